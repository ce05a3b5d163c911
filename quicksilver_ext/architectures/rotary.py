"""Rotary position embeddings: the frequencies of each scaling variant, and the cosine and sine tables made from them.

The variants are those that transformers has for Llama, and give the same tables: default, linear, dynamic (NTK by
length), llama3, yarn and longrope; and, from GGUF files, a divisor for each frequency.

A table can't depend on a sequence's length, or a token's result would depend on what comes after it. So where a variant
changes with the length, row p is what transformers uses in a decoding step at position p:

* dynamic changes nothing up to max_position_embeddings, which is where the context ends here.
* longrope has its short factors below original_max_position_embeddings and its long factors from there on. (In one
  forward pass over more tokens than that, transformers uses the long factors for all of them.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights.checkpoint import CheckpointError, Fields

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rotary:
    """Inverse frequencies, fp32 [head_size / 2]: ``inverse`` below position ``switch`` and ``beyond`` from it on.
    ``magnitude`` multiplies cosines and sines."""

    inverse: Tensor
    beyond: Tensor | None = None
    switch: int = 0
    magnitude: float = 1.0

    def tables(self, positions: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Cosines and sines, fp32 [positions, head_size / 2]."""
        if device == "meta":  # computing there would import torch._dynamo, which takes two seconds
            empty = torch.empty((2, positions, len(self.inverse)), dtype=torch.float32, device=device)
            return empty[0], empty[1]
        position = torch.arange(positions, dtype=torch.float32, device=device)
        angles = torch.outer(position, self.inverse.to(device))
        if self.beyond is not None and self.switch < positions:
            angles[self.switch :] = torch.outer(position[self.switch :], self.beyond.to(device))
        sine = angles.sin().mul_(self.magnitude)
        return angles.cos_().mul_(self.magnitude), sine


def from_config(config: Fields, head_size: int, max_positions: int) -> Rotary:
    """Reads transformers 5's ``rope_parameters``, or ``rope_theta`` with ``rope_scaling`` (older keys too).

    Raises CheckpointError naming the field that is missing or makes no sense.
    """
    rotary = _read(config, head_size, max_positions)
    for frequencies in (rotary.inverse, rotary.beyond):
        if frequencies is not None and not bool((frequencies * max_positions).isfinite().all()):
            raise CheckpointError(
                f"{config.where}: its rotary embedding's factors give angles that aren't finite; compare them with the "
                "model's own config"
            )
    return rotary


def _read(config: Fields, head_size: int, max_positions: int) -> Rotary:
    # Where a config has both, the older key wins, as in transformers: somebody added it to a file that had the newer.
    source = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    values = config.values.get(source) or {}
    if not isinstance(values, dict):
        raise config.error(source, "an object")
    values = {key: value for key, value in values.items() if value is not None}
    values.setdefault("rope_type", values.get("type", "default"))
    for key in ("rope_theta", "partial_rotary_factor"):
        values.setdefault(key, config.values.get(key))
    # Outside of the rope's own fields this key has priority, as in transformers.
    values["original_max_position_embeddings"] = (
        config.values.get("original_max_position_embeddings")
        or values.get("original_max_position_embeddings")
        or max_positions
    )
    rope = Fields(values, f"{config.where}, rotary embedding")
    kind = rope.choice("rope_type", TYPES)
    if head_size % 2:
        raise CheckpointError(f"{config.where}: the head size is {head_size}, but rotary embeddings want an even one")
    if rope.number("partial_rotary_factor", 1.0) != 1 or rope.integer("rotary_dim", head_size) != head_size:
        raise CheckpointError(
            f"{config.where}: only a part of each head is rotated; wanted all of it, as in Llama models"
        )

    base = rope.number("rope_theta", 10000.0, minimum=1.0)
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size
    if kind == "longrope":
        return _longrope(rope, base**exponents, max_positions)
    if kind == "yarn":
        return _yarn(rope, base**exponents, base, max_positions)
    inverse = 1.0 / base**exponents
    if kind == "linear":
        inverse /= rope.number("factor")
    elif kind == "llama3":
        inverse = _llama3(rope, inverse)
    if "frequency_factors" in values:
        inverse /= _factors(rope, "frequency_factors", head_size // 2)
    return Rotary(inverse)


def _llama3(rope: Fields, inverse: Tensor) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those in between interpolated."""
    factor, original = rope.number("factor"), rope.integer("original_max_position_embeddings")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.error("high_freq_factor", f"more than low_freq_factor, {low:g}")
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / factor + smooth * inverse


def _yarn(rope: Fields, frequencies: Tensor, base: float, max_positions: int) -> Rotary:
    """Interpolated below a number of turns within the original context, extrapolated above another."""
    size, original = 2 * len(frequencies), rope.integer("original_max_position_embeddings")
    factor = rope.number("factor", max_positions / original)
    scale, all_dims = (rope.number(key) if rope.values.get(key) else 0.0 for key in ("mscale", "mscale_all_dim"))
    if scale and all_dims:
        magnitude = _yarn_magnitude(factor, scale) / _yarn_magnitude(factor, all_dims)
    else:
        magnitude = _yarn_magnitude(factor, 1.0)

    def dimension(turns: float) -> float:
        ratio = min(max(original / (turns * 2 * math.pi), 1e-300), 1e300)
        return size * math.log(ratio) / (2 * math.log(base))

    low, high = dimension(rope.number("beta_fast", 32.0)), dimension(rope.number("beta_slow", 1.0))
    if rope.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    each = torch.arange(size // 2, dtype=torch.float32, device="cpu")
    keep = 1 - ((each - low) / (high - low)).clamp(0, 1)
    inverse = 1.0 / (factor * frequencies) * (1 - keep) + 1.0 / frequencies * keep
    return Rotary(inverse, magnitude=rope.number("attention_factor", magnitude))


def _factors(rope: Fields, key: str, count: int) -> Tensor:
    return torch.tensor(rope.numbers(key, count), dtype=torch.float32, device="cpu")


def _yarn_magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(rope: Fields, frequencies: Tensor, max_positions: int) -> Rotary:
    original = rope.integer("original_max_position_embeddings", minimum=2)
    factor = rope.number("factor", max_positions / original)
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (_factors(rope, key, len(frequencies)) for key in ("short_factor", "long_factor"))
    return Rotary(
        1.0 / (short * frequencies),
        1.0 / (long * frequencies),
        switch=original,
        magnitude=rope.number("attention_factor", magnitude),
    )
