"""Qwen2 and Qwen2.5 checkpoints: Llama with biases on q, k and v, and a window on some layers where they ask for it."""

from __future__ import annotations

from ..weights.checkpoint import Fields
from .llama import Llama

SLIDING, FULL = "sliding_attention", "full_attention"


class Qwen2(Llama):
    model_type = "qwen2"
    gguf = "qwen2"
    gguf_interleaved = {}

    def kv_heads(self, config: Fields, heads: int) -> int:
        return config.integer("num_key_value_heads", 32)

    def biases(self, config: Fields) -> set[str]:
        return {"q", "k", "v"}

    def windows(self, config: Fields, layers: int) -> list[int | None] | None:
        window = config.values.get("sliding_window")
        if not config.flag("use_sliding_window", False) or window is None:
            return None
        size, first = config.integer("sliding_window"), config.integer("max_window_layers", 28, minimum=0)
        kinds = config.values.get("layer_types") or [SLIDING if index >= first else FULL for index in range(layers)]
        if not isinstance(kinds, list) or len(kinds) != layers or not {SLIDING, FULL}.issuperset(map(str, kinds)):
            raise config.error("layer_types", f"a list of {layers} of '{SLIDING}' and '{FULL}'")
        return [size if kind == SLIDING else None for kind in kinds]
