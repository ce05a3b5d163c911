"""New tokens on their way in: checked once, here, and by nobody behind this door."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..weights.model import Spec
    from .kv_cache import KVCache

# Rows of one pass: enough to use the weights well, few enough for the work memory to stay in cache.
CHUNK = 512
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Batch:
    """T tokens: rows grouped by sequence, positions ascending, going on where the cache ended.

    asked      rows whose logits are wanted; None: all
    overrides  by row: 1 halts a token at its first chance, -1 never, 0 leaves it to the test; None: all 0

    Lists, since a step of one row is over sooner than a tensor is made.
    """

    ids: list[int]
    positions: list[int]
    sequence: list[int]
    asked: list[bool] | None = None
    overrides: list[int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def of(ids: Any, positions: Any, sequence: Any, asked: Any = None, overrides: Any = None) -> Batch:
        """From lists, or from one-dimensional tensors: integers, ``asked`` bool, ``overrides`` int8. TypeError and
        ValueError naming the argument for another kind, dtype or length, and for an empty batch."""
        columns = {name: _column(name, value, INTEGERS) for name, value in
                   (("input_ids", ids), ("positions", positions), ("sequence", sequence))}  # fmt: skip
        length = len(columns["input_ids"])
        if length == 0:
            raise ValueError("input_ids is empty; give at least one token")
        more = {
            "asked": None if asked is None else _column("asked", asked, (torch.bool,)),
            "overrides": None if overrides is None else _column("overrides", overrides, (torch.int8,)),
        }
        for name, values in {**columns, **more}.items():
            if values is not None and len(values) != length:
                raise ValueError(f"{name} must have input_ids' length {length}; got {len(values)}")
        if more["overrides"] is not None and not set(more["overrides"]) <= {-1, 0, 1}:
            raise ValueError("overrides must hold -1, 0 and 1 alone")
        return Batch(columns["input_ids"], columns["positions"], columns["sequence"], more["asked"], more["overrides"])

    def check(self, spec: Spec, cache: KVCache) -> None:
        """IndexError, ValueError for ids outside the vocabulary, positions that don't go on where the cache ended, and
        more tokens than it or the model holds."""
        low, high = min(self.ids), max(self.ids)
        if low < 0 or high >= spec.vocab_size:
            raise IndexError(f"input_ids must be in 0..{spec.vocab_size - 1}; got {low if low < 0 else high}")
        following: dict[int, int] = {}
        last = None
        for s, position in zip(self.sequence, self.positions, strict=True):
            if s != last:
                if not 0 <= s < cache.sequences or s in following:
                    raise ValueError(f"sequence must hold runs of 0..{cache.sequences - 1}, each once; got {s}")
                following[s], last = len(cache.tokens[s]), s
            if position != following[s]:
                raise ValueError(f"positions of sequence {s} must continue at {following[s]}; got {position}")
            following[s] = position + 1
            if position >= spec.max_positions:
                raise ValueError(f"the model holds {spec.max_positions} positions; got position {position}")
            if position >= cache.capacity:
                raise ValueError(f"the cache holds {cache.capacity} tokens of a sequence; got position {position}")

    @cached_property
    def one_each(self) -> bool:
        """Whether each row is of another sequence, and all logits are wanted, and nobody is forced."""
        whole = self.asked is None or all(self.asked)
        return whole and self.overrides is None and len(set(self.sequence)) == len(self.sequence)

    def part(self, rows: slice) -> Batch:
        if len(range(*rows.indices(len(self)))) == len(self):
            return self
        return Batch(
            self.ids[rows],
            self.positions[rows],
            self.sequence[rows],
            None if self.asked is None else self.asked[rows],
            None if self.overrides is None else self.overrides[rows],
        )

    def passes(self) -> Iterator[Batch]:
        """The batch by passes of about ``CHUNK`` rows. A sequence is cut only at multiples of that in its own
        positions, so that its passes, and with them what fusion makes of a prompt, don't depend on its neighbours."""
        if len(self) <= 1:
            yield self
            return
        cuts = [
            row
            for row in range(1, len(self))
            if self.sequence[row] != self.sequence[row - 1] or self.positions[row] % CHUNK == 0
        ]
        begin = end = 0
        for cut in [*cuts, len(self)]:
            if cut - begin > CHUNK and end > begin:
                yield self.part(slice(begin, end))
                begin = end
            end = cut
        yield self.part(slice(begin, end))


def _column(name: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> list[Any]:
    if isinstance(value, Tensor):
        if value.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name} must be {wanted}; got {str(value.dtype).removeprefix('torch.')}")
        if value.dim() != 1:
            raise ValueError(f"{name} must be one-dimensional; got shape {list(value.shape)}")
        return value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{name} must be a list or a tensor; got {type(value).__name__}")
    kind = bool if dtypes == (torch.bool,) else int
    if not all(type(each) is kind for each in value):
        raise TypeError(f"{name} must hold {kind.__name__} alone")
    return list(value)
