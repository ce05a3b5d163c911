"""The five stages of a layer and the head, two ways: fused kernels, or composed of operators and plain PyTorch.

``NativeStages`` is the fast one (one call a stage, packed weights on a CPU backend). ``ComposedStages`` runs on every
backend and precision, and is what the fast one is tested against. Both take the same rows: ``hidden`` by row number,
``active`` the rows that take part. Nothing is computed for a row that isn't active.
"""

from __future__ import annotations

import ctypes
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .. import _C
from ..config import QuickSilverConfig
from ..kernels import ops
from ..weights.matryoshka import MatryoshkaWeight
from ..weights.model import Layer, Linear, Model, Norm
from .kv_cache import BLOCK_SIZE, KVCache, LayerCache

# How many INT8 planes hold the activations of a stage: 2 where outlier channels of a norm's output cost quality.
PLANES = {"attention_input": 2, "attention_output": 1, "mlp_input": 2, "mlp_output": 1, "head": 2}
# Rows of logits computed at a time where only their entropy is wanted.
ENTROPY_ROWS = 64
KV_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "i8"}


@dataclass
class Rows:
    """A ragged, packed batch on its way through the layers.

    hidden [rows, d] fp32, positions and sequence [rows] int32, bits [rows] int32 or None (all that the weights have),
    active [count] int32, ascending.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    sequence: torch.Tensor
    active: torch.Tensor
    bits: torch.Tensor | None = None

    def at_active(self, tensor: torch.Tensor) -> torch.Tensor:
        """The active rows of a tensor that is indexed by row."""
        return tensor if len(self.active) == len(tensor) else tensor[self.active]


@dataclass
class Work:
    """Multiply-adds and bytes of what really ran."""

    gemm_macs: int = 0
    attention_pairs: int = 0
    weight_bytes_read: int = 0


@dataclass(frozen=True)
class HaltingTest:
    """What decides a halt. entropy [count] in bits or None; overrides [rows] int8 or None."""

    params: ops.HaltingParams
    entropy: torch.Tensor | None = None
    overrides: torch.Tensor | None = None


def entropy_bits(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in bits of softmax over the last dimension."""
    log_p = torch.log_softmax(logits.double(), -1)
    return (-(log_p.exp() * log_p).nan_to_num(0.0).sum(-1) / torch.log(torch.tensor(2.0).double())).float()


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) of x [n, heads, D] by cosine, sine [n, D / 2]; pairs are (i, i + D / 2)."""
    first, second = x.chunk(2, -1)
    c, s = cosine[:, None], sine[:, None]
    return torch.cat((first * c - second * s, second * c + first * s), -1)


def normalize(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """RMS or layer norm over the last dimension."""
    if norm.kind == "rms":
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def runs_as_step(config: QuickSilverConfig) -> bool:
    """Whether a decode step under ``config`` is one thing to launch: no decision in it is Python's."""
    halting, amq = config.halting, config.amq
    return (
        config.fusion is None
        and not config.trace
        and (amq is None or amq.entropy_source == "latent")
        and (
            halting is None
            or (
                halting.kv_policy == "skip"
                and halting.state == "frozen"
                and halting.resume_layer is None
                and (halting.entropy_threshold is None or halting.entropy_source == "latent")
            )
        )
    )


class Stages(ABC):
    """What the decoder calls. ``begin`` first, and again whenever the rows, rows.active or rows.bits change.

    A layer is ``attention_input``, ``attention``, ``attention_output``, ``mlp_input``, ``mlp_output`` in this order, on
    the active rows of ``begin``; ``hidden`` is changed in place.
    """

    rows: Rows

    def __init__(self, model: Model) -> None:
        self.model = model

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

    @abstractmethod
    def halt(self, test: HaltingTest) -> torch.Tensor:
        """The rows [n] int32 that go on after the halting test of the active ones."""

    @abstractmethod
    def head(self, index: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] fp32 of rows index [n] int32."""

    @abstractmethod
    def work(self) -> Work:
        """What ran since the last call."""

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


class ComposedStages(Stages):
    """Stages out of ``ops`` and plain PyTorch: any precision, any backend."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._work = Work()
        self._pairs: list[torch.Tensor] = []  # summed where they are, and read once a pass

    def work(self) -> Work:
        done, self._work = self._work, Work()
        if self._pairs:
            done.attention_pairs = int(torch.stack(self._pairs).sum())
            self._pairs = []
        return done

    def _count(self, linear: Linear, rows: int, reads_low: bool) -> None:
        """Books a product of ``rows`` rows, some of 8 bits if ``reads_low``."""
        weight = linear.weight
        self._work.gemm_macs += rows * linear.macs
        if isinstance(weight, MatryoshkaWeight):
            planes = weight.hi.numel() * (2 if reads_low and weight.lo is not None else 1)
            self._work.weight_bytes_read += planes + 2 * weight.scale.numel()
        else:
            self._work.weight_bytes_read += weight.numel() * weight.element_size()
        self._work.weight_bytes_read += 0 if linear.bias is None else 4 * linear.bias.numel()

    def _linear(self, x: torch.Tensor, linear: Linear, stage: str, bits: torch.Tensor | None) -> torch.Tensor:
        weight = linear.weight
        self._count(linear, len(x), bits is None or bool((bits == 8).any()))
        if isinstance(weight, MatryoshkaWeight):
            if weight.lo is None:
                bits = None
            return ops.matryoshka_gemm(x, weight.hi, weight.lo, weight.scale, bits, linear.bias, planes=PLANES[stage])
        y = F.linear(x.to(weight.dtype), weight).float()
        return y if linear.bias is None else y + linear.bias

    def _bits(self) -> torch.Tensor | None:
        return None if self.rows.bits is None else self.rows.at_active(self.rows.bits)

    def _keys_values(
        self, layer: Layer, normed: torch.Tensor, positions: torch.Tensor, bits: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        spec = self.model.spec
        shape = (-1, spec.num_kv_heads, spec.head_size)
        key = self._linear(normed, layer.k, "attention_input", bits).view(shape)
        value = self._linear(normed, layer.v, "attention_input", bits).view(shape)
        return self._rotate(key, positions), value

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cosine, sine = self.model.rotary_cos, self.model.rotary_sin
        return x if cosine is None or sine is None else rotate(x, cosine[positions], sine[positions])

    def attention_input(self, index: int, cache: LayerCache, slots: torch.Tensor | None) -> None:
        layer, rows = self.model.layers[index], self.rows
        positions, bits = rows.at_active(rows.positions), self._bits()
        self.previous = rows.hidden[rows.active]
        normed = normalize(self.previous, layer.attention_norm)
        query = self._linear(normed, layer.q, "attention_input", bits)
        query = query.view(-1, self.model.spec.num_heads, self.model.spec.head_size)
        self.query = self._rotate(query, positions)
        key, value = self._keys_values(layer, normed, positions, bits)
        if slots is None:
            slots = cache.allocate(rows.at_active(rows.sequence), positions)
        cache.write(key, value, slots)

    def write_kv(self, index: int, cache: LayerCache, which: torch.Tensor, slots: torch.Tensor) -> None:
        layer, rows = self.model.layers[index], self.rows
        bits = None if rows.bits is None else rows.bits[which]
        normed = normalize(rows.hidden[which], layer.attention_norm)
        key, value = self._keys_values(layer, normed, rows.positions[which], bits)
        cache.write(key, value, slots)

    def attention(self, index: int, cache: LayerCache, mass: bool = False) -> torch.Tensor | None:
        rows = self.rows
        positions, sequence = rows.at_active(rows.positions), rows.at_active(rows.sequence)
        self.attended, log_sum_exp = ops.attention_lse(
            self.query,
            cache.key,
            cache.value,
            cache.block_table,
            cache.positions,
            cache.lengths,
            positions,
            sequence,
            self.model.spec.attention_scale,
            cache.until,
            cache.key_scale,
            cache.value_scale,
        )
        self._count_pairs(cache)
        return log_sum_exp if mass else None

    def _count_pairs(self, cache: LayerCache) -> None:
        """Books the (query head, visible entry) pairs of the active rows."""
        rows = self.rows
        at, table = rows.at_active(rows.positions)[:, None, None], cache.block_table[rows.at_active(rows.sequence)]
        entry = torch.arange(table.shape[1] * BLOCK_SIZE, dtype=torch.int32, device=table.device)
        present = entry < cache.lengths[rows.at_active(rows.sequence), None]
        seen = (cache.positions[table] <= at) & present.view(*table.shape, BLOCK_SIZE)
        if cache.until is not None:
            seen &= cache.until[table] > at
        self._pairs.append(seen.sum() * self.model.spec.num_heads)

    def queries(self) -> torch.Tensor:
        return self.query

    def attention_output(self, index: int) -> None:
        rows = self.rows
        out = self._linear(self.attended.flatten(1), self.model.layers[index].o, "attention_output", self._bits())
        rows.hidden[rows.active] = rows.hidden[rows.active] + out

    def mlp_input(self, index: int) -> None:
        layer, rows, bits = self.model.layers[index], self.rows, self._bits()
        normed = normalize(rows.hidden[rows.active], layer.mlp_norm)
        up = self._linear(normed, layer.up, "mlp_input", bits)
        if layer.gate is None:
            self.inner = F.gelu(up, approximate="tanh")
        else:
            self.inner = F.silu(self._linear(normed, layer.gate, "mlp_input", bits)) * up

    def mlp_output(self, index: int) -> None:
        rows = self.rows
        out = self._linear(self.inner, self.model.layers[index].down, "mlp_output", self._bits())
        rows.hidden[rows.active] = rows.hidden[rows.active] + out

    def halt(self, test: HaltingTest) -> torch.Tensor:
        rows = self.rows
        hidden = rows.hidden[rows.active]
        _, _, index, count = ops.halting_update(
            hidden,
            self.previous,
            test.entropy,
            torch.zeros(len(hidden), dtype=torch.bool),
            rows.at_active(rows.positions),
            test.params,
            None if test.overrides is None else rows.at_active(test.overrides),
        )
        return rows.active[index[: int(count)]]

    def head(self, index: torch.Tensor) -> torch.Tensor:
        normed = normalize(self.rows.hidden[index], self.model.final_norm)
        return self._linear(normed, self.model.head, "head", None)


# --- what the compiled stages take, made of ours: addresses, 0 for None -----------------------------------------------


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def native_norm(norm: Norm) -> Any:
    return _C.Norm(norm.kind, pointer(norm.weight), pointer(norm.bias), norm.eps)


def native_linear(linear: Linear) -> Any:
    weight = linear.weight
    assert isinstance(weight, MatryoshkaWeight)
    native = _C.MatryoshkaWeight(
        hi=pointer(weight.hi),
        lo=pointer(weight.lo),
        scale=pointer(weight.scale),
        n=weight.out_features,
        k=weight.in_features,
        group=weight.group_size,
    )
    return _C.Linear(native, pointer(linear.bias))


def native_layer(model: Model, layer: Layer) -> Any:
    spec, native = model.spec, _C.Layer()
    native.d, native.heads, native.kv_heads = spec.hidden_size, spec.num_heads, spec.num_kv_heads
    native.head_size, native.ffn, native.activation = spec.head_size, spec.intermediate_size, spec.activation
    native.attention_norm, native.mlp_norm = native_norm(layer.attention_norm), native_norm(layer.mlp_norm)
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        if (linear := getattr(layer, name)) is not None:
            setattr(native, name, native_linear(linear))
    native.cosine, native.sine = pointer(model.rotary_cos), pointer(model.rotary_sin)
    native.attention_scale = spec.attention_scale
    for stage in ("attention_input", "attention_output", "mlp_input", "mlp_output"):
        setattr(native, f"{stage}_planes", PLANES[stage])
    return native


def native_cache(cache: LayerCache) -> Any:
    if cache.native is None:
        native = _C.KvCache()
        native.key, native.value = cache.key.data_ptr(), cache.value.data_ptr()
        native.key_scale, native.value_scale = pointer(cache.key_scale), pointer(cache.value_scale)
        native.type = KV_TYPES[cache.key.dtype]
        native.blocks, native.kv_heads, native.block_size, native.head_size = cache.key.shape
        native.block_table = cache.block_table.data_ptr()
        native.sequences, native.max_blocks = cache.block_table.shape
        native.lengths, native.positions = cache.lengths.data_ptr(), cache.positions.data_ptr()
        native.until, native.blocks_used = pointer(cache.until), cache.blocks_used.data_ptr()
        cache.native = native
    return cache.native


def point(native: Any, rows: Rows, active: torch.Tensor) -> None:
    """Makes a _C.Rows stand for the rows active [n] int32 of ``rows``."""
    native.hidden, native.rows = rows.hidden.data_ptr(), len(rows.hidden)
    native.positions, native.sequence = rows.positions.data_ptr(), rows.sequence.data_ptr()
    native.bits = pointer(rows.bits)
    native.active, native.count = active.data_ptr(), len(active)
    native.slots = 0


def follow_threads() -> None:
    """The kernels' pool gets as many threads as PyTorch has."""
    if _C.threads() != torch.get_num_threads():
        _C.set_threads(torch.get_num_threads())


def _full_cache() -> ValueError:
    return ValueError("the KV cache is full; make it with a larger capacity")


class NativeStages(Stages):
    """Stages as fused CPU kernels on packed weights. Pointers are handed over once per layer and pass, not per call."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.layers = [native_layer(model, layer) for layer in model.layers]
        self.final_norm = native_norm(model.final_norm)
        self.final_head = native_linear(model.head)
        self._work = _C.Workspace()
        self._rows = _C.Rows()
        self._head_work = _C.Workspace()  # of its own: the head may run in the middle of a layer
        self._seen = _C.counters()

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
        if not _C.attention_input(self.layers[index], self._rows, native_cache(cache), self._work):
            raise _full_cache()

    def write_kv(self, index: int, cache: LayerCache, which: torch.Tensor, slots: torch.Tensor) -> None:
        rows = _C.Rows()
        point(rows, self.rows, which)
        rows.slots = slots.data_ptr()
        _C.write_kv(self.layers[index], rows, native_cache(cache), _C.Workspace())

    def attention(self, index: int, cache: LayerCache, mass: bool = False) -> torch.Tensor | None:
        log_sum_exp = torch.empty(len(self.rows.active), self.model.spec.num_heads) if mass else None
        _C.attention(self.layers[index], self._rows, native_cache(cache), self._work, pointer(log_sum_exp))
        return log_sum_exp

    def queries(self) -> torch.Tensor:
        spec = self.model.spec
        shape = (len(self.rows.active), spec.num_heads, spec.head_size)
        memory = (ctypes.c_float * math.prod(shape)).from_address(self._work.q)
        return torch.frombuffer(memory, dtype=torch.float32).view(shape)

    def attention_output(self, index: int) -> None:
        _C.attention_output(self.layers[index], self._rows, self._work)

    def mlp_input(self, index: int) -> None:
        _C.mlp_input(self.layers[index], self._rows, self._work)

    def mlp_output(self, index: int) -> None:
        _C.mlp_output(self.layers[index], self._rows, self._work)

    def run_layers(self, first: int, last: int, cache: KVCache) -> None:
        self._rows.slots = 0
        natives = [native_cache(layer) for layer in cache.layers[first:last]]
        if _C.run_layers(self.layers[first:last], natives, self._rows, self._work) < last - first:
            raise _full_cache()

    def halt(self, test: HaltingTest) -> torch.Tensor:
        rows, params, d = self.rows, test.params, self.model.spec.hidden_size
        count = len(rows.active)
        going_on = torch.empty(count, dtype=torch.int32)
        drift, halted = torch.empty(count), torch.zeros(len(rows.hidden), dtype=torch.uint8)
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
        return rows.active if left == count else going_on[:left]

    def head(self, index: torch.Tensor) -> torch.Tensor:
        rows = _C.Rows()
        point(rows, self.rows, index)
        logits = torch.empty(len(index), self.model.spec.vocab_size)
        self._head_work.reserve(self.layers[0], len(index))
        _C.lm_head(
            self.final_norm,
            self.final_head,
            PLANES["head"],
            rows,
            self.model.spec.hidden_size,
            logits.data_ptr(),
            self.model.spec.vocab_size,
            self._head_work,
        )
        return logits


class NativeStep:
    """A decode step of up to ``rows`` sequences of a cache as one call of a CPU kernel, for configs that
    :func:`runs_as_step` allows. ``logits`` [rows, V] hold until the next run."""

    def __init__(self, stages: NativeStages, config: QuickSilverConfig, cache: KVCache, rows: int) -> None:
        model, halting, amq = stages.model, config.halting, config.amq
        self.logits = torch.empty(rows, model.spec.vocab_size)
        self._native = _C.DecodeStep(
            layers=stages.layers,
            embedding=pointer(model.embedding),
            position_embedding=pointer(model.position_embedding),
            final_norm=stages.final_norm,
            head=stages.final_head,
            head_planes=PLANES["head"],
        )
        self._caches = [native_cache(layer) for layer in cache.layers]
        if halting is not None:
            self._native.set_halting(
                drift_threshold=halting.drift_threshold,
                relative=halting.drift_norm == "relative",
                entropy_threshold=halting.entropy_threshold,
                sink_tokens=halting.sink_tokens,
                min_layer=halting.min_layer,
            )
        if amq is not None:
            full_entropy = float(torch.log2(torch.tensor(float(model.spec.hidden_size))))
            self._native.set_amq(amq.layer, amq.entropy_threshold, full_entropy)

    def run(self, ids: list[int], positions: list[int], sequence: list[int]) -> torch.Tensor:
        """Logits [n, V] of the next token of each of n sequences."""
        if not self._native.run(self._caches, ids, positions, sequence, pointer(self.logits)):
            raise _full_cache()
        return self.logits[: len(ids)]

    @property
    def depth(self) -> list[int]:
        """Layers that each row of the last run went through."""
        return self._native.depth

    @property
    def bits(self) -> list[int]:
        """Bits of each row of the last run, from the layer of AMQ on."""
        return self._native.bits
