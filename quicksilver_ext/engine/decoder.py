"""The decoder loop: for each layer five stages, and between them what the mechanisms decide.

A pass takes a ragged, packed batch: rows grouped by sequence, positions ascending, continuing where the cache ended.
The rows of one sequence may come in one pass or one by one: the answer is the same to the bit on packed weights (fusion
in scope ``prompt`` apart, which needs to see the prompt as one).
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .. import _C
from ..config import QuickSilverConfig
from ..kernels import ops
from ..profiling import enabled
from ..stats import GenerationStats
from ..weights.matryoshka import MatryoshkaWeight
from ..weights.model import WEIGHT_BITS, Model
from .cuda import CudaStages, DecodeStep
from .forward_pass import ForwardPass, PlainPass
from .kv_cache import KV_CACHE_DTYPES, KVCache, check_kv_cache_dtype
from .stages import ComposedStages, NativeStages, NativeStep, Stages, Work, follow_threads, runs_as_step

# Rows of one pass: enough to use the weights well, few enough for the work memory to stay in cache.
CHUNK = 512
# Rows of a step that is one call: beyond them Python's part is small beside the kernels'.
STEP_ROWS = 64


class Decoder:
    """A model and a config, ready to run. ValueError where the config doesn't fit the model or its precision.

    kv_cache_dtype  one of ``KV_CACHE_DTYPES``; None: that of fp32 and bf16 weights, fp16 for packed ones
    """

    def __init__(self, model: Model, config: QuickSilverConfig, kv_cache_dtype: str | None = None) -> None:
        check_kv_cache_dtype(kv_cache_dtype)
        config.check_model(model.spec.num_layers, model.spec.hidden_size)
        if config.amq is not None and model.precision != "adaptive":
            raise ValueError(f"amq chooses bits per token and needs precision 'adaptive'; got {model.precision!r}")
        self.model = model
        self.config = config
        self.kv_cache_dtype = kv_cache_dtype or {"fp32": "fp32", "bf16": "bf16"}.get(model.precision, "fp16")
        self.device = model.embedding.device
        self.tensors = {name: tensor.to(self.device) for name, tensor in config.tensors.items()}
        self._stages: dict[str, Stages] = {}
        self._lock = threading.Lock()  # passes share work memory
        self._steps = runs_as_step(config)
        self._plain = config.halting is None and config.fusion is None and not config.trace
        self._layer_macs = sum(linear.macs for layer in model.layers for linear in layer.linears())

    def stages(self) -> Stages:
        """The stages for the backend in use: fused kernels for packed weights, else composed ones."""
        backend = ops.current_backend()
        if not isinstance(self.model.head.weight, MatryoshkaWeight):
            kind = "composed"
        elif self.device.type == "cuda" or backend == "cuda-emulated":
            kind = "cuda" if self.device.type == "cuda" else "emulated"
        else:
            kind = "native" if backend.startswith("cpu") else "composed"
        if kind not in self._stages:
            if kind in ("cuda", "emulated"):
                self._stages[kind] = CudaStages(self.model, getattr(_C, kind))
            else:
                self._stages[kind] = NativeStages(self.model) if kind == "native" else ComposedStages(self.model)
        return self._stages[kind]

    def new_cache(self, sequences: int, capacity: int) -> KVCache:
        """An empty cache for ``sequences`` sequences of at most ``capacity`` tokens."""
        fusion = self.config.fusion
        merging_from = fusion.layer if fusion is not None and fusion.scope == "cache" else None
        dtype = KV_CACHE_DTYPES[self.kv_cache_dtype]
        return KVCache(self.model.spec, sequences, capacity, dtype, merging_from, self.device)

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        sequence: torch.Tensor,
        cache: KVCache,
        logits: torch.Tensor | None = None,
        stats: GenerationStats | None = None,
        overrides: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [n, V] fp32 of the rows that ``logits`` [T] bool asks for (None: all), in order.

        input_ids [T] int64, positions and sequence [T] integer; overrides [T] int8: 1 halts a token at its first
        chance, -1 never, 0 leaves it to the test. ValueError/IndexError, before anything is written, for ids outside
        the vocabulary, positions that don't continue the cache, or more tokens than it or the model holds.
        """
        if input_ids.dim() != 1 or len(input_ids) == 0 or not len(input_ids) == len(positions) == len(sequence):
            raise ValueError(
                "input_ids, positions and sequence must be one-dimensional, of one length and not empty; got "
                f"{list(input_ids.shape)}, {list(positions.shape)} and {list(sequence.shape)}"
            )
        positions, sequence = positions.to(torch.int32), sequence.to(torch.int32)
        following = self._check(input_ids.tolist(), positions.tolist(), sequence.tolist(), cache)
        count = len(input_ids)
        stats = stats if stats is not None else GenerationStats()
        stages = self.stages()
        if isinstance(stages, NativeStages):
            follow_threads()
        with self._lock:
            if isinstance(stages, CudaStages) and self._is_step(stages, sequence, logits, overrides):
                cache.next_position = following
                return self._step(stages, input_ids, positions, sequence, cache, stats)
            parts = []
            with self._on_device():
                for start in range(0, count, CHUNK):
                    part = slice(start, start + CHUNK)
                    stages.work()  # what ran before this pass isn't its work
                    ids, at, of = (tensor[part].to(self.device) for tensor in (input_ids, positions, sequence))
                    want = None if logits is None else logits[part].to(self.device)
                    chunk: PlainPass | ForwardPass
                    if self._plain and not enabled():  # a profiler wants to see the stages
                        chunk = PlainPass(self, stages, cache, ids, at, of, want)
                    else:
                        asked = torch.ones(len(ids), dtype=torch.bool) if want is None else want
                        forced = None if overrides is None else overrides[part].to(self.device)
                        chunk = ForwardPass(self, stages, cache, ids, at, of, asked, forced)
                    parts.append(chunk.run())
                    chunk.count(stats)
            cache.next_position = following
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def step(
        self, ids: list[int], positions: list[int], sequence: list[int], cache: KVCache, stats: GenerationStats
    ) -> torch.Tensor:
        """:meth:`forward` of one token for each of n sequences: logits [n, V], which hold until the next step. On the
        CPU one call where the config allows it; tensors and tables for a row cost more time than some layers."""
        stages = self.stages()
        one_each = len(set(sequence)) == len(ids) <= STEP_ROWS
        if not (isinstance(stages, NativeStages) and self._steps and one_each) or enabled():
            return self.forward(
                torch.tensor(ids),
                torch.tensor(positions, dtype=torch.int32),
                torch.tensor(sequence, dtype=torch.int32),
                cache,
                stats=stats,
            )
        following = self._check(ids, positions, sequence, cache)
        follow_threads()
        with self._lock:
            step = cache.steps.get(len(ids))
            if not isinstance(step, NativeStep):
                step = cache.steps[len(ids)] = NativeStep(stages, self.config, cache, len(ids))
            stages.work()  # what ran before this pass isn't its work
            logits = step.run(ids, positions, sequence)
            work = stages.work()
            cache.next_position = following
        self.book_rows(stats, step.depth, None if self.config.amq is None else step.bits)
        self.book_work(stats, work, positions, len(ids))
        return logits

    def _on_device(self) -> AbstractContextManager[Any]:
        """What a pass makes without naming a device belongs on the model's."""
        return nullcontext() if self.device.type == "cpu" else self.device

    def _is_step(
        self,
        stages: CudaStages,
        sequence: torch.Tensor,
        logits: torch.Tensor | None,
        overrides: torch.Tensor | None,
    ) -> bool:
        """Whether a pass is one new token for each of a few sequences, under a config that a step can run."""
        few = len(sequence) <= stages.kernels.DECODE_ROWS and len(sequence.unique()) == len(sequence)
        return few and overrides is None and (logits is None or bool(logits.all())) and self._steps

    def _step(
        self,
        stages: CudaStages,
        ids: torch.Tensor,
        positions: torch.Tensor,
        sequence: torch.Tensor,
        cache: KVCache,
        stats: GenerationStats,
    ) -> torch.Tensor:
        """A pass of one token per sequence that waits for the device only at its end."""
        count = len(ids)
        bucket = 1 << (count - 1).bit_length()
        if bucket not in cache.steps:
            cache.steps[bucket] = DecodeStep(stages, self.config, cache, bucket)
        step: DecodeStep = cache.steps[bucket]
        step.run(ids, positions, sequence)
        depth, bits, work = step.results(count)
        self.book_rows(stats, depth, bits)
        self.book_work(stats, work, positions.tolist(), count)
        return step.logits[:count].clone()

    def _check(self, ids: list[int], positions: list[int], sequence: list[int], cache: KVCache) -> list[int]:
        """Where each sequence goes on after these tokens."""
        spec = self.model.spec
        low, high = min(ids), max(ids)
        if low < 0 or high >= spec.vocab_size:
            raise IndexError(f"input_ids must be in 0..{spec.vocab_size - 1}; got {low if low < 0 else high}")
        following = list(cache.next_position)
        last = None
        closed: set[int] = set()
        for s, position in zip(sequence, positions, strict=True):
            if not 0 <= s < len(following) or s in closed:
                raise ValueError(f"sequence must hold runs of 0..{cache.sequences - 1}, each once; got {s}")
            if position != following[s]:
                raise ValueError(f"positions of sequence {s} must continue at {following[s]}; got {position}")
            if last is not None and last != s:
                closed.add(last)
            following[s], last = position + 1, s
            if position >= spec.max_positions:
                raise ValueError(f"the model holds {spec.max_positions} positions; got position {position}")
            if position >= cache.capacity:
                raise ValueError(f"the cache holds {cache.capacity} tokens of a sequence; got position {position}")
        return following

    def probe(self, source: str, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weight and bias of the probe for entropy at ``layer``; None for a source that isn't one."""
        if source != "probe":
            return None
        return self.tensors[f"probe.{layer}.weight"].float(), self.tensors[f"probe.{layer}.bias"].float()

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The state [T, d] fp32 that comes into the first layer."""
        hidden = self.model.embedding[ids].float()
        if self.model.position_embedding is not None:
            hidden += self.model.position_embedding[positions]
        return hidden

    def book_rows(self, stats: GenerationStats, depth: list[int], bits: list[int] | None) -> None:
        """Adds rows that ran depth[i] layers, from that of AMQ on with bits[i] bits; None: with the weights' own."""
        layers, own, amq = self.model.spec.num_layers, WEIGHT_BITS[self.model.precision], self.config.amq
        if bits is None or amq is None:
            stats.add_rows(depth, [own] * len(depth), layers, own, layers)
        else:
            stats.add_rows(depth, bits, layers, own, amq.layer)

    def book_work(self, stats: GenerationStats, work: Work, positions: list[int], logits: int) -> None:
        """Adds what ran for new rows at ``positions`` and ``logits`` rows of the head, and what full depth comes to."""
        stats.flops += 2 * (work.gemm_macs + 2 * self.model.spec.head_size * work.attention_pairs)
        stats.flops_full += self.full_flops(positions, logits)
        stats.weight_bytes_read += work.weight_bytes_read

    def full_flops(self, positions: list[int], logits: int) -> int:
        """FLOPs at full depth, all mechanisms off, of rows at ``positions`` and ``logits`` rows of the head."""
        spec = self.model.spec
        pairs = (sum(positions) + len(positions)) * spec.num_heads * spec.num_layers
        gemm = self._layer_macs * len(positions) + self.model.head.macs * logits
        return 2 * (gemm + 2 * spec.head_size * pairs)
