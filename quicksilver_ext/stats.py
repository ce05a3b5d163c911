"""What a run did: tokens, layers, bits, cache entries, FLOPs, bytes and seconds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class GenerationStats:
    """Counts of one run, added up by the decoder (work) and by ``generate`` (tokens and seconds).

    ``first_tokens``: of the new ones, those that the prompts' pass made. ``flops``: multiply-adds executed in GEMMs and
    attention, times two; ``flops_full``: the same for the same tokens at full depth with every mechanism off.
    ``weight_bytes_read``: bytes of weights (planes of the bits in use, scales, biases) that GEMMs read, once per GEMM.
    Identities: ``depth_histogram`` (layers a token ran -> tokens) sums to the tokens processed, and its mean times them
    plus ``layers_recomputed`` (run later, for the cache alone) is ``layers_run``; ``layers_full`` is tokens times
    layers; ``bits_histogram`` (bits -> row-layers) sums to ``layers_run``; written + skipped entries, plus those that
    fusion took away, are ``layers_full``.
    """

    new_tokens: int = 0
    first_tokens: int = 0
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    layers_run: int = 0
    layers_full: int = 0
    layers_recomputed: int = 0
    depth_histogram: Counter[int] = field(default_factory=Counter)
    bits_histogram: Counter[int] = field(default_factory=Counter)
    kv_entries_written: int = 0
    kv_entries_skipped: int = 0
    kv_entries_fused: int = 0
    tokens_fused: int = 0
    flops: int = 0
    flops_full: int = 0
    weight_bytes_read: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Tokens that decode steps made over their seconds. The first token of each sequence is the prompt's pass's,
        and ``prefill_seconds`` its time."""
        return (self.new_tokens - self.first_tokens) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def mean_depth(self) -> float:
        """Layers run over layers of the full depth, 0 to 1."""
        return self.layers_run / self.layers_full if self.layers_full else 1.0

    @property
    def mean_bits(self) -> float | None:
        """Mean weight bits over the row-layers that ran; None where weights aren't quantized."""
        total = sum(self.bits_histogram.values())
        return sum(bits * n for bits, n in self.bits_histogram.items()) / total if total else None

    def to_dict(self) -> dict[str, Any]:
        """All fields but the trace, plus ``tokens_per_second``, as JSON values; histogram keys are strings."""
        values = {name: value for name, value in vars(self).items() if name != "trace"}
        for name in ("depth_histogram", "bits_histogram"):
            values[name] = {str(key): count for key, count in sorted(values[name].items())}
        return {**values, "tokens_per_second": self.tokens_per_second}
