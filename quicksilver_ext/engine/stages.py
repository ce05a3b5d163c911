"""What an executor of layers can do: the five stages of a layer, the head, and perhaps a whole step in one launch.

``CpuStages`` (cpu.py) and ``CudaStages`` (cuda.py) are fused kernels on packed weights; ``ComposedStages``
(composed.py) runs on every backend and precision, and is what the fast ones are tested against. All take the same rows:
``hidden`` by row number, ``active`` the rows that take part. Nothing is computed for a row that isn't active.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..kernels import ops
from ..mechanisms.base import Rows
from ..mechanisms.halting import HaltingTest
from ..weights.model import Model
from .kv_cache import KVCache, LayerCache

if TYPE_CHECKING:
    from .batch import Batch
    from .plan import Plan

# Rows of logits computed at a time where only their entropy is wanted.
ENTROPY_ROWS = 64


@dataclass
class Work:
    """Multiply-adds and bytes of what really ran."""

    gemm_macs: int = 0
    attention_pairs: int = 0
    weight_bytes_read: int = 0


@dataclass
class Step:
    """What a step in one launch did, of n rows: ``logits`` [n, V] hold until the next one; ``depth`` layers run;
    ``bits`` from AMQ's layer on, None without it. ``drift`` and ``entropy`` [layers][n], where they were asked for, NaN
    where nothing was measured: of the step over layer l; of the state that comes into layer l."""

    logits: torch.Tensor
    depth: list[int]
    bits: list[int] | None
    work: Work
    drift: list[list[float]] = field(default_factory=list)
    entropy: list[list[float]] = field(default_factory=list)


def entropy_bits(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in bits of softmax over the last dimension."""
    log_p = torch.log_softmax(logits.double(), -1)
    nats = -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)
    return (nats / torch.log(torch.tensor(2.0, dtype=torch.float64, device=logits.device))).float()


def full_cache() -> ValueError:
    return ValueError("the KV cache is full; make it with a larger capacity")


class Stages(ABC):
    """What the runner calls. ``begin`` first, and again whenever the rows, rows.active or rows.bits change.

    A layer is ``attention_input``, ``attention``, ``attention_output``, ``mlp_input``, ``mlp_output`` in this order, on
    the active rows of ``begin``; ``hidden`` is changed in place.
    """

    rows: Rows

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = model.embedding.device

    def begin(self, rows: Rows) -> None:
        self.rows = rows

    @abstractmethod
    def attention_input(self, index: int, cache: LayerCache, slots: torch.Tensor | None) -> None:
        """Queries, and keys and values into the cache: at slots [count] int64, or the next ones for None."""

    @abstractmethod
    def write_kv(self, index: int, cache: LayerCache, which: torch.Tensor, slots: torch.Tensor) -> None:
        """Keys and values alone, of rows which [n] int32 as they stand, to slots [n] int64."""

    @abstractmethod
    def attention(self, index: int, cache: LayerCache, mass: bool = False) -> torch.Tensor | None:
        """Fills the attention output; with ``mass`` returns the log-sum-exp [count, heads] of the scores."""

    @abstractmethod
    def queries(self) -> torch.Tensor:
        """The active rows' queries [count, heads, D] of the layer in progress, after the rotary embedding."""

    @abstractmethod
    def attention_output(self, index: int) -> None:
        """Adds the attention's projection to ``hidden``."""

    @abstractmethod
    def mlp_input(self, index: int) -> None:
        """The MLP up to its activation."""

    @abstractmethod
    def mlp_output(self, index: int) -> None:
        """Adds the MLP's projection to ``hidden``."""

    def run_layers(self, first: int, last: int, cache: KVCache) -> None:
        """All stages of layers first..last - 1: for when nothing is to be decided between them."""
        for index in range(first, last):
            self.attention_input(index, cache.layers[index], None)
            self.attention(index, cache.layers[index])
            self.attention_output(index)
            self.mlp_input(index)
            self.mlp_output(index)

    @property
    @abstractmethod
    def previous(self) -> torch.Tensor:
        """The active rows [count, d] fp32 as they came into the layer in progress."""

    @abstractmethod
    def halt(self, test: HaltingTest) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows [n] int32 that go on after the halting test of the active ones, and the drift [count] of these."""

    @abstractmethod
    def head(self, index: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] fp32 of rows index [n] int32."""

    @abstractmethod
    def work(self) -> Work:
        """What ran since the last call."""

    def step(self, plan: Plan, batch: Batch, cache: KVCache, log: bool) -> Step | None:
        """A whole pass of one new token for each of a few sequences, as the plan's compiled parameters say; None where
        this executor has no such thing for the plan or the batch. ``log``: with drift and entropy."""
        return None

    def entropy(self, source: str, probe: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Entropy in bits [count] of the active rows as they stand: see config.HaltingConfig for the sources."""
        hidden = self.rows.at_active(self.rows.hidden)
        if source == "latent":
            return ops.softmax_entropy(hidden)
        if source == "probe":
            assert probe is not None
            scaled = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
            return (scaled * probe[0]).sum(-1) + probe[1]
        parts = self.rows.active.split(ENTROPY_ROWS)
        return torch.cat([entropy_bits(self.head(part)) for part in parts])
