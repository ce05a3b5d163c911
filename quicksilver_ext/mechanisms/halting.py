"""Dynamic Token Halting and the KV policies: see config.HaltingConfig and docs/mechanisms.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..config import HaltingConfig
from ..kernels import ops
from ..profiling import span
from .base import Judged, Mechanism, Memory, Pass

if TYPE_CHECKING:
    from ..engine.kv_cache import LayerCache


class StepHalting(NamedTuple):
    """What a compiled step needs to halt by itself."""

    drift_threshold: float
    relative: bool
    entropy_threshold: float | None
    sink_tokens: int
    min_layer: int


@dataclass(frozen=True)
class HaltingTest:
    """What decides a halt. entropy [count] in bits or None; overrides [rows] int8 or None."""

    params: ops.HaltingParams
    entropy: Tensor | None = None
    overrides: Tensor | None = None


@dataclass
class OwedRows(Memory):
    """Halted tokens whose deeper layers wait for a later token to need them (``recompute``): the state [n, d] at the
    input of ``layer``."""

    hidden: Tensor
    positions: Tensor
    sequence: Tensor
    layer: Tensor
    bits: Tensor

    @staticmethod
    def none(hidden_size: int, device: torch.device) -> OwedRows:
        ints = torch.zeros(0, dtype=torch.int32, device=device)
        return OwedRows(
            torch.zeros(0, hidden_size, dtype=torch.float32, device=device),
            ints,
            ints.clone(),
            ints.clone(),
            ints.clone(),
        )

    def __len__(self) -> int:
        return len(self.layer)

    def take(self, which: Tensor) -> OwedRows:
        """Removes and returns the rows which [n] bool."""
        taken = OwedRows(**{name: tensor[which] for name, tensor in vars(self).items()})
        for name, tensor in list(vars(self).items()):
            setattr(self, name, tensor[~which])
        return taken

    def add(self, other: OwedRows) -> None:
        for name, tensor in vars(other).items():
            setattr(self, name, torch.cat((getattr(self, name), tensor)))

    def truncate(self, sequence: int, position: int) -> None:
        # Entries of older tokens that a later one, taken back now, had asked for may stay: whoever sees them would have
        # had them made with the same bits.
        if len(self):
            self.take((self.sequence == sequence) & (self.positions >= position))


class Halting(Mechanism):
    """One pass's halting."""

    def __init__(self, config: HaltingConfig, run: Pass, overrides: Tensor | None) -> None:
        super().__init__(run)
        self.config = config
        self.last = config.resume_layer or run.layers  # tests come before this many layers
        self.recomputes = config.kv_policy == "recompute"
        self.leaves = config.kv_policy in ("zero", "propagate")
        rows = run.rows
        count = len(rows.hidden)
        self.overrides = torch.zeros(count, dtype=torch.int8, device=run.device) if overrides is None else overrides
        self.next_layer = torch.zeros(count, dtype=torch.int32, device=run.device)
        if self.recomputes:
            self._take_owed()
        self.exit_hidden = run.rows.hidden.clone() if config.state == "translated" or self.recomputes else None

    @staticmethod
    def memory(config: HaltingConfig, hidden_size: int, device: torch.device) -> OwedRows | None:
        return OwedRows.none(hidden_size, device) if config.kv_policy == "recompute" else None

    @staticmethod
    def step(config: HaltingConfig) -> StepHalting | None:
        """The parameters by which a compiled step does the same; None where it can't."""
        fits = (
            config.kv_policy == "skip"
            and config.state == "frozen"
            and config.resume_layer is None
            and (config.entropy_threshold is None or config.entropy_source == "latent")
        )
        if not fits:
            return None
        return StepHalting(
            config.drift_threshold,
            config.drift_norm == "relative",
            config.entropy_threshold,
            config.sink_tokens,
            config.min_layer,
        )

    def _owed(self) -> OwedRows:
        owed = self.run.cache.memories["halting"]
        assert isinstance(owed, OwedRows)
        return owed

    def _take_owed(self) -> None:
        """Puts the rows that these sequences still owe before their new ones."""
        run, rows, memory = self.run, self.run.rows, self._owed()
        if not len(memory):
            return
        owed = memory.take(torch.isin(memory.sequence, rows.sequence))
        count, fresh = len(owed), len(rows.hidden)
        place = torch.zeros(run.cache.sequences, dtype=torch.int64, device=run.device)
        runs = torch.unique_consecutive(rows.sequence).long()
        place[runs] = torch.arange(len(runs), dtype=torch.int64, device=run.device)
        sequence, positions = torch.cat((owed.sequence, rows.sequence)), torch.cat((owed.positions, rows.positions))
        order = torch.argsort(place[sequence.long()] * 2**32 + positions)

        def merged(first: Tensor, second: Tensor) -> Tensor:
            return torch.cat((first, second))[order]

        rows.hidden = merged(owed.hidden, rows.hidden)
        rows.positions, rows.sequence = positions[order], sequence[order]
        if rows.bits is not None:
            rows.bits = merged(owed.bits, rows.bits)
        run.fresh = merged(torch.zeros(count, dtype=torch.bool, device=run.device), run.fresh)
        self.next_layer = merged(owed.layer, self.next_layer)
        self.overrides = merged(torch.full((count,), -1, dtype=torch.int8, device=run.device), self.overrides)
        rows.active = run.fresh.nonzero().squeeze(1).int()
        assert len(rows.hidden) == count + fresh

    # --- the loop's questions -----------------------------------------------------------------------------------------

    def next_event(self, layer: int) -> int:
        resume = self.config.resume_layer
        if self.recomputes or (self.leaves and bool(self.run.exited.any())):
            return layer
        first = max(layer, self.config.min_layer - 1)  # the first layer that is judged
        if first < self.last - 1:
            return first
        return resume if resume is not None and layer < resume else self.run.layers

    def holds(self, layer: int) -> bool:
        resume = self.config.resume_layer
        return self.leaves or (resume is not None and layer < resume)

    def before_layer(self, layer: int) -> None:
        """Rows come back at ``resume_layer``, or because a later token needs their entries."""
        run = self.run
        if not bool(run.exited.any()):
            return
        if layer == self.config.resume_layer:
            run.book()
            back = run.exited & ~run.fused
            if self.exit_hidden is not None:
                run.rows.hidden[back] = self.exit_hidden[back]
            run.exited &= ~back
            run.set_running(run.running | back)
        elif self.recomputes:
            rows, live = run.rows, run.running & ~run.exited
            deepest = torch.full((run.cache.sequences,), -1, dtype=torch.int32, device=run.device)
            deepest.scatter_reduce_(0, rows.sequence[live].long(), rows.positions[live], "amax")
            needed = run.exited & (self.next_layer == layer) & (rows.positions < deepest[rows.sequence])
            run.set_running(live | needed)

    def leaving(self, layer: int) -> Tensor | None:
        run = self.run
        return run.exited & ~run.fused if self.leaves and bool(run.exited.any()) else None

    def write_entries(self, layer: int, cache: LayerCache, rows: Tensor, slots: Tensor) -> None:
        """Entries of halted rows: zeros, or keys and values of their halted state."""
        run = self.run
        gone = ~run.running[rows]
        which, slots = rows[gone], slots[gone]
        if not len(which):
            return
        if self.config.kv_policy == "propagate":
            run.stages.write_kv(layer, cache, which, slots)
        else:
            spec = run.model.spec
            shape = (len(which), spec.num_kv_heads, spec.head_size)
            zeros = torch.zeros(shape, dtype=torch.float32, device=run.device)
            cache.write(zeros, zeros, slots)

    def after_layer(self, layer: int) -> None:
        if self.recomputes:
            self.next_layer[self.run.rows.active] = layer + 1
        if self.config.min_layer <= layer + 1 < self.last:
            with span(f"layer {layer} halting"):
                self._judge(layer + 1)

    def _judge(self, done: int) -> None:
        """Judges the active rows after ``done`` layers."""
        config, run, rows = self.config, self.run, self.run.rows
        relative = config.drift_norm == "relative"
        params = ops.HaltingParams(config.drift_threshold, relative, config.entropy_threshold, config.sink_tokens)
        entropy = None
        if config.entropy_threshold is not None:
            entropy = run.stages.entropy(config.entropy_source, run.probe(config.entropy_source, done))
        going_on, drift = run.stages.halt(HaltingTest(params, entropy, self.overrides))
        self.judged = Judged(rows.active, drift, entropy)
        if len(going_on) == len(rows.active):
            return
        run.book()
        staying = torch.zeros_like(run.running)
        staying[going_on] = True
        halted = run.running & ~staying
        run.exited |= halted
        self.overrides = torch.where(halted, -1, self.overrides).to(torch.int8)  # it is judged once
        if self.exit_hidden is not None:
            state = rows.hidden[halted]
            if config.state == "translated":
                weight, bias = run.tensors[f"translator.{done}.weight"], run.tensors[f"translator.{done}.bias"]
                state = torch.addmm(bias.float(), state, weight.float().T)
            self.exit_hidden[halted] = state
        run.set_running(staying)

    def finish(self) -> None:
        run, rows = self.run, self.run.rows
        if self.recomputes:
            owes = run.exited & (self.next_layer < run.layers)
            bits = rows.bits
            if bits is None:
                bits = torch.full((len(owes),), 8, dtype=torch.int32, device=run.device)
            self._owed().add(
                OwedRows(
                    rows.hidden[owes], rows.positions[owes], rows.sequence[owes], self.next_layer[owes], bits[owes]
                )
            )
        if self.exit_hidden is not None:
            rows.hidden[run.exited] = self.exit_hidden[run.exited]
