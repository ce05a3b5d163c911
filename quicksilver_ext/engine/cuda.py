"""The stages as CUDA kernels, and the decode step that never waits for the host.

The same code runs the kernels on a GPU (``_C.cuda``, tensors there) and on the emulator (``_C.emulated``, tensors on
the CPU; for tests). A step keeps the number of active rows on the device, so nothing in it depends on a value that only
the device knows, and a GPU replays it from a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import _C, profiling
from ..kernels import ops
from ..kernels.native import native_layer, native_linear, native_norm, point, pointer
from ..mechanisms.base import Rows
from ..profiling import ranged
from ..weights.model import Layer, Linear, Model
from .batch import Batch
from .composed import ComposedStages, visible_entries
from .kv_cache import BLOCK_SIZE, KVCache, LayerCache
from .plan import Plan
from .stages import Step, Work

ALIGNMENT = 256  # of work memory, in bytes


class WorkMemory:
    """Work memory of the stages for up to ``rows`` rows, and a cache of ``sequences`` sequences (not fewer: attention's
    counters would lie elsewhere) of up to ``entries`` entries."""

    def __init__(self, kernels: Any, layer: Any, device: torch.device, sizes: tuple[int, int, int]) -> None:
        self.sizes = sizes
        nbytes = kernels.Work.nbytes(layer, *sizes)
        self._buffer = torch.zeros(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
        begin = -self._buffer.data_ptr() % ALIGNMENT + self._buffer.data_ptr()
        self.native = kernels.Work(begin, device.index or 0, layer, *sizes)

    def floats(self, address: int, *shape: int) -> torch.Tensor:
        """The fp32 array at an address inside."""
        begin = address - self._buffer.data_ptr()
        size = 4 * torch.Size(shape).numel()
        return self._buffer[begin : begin + size].view(torch.float32).view(shape)


def entries_of(cache: LayerCache) -> tuple[int, int]:
    """Sequences, and the most entries that one of them may have."""
    sequences, blocks = cache.block_table.shape
    return sequences, blocks * BLOCK_SIZE


class CudaStages(ComposedStages):
    """Stages as fused CUDA kernels on packed weights: one launch each for up to ``DECODE_ROWS`` rows."""

    def __init__(self, model: Model, kernels: Any) -> None:
        super().__init__(model)
        self.kernels = kernels
        self.layers = [native_layer(model, index) for index in range(len(model.layers))]
        self.final_norm, self.final_head = native_norm(model.final_norm), native_linear(model.head)
        self._rows = _C.Rows()
        self._memory: WorkMemory | None = None
        self._aside: WorkMemory | None = None  # for what may run within a layer: the head, other rows' entries
        self._reads_low = True

    def _large_enough(self, have: WorkMemory | None, rows: int, sequences: int, entries: int) -> WorkMemory:
        """``have`` where it serves so many rows, sequences and entries, else a new one."""
        if have is not None and have.sizes[1] == sequences:
            if have.sizes[0] >= rows and have.sizes[2] >= entries:
                return have
            rows, entries = max(rows, have.sizes[0]), max(entries, have.sizes[2])
        return WorkMemory(self.kernels, self.layers[0], self.device, (rows, sequences, entries))

    def begin(self, rows: Rows) -> None:
        super().begin(rows)
        point(self._rows, rows, rows.active)
        self._reads_low = rows.bits is None or bool((rows.at_active(rows.bits) == 8).any())

    def _book(self, rows: int, *linears: Linear | None) -> None:
        for linear in linears:
            if linear is not None:
                self._count(linear, rows, self._reads_low)

    def attention_input(self, index: int, cache: LayerCache, slots: torch.Tensor | None) -> None:
        layer, count = self.model.layers[index], len(self.rows.active)
        self._memory = memory = self._large_enough(self._memory, len(self.rows.hidden), *entries_of(cache))
        self._rows.slots = pointer(slots)
        self.kernels.attention_input(self.layers[index], self._rows, 0, cache.native, memory.native)
        self._previous = memory.floats(memory.native.previous, count, self.model.spec.hidden_size)
        self._book(count, layer.q, layer.k, layer.v)

    def write_kv(self, index: int, cache: LayerCache, which: torch.Tensor, slots: torch.Tensor) -> None:
        rows, layer = _C.Rows(), self.model.layers[index]
        point(rows, self.rows, which)
        rows.slots = slots.data_ptr()
        self._aside = self._large_enough(self._aside, len(which), 1, BLOCK_SIZE)
        self.kernels.write_kv(self.layers[index], rows, 0, cache.native, self._aside.native)
        self._book(len(which), layer.k, layer.v)

    def attention(self, index: int, cache: LayerCache, mass: bool = False) -> torch.Tensor | None:
        rows, spec = self.rows, self.model.spec
        log_sum_exp = None
        if mass:
            shape = (len(rows.active), spec.num_heads)
            log_sum_exp = torch.empty(shape, dtype=torch.float32, device=self.device)
        assert self._memory is not None
        self.kernels.attention(
            self.layers[index], self._rows, 0, cache.native, self._memory.native, pointer(log_sum_exp)
        )
        self._count_pairs(cache)
        return log_sum_exp

    def queries(self) -> torch.Tensor:
        spec, memory = self.model.spec, self._memory
        assert memory is not None
        return memory.floats(memory.native.q, len(self.rows.active), spec.num_heads, spec.head_size)

    def attention_output(self, index: int) -> None:
        assert self._memory is not None
        self.kernels.attention_output(self.layers[index], self._rows, 0, self._memory.native)
        self._book(len(self.rows.active), self.model.layers[index].o)

    def mlp_input(self, index: int) -> None:
        assert self._memory is not None
        layer = self.model.layers[index]
        self.kernels.mlp_input(self.layers[index], self._rows, 0, self._memory.native)
        self._book(len(self.rows.active), layer.gate, layer.up)

    def mlp_output(self, index: int) -> None:
        assert self._memory is not None
        self.kernels.mlp_output(self.layers[index], self._rows, 0, self._memory.native, 0, None)
        self._book(len(self.rows.active), self.model.layers[index].down)

    def head(self, index: torch.Tensor) -> torch.Tensor:
        rows, spec = _C.Rows(), self.model.spec
        point(rows, self.rows, index)
        self._aside = self._large_enough(self._aside, len(index), 1, BLOCK_SIZE)
        logits = torch.empty(len(index), spec.vocab_size, dtype=torch.float32, device=self.device)
        self.kernels.lm_head(
            self.final_norm,
            self.final_head,
            rows,
            0,
            spec.hidden_size,
            logits.data_ptr(),
            spec.vocab_size,
            self._aside.native,
        )
        self.book_head(len(index))
        return logits

    def book_layer(self, layer: Layer, rows: int, reads_low: bool) -> None:
        """Books a layer's products of ``rows`` rows."""
        for linear in layer.linears():
            self._count(linear, rows, reads_low)

    def book_head(self, rows: int) -> None:
        self._count(self.model.head, rows, True)

    def step(self, plan: Plan, batch: Batch, cache: KVCache, log: bool) -> Step | None:
        """The pass waits for the device only at its end; on a GPU its launches are replayed from a graph that the cache
        keeps, one for each power of two of rows."""
        rows = len(batch)
        if plan.step is None or log or rows > self.kernels.DECODE_ROWS or not batch.one_each:
            return None
        key = (plan, 1 << (rows - 1).bit_length())
        if key not in cache.graphs:
            cache.graphs[key] = CapturedStep(self, plan, cache, key[1])
        step: CapturedStep = cache.graphs[key]
        step.run(batch)
        depth, bits, work = step.results(rows)
        return Step(step.logits[:rows].clone(), depth, bits, work)


class CapturedStep:
    """One new token for each of up to ``rows`` sequences of a cache: nine launches a layer, then the head.

    Rows that halt leave the device-side list of active rows at once; where none is left, the kernels of the layers
    above return as they start. The results stay on the device: ``logits`` [rows, V], ``depth`` [rows] (layers run),
    ``bits`` [rows], ``pairs`` (attention's (query head, entry) pairs).
    """

    def __init__(self, stages: CudaStages, plan: Plan, cache: KVCache, rows: int) -> None:
        assert plan.step is not None
        self.stages, self.params, self.cache = stages, plan.step, cache
        spec, device = stages.model.spec, stages.device

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions, self.sequence, self.depth, self.active = ints(rows), ints(rows), ints(rows), ints(rows)
        self.total, self.count = ints(1), ints(1)
        self.halted = torch.zeros(rows, dtype=torch.uint8, device=device)
        self.every_row = torch.arange(rows, dtype=torch.int32, device=device)
        self.layer_numbers = torch.arange(spec.num_layers, dtype=torch.int32, device=device)
        self.hidden = torch.zeros(rows, spec.hidden_size, dtype=torch.float32, device=device)
        self.bits = torch.full((rows,), 8, dtype=torch.int32, device=device) if self.params.amq is not None else None
        self.logits = torch.zeros(rows, spec.vocab_size, dtype=torch.float32, device=device)
        self.pairs = torch.zeros(1, dtype=torch.int64, device=device)

        self._memory = WorkMemory(stages.kernels, stages.layers[0], device, (rows, *entries_of(cache.layers[0])))
        self._rows, self._all_rows = _C.Rows(), _C.Rows()
        batch = Rows(self.hidden, self.positions, self.sequence, self.active, self.bits)
        point(self._rows, batch, self.active)
        point(self._all_rows, batch, self.every_row)
        self._halting = self._native_halting()
        self._graph: Any = None
        self._has_run = False

    def _native_halting(self) -> Any:
        halting = self.params.halting
        if halting is None:
            return None
        native = self.stages.kernels.Halting()
        native.drift_threshold, native.relative = halting.drift_threshold, halting.relative
        native.tests_entropy = halting.entropy_threshold is not None
        native.entropy_threshold = halting.entropy_threshold or 0.0
        native.sink_tokens = halting.sink_tokens
        native.halted, native.active, native.count = (t.data_ptr() for t in (self.halted, self.active, self.count))
        return native

    def run(self, batch: Batch) -> None:
        """Up to ``rows`` rows."""
        n = len(batch)
        self.total.fill_(n)
        for tensor, values in (
            (self.ids, batch.ids),
            (self.positions, batch.positions),
            (self.sequence, batch.sequence),
        ):
            tensor[:n].copy_(torch.tensor(values, dtype=tensor.dtype, device="cpu"), non_blocking=True)
        if self.stages.device.type != "cuda" or not self._has_run or profiling.enabled():
            self._launch()  # on a GPU the first time too: what PyTorch sets up once can't be captured
            self._has_run = True
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._launch()
        self._graph.replay()

    def _launch(self) -> None:
        stages, model, work = self.stages, self.stages.model, self._memory.native
        rows, count, halting, amq = self._rows, self.count.data_ptr(), self.params.halting, self.params.amq
        self.count.copy_(self.total)
        self.active.copy_(self.every_row)
        self.halted.zero_()
        self.depth.zero_()
        self.hidden.copy_(model.embedding[self.ids])
        if model.position_embedding is not None:
            self.hidden.add_(model.position_embedding[self.positions])
        if self.bits is not None:
            self.bits.fill_(8)
        last = len(stages.layers)
        for index, layer in enumerate(stages.layers):
            if amq is not None and self.bits is not None and index == amq.layer:
                entropy = ops.softmax_entropy(self.hidden) / amq.full_entropy
                sinks = self.positions < amq.sink_tokens
                self.bits.copy_(torch.where((entropy >= amq.threshold) | sinks, 8, 4))
            cache, kernels = self.cache.native[index], ranged(stages.kernels, index)
            judged = halting is not None and halting.min_layer <= index + 1 < last
            kernels.attention_input(layer, rows, count, cache, work)
            kernels.attention(layer, rows, count, cache, work, 0)
            kernels.attention_output(layer, rows, count, work)
            kernels.mlp_input(layer, rows, count, work)
            kernels.mlp_output(layer, rows, count, work, self.depth.data_ptr(), self._halting if judged else None)
        ranged(stages.kernels).lm_head(
            stages.final_norm,
            stages.final_head,
            self._all_rows,
            self.total.data_ptr(),
            model.spec.hidden_size,
            self.logits.data_ptr(),
            model.spec.vocab_size,
            work,
        )
        # A row that ran a layer saw all of its sequence's entries there, its own included, but those out of a window.
        ran = self.layer_numbers[:, None] < self.depth[None]
        seen = self.cache.lengths[:, self.sequence]
        if self.cache.until is not None:
            layers = self.cache.layers
            seen = torch.stack([visible_entries(layer, self.positions, self.sequence) for layer in layers])
        torch.sum(seen * ran, dim=(0, 1), dtype=torch.int64, out=self.pairs[0])
        self.pairs.mul_(model.spec.num_heads)

    def results(self, rows: int) -> tuple[list[int], list[int] | None, Work]:
        """Depth, bits and work of the last run, of ``rows`` rows. Waits for the device."""
        stages, layers, amq = self.stages, self.stages.model.layers, self.params.amq
        depth = self.depth[:rows].tolist()
        bits = None if self.bits is None else self.bits[:rows].tolist()
        stages.work()
        for index, layer in enumerate(layers):
            # Before AMQ has chosen, all rows take all bits.
            chosen = bits if bits is not None and amq is not None and index >= amq.layer else [8] * rows
            active = [width for ran, width in zip(depth, chosen, strict=True) if ran > index]
            if active:
                stages.book_layer(layer, len(active), 8 in active)
        stages.book_head(rows)
        work = stages.work()
        work.attention_pairs = int(self.pairs)
        return depth, bits, work
