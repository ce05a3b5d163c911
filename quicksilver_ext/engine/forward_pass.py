"""One pass through the layers: five stages for each, and between them what the mechanisms decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..kernels import ops
from ..profiling import enabled, ranged, span
from ..stats import GenerationStats
from ..weights.model import WEIGHT_BITS
from .kv_cache import KVCache, LayerCache, OwedRows
from .stages import HaltingTest, Rows, Stages

if TYPE_CHECKING:
    from .decoder import Decoder


@dataclass
class _Entries:
    """Cache entries that one layer gets: rows [n] that leave one, their slots [n], and where merges go."""

    rows: torch.Tensor
    slots: torch.Tensor
    merged: dict[int, int]  # place in rows -> slot of the merged entry that follows it


def _choose_bits(decoder: Decoder, stages: Stages, rows: Rows) -> None:
    """Adaptive bits for the active rows as they stand."""
    amq, spec = decoder.config.amq, decoder.model.spec
    assert amq is not None
    if rows.bits is None:
        rows.bits = torch.full((len(rows.hidden),), 8, dtype=torch.int32)
    if len(rows.active):
        width = spec.hidden_size if amq.entropy_source == "latent" else spec.vocab_size
        entropy = stages.entropy(amq.entropy_source, decoder.probe(amq.entropy_source, amq.layer))
        normalised = entropy / torch.log2(torch.tensor(float(width)))
        rows.bits[rows.active] = torch.where(normalised >= amq.entropy_threshold, 8, 4).int()
    stages.begin(rows)


class PlainPass:
    """A pass without halting and fusion: all rows go through all layers, so there are no tables to keep by row. At one
    row a step those would take longer than some layers do."""

    def __init__(
        self,
        decoder: Decoder,
        stages: Stages,
        cache: KVCache,
        ids: torch.Tensor,
        positions: torch.Tensor,
        sequence: torch.Tensor,
        want: torch.Tensor | None,
    ) -> None:
        self.decoder, self.stages, self.cache, self.want = decoder, stages, cache, want
        active = torch.arange(len(ids), dtype=torch.int32)
        self.rows = Rows(decoder.embed(ids, positions), positions, sequence, active)

    def run(self) -> torch.Tensor:
        stages, rows, amq = self.stages, self.rows, self.decoder.config.amq
        layers = self.decoder.model.spec.num_layers
        stages.begin(rows)
        first = 0
        if amq is not None:
            stages.run_layers(0, amq.layer, self.cache)
            _choose_bits(self.decoder, stages, rows)
            first = amq.layer
        stages.run_layers(first, layers, self.cache)
        index = rows.active if self.want is None else rows.active[self.want]
        self.asked = len(index)
        return stages.head(index) if self.asked else torch.empty(0, self.decoder.model.spec.vocab_size)

    def count(self, stats: GenerationStats) -> None:
        """Adds what this pass did."""
        positions, bits = self.rows.positions.tolist(), self.rows.bits
        depth = [self.decoder.model.spec.num_layers] * len(positions)
        self.decoder.book_rows(stats, depth, None if bits is None else bits.tolist())
        self.decoder.book_work(stats, self.stages.work(), positions, self.asked)


class ForwardPass:
    """One chunk on its way up. Masks and tables are by row; rows that an earlier pass still owes come before the new
    ones of their sequence."""

    def __init__(
        self,
        decoder: Decoder,
        stages: Stages,
        cache: KVCache,
        ids: torch.Tensor,
        positions: torch.Tensor,
        sequence: torch.Tensor,
        want: torch.Tensor,
        overrides: torch.Tensor | None,
    ) -> None:
        self.decoder, self.cache, self.ids, self.want = decoder, cache, ids, want
        self.stages = ranged(stages)
        config = decoder.config
        self.halting, self.fusion, self.amq = config.halting, config.fusion, config.amq
        self.layers = decoder.model.spec.num_layers
        hidden = decoder.embed(ids, positions)
        count = len(ids)
        self.rows = Rows(hidden, positions, sequence, torch.arange(count, dtype=torch.int32))
        self.fresh = torch.ones(count, dtype=torch.bool)
        self.next_layer = torch.zeros(count, dtype=torch.int32)
        self.overrides = (
            overrides if overrides is not None or self.halting is None else torch.zeros(count, dtype=torch.int8)
        )
        self.entries_written = self.recomputed = self.unbooked = 0
        self.joined = 0
        self.bit_rows = {8: 0, 4: 0}
        if cache.owed is not None and len(cache.owed.layer):
            self._take_owed(cache.owed)
        total = len(self.rows.hidden)
        self.running = self.fresh.clone()
        self.exited = ~self.fresh  # rows whose own prediction is settled
        self.fused = torch.zeros(total, dtype=torch.bool)
        self.ran = torch.zeros(total, dtype=torch.int32)
        self.exit_hidden = self.rows.hidden.clone() if self._keeps_exits() else None
        self.group = torch.arange(-total, 0)  # unlike any numbered group, and unlike each other
        self.weight = torch.ones(total)
        self.dynamic = self.halting is not None or self.fusion is not None  # may a row stop before the top?
        for s, position in zip(sequence.tolist(), positions.tolist(), strict=True):  # squeezing out entries needs it
            cache.next_position[s] = position + 1

    def _keeps_exits(self) -> bool:
        halting = self.halting
        return halting is not None and (halting.state == "translated" or halting.kv_policy == "recompute")

    def _take_owed(self, owed: OwedRows) -> None:
        rows = self.rows
        here = torch.isin(owed.sequence, rows.sequence)
        place = {s: i for i, s in enumerate(dict.fromkeys(rows.sequence.tolist()))}
        sequence = torch.cat((owed.sequence[here], rows.sequence))
        positions = torch.cat((owed.positions[here], rows.positions))
        key = torch.tensor([place[s] for s in sequence.tolist()]) * 2**32 + positions
        order = torch.argsort(key)
        hidden = torch.cat((owed.hidden[here], rows.hidden))[order]
        bits = torch.cat((owed.bits[here], torch.full((len(rows.hidden),), 8, dtype=torch.int32)))[order]
        count = int(here.sum())
        self.fresh = torch.cat((torch.zeros(count, dtype=torch.bool), self.fresh))[order]
        self.next_layer = torch.cat((owed.layer[here], self.next_layer))[order]
        assert self.overrides is not None  # halting is on where rows are owed
        self.overrides = torch.cat((torch.full((count,), -1, dtype=torch.int8), self.overrides))[order]
        active = self.fresh.nonzero().squeeze(1).int()
        self.rows = Rows(hidden, positions[order], sequence[order], active, bits if self.amq is not None else None)
        self.cache.owed = OwedRows(**{name: tensor[~here] for name, tensor in vars(owed).items()})

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> torch.Tensor:
        stages, rows = self.stages, self.rows
        stages.begin(rows)
        index = 0
        while index < self.layers:
            if self.dynamic:
                self._rejoin(index)
            if self.fusion is not None and index == self.fusion.layer:
                with span(f"layer {index} fusion"):
                    self._fuse()
            if self.amq is not None and index == self.amq.layer:
                with span(f"layer {index} adaptive bits"):
                    self._choose_bits()
            if not len(rows.active) and not self._leaves_entries() and not self._may_rejoin(index):
                break
            index = self._advance(index)
        return self._finish()

    def _advance(self, index: int) -> int:
        """Runs layers from ``index`` on; returns the next one. As many as need no decision before, in or after them,
        else one."""
        last = self._undisturbed(index)
        if last <= index:
            self._layer(index)
            return index + 1
        self.stages.run_layers(index, last, self.cache)
        self.entries_written += (last - index) * len(self.rows.active)
        self.unbooked += last - index
        return last

    def _undisturbed(self, index: int) -> int:
        """The first layer from ``index`` on that some mechanism has a part in."""
        if enabled():  # a profiler wants to see the stages
            return index
        last = self.layers
        if self.halting is not None:
            if self.halting.kv_policy == "recompute":
                return index
            last = min(last, self.halting.min_layer - 1)
        if self.fusion is not None and (index < self.fusion.layer or self.fusion.scope == "cache"):
            last = min(last, self.fusion.layer - 1)  # whose attention may weigh the rows
        if self.amq is not None and index < self.amq.layer:
            last = min(last, self.amq.layer)
        return last

    def _layer(self, index: int) -> None:
        stages, rows, cache = self.stages, self.rows, self.cache.layers[index]
        entries = self._entries(index, cache)
        if len(rows.active):
            slots = None
            if entries is not None:
                slots = entries.slots[self.running[entries.rows]]
            stages.attention_input(index, cache, slots)
        if entries is not None:
            self._leave(index, cache, entries)
            if self._merges(index):
                model, which = self.decoder.model, entries.rows.long()
                self.cache.fusion.merge(
                    index,
                    cache,
                    entries.slots,
                    entries.merged,
                    rows.sequence[which],
                    rows.positions[which],
                    self.group[which],
                    self.weight[which],
                    model.rotary_cos,
                    model.rotary_sin,
                )
        self.entries_written += len(rows.active) if entries is None else len(entries.rows)
        if not len(rows.active):
            return
        weighs = self._weighs(index)
        log_sum_exp = stages.attention(index, cache, mass=weighs)
        if weighs:
            assert log_sum_exp is not None and entries is not None
            self._attention_mass(cache, entries, log_sum_exp)
        stages.attention_output(index)
        stages.mlp_input(index)
        stages.mlp_output(index)
        self.unbooked += 1
        if self.halting is not None:
            if self.halting.kv_policy == "recompute":
                self.next_layer[rows.active] = index + 1
            with span(f"layer {index} halting"):
                self._halt(index + 1)

    def _account(self) -> None:
        """Books the layers that ran since the last call. Called before active rows, their standing or bits change: per
        layer it would cost more than a small model's kernels."""
        rows, layers, self.unbooked = self.rows, self.unbooked, 0
        if not layers:
            return
        if self.dynamic:
            ghosts = self.exited[rows.active]
            self.recomputed += layers * int(ghosts.sum())
            self.ran[rows.active[~ghosts]] += layers
        high = len(rows.active) if rows.bits is None else int((rows.at_active(rows.bits) == 8).sum())
        self.bit_rows[8] += layers * high
        self.bit_rows[4] += layers * (len(rows.active) - high)

    def _set_running(self, running: torch.Tensor) -> None:
        self._account()
        self.running = running
        self.rows.active = running.nonzero().squeeze(1).int()
        self.stages.begin(self.rows)

    # --- halting ------------------------------------------------------------------------------------------------------

    def _halt(self, done: int) -> None:
        """Judges the active rows after ``done`` layers."""
        halting, rows = self.halting, self.rows
        assert halting is not None
        last = halting.resume_layer or self.layers
        if not halting.min_layer <= done < last:
            return
        params = ops.HaltingParams(
            halting.drift_threshold, halting.drift_norm == "relative", halting.entropy_threshold, halting.sink_tokens
        )
        entropy = None
        if halting.entropy_threshold is not None:
            entropy = self.stages.entropy(halting.entropy_source, self.decoder.probe(halting.entropy_source, done))
        going_on = self.stages.halt(HaltingTest(params, entropy, self.overrides))
        if len(going_on) == len(rows.active):
            return
        self._account()
        staying = torch.zeros_like(self.running)
        staying[going_on] = True
        halted = self.running & ~staying
        self.exited |= halted
        assert self.overrides is not None
        self.overrides = torch.where(halted, -1, self.overrides).to(torch.int8)  # it is judged once
        if self.exit_hidden is not None:
            state = rows.hidden[halted]
            if halting.state == "translated":
                tensors = self.decoder.tensors
                weight, bias = tensors[f"translator.{done}.weight"], tensors[f"translator.{done}.bias"]
                state = torch.addmm(bias.float(), state, weight.float().T)
            self.exit_hidden[halted] = state
        self._set_running(staying)

    def _may_rejoin(self, index: int) -> bool:
        return self.halting is not None and self.halting.resume_layer is not None and index < self.halting.resume_layer

    def _rejoin(self, index: int) -> None:
        """Rows that come back at this layer: at ``resume_layer``, or because a later token needs their entries."""
        halting = self.halting
        if halting is None or not bool(self.exited.any()):
            return
        if index == halting.resume_layer:
            self._account()
            back = self.exited & ~self.fused
            if self.exit_hidden is not None:
                self.rows.hidden[back] = self.exit_hidden[back]
            self.exited &= ~back
            self._set_running(self.running | back)
        elif halting.kv_policy == "recompute":
            rows = self.rows
            live = self.running & ~self.exited
            deepest = torch.full((self.cache.sequences,), -1, dtype=torch.int32)
            deepest.scatter_reduce_(0, rows.sequence[live].long(), rows.positions[live], "amax")
            needed = self.exited & (self.next_layer == index) & (rows.positions < deepest[rows.sequence])
            self._set_running(live | needed)

    # --- cache entries ------------------------------------------------------------------------------------------------

    def _leaves_entries(self) -> bool:
        return self.halting is not None and self.halting.kv_policy in ("zero", "propagate")

    def _merges(self, index: int) -> bool:
        return self.fusion is not None and self.fusion.scope == "cache" and index >= self.fusion.layer

    def _weighs(self, index: int) -> bool:
        return self.fusion is not None and self.fusion.weights == "attention" and index == self.fusion.layer - 1

    def _entries(self, index: int, cache: LayerCache) -> _Entries | None:
        """Slots for all rows that leave an entry, in order of position; None where stage 1 may take them by itself."""
        merges = self._merges(index)
        if not (merges or self._weighs(index) or (self._leaves_entries() and bool(self.exited.any()))):
            return None
        leaving = self.running | (self.exited & ~self.fused) if self._leaves_entries() else self.running
        rows = leaving.nonzero().squeeze(1).int()
        if not len(rows):
            return None
        sequence, positions = self.rows.sequence[rows], self.rows.positions[rows]
        if not merges:
            return _Entries(rows, cache.allocate(sequence, positions), {})
        joins = self.cache.fusion.joins(index, sequence, self.group[rows])
        # A merged entry comes right behind its last member's own and is seen from the next position on.
        copies = joins.int() + 1
        own = copies.cumsum(0) - copies
        visible = positions.repeat_interleave(copies)
        visible[(own + 1)[copies == 2]] += 1
        slots = cache.allocate(sequence.repeat_interleave(copies), visible)
        merged = {i: int(slots[own[i] + 1]) for i in joins.nonzero().squeeze(1).tolist()}
        return _Entries(rows, slots[own], merged)

    def _leave(self, index: int, cache: LayerCache, entries: _Entries) -> None:
        """Entries of halted rows: zeros, or keys and values of their halted state."""
        gone = ~self.running[entries.rows]
        which, slots = entries.rows[gone], entries.slots[gone]
        if not len(which):
            return
        assert self.halting is not None
        if self.halting.kv_policy == "propagate":
            self.stages.write_kv(index, cache, which, slots)
        else:
            spec = self.decoder.model.spec
            zeros = torch.zeros(len(which), spec.num_kv_heads, spec.head_size)
            cache.write(zeros, zeros, slots)

    # --- fusion -------------------------------------------------------------------------------------------------------

    def _fuse(self) -> None:
        fusion, rows = self.fusion, self.rows
        assert fusion is not None
        if not len(rows.active):
            return
        if fusion.weights == "norm":
            self.weight = torch.linalg.vector_norm(rows.hidden, dim=-1)
        self.weight = self.weight.clamp_min(1e-12)
        if fusion.scope == "prompt":
            self._fuse_prompt()
        else:
            self._group_entries()

    def _fuse_prompt(self) -> None:
        """Adjacent rows nobody asked logits of become one, in the row of the last; never a sequence's newest row."""
        fusion, rows = self.fusion, self.rows
        assert fusion is not None
        active, sequence = rows.active.long(), rows.at_active(rows.sequence)
        newest = torch.ones(len(active), dtype=torch.bool)
        newest[:-1] = sequence[1:] != sequence[:-1]
        want = torch.zeros_like(self.fresh)
        want[self.fresh] = self.want
        fusible = ~want[active] & ~newest & ~self.exited[active]
        hidden = rows.hidden[active]
        group, _ = ops.fusion_groups(
            hidden,
            rows.at_active(rows.positions),
            sequence,
            fusible,
            fusion.threshold,
            fusion.norm == "relative",
            fusion.max_group,
        )
        last = torch.ones(len(active), dtype=torch.bool)
        last[:-1] = group[1:] != group[:-1]
        if bool(last.all()):
            return
        fused = ops.fusion_reduce(hidden, self.weight[active], group)
        several = group.bincount() > 1
        rows.hidden[active[last][several]] = fused[several]
        self.fused[active[~last]] = True
        self.joined += int((~last).sum())
        self._set_running(self.running & ~self.fused)

    def _group_entries(self) -> None:
        """Numbers the groups that entries of this layer and those above will merge in."""
        fusion, rows = self.fusion, self.rows
        assert fusion is not None
        sequence = rows.at_active(rows.sequence)
        for s in sequence.unique().tolist():
            mine = rows.active[sequence == s].long()
            number, joined = self.cache.fusion.number(fusion, s, rows.hidden[mine], rows.positions[mine])
            self.group[mine] = number
            self.joined += joined

    def _attention_mass(self, cache: LayerCache, entries: _Entries, log_sum_exp: torch.Tensor) -> None:
        """Weights for fusion: the attention that a row's entry got, mean over heads, from its own query (scope cache:
        it merges right after) or from all queries of the pass (scope prompt)."""
        fusion, rows, spec = self.fusion, self.rows, self.decoder.model.spec
        assert fusion is not None
        slots = entries.slots[self.running[entries.rows]]
        keys = cache.keys(slots).repeat_interleave(spec.num_heads // spec.num_kv_heads, 1)  # [count, heads, D]
        queries = self.stages.queries() * spec.attention_scale
        if fusion.scope == "cache":
            mass = ((queries * keys).sum(-1) - log_sum_exp).exp().mean(-1)
        else:
            mass = torch.empty(len(slots))
            positions, sequence = rows.at_active(rows.positions), rows.at_active(rows.sequence)
            for s in sequence.unique().tolist():
                mine = sequence == s
                scores = torch.einsum("qhd,khd->qkh", queries[mine], keys[mine]) - log_sum_exp[mine][:, None]
                seen = positions[mine][:, None] >= positions[mine][None]
                mass[mine] = (scores.exp() * seen[..., None]).sum(0).mean(-1)
        self.weight[rows.active] = mass

    # --- adaptive bits ------------------------------------------------------------------------------------------------

    def _choose_bits(self) -> None:
        self._account()
        _choose_bits(self.decoder, self.stages, self.rows)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _finish(self) -> torch.Tensor:
        rows = self.rows
        if self.halting is not None and self.halting.kv_policy == "recompute":
            self._store_owed()
        if self.exit_hidden is not None:
            rows.hidden[self.exited] = self.exit_hidden[self.exited]
        if self.cache.fusion.tails:
            self.cache.reclaim()
        index = self.fresh.nonzero().squeeze(1)[self.want].int()
        if not len(index):
            return torch.empty(0, self.decoder.model.spec.vocab_size)
        return self.stages.head(index)

    def _store_owed(self) -> None:
        rows = self.rows
        owes = self.exited & (self.next_layer < self.layers)
        bits = rows.bits if rows.bits is not None else torch.full((len(owes),), 8, dtype=torch.int32)
        mine = OwedRows(rows.hidden[owes], rows.positions[owes], rows.sequence[owes], self.next_layer[owes], bits[owes])
        others = self.cache.owed
        if others is not None:
            mine = OwedRows(**{name: torch.cat((getattr(others, name), tensor)) for name, tensor in vars(mine).items()})
        self.cache.owed = mine

    def count(self, stats: GenerationStats) -> None:
        """Adds what this pass did."""
        self._account()
        model, work, fresh = self.decoder.model, self.stages.work(), self.fresh
        tokens = int(fresh.sum())
        depth = self.ran[fresh] if self.dynamic else torch.full((tokens,), self.layers)
        fused_away = int(self.fused.sum()) * (self.layers - self.fusion.layer) if self.fusion is not None else 0
        stats.layers_run += int(depth.sum()) + self.recomputed
        stats.layers_recomputed += self.recomputed
        stats.layers_full += tokens * self.layers
        stats.depth_histogram.update(depth.tolist())
        bits = WEIGHT_BITS[model.precision]
        if bits != 8:
            stats.bits_histogram[bits] += self.bit_rows[8]
        else:
            for key, number in self.bit_rows.items():
                if number:
                    stats.bits_histogram[key] += number
        stats.kv_entries_written += self.entries_written
        stats.kv_entries_fused += fused_away
        stats.kv_entries_skipped += tokens * self.layers - self.entries_written - fused_away
        stats.tokens_fused += self.joined
        self.decoder.book_work(stats, work, self.rows.positions[fresh].tolist(), int(self.want.sum()))
        if self.decoder.config.trace:
            self._trace(stats, depth)

    def _trace(self, stats: GenerationStats, depth: torch.Tensor) -> None:
        rows, fresh = self.rows, self.fresh
        own_bits = WEIGHT_BITS[self.decoder.model.precision]
        bits = rows.bits[fresh].tolist() if rows.bits is not None else [own_bits] * int(fresh.sum())
        columns = {
            "sequence": rows.sequence[fresh].tolist(),
            "position": rows.positions[fresh].tolist(),
            "token": self.ids.tolist(),
            "depth": depth.tolist(),
            "bits": bits,
            "halted": self.exited[fresh].tolist(),
            "fused": self.fused[fresh].tolist(),
        }
        stats.trace.extend(dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
