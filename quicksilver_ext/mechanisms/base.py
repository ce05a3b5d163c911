"""What a mechanism is to the engine, and what of a pass it sees.

A pass takes rows through the layers. At each layer the loop asks the mechanisms of its plan, in order, at fixed points;
:meth:`Mechanism.next_event` says how far the layers may run before it must ask again. A mechanism's objects live for
one pass; what must outlive it is its :class:`Memory`, which the KV cache holds and rolls back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..engine.kv_cache import KVCache, LayerCache
    from ..engine.stages import Stages
    from ..weights.model import Model


@dataclass
class Rows:
    """A ragged, packed batch on its way through the layers.

    hidden [rows, d] fp32, positions and sequence [rows] int32, bits [rows] int32 or None (all that the weights have),
    active [count] int32, ascending.
    """

    hidden: Tensor
    positions: Tensor
    sequence: Tensor
    active: Tensor
    bits: Tensor | None = None

    def at_active(self, tensor: Tensor) -> Tensor:
        """The active rows of a tensor that is indexed by row."""
        return tensor if len(self.active) == len(tensor) else tensor[self.active]


class Memory(ABC):
    """What a mechanism remembers of a cache's sequences between passes."""

    @abstractmethod
    def truncate(self, sequence: int, position: int) -> None:
        """Makes it as if the tokens of ``sequence`` from ``position`` on had never run."""


class Pass:
    """A pass under way: the rows, and masks [rows] that mechanisms set.

    fresh    new tokens; the others are older ones that an earlier pass still owed
    running  rows that take part (rows.active is their list)
    exited   rows whose own prediction is settled: they halted, whether or not they still run for the cache's sake
    fused    rows that went on in another one

    The masks are there where the plan is dynamic: where a row may stop before the top.
    """

    def __init__(
        self, model: Model, stages: Stages, cache: KVCache, tensors: Mapping[str, Tensor], rows: Rows, asked: Tensor
    ) -> None:
        self.model, self.stages, self.cache, self.tensors, self.rows, self.asked = (
            model, stages, cache, tensors, rows, asked,
        )  # fmt: skip
        self.layers = model.spec.num_layers
        self.device = rows.hidden.device
        self.fresh = self.mask(True)
        self.joined = 0  # tokens that fusion merged with another
        self.fused_away = 0  # cache entries that are not, since their rows went on in others
        self.recomputed = 0  # row-layers that exited rows ran for the cache's sake
        self.bit_rows = {8: 0, 4: 0}
        self._unbooked = 0

    def mask(self, value: bool) -> Tensor:
        """[rows] bool."""
        return torch.full((len(self.rows.hidden),), value, dtype=torch.bool, device=self.device)

    def make_masks(self) -> None:
        """When all rows are there."""
        self.running = self.fresh.clone()
        self.exited = ~self.fresh
        self.fused = self.mask(False)
        self.ran = torch.zeros(len(self.fresh), dtype=torch.int32, device=self.device)

    def set_running(self, running: Tensor) -> None:
        self.book()
        self.running = running
        self.rows.active = running.nonzero().squeeze(1).int()
        self.stages.begin(self.rows)

    def ran_layers(self, count: int) -> None:
        """The active rows have run ``count`` more layers."""
        self._unbooked += count

    def book(self) -> None:
        """Books the layers that ran since the last call. Called before active rows, their standing or bits change: per
        layer it would cost more than a small model's kernels."""
        rows, layers, self._unbooked = self.rows, self._unbooked, 0
        if not layers:
            return
        if hasattr(self, "running"):
            ghosts = self.exited[rows.active]
            self.recomputed += layers * int(ghosts.sum())
            self.ran[rows.active[~ghosts]] += layers
        high = len(rows.active) if rows.bits is None else int((rows.at_active(rows.bits) == 8).sum())
        self.bit_rows[8] += layers * high
        self.bit_rows[4] += layers * (len(rows.active) - high)

    def probe(self, source: str, layer: int) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of the probe for entropy at ``layer``; None for a source that isn't one."""
        if source != "probe":
            return None
        return self.tensors[f"probe.{layer}.weight"].float(), self.tensors[f"probe.{layer}.bias"].float()


@dataclass
class Judged:
    """What was measured of rows [n] at a layer, for observers."""

    rows: Tensor
    drift: Tensor | None = None
    entropy: Tensor | None = None


class Mechanism(ABC):
    """A mechanism's part in one pass. The loop calls, for each layer: ``before_layer``; ``leaving`` and ``slots``, then
    ``write_entries`` once the running rows' keys and values are in the cache; ``after_attention`` where it
    ``wants_log_sum_exp``; ``after_layer``. ``finish`` comes before the head."""

    def __init__(self, run: Pass) -> None:
        self.run = run
        # Of the layer in progress, for observers: what was measured; the fusion groups of the active rows.
        self.judged: Judged | None = None
        self.groups: Tensor | None = None

    @abstractmethod
    def next_event(self, layer: int) -> int:
        """The first layer from ``layer`` on that it has a part in, ``layer``'s own before_layer being done; the number
        of layers where there is none. Layers below it run without a question."""

    def before_layer(self, layer: int) -> None:
        """Decides on the state that comes into ``layer``."""

    def holds(self, layer: int) -> bool:
        """Whether the pass must go on from ``layer`` though no row is active."""
        return False

    def leaving(self, layer: int) -> Tensor | None:
        """Rows [rows] bool that leave a cache entry beside the running ones."""
        return None

    def slots(self, layer: int, cache: LayerCache, rows: Tensor) -> Tensor | None:
        """Slots [n] int64 for the entries of rows [n] int32, where it gives them out itself."""
        return None

    def wants_slots(self, layer: int) -> bool:
        """Whether the slots of this layer's entries must be known."""
        return False

    def write_entries(self, layer: int, cache: LayerCache, rows: Tensor, slots: Tensor) -> None:
        """Adds to or changes the entries of rows [n] int32 at slots [n]."""

    def wants_log_sum_exp(self, layer: int) -> bool:
        return False

    def after_attention(self, layer: int, cache: LayerCache, rows: Tensor, slots: Tensor, log_sum_exp: Tensor) -> None:
        """log_sum_exp [count, heads] of the active rows' scores; rows [n] with entries at slots [n]."""

    def after_layer(self, layer: int) -> None:
        """Decides on the state that came out of ``layer``."""

    def finish(self) -> None:
        """Leaves the states that the head will see, and what the next pass must know."""
