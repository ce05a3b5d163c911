"""Model files as users have them: heads tied or not, names, shards, parts, special tokens, numbers out of range."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_gpt2, random_llama, write_gguf
from safetensors.torch import load_file, save_file
from torch import Tensor

from quicksilver_ext import QuickSilverForCausalLM
from quicksilver_ext.architectures.loading import load_model
from quicksilver_ext.weights.checkpoint import CheckpointError

SMALL = {"num_hidden_layers": 2, "vocab_size": 503}
IDS = torch.arange(3, 40)[None]


def logits(folder: Path, **options: Any) -> Tensor:
    return QuickSilverForCausalLM.from_pretrained(folder, precision="fp32", **options)(IDS).logits


@torch.no_grad()
def transformers_logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).norm() < 2e-4 * want.norm())


def changed(
    source: Path, folder: Path, config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None
) -> Path:
    """A copy with fields of its config changed (None: left out), and with other tensors."""
    folder.mkdir(parents=True)
    values = json.loads((source / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps({key: v for key, v in values.items() if v is not None}))
    if tensors is None:
        shutil.copy(source / "model.safetensors", folder)
    else:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# --- heads and names --------------------------------------------------------------------------------------------------

EMBEDDING = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}


@pytest.mark.parametrize("family", EMBEDDING)
@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("stored", ["embedding", "head", "both", "both the same"])
def test_heads(tmp_path: Path, family: str, said: bool | None, stored: str) -> None:
    """A head of its own in the file wins over a config that says tied; one tensor serves both where it is the only one,
    if the config (or its default: tied for GPT-2 alone) says so."""
    make = random_llama if family == "llama" else random_gpt2
    source = make(3, tie_word_embeddings=False, **(SMALL if family == "llama" else {"n_layer": 2, "vocab_size": 503}))
    tensors, name = load_file(source / "model.safetensors"), EMBEDDING[family]
    head, embedding = tensors.pop("lm_head.weight"), tensors.pop(name)
    given = {
        "embedding": {name: embedding},
        "head": {"lm_head.weight": head},
        "both": {name: embedding, "lm_head.weight": head},
        "both the same": {name: embedding, "lm_head.weight": embedding.clone()},
    }[stored]
    folder = changed(source, tmp_path / "x", {"tie_word_embeddings": said}, tensors | given)
    tied = said if said is not None else family == "gpt2"
    if len(given) == 1 and not tied:
        with pytest.raises(CheckpointError, match=r"has no tensor (lm_head|.*embed_tokens|.*wte)\.weight"):
            load_model(folder, "fp32")
        return
    only = next(iter(given.values()))
    plain = changed(
        source,
        tmp_path / "plain",
        {"tie_word_embeddings": False},
        tensors | {name: given.get(name, only), "lm_head.weight": given.get("lm_head.weight", only).clone()},
    )
    assert close(logits(folder), transformers_logits(plain))
    for precision in ("int8", "int4"):
        got, want = (load_model(each, precision) for each in (folder, plain))
        assert torch.equal(got.head.weight.hi, want.head.weight.hi)
        assert torch.equal(got.embedding, want.embedding)


@pytest.mark.parametrize("family", EMBEDDING)
@pytest.mark.parametrize("form", ["bare", "full"])
def test_names_with_and_without_their_root(tmp_path: Path, family: str, form: str) -> None:
    source = random_llama(3, **SMALL) if family == "llama" else random_gpt2(3, n_layer=2)
    root = "model." if family == "llama" else "transformer."
    tensors = {
        (name.removeprefix(root) if form == "bare" or name == "lm_head.weight" else root + name.removeprefix(root)): t
        for name, t in load_file(source / "model.safetensors").items()
    }
    assert torch.equal(logits(changed(source, tmp_path / "x", tensors=tensors)), logits(source))


def test_rope_scaling_wins_over_rope_parameters(tmp_path: Path) -> None:
    source = random_llama(3, **SMALL)
    scaling = {"rope_type": "linear", "factor": 4.0}
    folder = changed(source, tmp_path / "x", {"rope_scaling": scaling})
    assert "rope_parameters" in json.loads((folder / "config.json").read_text())
    assert close(logits(folder), transformers_logits(folder))
    assert not close(logits(folder), logits(source))


# --- several files ----------------------------------------------------------------------------------------------------


def shards(source: Path, folder: Path, count: int) -> Path:
    tensors = load_file(source / "model.safetensors")
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    for i in range(count):
        part = {name: tensors[name] for name in sorted(tensors)[i::count]}
        save_file(part, folder / f"model-{i + 1:05}-of-{count:05}.safetensors")
    return folder


def test_shards_without_an_index(tmp_path: Path) -> None:
    source = random_llama(3, **SMALL)
    folder = shards(source, tmp_path / "x", 3)
    assert torch.equal(logits(folder), logits(source))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003\.safetensors, and there is no"):
        load_model(folder)


def split_gguf(whole: Path, folder: Path, tensors: int) -> list[Path]:
    """The file in parts, as llama.cpp's splitter writes them: all metadata in the first."""
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(str(whole))
    groups = [reader.tensors[i : i + tensors] for i in range(0, len(reader.tensors), tensors)]
    folder.mkdir()
    paths = []
    for number, group in enumerate(groups):
        paths.append(folder / f"m-{number + 1:05}-of-{len(groups):05}.gguf")
        writer = GGUFWriter(str(paths[-1]), "llama" if number == 0 else "")
        if number == 0:
            for field in reader.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    writer.add_key_value(field.name, field.contents(), field.types[0], *field.types[1:2])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(groups))
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in group:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_split_gguf_files_are_read_whole(tmp_path: Path) -> None:
    whole = write_gguf(random_llama(3, **SMALL))
    parts = split_gguf(whole, tmp_path / "x", 6)
    assert len(parts) > 2
    for part in parts:  # whichever the user names
        assert torch.equal(logits(part), logits(whole))
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks.*{parts[1].name}|{parts[1].name}"):
        load_model(parts[0])
    lone = Path(shutil.copy(parts[0], tmp_path / "model.gguf"))
    with pytest.raises(CheckpointError, match=f"is one of {len(parts)} parts, but its name doesn't say which"):
        load_model(lone)


def test_gguf_files_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    whole = write_gguf(random_llama(3, **SMALL))
    for name in ("blob", "model.bin", "sha256-0123abc"):
        assert torch.equal(logits(Path(shutil.copy(whole, tmp_path / name))), logits(whole))


@pytest.mark.parametrize("load", [load_model, QuickSilverForCausalLM.from_pretrained])
def test_a_config_is_fetched_before_gigabytes(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[list[str]] = []
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')

    def snapshot_download(hub_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="its model_type is 'bert'; can be read: gpt2, llama"):
        load("some-one/some-bert")
    assert asked == [["config.json"]]


# --- special tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        ({"eos_token_id": 7}, None, [7]),
        ({"eos_token_id": [7, 9]}, None, [7, 9]),
        ({"eos_token_id": []}, None, []),
        ({"eos_token_id": None}, None, []),
        ({"eos_token_id": 7}, {"eos_token_id": [9, 8]}, [9, 8]),
        ({"eos_token_id": 7}, {"eos_token_id": 9, "pad_token_id": 4}, [9]),
        ({"eos_token_id": 7}, {"temperature": 0.6}, [7]),
    ],
)
def test_ends_of_every_form(tmp_path: Path, config: dict, generation: dict | None, want: list[int]) -> None:
    folder = changed(random_llama(3, **SMALL), tmp_path / "x", config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    spec = load_model(folder).spec
    assert spec.eos_token_ids == want
    assert spec.pad_token_id == (generation or {}).get("pad_token_id")


@pytest.mark.parametrize("wrong", ["2", 2.5, -1, True, [1, "2"], {"a": 1}])
def test_ends_that_make_no_sense_are_refused(tmp_path: Path, wrong: Any) -> None:
    folder = changed(random_llama(3, **SMALL), tmp_path / "x", {"eos_token_id": wrong})
    with pytest.raises(CheckpointError, match=r"config.*eos_token_id"):
        load_model(folder)


def test_saved_models_keep_their_special_tokens_and_settings(tmp_path: Path) -> None:
    folder = changed(random_llama(3, **SMALL), tmp_path / "x", {"eos_token_id": [7, 9], "pad_token_id": 11})
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [7, 9], "pad_token_id": 11}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    lm = QuickSilverForCausalLM.from_pretrained(folder)
    lm.save_pretrained(tmp_path / "saved")
    again = QuickSilverForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.model.spec.eos_token_ids == [7, 9]
    assert again.generation_config.pad_token_id == lm.generation_config.pad_token_id == 11
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert settings.items() <= saved.items()
    # Another model in the same place leaves nothing of this one.
    QuickSilverForCausalLM.from_pretrained(random_gpt2(3, n_layer=2)).save_pretrained(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 1
    assert QuickSilverForCausalLM.from_pretrained(tmp_path / "saved").model.spec.family == "gpt2"
    assert not list((tmp_path / "saved").glob(".*"))


@torch.no_grad()
@pytest.mark.parametrize("pad", [0, 1, 2])
def test_masks_are_inferred_where_transformers_infers_them(tmp_path: Path, pad: int) -> None:
    """Pads in a prompt and no mask: a mask, unless the pad token ends texts."""
    from transformers import AutoModelForCausalLM

    folder = changed(random_llama(3, **SMALL), tmp_path / "x", {"pad_token_id": pad})
    ours = QuickSilverForCausalLM.from_pretrained(folder, precision="fp32")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 500, (3, 9), generator=torch.Generator().manual_seed(1))
    ids[0, :4], ids[2, :1] = pad, pad
    for given in ({}, {"attention_mask": (ids != pad).long()}, {"attention_mask": torch.ones_like(ids)}):
        want = theirs.generate(ids, max_new_tokens=8, do_sample=False, **given)
        assert torch.equal(ours.generate(ids, max_new_tokens=8, do_sample=False, **given).sequences, want)


# --- numbers out of range ---------------------------------------------------------------------------------------------


def scaled(source: Path, folder: Path, **factors: float) -> Path:
    """Tensors whose name holds a key, times its factor."""
    tensors = load_file(source / "model.safetensors")
    for part, factor in factors.items():
        for name in tensors:
            if part in name:
                tensors[name] = tensors[name] * factor
    return changed(source, folder, tensors=tensors)


@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
@pytest.mark.parametrize("precision", ["int8", "adaptive"])
def test_keys_and_values_beyond_an_fp16_cache(tmp_path: Path, part: str, precision: str) -> None:
    folder = scaled(random_llama(3, **SMALL), tmp_path / "x", **{part: 3e5, "input_layernorm": 10})
    lm = QuickSilverForCausalLM.from_pretrained(folder, precision=precision)
    for call in (lm, lm.score, lambda ids: lm.generate(ids, max_new_tokens=3)):
        with pytest.raises(ValueError, match=r"beyond 65504, the range of this fp16 KV cache; use kv_cache_dtype"):
            call(IDS)
    for dtype in ("bf16", "fp32", "int8"):
        lm = QuickSilverForCausalLM.from_pretrained(folder, precision=precision, kv_cache_dtype=dtype)
        assert lm(IDS).logits.isfinite().all()


@pytest.mark.parametrize("precision", ["int8", "int4", "adaptive"])
def test_weights_too_small_for_fp16_scales(tmp_path: Path, precision: str) -> None:
    """A norm undoes any factor, so the model is a good one at fp32; packed, it is refused, with the way out."""
    source = random_llama(3, **SMALL)
    for part in ("q_proj", "up_proj", "lm_head"):
        folder = scaled(source, tmp_path / f"{part}", **{part: 1e-7})
        with pytest.raises(CheckpointError, match=rf"{part}.*too small for.*use precision bf16 or fp32"):
            load_model(folder, precision)
        assert logits(folder).isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_weights_that_are_no_numbers(tmp_path: Path, precision: str, value: float, name: str) -> None:
    source = random_llama(3, **SMALL)
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[5] = value
    with pytest.raises(CheckpointError, match=f"{name.removesuffix('.weight')}.*(NaN|Inf)"):
        load_model(changed(source, tmp_path / "x", tensors=tensors), precision)
