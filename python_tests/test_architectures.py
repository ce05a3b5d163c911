"""Models as they are loaded: equal to transformers' in fp32, packed as they should be, saved and loaded to the bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TRAINED_GPT2, dense_logits, random_gpt2, random_llama, write_gguf
from safetensors.torch import load_file, save_file
from torch import Tensor

from quicksilver_ext.architectures.loading import load_model
from quicksilver_ext.weights import gguf as gguf_file
from quicksilver_ext.weights import packed
from quicksilver_ext.weights.checkpoint import CheckpointError
from quicksilver_ext.weights.matryoshka import MatryoshkaWeight, pack_matryoshka
from quicksilver_ext.weights.model import PRECISIONS, Linear, Model
from quicksilver_ext.weights.packed import save_packed

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "max_position_embeddings": 256}
LLAMAS: dict[str, dict[str, Any]] = {
    "one KV head, untied": {},
    "all KV heads, tied": {"num_key_value_heads": 5, "tie_word_embeddings": True, "vocab_size": 517},
    "head size of its own": {**SMALL, "head_dim": 48},
    "biases": {**SMALL, "attention_bias": True, "mlp_bias": True},
    "epsilon and theta": {**SMALL, "rms_norm_eps": 0.3, "rope_parameters": {"rope_theta": 200.0}},
}
GPT2S: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"n_layer": 2, "tie_word_embeddings": False},
    "MLP size and epsilon": {"n_layer": 2, "n_inner": 200, "layer_norm_epsilon": 0.2},
    "unscaled attention": {"n_layer": 2, "scale_attn_weights": False},
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with all fields": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
    },
    "yarn with an attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(16)],
        "long_factor": [1.0 + 0.5 * i for i in range(16)],
        "original_max_position_embeddings": 64,
    },
    "longrope with a factor": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
        "factor": 3.0,
        "original_max_position_embeddings": 300,
    },
}


def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompt(count: int = 48, vocabulary: int = 500) -> Tensor:
    return torch.randint(3, vocabulary, (count,), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_equals_transformers(folder: Path, tokens: Tensor | None = None) -> None:
    tokens = prompt() if tokens is None else tokens
    want = reference(folder)(tokens[None]).logits[0]
    got = dense_logits(load_model(folder, "fp32"), tokens)
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("case", LLAMAS)
def test_llama_equals_transformers(case: str) -> None:
    assert_equals_transformers(random_llama(1, **LLAMAS[case]))


@pytest.mark.parametrize("case", GPT2S)
def test_gpt2_equals_transformers(case: str) -> None:
    assert_equals_transformers(random_gpt2(1, **GPT2S[case]))


def test_the_trained_gpt2_equals_transformers() -> None:
    assert_equals_transformers(TRAINED_GPT2)


@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_rotary_tables_are_transformers(rope: str) -> None:
    """Row p of the tables is what a decoding step at position p uses."""
    folder = random_llama(2, **SMALL, rope_parameters=ROPES[rope])
    model, rotary = load_model(folder, "fp32"), reference(folder).model.rotary_emb
    assert model.rotary_cos is not None and model.rotary_sin is not None
    assert model.rotary_cos.shape == model.rotary_sin.shape == (256, 16)
    for position in (0, 1, 63, 64, 65, 200, 255):
        cosine, sine = rotary(torch.zeros(1), torch.tensor([[position]]))
        assert torch.allclose(model.rotary_cos[position], cosine[0, 0, :16], atol=2e-6)
        assert torch.allclose(model.rotary_sin[position], sine[0, 0, :16], atol=2e-6)
    assert_equals_transformers(folder, prompt(60))  # within the original context, where one pass has the same tables


def test_older_forms_of_the_rotary_config_are_understood(tmp_path: Path) -> None:
    folder = random_llama(2, **SMALL, rope_parameters={**ROPES["linear"], "rope_theta": 5000.0})
    want = load_model(folder).rotary_cos
    older = Path(shutil.copytree(folder, tmp_path / "older"))
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    for scaling in ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "type": "mrope", "factor": 4}):
        changes = {"rope_theta": 5000.0, "rope_scaling": scaling}
        (older / "config.json").write_text(json.dumps(config | changes))
        got = load_model(older).rotary_cos
        assert want is not None and got is not None
        assert torch.equal(got, want)
    # Outside of the scaling's own fields, the original length has priority.
    scaling = {**ROPES["llama3"], "original_max_position_embeddings": 9}
    changes = {"rope_theta": None, "rope_scaling": scaling, "original_max_position_embeddings": 64}
    (older / "config.json").write_text(json.dumps(config | changes))
    plain = load_model(random_llama(2, **SMALL, rope_parameters=ROPES["llama3"])).rotary_cos
    got = load_model(older).rotary_cos
    assert plain is not None and got is not None
    assert torch.equal(got, plain)


def test_a_gguf_file_has_its_rotary_scaling_as_divisors() -> None:
    """llama3 as one tensor that divides the frequencies, longrope as two."""
    for rope in ("llama3", "longrope with a factor"):
        folder = random_llama(2, **SMALL, rope_parameters=ROPES[rope])
        want = reference(folder).model.rotary_emb
        inverse = 1.0 / 10000.0 ** (torch.arange(0, 32, 2) / 32)
        if rope == "llama3":
            vectors = {"rope_freqs.weight": inverse / want.inv_freq}
            metadata: dict[str, Any] = {}
        else:
            vectors = {
                f"rope_factors_{part}.weight": torch.tensor(ROPES[rope][f"{part}_factor"]) for part in ("short", "long")
            }
            metadata = {
                "llama.rope.scaling.original_context_length": 300,
                "llama.rope.scaling.attn_factor": want.attention_scaling,
            }
        got, expected = load_model(write_gguf(folder, "F32", metadata, vectors)), load_model(folder)
        for table in ("rotary_cos", "rotary_sin"):
            assert torch.allclose(getattr(got, table), getattr(expected, table), atol=3e-5)


@pytest.mark.parametrize("make", [random_llama, random_gpt2])
def test_gguf_models_equal_their_folders(make: Any) -> None:
    folder = make()
    from_folder, from_gguf = load_model(folder), load_model(write_gguf(folder))
    for (name, want), (_, got) in zip(tensors(from_folder), tensors(from_gguf)):
        assert torch.equal(got, want), name
    assert dataclasses.replace(from_gguf.spec, name="") == dataclasses.replace(from_folder.spec, name="")


def test_gpt2_without_its_prefix_is_read(tmp_path: Path) -> None:
    folder = random_gpt2(1, n_layer=2)
    shutil.copy(folder / "config.json", tmp_path)
    stored = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): value for name, value in stored.items()}, tmp_path / "model.safetensors"
    )
    for (name, want), (_, got) in zip(tensors(load_model(folder)), tensors(load_model(tmp_path))):
        assert torch.equal(got, want), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention is True, wanted false"),
        ({"activation_function": "mish"}, "activation_function is 'mish', wanted one of 'gelu_new'"),
        ({"n_head": 7}, "n_head is 7, wanted a divisor of n_embd, 176"),
        ({"n_layer": 0}, "n_layer is 0, wanted an integer from 1"),
        ({"n_positions": 600}, r"wpe\.weight has shape \[512, 176\], but the config makes it \[600, 176\]"),
    ],
)
def test_other_gpt2s_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = Path(shutil.copytree(random_gpt2(1, n_layer=2), tmp_path / "gpt2"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize(("precision", "group_size"), [("int3", 64), ("int8", 48), (8, 64)])
def test_arguments_are_checked_first(precision: Any, group_size: int) -> None:
    with pytest.raises(ValueError, match=r"(precision|group_size): got"):
        load_model("/nonexistent", precision, group_size)


# --- packing ----------------------------------------------------------------------------------------------------------


def linears(model: Model) -> Iterator[tuple[str, Linear]]:
    for index, layer in enumerate(model.layers):
        for field in dataclasses.fields(layer):
            part = getattr(layer, field.name)
            if isinstance(part, Linear):
                yield f"layers.{index}.{field.name}", part
    yield "head", model.head


def tensors(model: Model) -> list[tuple[str, Tensor]]:
    return list(packed._tensors(model).items())


def test_precisions_say_what_is_kept() -> None:
    for make in (random_llama, random_gpt2):
        models = {precision: load_model(make(1), precision) for precision in PRECISIONS}
        dense = dict(linears(models["fp32"]))
        for precision, model in models.items():
            assert model.precision == precision
            expected = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, torch.float16)
            assert model.embedding.dtype == expected
            for norm in (model.final_norm, model.layers[0].attention_norm):
                assert norm.weight.dtype == torch.float32
            for name, linear in linears(model):
                weight = linear.weight
                assert (linear.out_features, linear.in_features) == tuple(dense[name].weight.shape)
                assert linear.bias is None or linear.bias.dtype == torch.float32
                if isinstance(weight, Tensor):
                    assert weight.dtype == expected
                    assert weight.is_contiguous()
                else:
                    assert precision in ("int8", "int4", "adaptive")
                    assert (weight.lo is None) == (precision == "int4" and name != "head")


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_packed_planes_are_those_of_the_weights(group_size: int) -> None:
    for make in (random_llama, random_gpt2):
        dense, model = load_model(make(1), "fp32"), load_model(make(1), "int8", group_size, statistics=False)
        for (name, exact), (_, linear) in zip(linears(dense), linears(model)):
            want, got = pack_matryoshka(exact.weight, group_size), linear.weight
            assert isinstance(got, MatryoshkaWeight)
            assert torch.equal(got.hi, want.hi), name
            assert got.lo is not None and want.lo is not None
            assert torch.equal(got.lo, want.lo), name
            assert torch.equal(got.scale, want.scale), name


@torch.no_grad()
def test_packed_models_stay_close_to_fp32() -> None:
    for folder in (random_llama(1), random_gpt2(1), TRAINED_GPT2):
        tokens = prompt()
        want = dense_logits(load_model(folder, "fp32"), tokens)
        for precision, bits, bound in (("bf16", 8, 0.02), ("int8", 8, 0.05), ("int4", 4, 0.5)):
            got = dense_logits(load_model(folder, precision), tokens, bits)
            assert (got - want).norm() < bound * want.norm(), (folder, precision)


def test_planes_lie_in_one_arena() -> None:
    model = load_model(random_llama(1))
    weights = [linear.weight for _, linear in linears(model)]
    spans = []
    for weight in weights:
        assert isinstance(weight, MatryoshkaWeight) and weight.lo is not None
        for part in (weight.hi, weight.lo, weight.scale):
            assert part.is_contiguous()
            assert part.data_ptr() % 64 == 0
            spans.append((part.data_ptr(), part.data_ptr() + part.nbytes))
        assert (weight.lo.data_ptr() - weight.hi.data_ptr()) % 8192 == 4096  # an odd number of pages
    assert len({weight.hi.untyped_storage().data_ptr() for weight in weights}) == 1  # type: ignore[union-attr]
    spans.sort()
    assert spans[0][0] % (2 << 20) == 0
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] - spans[0][0] < 1.02 * sum(end - start for start, end in spans) + 12288 * len(weights)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="mappings are read from Linux's /proc")
def test_the_arena_asks_for_huge_pages() -> None:
    weight = load_model(random_llama(1)).head.weight
    assert isinstance(weight, MatryoshkaWeight)
    flags, inside = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (span := line.split()[0]).count("-") == 1 and not line.startswith("VmFlags"):
            start, end = (int(bound, 16) for bound in span.split("-"))
            inside = start <= weight.hi.data_ptr() < end
        elif inside and line.startswith("VmFlags"):
            flags = line
    assert "hg" in flags.split()
    assert "sh" not in flags.split()  # shared memory gets none


def test_weights_of_other_dtypes_give_the_same_planes(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = random_llama(1, **SMALL)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32).save_pretrained(tmp_path / "fp32")
    half, full = load_model(tmp_path / "bf16"), load_model(tmp_path / "fp32")
    for (name, want), (_, got) in zip(tensors(full), tensors(half)):
        assert torch.equal(got, want), name


MEASURE = """
import sys
from itertools import pairwise
from pathlib import Path
import torch
from quicksilver_ext.architectures.loading import load_model
from quicksilver_ext.weights import packed

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

load_model(sys.argv[1])  # what it imports and starts isn't the model's
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS")
model = load_model(sys.argv[2])
print(status("VmHWM") - before, sum(tensor.nbytes for tensor in packed._tensors(model).values()))
"""


@pytest.mark.parametrize("make", [random_llama, random_gpt2])
def test_matrices_read_by_parts_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    file = write_gguf(make(1, **({"intermediate_size": 104} if make is random_llama else {})))
    want = load_model(file, "int8", 32)
    for name in ("KERNEL_VALUES", "NUMPY_VALUES"):
        monkeypatch.setattr(gguf_file, name, 1)  # 16 rows at a time
    got = load_model(file, "int8", 32)
    for (name, one), (_, other) in zip(tensors(want), tensors(got), strict=True):
        assert torch.equal(one, other), name


def test_a_matrix_read_by_parts_is_judged_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are too small for fp16 scales are fine beside ordinary ones, wherever a part begins."""
    monkeypatch.setattr(gguf_file, "NUMPY_VALUES", 1)  # 16 rows at a time
    folder = tmp_path / "llama"
    shutil.copytree(random_llama(1), folder)
    tensors = load_file(folder / "model.safetensors")
    for rows, refused in ((slice(0, 40), False), (slice(0, None), True)):
        tensors["lm_head.weight"][rows] *= 1e-7
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        file = write_gguf(folder)
        if refused:
            with pytest.raises(CheckpointError, match=r"lm_head\.weight: its magnitudes, .* too small"):
                load_model(file)
        else:
            assert load_model(file).head.weight.dequantize()[:32].abs().max() == 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_needs_little_more_than_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    """Peak resident memory, mapped file pages included, of loading a Llama of 110 million parameters."""
    tiny = random_llama(1, **SMALL)
    config = json.loads((tiny / "config.json").read_text())
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32000}
    sizes |= {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    shapes = {"q_proj": (768, 768), "k_proj": (256, 768), "v_proj": (256, 768), "o_proj": (768, 768)}
    shapes |= {"gate_proj": (2048, 768), "up_proj": (2048, 768), "down_proj": (768, 2048)}
    random = {part: torch.randn(shape).to(dtype) for part, shape in shapes.items()}
    stored = {"model.embed_tokens.weight": torch.randn(32000, 768).to(dtype), "model.norm.weight": torch.ones(768)}
    for layer in range(12):
        for part, value in random.items():
            block = "self_attn" if part in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            stored[f"model.layers.{layer}.{block}.{part}.weight"] = value.clone()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            stored[f"model.layers.{layer}.{norm}.weight"] = torch.ones(768)
    save_file(stored, tmp_path / "model.safetensors")
    largest = max(tensor.nbytes for tensor in stored.values())
    command = [sys.executable, "-c", MEASURE, str(tiny), str(tmp_path)]
    grown, model = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    print(f"peak {grown / 2**20:.0f} MiB, model {model / 2**20:.0f} MiB, largest tensor {largest / 2**20:.0f} MiB")
    # For statistics a layer in fp32: as it is read, as it is, and migrated; and what runs through it, or ran.
    layer = 4 * sum(value.numel() for value in random.values())
    assert grown < 1.3 * model + largest + 6 * layer + (64 << 20)


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("make", [random_llama, random_gpt2])
def test_saved_models_load_to_the_bit(tmp_path: Path, make: Any, precision: str) -> None:
    model = load_model(make(1), precision, 32)
    save_packed(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", precision, 32)
    assert again.spec == model.spec
    assert (again.precision, again.group_size) == (precision, 32)
    assert (again.final_norm.kind, again.final_norm.eps) == (model.final_norm.kind, model.final_norm.eps)
    assert dict(tensors(again)).keys() == dict(tensors(model)).keys()
    for (name, want), (_, got) in zip(tensors(model), tensors(again)):
        assert got.dtype == want.dtype
        assert torch.equal(got, want), name
    spec, weights = sorted((tmp_path / "saved").iterdir(), key=lambda path: path.suffix)
    assert spec.name == packed.SPEC_FILE and weights.name == json.loads(spec.read_text())["weights"]


def test_a_model_may_be_saved_over_itself(tmp_path: Path) -> None:
    save_packed(load_model(random_llama(1, **SMALL)), tmp_path)
    model = load_model(tmp_path)
    save_packed(model, tmp_path)
    for (name, want), (_, got) in zip(tensors(model), tensors(load_model(tmp_path))):
        assert torch.equal(got, want), name


def test_both_planes_serve_every_packed_precision(tmp_path: Path) -> None:
    folder = random_gpt2(1, n_layer=2)
    save_packed(load_model(folder, "int8"), tmp_path)
    for precision in ("adaptive", "int4"):
        want, got = load_model(folder, precision), load_model(tmp_path, precision)
        assert dict(tensors(want)).keys() == dict(tensors(got)).keys()
        for (name, expected), (_, tensor) in zip(tensors(want), tensors(got)):
            assert torch.equal(tensor, expected), name


def test_what_a_saved_model_can_not_give_is_said(tmp_path: Path) -> None:
    for precision in ("int8", "int4", "fp32"):
        save_packed(load_model(random_gpt2(1, n_layer=2), precision), tmp_path / precision)
    with pytest.raises(CheckpointError, match="saved at precision int8; load it as int8 or adaptive or int4"):
        load_model(tmp_path / "int8", "fp32")
    with pytest.raises(CheckpointError, match="saved at precision int4; load it as int4"):
        load_model(tmp_path / "int4", "int8")
    with pytest.raises(CheckpointError, match="saved at precision fp32; load it as fp32"):
        load_model(tmp_path / "fp32", "int8")
    with pytest.raises(CheckpointError, match="packed in groups of 64; pass that as group_size"):
        load_model(tmp_path / "int8", "int8", 32)


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(random_llama(1, **SMALL))

    def fail(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(packed, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_packed(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_saved_models_are_refused(tmp_path: Path) -> None:
    save_packed(load_model(random_llama(1, **SMALL)), tmp_path)
    spec = tmp_path / packed.SPEC_FILE
    weights = tmp_path / json.loads(spec.read_text())["weights"]
    good_spec, good_weights = spec.read_text(), weights.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path)
        spec.write_text(good_spec)
        weights.write_bytes(good_weights)

    spec.write_text("{")
    refused("can't be read as JSON")
    for key, value, message in (
        ("version", 5, "version is 5, wanted an integer from 1 to 4"),
        ("version", 3, r"was packed in an earlier format \(version 3, wanted 4\); load .* save_pretrained again"),
        ("format", "x", "format is 'x'"),
        ("precision", "int7", "precision is 'int7'"),
        ("spec", None, "spec is nothing, wanted an object"),
        ("norm", {"kind": "rms"}, "norm: eps is nothing"),
    ):
        spec.write_text(json.dumps(json.loads(good_spec) | {key: value}))
        refused(message)
    changed = json.loads(good_spec)
    changed["spec"]["num_layers"] = 3
    spec.write_text(json.dumps(changed))
    refused(r"has no tensor layers\.2\.")
    changed["spec"] |= {"num_layers": 2, "hidden_size": 320}
    spec.write_text(json.dumps(changed))
    refused(r"tensor embedding has shape \[1003, 160\], but .* makes it \[1003, 320\]")
    weights.write_bytes(good_weights[: len(good_weights) // 2])
    refused("can't be read as safetensors")
    stored = load_file(weights)
    save_file({**stored, "layers.0.q.hi": stored["layers.0.q.hi"].to(torch.int8)}, weights)
    refused(r"layers\.0\.q\.hi is torch\.int8, wanted torch\.uint8")
    weights.unlink()
    refused("can't be read as safetensors")
    assert load_model(tmp_path).spec.num_layers == 2


def test_a_saved_model_may_bring_its_tokenizer(tmp_path: Path) -> None:
    from quicksilver_ext.weights.checkpoint import load_tokenizer

    save_packed(load_model(TRAINED_GPT2), tmp_path)
    tokenizer = load_tokenizer(TRAINED_GPT2)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("The value").input_ids == tokenizer("The value").input_ids
