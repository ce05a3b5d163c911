"""The stages as fused CPU kernels on packed weights, and a decode step as one call of them."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch

from .. import _C
from ..kernels.native import native_layer, native_linear, native_norm, point, pointer
from ..mechanisms.base import Rows
from ..mechanisms.halting import HaltingTest
from ..weights.model import Model
from .batch import Batch
from .kv_cache import KVCache, LayerCache
from .plan import Plan
from .stages import Stages, Step, Work, full_cache

# Rows of a step that is one call: beyond them Python's part is small beside the kernels'.
STEP_ROWS = 64


class CpuStages(Stages):
    """Stages as fused CPU kernels on packed weights. Pointers are handed over once per layer and pass, not per call."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.layers = [native_layer(model, index) for index in range(len(model.layers))]
        self.final_norm = native_norm(model.final_norm)
        self.final_head = native_linear(model.head)
        self._work = _C.Workspace()
        self._rows = _C.Rows()
        self._head_work = _C.Workspace()  # of its own: the head may run in the middle of a layer
        self._seen = _C.counters()
        self._steps: tuple[Plan | None, Any] = (None, None)
        self._logits = torch.empty(0, model.spec.vocab_size, dtype=torch.float32, device="cpu")

    def begin(self, rows: Rows) -> None:
        super().begin(rows)
        point(self._rows, rows, rows.active)

    def work(self) -> Work:
        now, before = _C.counters(), self._seen
        self._seen = now
        return Work(
            now.gemm_macs - before.gemm_macs,
            now.attention_pairs - before.attention_pairs,
            now.weight_bytes_read - before.weight_bytes_read,
        )

    def attention_input(self, index: int, cache: LayerCache, slots: torch.Tensor | None) -> None:
        self._rows.slots = pointer(slots)
        if not _C.attention_input(self.layers[index], self._rows, cache.native, self._work):
            raise full_cache()

    def write_kv(self, index: int, cache: LayerCache, which: torch.Tensor, slots: torch.Tensor) -> None:
        rows = _C.Rows()
        point(rows, self.rows, which)
        rows.slots = slots.data_ptr()
        _C.write_kv(self.layers[index], rows, cache.native, _C.Workspace())

    def attention(self, index: int, cache: LayerCache, mass: bool = False) -> torch.Tensor | None:
        log_sum_exp = None
        if mass:
            shape = (len(self.rows.active), self.model.spec.num_heads)
            log_sum_exp = torch.empty(shape, dtype=torch.float32, device="cpu")
        _C.attention(self.layers[index], self._rows, cache.native, self._work, pointer(log_sum_exp))
        return log_sum_exp

    def _floats(self, address: int, *shape: int) -> torch.Tensor:
        memory = (ctypes.c_float * math.prod(shape)).from_address(address)
        return torch.frombuffer(memory, dtype=torch.float32).view(shape)

    def queries(self) -> torch.Tensor:
        spec = self.model.spec
        return self._floats(self._work.q, len(self.rows.active), spec.num_heads, spec.head_size)

    @property
    def previous(self) -> torch.Tensor:
        return self._floats(self._work.previous, len(self.rows.active), self.model.spec.hidden_size)

    def attention_output(self, index: int) -> None:
        _C.attention_output(self.layers[index], self._rows, self._work)

    def mlp_input(self, index: int) -> None:
        _C.mlp_input(self.layers[index], self._rows, self._work)

    def mlp_output(self, index: int) -> None:
        _C.mlp_output(self.layers[index], self._rows, self._work)

    def run_layers(self, first: int, last: int, cache: KVCache) -> None:
        self._rows.slots = 0
        if _C.run_layers(self.layers[first:last], cache.native[first:last], self._rows, self._work) < last - first:
            raise full_cache()

    def halt(self, test: HaltingTest) -> tuple[torch.Tensor, torch.Tensor]:
        rows, params, d = self.rows, test.params, self.model.spec.hidden_size
        count = len(rows.active)
        going_on = torch.empty(count, dtype=torch.int32, device="cpu")
        drift = torch.empty(count, dtype=torch.float32, device="cpu")
        halted = torch.zeros(len(rows.hidden), dtype=torch.uint8, device="cpu")
        left = _C.halt(
            rows.hidden.data_ptr(),
            d,
            self._work.previous,
            d,
            d,
            rows.active.data_ptr(),
            count,
            pointer(test.entropy),
            rows.positions.data_ptr(),
            pointer(test.overrides),
            params.drift_threshold,
            params.entropy_threshold or 0.0,
            params.relative,
            params.sink_tokens,
            drift.data_ptr(),
            halted.data_ptr(),
            going_on.data_ptr(),
        )
        return rows.active if left == count else going_on[:left], drift

    def head(self, index: torch.Tensor) -> torch.Tensor:
        rows = _C.Rows()
        point(rows, self.rows, index)
        logits = torch.empty(len(index), self.model.spec.vocab_size, dtype=torch.float32, device="cpu")
        self._head_work.reserve(self.layers[0], len(index))
        _C.lm_head(
            self.final_norm,
            self.final_head,
            rows,
            self.model.spec.hidden_size,
            logits.data_ptr(),
            self.model.spec.vocab_size,
            self._head_work,
        )
        return logits

    def step(self, plan: Plan, batch: Batch, cache: KVCache, log: bool) -> Step | None:
        rows = len(batch)
        if plan.step is None or rows > STEP_ROWS or not batch.one_each:
            return None
        if self._steps[0] is not plan:
            self._steps = (plan, self._new_step(plan))
        native = self._steps[1]
        if len(self._logits) < rows:
            self._logits = torch.empty(rows, self.model.spec.vocab_size, dtype=torch.float32, device="cpu")
        self.work()  # what ran before isn't its work
        logits = self._logits
        if not native.run(cache.native, batch.ids, batch.positions, batch.sequence, logits.data_ptr(), log):
            raise full_cache()
        bits = None if plan.config.amq is None else native.bits
        return Step(logits[:rows], native.depth, bits, self.work(), native.drift, native.entropy)

    def _new_step(self, plan: Plan) -> Any:
        assert plan.step is not None
        native = _C.DecodeStep(
            layers=self.layers,
            embedding=pointer(self.model.embedding),
            position_embedding=pointer(self.model.position_embedding),
            final_norm=self.final_norm,
            head=self.final_head,
        )
        if plan.step.halting is not None:
            native.set_halting(**plan.step.halting._asdict())
        if plan.step.amq is not None:
            native.set_amq(**plan.step.amq._asdict())
        return native
