"""Qwen3 checkpoints: Qwen2 with norms of each head's queries and keys in place of the biases."""

from __future__ import annotations

from ..weights.checkpoint import Fields
from ..weights.model import Norm
from .base import Reader
from .llama import Llama
from .qwen2 import Qwen2


class Qwen3(Qwen2):
    model_type = "qwen3"
    gguf = "qwen3"
    gguf_tensors = {
        **Llama.gguf_tensors,
        "attn_q_norm": "model.layers.{}.self_attn.q_norm",
        "attn_k_norm": "model.layers.{}.self_attn.k_norm",
    }

    def head_size(self, config: Fields, d: int, heads: int) -> int:
        return config.integer("head_dim", 128, maximum=1 << 16)

    def biases(self, config: Fields) -> set[str]:
        return {"q", "k", "v", "o"} if config.flag("attention_bias", False) else set()

    def head_norms(self, read: Reader, name: str, size: int, eps: float) -> dict[str, Norm]:
        return {f"{part}_norm": read.norm("rms", f"{name}.self_attn.{part}_norm", size, eps) for part in ("q", "k")}
