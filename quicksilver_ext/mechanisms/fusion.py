"""Contextual Token Fusion, of a prompt's tokens or of cache entries. See config.FusionConfig and docs/mechanisms.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import FusionConfig
from ..kernels import ops
from ..profiling import span
from .base import Mechanism, Memory, Pass

if TYPE_CHECKING:
    from ..engine.kv_cache import LayerCache

ALONE = -1  # the group of a token that takes part in no fusion


class FusionMemory(Memory):
    """What fusion in scope ``cache`` remembers of each token: its state at the fusion layer, hidden [sequences,
    capacity, d], and its group, the position of that group's first member (``ALONE``: it never came so far)."""

    def __init__(self, sequences: int, capacity: int, hidden_size: int, device: torch.device) -> None:
        self.hidden = torch.empty(sequences, capacity, hidden_size, dtype=torch.float32, device=device)
        self.group = torch.full((sequences, capacity), ALONE, dtype=torch.int32, device=device)

    def truncate(self, sequence: int, position: int) -> None:
        self.group[sequence, position:] = ALONE

    def number(self, config: FusionConfig, sequence: int, hidden: Tensor, positions: Tensor) -> int:
        """Groups the new tokens of a sequence (hidden [n, d] at positions [n], ascending), the first of them with what
        is there before it. Returns how many joined a group that had a member."""
        at = positions.long()
        first = int(at[0])
        start = int(self.group[sequence, first - 1]) if first else ALONE
        carried = 0 if start == ALONE else first - start
        if carried:
            hidden = torch.cat((self.hidden[sequence, start:first], hidden))
            before = torch.arange(start, first, dtype=positions.dtype, device=positions.device)
            positions = torch.cat((before, positions))
        label, _ = ops.fusion_groups(
            hidden,
            positions,
            torch.full_like(positions, sequence),
            torch.ones(len(positions), dtype=torch.bool, device=positions.device),
            config.threshold,
            config.norm == "relative",
            config.max_group,
        )
        opens = torch.ones(len(label), dtype=torch.bool, device=label.device)
        opens[1:] = label[1:] != label[:-1]
        group = positions[opens][label.long()]
        self.group[sequence, at] = group[carried:]
        self.hidden[sequence, at] = hidden[carried:]
        return int((~opens[max(carried, 1) :]).sum())


class Fusion(Mechanism):
    """One pass's fusion."""

    def __init__(self, config: FusionConfig, run: Pass) -> None:
        super().__init__(run)
        self.config = config
        self.weight: Tensor | None = None  # [rows], from the fusion layer on, or from the attention below it

    @staticmethod
    def memory(
        config: FusionConfig, sequences: int, capacity: int, hidden_size: int, device: torch.device
    ) -> FusionMemory | None:
        return FusionMemory(sequences, capacity, hidden_size, device) if config.scope == "cache" else None

    def _memory(self) -> FusionMemory:
        memory = self.run.cache.memories["fusion"]
        assert isinstance(memory, FusionMemory)
        return memory

    def _merges(self, layer: int) -> bool:
        return self.config.scope == "cache" and layer >= self.config.layer

    def wants_log_sum_exp(self, layer: int) -> bool:
        return self.config.weights == "attention" and layer == self.config.layer - 1

    def wants_slots(self, layer: int) -> bool:
        return self._merges(layer) or self.wants_log_sum_exp(layer)

    def next_event(self, layer: int) -> int:
        fusion_layer = self.config.layer
        if layer < fusion_layer:
            return max(layer, fusion_layer - 1) if self.config.weights == "attention" else fusion_layer
        return layer if self.config.scope == "cache" else self.run.layers

    def before_layer(self, layer: int) -> None:
        rows = self.run.rows
        if layer != self.config.layer or not len(rows.active):
            return
        with span(f"layer {layer} fusion"):
            if self.config.weights == "norm":
                self.weight = torch.linalg.vector_norm(rows.hidden, dim=-1)
            if self.weight is None:
                self.weight = torch.ones(len(rows.hidden), dtype=torch.float32, device=self.run.device)
            self.weight = self.weight.clamp_min(1e-12)
            if self.config.scope == "prompt":
                self._fuse_prompt(self.weight)
            else:
                self._group_entries()

    # --- scope prompt -------------------------------------------------------------------------------------------------

    def _fuse_prompt(self, weight: Tensor) -> None:
        """Adjacent rows nobody asked logits of become one, in the row of the last; never a sequence's newest row."""
        config, run, rows = self.config, self.run, self.run.rows
        active, sequence = rows.active.long(), rows.at_active(rows.sequence)
        newest = torch.ones(len(active), dtype=torch.bool, device=run.device)
        newest[:-1] = sequence[1:] != sequence[:-1]
        asked = torch.zeros_like(run.fresh)
        asked[run.fresh] = run.asked
        fusible = ~asked[active] & ~newest & ~run.exited[active]
        hidden = rows.hidden[active]
        group, _ = ops.fusion_groups(
            hidden,
            rows.at_active(rows.positions),
            sequence,
            fusible,
            config.threshold,
            config.norm == "relative",
            config.max_group,
        )
        self.groups = group
        last = torch.ones(len(active), dtype=torch.bool, device=run.device)
        last[:-1] = group[1:] != group[:-1]
        if bool(last.all()):
            return
        fused = ops.fusion_reduce(hidden, weight[active], group)
        several = group.bincount() > 1
        rows.hidden[active[last][several]] = fused[several]
        run.fused[active[~last]] = True
        away = int((~last).sum())
        run.joined += away
        run.fused_away += away * (run.layers - config.layer)
        run.set_running(run.running & ~run.fused)

    # --- scope cache --------------------------------------------------------------------------------------------------

    def _group_entries(self) -> None:
        """Numbers the groups that entries of this layer and those above will merge in."""
        run, rows, memory = self.run, self.run.rows, self._memory()
        sequence = rows.at_active(rows.sequence)
        for s in sequence.unique().tolist():
            mine = rows.active[sequence == s].long()
            run.joined += memory.number(self.config, s, rows.hidden[mine], rows.positions[mine])
        self.groups = memory.group[sequence.long(), rows.at_active(rows.positions).long()]

    def slots(self, layer: int, cache: LayerCache, rows: Tensor) -> Tensor | None:
        if not self._merges(layer):
            return None
        run, memory = self.run, self._memory()
        sequence, positions = run.rows.sequence[rows], run.rows.positions[rows]
        group = memory.group[sequence.long(), positions.long()].tolist()
        # An entry merges with the one before it in its sequence, if both tokens are of one group.
        self._tails = {s: _Tail.of(cache, s) for s in sequence.unique().tolist()}
        latest = {s: ALONE if tail is None else int(memory.group[s, tail.position]) for s, tail in self._tails.items()}
        joins = []
        for s, number in zip(sequence.tolist(), group, strict=True):
            joins.append(number != ALONE and latest[s] == number)
            latest[s] = number
        joined = torch.tensor(joins, dtype=torch.bool, device=run.device)
        # A merged entry comes right behind its last member's own and is seen from the next position on.
        copies = joined.int() + 1
        own = copies.cumsum(0) - copies
        visible = positions.repeat_interleave(copies)
        visible[(own + 1)[copies == 2]] += 1
        slots = cache.allocate(sequence.repeat_interleave(copies), visible, positions.repeat_interleave(copies))
        self._merged = {i: int(slots[own[i] + 1]) for i in joined.nonzero().squeeze(1).tolist()}
        return slots[own]

    def write_entries(self, layer: int, cache: LayerCache, rows: Tensor, slots: Tensor) -> None:
        """Merges new entries with their predecessors. The parts expire at the position from which the merged entry is
        seen."""
        if not self._merges(layer):
            return
        run, model = self.run, self.run.model
        assert cache.until is not None and self.weight is not None
        until, weights = cache.until.view(-1), cache.weight.view(-1)
        items: list[tuple[Any, ...]] = []
        totals: dict[int, float] = {}
        columns = (slots, run.rows.sequence[rows], run.rows.positions[rows], self.weight[rows])
        for i, (slot, s, position, mass) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            totals[slot] = mass
            if i not in self._merged:
                self._tails[s] = _Tail(slot, position, mass)
                continue
            tail, target = self._tails[s], self._merged[i]
            assert tail is not None
            items.append((target, tail.slot, slot, tail.weight, mass, position - tail.position))
            parts = torch.tensor([tail.slot, slot], dtype=torch.int64, device=run.device)
            until[parts] = until[parts].clamp_max(position + 1)
            totals[target] = tail.weight + mass
            self._tails[s] = _Tail(target, position, totals[target])
        where = torch.tensor(list(totals), dtype=torch.int64, device=run.device)
        weights[where] = torch.tensor(list(totals.values()), dtype=torch.float64, device=run.device)
        if not items:
            return
        targets, firsts, seconds, first_weights, second_weights, distances = zip(*items, strict=True)

        def column(values: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=run.device)

        ops.kv_merge(
            cache.key,
            cache.value,
            column(targets, torch.int64),
            column(firsts, torch.int64),
            column(seconds, torch.int64),
            column(first_weights, torch.float32),
            column(second_weights, torch.float32),
            column(distances, torch.int32),
            model.rotary_cos,
            model.rotary_sin,
            cache.key_scale,
            cache.value_scale,
        )

    # --- weights by attention -----------------------------------------------------------------------------------------

    def after_attention(self, layer: int, cache: LayerCache, rows: Tensor, slots: Tensor, log_sum_exp: Tensor) -> None:
        """The attention that a row's entry got, mean over heads, from its own query (scope cache: it merges right
        after) or from all queries of the pass (scope prompt)."""
        run, spec = self.run, self.run.model.spec
        slots = slots[run.running[rows]]
        keys = cache.keys(slots).repeat_interleave(spec.num_heads // spec.num_kv_heads, 1)  # [count, heads, D]
        queries = run.stages.queries() * spec.attention_scale_of(layer)
        if self.config.scope == "cache":
            mass = ((queries * keys).sum(-1) - log_sum_exp).exp().mean(-1)
        else:
            mass = torch.empty(len(slots), dtype=torch.float32, device=run.device)
            positions, sequence = run.rows.at_active(run.rows.positions), run.rows.at_active(run.rows.sequence)
            for s in sequence.unique().tolist():
                mine = sequence == s
                scores = torch.einsum("qhd,khd->qkh", queries[mine], keys[mine]) - log_sum_exp[mine][:, None]
                seen = positions[mine][:, None] >= positions[mine][None]
                mass[mine] = (scores.exp() * seen[..., None]).sum(0).mean(-1)
        self.weight = torch.ones(len(run.rows.hidden), dtype=torch.float32, device=run.device)
        self.weight[run.rows.active] = mass


class _Tail:
    """The latest entry of a sequence in a layer, into which a member of the same group would merge."""

    def __init__(self, slot: int, position: int, weight: float) -> None:
        self.slot, self.position, self.weight = slot, position, weight

    @staticmethod
    def of(cache: LayerCache, sequence: int) -> _Tail | None:
        slot = cache.last_slot(sequence)
        if slot is None:
            return None
        return _Tail(slot, int(cache.owner.view(-1)[slot]), float(cache.weight.view(-1)[slot]))
