"""GPTQ's and AWQ's folders: their codes as they are, and the values that plain dequantization gives."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_gpt2, random_llama
from safetensors.torch import load_file, save_file

from quicksilver_ext import QuickSilverConfig, QuickSilverForCausalLM
from quicksilver_ext.architectures.loading import check_config, load_model, open_checkpoint
from quicksilver_ext.kernels import testing
from quicksilver_ext.weights import gptq
from quicksilver_ext.weights.checkpoint import CheckpointError

TINY: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 160, "intermediate_size": 208}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 64}
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
UP = "model.layers.0.mlp.up_proj"


def words_along_rows(codes: np.ndarray) -> np.ndarray:
    """GPTQ's: a word has eight codes of a column, uint32 [K / 8, N] of [K, N]."""
    words = np.zeros((codes.shape[0] // 8, codes.shape[1]), np.uint32)
    for row in range(codes.shape[0]):
        words[row // 8] |= codes[row].astype(np.uint32) << np.uint32(4 * (row % 8))
    return words


def words_along_columns(codes: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Eight codes of a row, uint32 [L, N / 8] of [L, N]."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for word in range(words.shape[1]):
        for place, column in enumerate(order):
            words[:, word] |= codes[:, 8 * word + column].astype(np.uint32) << np.uint32(4 * place)
    return words


def tensor_of(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.view(np.int32).copy())


def act_order(columns: int, groups: int, size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(np.arange(columns) // size)


def groups_in_another_order(columns: int, groups: int, size: int, rng: np.random.Generator) -> np.ndarray:
    full = columns // size  # a shorter last group stays where it is
    return np.append(rng.permutation(full), np.arange(full, groups)).repeat(size)[:columns]


def quantized(
    into: Path,
    source: Path,
    method: str = "gptq",
    group_size: int = 32,
    sym: bool = False,
    layout: str = "gptq",
    scales_type: torch.dtype = torch.float16,
    g_idx: Callable[..., np.ndarray] | None = None,
    only: str = "",
    head: bool = False,
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of a folder whose layers' matrices have random codes, and those matrices' values. Of the matrices with
    ``only`` in their names, ``g_idx`` says which column is of which group."""
    rng = np.random.default_rng(0)
    folder = Path(shutil.copytree(source, into / "model"))
    config = json.loads((folder / "config.json").read_text())
    settings: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": group_size}
    if method == "awq":
        settings |= {"version": "gemm", "zero_point": True, "modules_to_not_convert": ["lm_head"]}
    else:
        settings |= {"checkpoint_format": layout, "sym": sym, "desc_act": g_idx is not None}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    tensors, values = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.dim() != 2 or not (".layers." in name or ".h." in name or (head and "lm_head" in name)):
            tensors[name] = weight.half()
            continue
        inputs, outputs = weight.shape if ".h." in name else weight.shape[::-1]  # GPT-2 has them this way round
        size = inputs if group_size == -1 else group_size
        groups = -(-inputs // size)
        codes, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (groups, outputs))
        if sym:
            zeros[:] = 8
        scales = torch.from_numpy(rng.uniform(0.002, 0.015, (groups, outputs))).to(scales_type)
        index = np.arange(inputs) // size
        if g_idx is not None and only in name:
            index = g_idx(inputs, groups, size, rng)
        stem = name.removesuffix("weight")
        if method == "awq":
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            words, zero_words = words_along_columns(codes, order), words_along_columns(zeros, order)
        else:
            words, zero_words = words_along_rows(codes), words_along_columns(zeros)
            tensors[f"{stem}g_idx"] = torch.from_numpy(index.astype(np.int32))
            if layout == "gptq":
                zero_words -= np.uint32(0x11111111)
        tensors |= {f"{stem}qweight": tensor_of(words), f"{stem}qzeros": tensor_of(zero_words), f"{stem}scales": scales}
        steps = torch.from_numpy(codes - zeros[index]).float()
        values[name] = (steps * scales.float()[torch.from_numpy(index)]).t().contiguous()
    save_file(tensors, folder / "model.safetensors")
    return folder, values


def name_of(layer: int, part: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if part in 'qkvo' else 'mlp'}.{part}_proj.weight"


def of_codes(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a matrix's codes come to, and how far its offsets' rounding may move that."""
    checkpoint = open_checkpoint(folder)
    parts = checkpoint.four_bits(name)
    assert parts is not None
    codes, scale, offset = map(torch.cat, zip(*parts))
    assert codes.dtype == torch.uint8 and scale.dtype == offset.dtype == torch.float16
    scale, offset = (part.float().repeat_interleave(checkpoint.own_group, 1)[:, : codes.shape[1]]
                     for part in (scale, offset))  # fmt: skip
    return codes * scale + offset, offset.abs() * 2**-11


FORMATS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "gptq, symmetric": {"sym": True},
    "gptq, 64": {"group_size": 64, "layout": "gptq_v2"},
    "gptq, 128, symmetric": {"group_size": 128, "sym": True},
    "gptq, 128": {"group_size": 128, "layout": "gptq_v2"},
    "gptq, one group": {"group_size": -1},
    "gptq, 256": {"group_size": 256},
    "gptq, bf16": {"scales_type": torch.bfloat16},
    "gptq, groups in another order": {"g_idx": groups_in_another_order},
    "awq": {"method": "awq"},
    "awq, 64": {"method": "awq", "group_size": 64, "scales_type": torch.bfloat16},
    "awq, 128": {"method": "awq", "group_size": 128},
}


@pytest.mark.parametrize("chunk", [gptq.CHUNK_VALUES, 160 * 32])
@pytest.mark.parametrize("kind", FORMATS)
def test_values_are_those_of_plain_dequantization(
    kind: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block of rows, or in several."""
    monkeypatch.setattr(gptq, "CHUNK_VALUES", chunk)
    folder, values = quantized(tmp_path, random_llama(**TINY), **FORMATS[kind])
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names()) == set(open_checkpoint(random_llama(**TINY)).names())
    for name, want in values.items():
        assert checkpoint.shape(name) == tuple(want.shape)
        testing.assert_equal(checkpoint.tensor(name), want)
        testing.assert_equal(torch.cat([part.clone() for part in checkpoint.parts(name)]), want)
        got, rounding = of_codes(folder, name)
        assert ((got - want).abs() <= rounding * 1.0001).all()
        if FORMATS[kind].get("sym"):
            assert torch.equal(got, want)
    model = load_model(folder)
    size = FORMATS[kind].get("group_size", 32)
    assert (model.precision, model.group_size) == ("int4", size if size in (32, 64) else 128)
    for index, layer in enumerate(model.layers):
        for part in LINEARS:
            testing.assert_equal(getattr(layer, part).weight.dequantize(4), of_codes(folder, name_of(index, part))[0])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_offsets_are_exact_where_fp16_can_hold_them(method: str, tmp_path: Path) -> None:
    """Of every zero point, 0 to 15: scales of few bits."""
    folder, values = quantized(tmp_path, random_llama(**TINY), method)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, want in values.items():
        scales = name.replace("weight", "scales")
        few = torch.exp2(tensors[scales].float().log2().round()) * 1.1875  # 5 bits, and 4 of a zero point
        values[name] = want / tensors[scales].float().t().repeat_interleave(32, 1)[:, : want.shape[1]]
        values[name] = values[name].round() * few.t().repeat_interleave(32, 1)[:, : want.shape[1]]
        tensors[scales] = few.half()
    save_file(tensors, file)
    for name, want in values.items():
        assert torch.equal(of_codes(folder, name)[0], want)


def test_scales_in_fp32_are_rounded_once(tmp_path: Path) -> None:
    folder, values = quantized(tmp_path, random_llama(**TINY), scales_type=torch.float32)
    for name, want in values.items():
        got, rounding = of_codes(folder, name)
        assert ((got - want).abs() <= rounding * 1.0001 + want.abs() * 2**-11).all()


@pytest.mark.parametrize("kind", ["gptq", "gptq, 64", "gptq, one group", "awq, 128"])
def test_a_quantized_folder_runs_as_its_values_do(kind: str, tmp_path: Path) -> None:
    """Against transformers on the dequantized weights."""
    import transformers

    folder, values = quantized(tmp_path, random_llama(**TINY), **FORMATS[kind])
    reference = transformers.AutoModelForCausalLM.from_pretrained(random_llama(**TINY), dtype=torch.float32).eval()
    plain = {
        name: tensor.half().float() for name, tensor in load_file(random_llama(**TINY) / "model.safetensors").items()
    }
    reference.load_state_dict({**plain, **values})
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        want = reference(ids).logits
        text = reference.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    whole = QuickSilverForCausalLM.from_pretrained(folder, precision="fp32")
    assert (whole(ids).logits - want).abs().max() < 2e-4
    got = whole.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1).sequences
    assert torch.equal(got, text)
    four = QuickSilverForCausalLM.from_pretrained(folder)
    for backend in testing.backends():
        if backend != "reference":
            with testing.use_backend(backend):
                for rows in (ids, ids[:1, :1]):
                    error = four(rows).logits - want[: len(rows), : rows.shape[1]]
                    assert error.norm() < 0.08 * want[: len(rows), : rows.shape[1]].norm(), (
                        backend
                    )  # activations are quantized


def test_8_bits_of_4_are_the_same_numbers(tmp_path: Path) -> None:
    folder, _ = quantized(tmp_path, random_llama(**TINY))
    ids = torch.arange(3, 43).view(2, 20)
    want = QuickSilverForCausalLM.from_pretrained(folder)(ids).logits
    for precision in ("int8", "adaptive"):
        with pytest.warns(UserWarning, match=r"4-bit weights.* precision .*same.*requantize"):
            model = QuickSilverForCausalLM.from_pretrained(folder, precision=precision)
        testing.assert_equal(model(ids).logits, want)


def test_requantized_it_is_on_our_grid(tmp_path: Path) -> None:
    folder, values = quantized(tmp_path, random_llama(**TINY), "awq", 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(folder, requantize=True, statistics=False)
    assert (model.precision, model.group_size) == ("int8", 64)
    weight, want = model.layers[0].up.weight, values[f"{UP}.weight"]
    assert (weight.dequantize(8) - want).norm() < 0.015 * want.norm()


def test_another_group_size_names_the_folder_s(tmp_path: Path) -> None:
    folder, _ = quantized(tmp_path, random_llama(**TINY), "awq", 128)
    with pytest.raises(ValueError, match=r"group_size: got 64, but .*codes of its own, in groups of 128; .*requantize"):
        load_model(folder, group_size=64)
    assert load_model(folder, group_size=128).group_size == 128
    assert load_model(folder, group_size=64, requantize=True).group_size == 64


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    folder, _ = quantized(tmp_path, random_llama(**TINY), group_size=128)
    ids = torch.arange(3, 43).view(2, 20)
    lm = QuickSilverForCausalLM.from_pretrained(folder)
    lm.save_pretrained(tmp_path / "saved")
    testing.assert_equal(QuickSilverForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, lm(ids).logits)


# --- matrices that can't keep their codes -----------------------------------------------------------------------------


def test_act_order_keeps_the_values_on_our_grid(tmp_path: Path) -> None:
    folder, values = quantized(tmp_path, random_llama(**TINY), g_idx=act_order)
    checkpoint = open_checkpoint(folder)
    for name, want in values.items():
        testing.assert_equal(checkpoint.tensor(name), want)
        assert checkpoint.four_bits(name) is None
    with pytest.warns(UserWarning, match=r"14 of its 4-bit matrices .*act-order.* at precision int8") as seen:
        lm = QuickSilverForCausalLM.from_pretrained(folder, statistics=False)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert (lm.model.precision, lm.model.group_size) == ("int8", 64)
    for index, layer in enumerate(lm.model.layers):
        for part in LINEARS:
            want = values[name_of(index, part)]
            assert (getattr(layer, part).weight.dequantize(8) - want).norm() < 0.015 * want.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = load_model(folder, "fp32")
        load_model(folder, requantize=True)
    testing.assert_equal(whole.layers[0].up.weight, values[f"{UP}.weight"])


def test_matrices_in_order_keep_their_codes_beside_act_order(tmp_path: Path) -> None:
    folder, values = quantized(tmp_path, random_llama(**TINY), g_idx=act_order, only="down_proj", group_size=64)
    with pytest.warns(UserWarning, match=r"2 of its 4-bit matrices .* with 8 bits"):
        model = load_model(folder)
    assert (model.precision, model.group_size) == ("int4", 64)
    up, down, want = model.layers[0].up.weight, model.layers[0].down.weight, values[name_of(0, "down")]
    assert up.lo is None and down.lo is not None
    testing.assert_equal(up.dequantize(4), of_codes(folder, f"{UP}.weight")[0])
    assert (down.dequantize(8) - want).norm() < 0.015 * want.norm()


def test_gpt2_s_transposed_matrices(tmp_path: Path) -> None:
    source = random_gpt2(n_layer=2)
    folder, values = quantized(tmp_path, source, group_size=64)
    whole = load_model(folder, "fp32")
    name, d = "transformer.h.1.attn.c_attn.weight", whole.spec.hidden_size
    assert open_checkpoint(folder).shape(name) == (d, 3 * d)
    fused = torch.cat([whole.layers[1].q.weight, whole.layers[1].k.weight, whole.layers[1].v.weight])
    testing.assert_equal(fused, values[name])
    with pytest.warns(UserWarning, match=r"8 of its 4-bit matrices can't keep their codes"):
        lm = QuickSilverForCausalLM.from_pretrained(folder)
    ids = torch.arange(3, 43).view(2, 20)
    want = QuickSilverForCausalLM(whole, QuickSilverConfig())(ids).logits
    assert (lm(ids).logits - want).norm() < 0.05 * want.norm()


def test_a_quantized_head_and_shards(tmp_path: Path) -> None:
    """The head always has 8 bits; a matrix's parts may lie in several files."""
    folder, values = quantized(tmp_path, random_llama(**TINY), "awq", head=True)
    tensors = load_file(folder / "model.safetensors")
    shards = {f"model-{number:05}-of-00003.safetensors": list(tensors)[number - 1 :: 3] for number in (1, 2, 3)}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    (folder / "model.safetensors").unlink()
    model, want = load_model(folder), values["lm_head.weight"]
    assert (model.head.weight.dequantize(8) - want).norm() < 0.015 * want.norm()
    testing.assert_equal(model.layers[0].up.weight.dequantize(4), of_codes(folder, f"{UP}.weight")[0])


# --- what is refused --------------------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes', wanted one of 'gptq', 'awq'"),
    "no method": ({"quant_method": None}, "quant_method is nothing, wanted one of 'gptq', 'awq'"),
    "bits": ({"bits": 8}, "bits is 8, wanted 4"),
    "no bits": ({"bits": None}, "bits is nothing, wanted 4"),
    "layout": ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', wanted one of 'gptq', 'gptq_v2'"),
    "layout by its new name": ({"checkpoint_format": None, "format": "bitblas"}, "format is 'bitblas', wanted"),
    "layout as a list": ({"checkpoint_format": ["gptq"]}, "checkpoint_format is "),
    "marlin": ({"is_marlin_format": True}, "is_marlin_format is True, wanted false"),
    "AWQ's layout": (
        {"quant_method": "awq", "checkpoint_format": None, "version": "gemv"},
        "version is 'gemv', wanted one of 'gemm'",
    ),
    "group size": ({"group_size": 48}, "group_size is 48, wanted 32, 64, a multiple of 128, or -1"),
    "no group size": ({"group_size": None}, "group_size is nothing, wanted"),
    "group size as a fraction": ({"group_size": 64.0}, "group_size is 64.0, wanted"),
    "group size as text": ({"group_size": "32"}, "group_size is '32', wanted"),
    "act-order": ({"desc_act": "yes"}, "desc_act is 'yes', wanted true or false"),
    "modules": ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic is .*wanted no settings for single modules"),
}


@pytest.mark.parametrize("which", SETTINGS)
def test_what_can_not_be_read_is_named(which: str, tmp_path: Path) -> None:
    """Before weights are fetched."""
    changes, message = SETTINGS[which]
    folder, _ = quantized(tmp_path, random_llama(**TINY))
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))
    for refuse in (load_model, lambda folder: check_config(folder / "config.json")):
        with pytest.raises(CheckpointError, match=f"quantization_config: {message}") as refused:
            refuse(folder)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("changes", [{"dynamic": {"-:.*lm_head.*": {}}}, {"checkpoint_format": "GPTQ"}, {"sym": None}])
def test_what_makes_no_difference_is_read(changes: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = quantized(tmp_path, random_llama(**TINY))
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))
    assert load_model(folder).precision == "int4"


DAMAGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no zeros": ("gptq", lambda t: t.pop(f"{UP}.qzeros"), rf"has no tensor {UP}\.qzeros.*fetch"),
    "no scales": ("awq", lambda t: t.pop(f"{UP}.scales"), rf"has no tensor {UP}\.scales"),
    "no codes": ("gptq", lambda t: t.pop(f"{UP}.qweight"), rf"has no tensor {UP}\.weight; it is incomplete"),
    "scales of other groups": (
        "gptq",
        lambda t: t.update({f"{UP}.scales": torch.ones(3, 208)}),
        rf"{UP}\.scales has shape \[3, 208\], but qweight and group_size 32 make it \[5, 208\].*fetch",
    ),
    "zeros of other groups": (
        "awq",
        lambda t: t.update({f"{UP}.qzeros": torch.ones(5, 25, dtype=torch.int32)}),
        rf"{UP}\.qzeros has shape \[5, 25\], but .* make it \[5, 26\]",
    ),
    "another model's": (
        "gptq",
        lambda t: t.update({f"{UP}.{part}": t[f"model.layers.0.mlp.down_proj.{part}"].clone() for part in PARTS}),
        r"up_proj\.weight has shape \[160, 208\], but the config makes it \[208, 160\]",
    ),
    "codes as bytes": (
        "gptq",
        lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].to(torch.int8)}),
        r"qweight is of type I8, wanted I32",
    ),
    "codes in a line": (
        "awq",
        lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].flatten()}),
        r"qweight has shape \[4160\], wanted a matrix",
    ),
    "scales as integers": (
        "awq",
        lambda t: t.update({f"{UP}.scales": torch.ones(5, 208, dtype=torch.int32)}),
        r"scales is of type I32, wanted F64 or F32",
    ),
    "a group that isn't there": (
        "gptq",
        lambda t: t[f"{UP}.g_idx"].__setitem__(7, 5),
        r"g_idx names group 5, but .* 5",
    ),
    "a group below 0": ("gptq", lambda t: t[f"{UP}.g_idx"].__setitem__(7, -1), r"g_idx names group -1"),
    "short g_idx": (
        "gptq",
        lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"][1:].clone()}),
        r"g_idx has shape \[159\]",
    ),
    "NaN scales": (
        "gptq",
        lambda t: t[f"{UP}.scales"][3].fill_(torch.nan),
        rf"tensor {UP}\.weight: its scales hold NaN",
    ),
    "infinite scales": (
        "awq",
        lambda t: t[f"{UP}.scales"][3].fill_(torch.inf),
        r"up_proj\.weight: its scales hold NaN",
    ),
    "scales below fp16": (
        "gptq",
        lambda t: t.update({f"{UP}.scales": torch.full((5, 208), 1e-7)}),
        rf"{UP}\.scales: its magnitudes, 1e-07 at most, are too small for fp16.*bf16 or fp32",
    ),
    "twice": ("gptq", lambda t: t.update({f"{UP}.weight": torch.ones(208, 160)}), rf"has both {UP}\.weight and"),
}
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@pytest.mark.parametrize("which", DAMAGES)
def test_damaged_matrices_are_named(which: str, tmp_path: Path) -> None:
    method, damage, message = DAMAGES[which]
    folder, _ = quantized(tmp_path, random_llama(**TINY), method)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message) as refused:
        load_model(folder)
    assert "\n" not in str(refused.value)


def test_act_order_wants_its_g_idx(tmp_path: Path) -> None:
    """Without it, the columns' groups can't be known; without act-order they can."""
    folder, values = quantized(tmp_path, random_llama(**TINY))
    file, config = folder / "model.safetensors", folder / "config.json"
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.endswith("g_idx")}, file)
    testing.assert_equal(open_checkpoint(folder).tensor(f"{UP}.weight"), values[f"{UP}.weight"])
    config.write_text(config.read_text().replace('"desc_act": false', '"desc_act": true'))
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.0\..*\.g_idx"):
        load_model(folder)
