"""Mistral checkpoints: Llama with a sliding window. Their GGUF files come as Llama's."""

from __future__ import annotations

from ..weights.checkpoint import Fields
from .llama import Llama


class Mistral(Llama):
    model_type = "mistral"
    gguf = None

    def kv_heads(self, config: Fields, heads: int) -> int:
        return config.integer("num_key_value_heads", 8)

    def windows(self, config: Fields, layers: int) -> list[int | None] | None:
        if config.values.get("sliding_window", 4096) is None:
            return None
        return [config.integer("sliding_window", 4096)] * layers
