"""The one loop that takes a batch through the layers.

A batch is ragged and packed: rows grouped by sequence, positions ascending, continuing where the cache ended. The rows
of one sequence may come in one pass or one by one: the answer is the same to the bit on packed weights (fusion in scope
``prompt`` apart, which needs to see the prompt as one).
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C, profiling
from ..kernels import ops
from ..mechanisms.base import Mechanism, Pass, Rows
from ..profiling import ranged
from ..stats import GenerationStats
from ..weights.matryoshka import MatryoshkaWeight
from ..weights.model import WEIGHT_BITS, Model
from .batch import Batch
from .composed import ComposedStages
from .cpu import CpuStages
from .cuda import CudaStages
from .kv_cache import KV_CACHE_DTYPES, KVCache, check_kv_cache_dtype
from .observer import LayerEvent, Observer, tell_step
from .plan import Plan
from .stages import Stages, Step, Work


@dataclass
class Record:
    """What a pass did to its new tokens, and for older ones: what is booked."""

    batch: Batch
    depth: list[int]
    bits: list[int] | None  # of each token, from AMQ's layer on
    bit_rows: dict[int, int]  # row-layers by bits, of those that the weights offer 8 or 4
    entries: int
    work: Work
    halted: list[bool] | None = None  # None: those that did not come to the top
    fused: list[bool] | None = None
    recomputed: int = 0
    joined: int = 0
    fused_away: int = 0


class Runner:
    """A model, ready to run any plan. Passes of several threads take turns; a forked child starts afresh."""

    def __init__(self, model: Model, kv_cache_dtype: str | None = None) -> None:
        """``kv_cache_dtype``: one of ``KV_CACHE_DTYPES``; None: that of fp32 and bf16 weights, fp16 for packed ones."""
        check_kv_cache_dtype(kv_cache_dtype)
        _C.start_threads(torch.get_num_threads())
        self.model = model
        self.kv_cache_dtype = kv_cache_dtype or {"fp32": "fp32", "bf16": "bf16"}.get(model.precision, "fp16")
        self.device = model.embedding.device
        self._layer_macs = sum(linear.macs for layer in model.layers for linear in layer.linears())
        self.start_afresh()
        _runners.add(self)

    def start_afresh(self) -> None:
        """Without work memory or a lock that another thread could be in the middle of."""
        self._stages: dict[str, Stages] = {}
        self._lock = threading.Lock()

    def stages(self) -> Stages:
        """The executor for the backend in use: fused kernels for packed weights, else composed ones."""
        backend = ops.current_backend()
        if not isinstance(self.model.head.weight, MatryoshkaWeight):
            kind = "composed"
        elif self.device.type == "cuda" or backend == "cuda-emulated":
            kind = "cuda" if self.device.type == "cuda" else "emulated"
        else:
            kind = "cpu" if backend.startswith("cpu") else "composed"
        if kind not in self._stages:
            if kind in ("cuda", "emulated"):
                self._stages[kind] = CudaStages(self.model, getattr(_C, kind))
            else:
                self._stages[kind] = CpuStages(self.model) if kind == "cpu" else ComposedStages(self.model)
        return self._stages[kind]

    def new_cache(self, plan: Plan, sequences: int, capacity: int, keeps: bool = True) -> KVCache:
        """An empty cache for a plan; see KVCache. ``keeps``: whether tokens can be taken back."""
        return plan.new_cache(sequences, capacity, KV_CACHE_DTYPES[self.kv_cache_dtype], keeps)

    @torch.inference_mode()
    def run(
        self,
        plan: Plan,
        batch: Batch,
        cache: KVCache,
        observer: Observer | None = None,
        stats: GenerationStats | None = None,
    ) -> Tensor:
        """Logits [n, V] fp32 of the rows that the batch asks for, in order. They hold until the next run.

        ``stats`` gets what was done. ValueError/IndexError, before anything is written, where the batch doesn't go on
        where the cache ended, or holds what the model can't: see Batch.check. ValueError, the tokens of the pass that
        failed being taken back, where keys or values leave the range of an fp16 cache.
        """
        batch.check(self.model.spec, cache)
        stages, parts = self.stages(), []
        with self._lock:
            for part in batch.passes():
                parts.append(self._pass(plan, stages, part, cache, observer, stats))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _pass(
        self,
        plan: Plan,
        stages: Stages,
        batch: Batch,
        cache: KVCache,
        observer: Observer | None,
        stats: GenerationStats | None,
    ) -> Tensor:
        loops = profiling.enabled() or (observer is not None and observer.wants_states)
        step = None if loops else stages.step(plan, batch, cache, observer is not None)
        if step is not None:
            logits, record = step.logits, self._record_of(plan, batch, step)
        else:
            logits, record = self._loop(plan, stages, batch, cache, observer)
        for s, token in zip(batch.sequence, batch.ids, strict=True):
            cache.tokens[s].append(token)
        if cache.overflowed():
            self._take_back(batch, cache)
            raise ValueError(
                "a key or value is beyond 65504, the range of this fp16 KV cache; use kv_cache_dtype 'bf16', 'fp32' or "
                "'int8'"
            )
        if step is not None and observer is not None:
            tell_step(observer, plan, batch, step)
        if observer is not None:
            observer.end(record.depth)
        if stats is not None:
            self.book(stats, plan, record)
        if step is None:
            cache.reclaim()
        return logits

    @staticmethod
    def _take_back(batch: Batch, cache: KVCache) -> None:
        first = dict(zip(reversed(batch.sequence), reversed(batch.positions), strict=True))
        for s, position in first.items():
            cache.truncate(s, position if cache.keeps else 0)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _loop(
        self, plan: Plan, stages: Stages, batch: Batch, cache: KVCache, observer: Observer | None
    ) -> tuple[Tensor, Record]:
        device, spec = self.device, self.model.spec

        def column(values: list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        stages.work()  # what ran before this pass isn't its work
        positions = column(batch.positions, torch.int32)
        rows = Rows(
            self.embed(column(batch.ids, torch.int64), positions),
            positions,
            column(batch.sequence, torch.int32),
            torch.arange(len(batch), dtype=torch.int32, device=device),
            torch.full((len(batch),), 8, dtype=torch.int32, device=device) if plan.config.amq else None,
        )
        asked = torch.tensor(batch.asked or [True] * len(batch), dtype=torch.bool, device=device)
        overrides = None if batch.overrides is None else column(batch.overrides, torch.int8)
        run = Pass(self.model, ranged(stages), cache, plan.tensors, rows, asked)
        mechanisms = plan.begin(run, overrides)
        if plan.dynamic:
            run.make_masks()
        loop = _Loop(run, mechanisms, observer)
        loop.layers()
        for mechanism in mechanisms:
            mechanism.finish()
        index = rows.active if not plan.dynamic else run.fresh.nonzero().squeeze(1).int()
        index = index if batch.asked is None else index[asked]
        if len(index):
            logits = run.stages.head(index)
        else:
            logits = torch.empty(0, spec.vocab_size, dtype=torch.float32, device=device)
        return logits, self._record(plan, batch, run, loop.entries)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The state [T, d] fp32 that comes into the first layer."""
        hidden = self.model.embedding[ids].float()
        if self.model.position_embedding is not None:
            hidden += self.model.position_embedding[positions]
        return hidden

    # --- what was done ------------------------------------------------------------------------------------------------

    def _record(self, plan: Plan, batch: Batch, run: Pass, entries: int) -> Record:
        run.book()
        bits = None if run.rows.bits is None else run.rows.bits[run.fresh].tolist()
        record = Record(
            batch, [run.layers] * len(batch), bits, run.bit_rows, entries, run.stages.work(),
            recomputed=run.recomputed, joined=run.joined, fused_away=run.fused_away,
        )  # fmt: skip
        if plan.dynamic:
            record.depth = run.ran[run.fresh].tolist()
            record.halted, record.fused = run.exited[run.fresh].tolist(), run.fused[run.fresh].tolist()
        return record

    def _record_of(self, plan: Plan, batch: Batch, step: Step) -> Record:
        ran = sum(step.depth)
        low = 0
        if step.bits is not None and plan.step is not None and plan.step.amq is not None:
            first = plan.step.amq.layer
            low = sum(max(depth - first, 0) for depth, bits in zip(step.depth, step.bits, strict=True) if bits == 4)
        return Record(batch, step.depth, step.bits, {8: ran - low, 4: low}, ran, step.work)

    def book(self, stats: GenerationStats, plan: Plan, record: Record) -> None:
        """Adds a pass to the counts: the one place where anything is counted."""
        batch, layers = record.batch, self.model.spec.num_layers
        tokens, ran = len(batch), sum(record.depth)
        own = WEIGHT_BITS[self.model.precision]
        stats.layers_run += ran + record.recomputed
        stats.layers_recomputed += record.recomputed
        stats.layers_full += tokens * layers
        stats.depth_histogram.update(record.depth)
        for bits, number in record.bit_rows.items():
            if number:
                stats.bits_histogram[bits if bits == 4 else own] += number
        stats.kv_entries_written += record.entries
        stats.kv_entries_fused += record.fused_away
        stats.kv_entries_skipped += tokens * layers - record.entries - record.fused_away
        stats.tokens_fused += record.joined
        logits = tokens if batch.asked is None else sum(batch.asked)
        work, head_size = record.work, self.model.spec.head_size
        stats.flops += 2 * (work.gemm_macs + 2 * head_size * work.attention_pairs)
        stats.flops_full += self.full_flops(batch.positions, logits)
        stats.weight_bytes_read += work.weight_bytes_read
        if plan.config.trace:
            halted = record.halted or [depth < layers for depth in record.depth]
            columns = {
                "sequence": batch.sequence,
                "position": batch.positions,
                "token": batch.ids,
                "depth": record.depth,
                "bits": record.bits or [own] * tokens,
                "halted": halted,
                "fused": record.fused or [False] * tokens,
            }
            stats.trace.extend(
                dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
            )

    def full_flops(self, positions: list[int], logits: int) -> int:
        """FLOPs at full depth, all mechanisms off, of rows at ``positions`` and ``logits`` rows of the head."""
        spec = self.model.spec
        pairs = 0
        for layer in range(spec.num_layers) if spec.windows else (0,):
            window = spec.window_of(layer)
            seen = sum(positions) + len(positions) if window is None else sum(min(p + 1, window) for p in positions)
            pairs += seen * spec.num_heads * (1 if spec.windows else spec.num_layers)
        gemm = self._layer_macs * len(positions) + self.model.head.macs * logits
        return 2 * (gemm + 2 * spec.head_size * pairs)


class _Loop:
    """The layers of one pass, as far as possible without a question to the mechanisms."""

    def __init__(self, run: Pass, mechanisms: list[Mechanism], observer: Observer | None) -> None:
        self.run, self.mechanisms, self.observer = run, mechanisms, observer
        self.by_layer = observer is not None or profiling.enabled()
        self.entries = 0

    def layers(self) -> None:
        run, mechanisms = self.run, self.mechanisms
        run.stages.begin(run.rows)
        index = 0
        while index < run.layers:
            for mechanism in mechanisms:
                mechanism.judged = mechanism.groups = None
                mechanism.before_layer(index)
            if not len(run.rows.active) and not any(mechanism.holds(index) for mechanism in mechanisms):
                return
            last = min((mechanism.next_event(index) for mechanism in mechanisms), default=run.layers)
            if last > index and not self.by_layer:
                if len(run.rows.active):
                    run.stages.run_layers(index, last, run.cache)
                self.entries += (last - index) * len(run.rows.active)
                run.ran_layers(last - index)
                index = last
            else:
                self._layer(index)
                index += 1

    def _layer(self, index: int) -> None:
        run, cache = self.run, self.run.cache.layers[index]
        before = self._before()
        rows, slots = self._entries(index)
        written = len(run.rows.active) if rows is None else len(rows)
        active = len(run.rows.active)
        if active:
            own = None if rows is None or slots is None else slots[run.running[rows]]
            run.stages.attention_input(index, cache, own)
        if rows is not None and slots is not None:
            for mechanism in self.mechanisms:
                mechanism.write_entries(index, cache, rows, slots)
        self.entries += written
        if not active:
            return
        listeners = [mechanism for mechanism in self.mechanisms if mechanism.wants_log_sum_exp(index)]
        log_sum_exp = run.stages.attention(index, cache, mass=bool(listeners))
        for mechanism in listeners:
            assert log_sum_exp is not None and rows is not None and slots is not None
            mechanism.after_attention(index, cache, rows, slots, log_sum_exp)
        run.stages.attention_output(index)
        run.stages.mlp_input(index)
        run.stages.mlp_output(index)
        run.ran_layers(1)
        ran = run.rows.active
        for mechanism in self.mechanisms:
            mechanism.after_layer(index)
        if self.observer is not None:
            self._tell(index, ran, written, before)

    def _entries(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """All rows that leave an entry, in order of position, and their slots; None where stage 1 may take the active
        ones' by itself."""
        run, layer_cache = self.run, self.run.cache.layers[index]
        more = [mask for mechanism in self.mechanisms if (mask := mechanism.leaving(index)) is not None]
        giving = [m for m in self.mechanisms if m.wants_slots(index)]
        if not more and not giving:
            return None, None
        leaving = run.running
        for mask in more:
            leaving = leaving | mask
        rows = leaving.nonzero().squeeze(1).int()
        if not len(rows):
            return None, None
        for mechanism in self.mechanisms:
            slots = mechanism.slots(index, layer_cache, rows)
            if slots is not None:
                return rows, slots
        return rows, layer_cache.allocate(run.rows.sequence[rows], run.rows.positions[rows])

    def _before(self) -> Tensor | None:
        if self.observer is None or not self.observer.wants_states:
            return None
        return self.run.rows.hidden[self.run.rows.active]

    def _tell(self, index: int, ran: Tensor, entries: int, before: Tensor | None) -> None:
        run, rows = self.run, self.run.rows
        assert self.observer is not None
        measured = {name: torch.full((len(ran),), torch.nan, dtype=torch.float32, device=run.device)
                    for name in ("drift", "entropy")}  # fmt: skip
        for mechanism in self.mechanisms:
            for name, values in measured.items():
                found = None if mechanism.judged is None else getattr(mechanism.judged, name)
                if found is not None:
                    values.copy_(found)
        halted = torch.zeros(len(ran), dtype=torch.bool, device=run.device)
        if len(rows.active) < len(ran):
            halted = ~torch.isin(ran, rows.active)
        bits = torch.full((len(ran),), WEIGHT_BITS[run.model.precision], dtype=torch.int32, device=run.device)
        groups = [mechanism.groups for mechanism in self.mechanisms if mechanism.groups is not None]
        event = LayerEvent(
            layer=index,
            sequence=rows.sequence[ran],
            positions=rows.positions[ran],
            drift=measured["drift"],
            entropy=measured["entropy"],
            bits=bits if rows.bits is None else rows.bits[ran],
            halted=halted,
            group=groups[0] if groups else None,
            entries=entries,
            before=before,
            after=None if before is None else rows.hidden[ran],
        )
        self.observer.layer(event)


_runners: weakref.WeakSet[Runner] = weakref.WeakSet()


def _after_fork() -> None:
    for runner in list(_runners):
        runner.start_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
