"""The stages out of operators and plain PyTorch: any precision, any backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..architectures.dense import UNGATED, normalize, rotate
from ..kernels import ops
from ..mechanisms.halting import HaltingTest
from ..weights.matryoshka import MatryoshkaWeight
from ..weights.model import Layer, Linear, Model
from .kv_cache import BLOCK_SIZE, LayerCache
from .stages import Stages, Work

PAIR_ROWS = 16  # rows whose visible entries are counted at a time


def visible_entries(cache: LayerCache, positions: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """How many entries each query at positions [n] of sequence [n] sees: int64 [n]. Some rows at a time."""
    entry = torch.arange(cache.block_table.shape[1] * BLOCK_SIZE, dtype=torch.int32, device=positions.device)
    counts = []
    for at, of in zip(positions.split(PAIR_ROWS), sequence.split(PAIR_ROWS)):
        table = cache.block_table[of].clamp_min(0)
        seen = (cache.positions[table] <= at[:, None, None]).flatten(1) & (entry < cache.lengths[of][:, None])
        if cache.until is not None:
            seen &= (cache.until[table] > at[:, None, None]).flatten(1)
        counts.append(seen.sum(1))
    return torch.cat(counts)


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
            self._work.weight_bytes_read += planes + weight.group_nbytes
        else:
            self._work.weight_bytes_read += weight.numel() * weight.element_size()
        self._work.weight_bytes_read += 0 if linear.bias is None else 4 * linear.bias.numel()

    def _linear(self, x: torch.Tensor, linear: Linear, bits: torch.Tensor | None) -> torch.Tensor:
        weight = linear.weight
        self._count(linear, len(x), bits is None or bool((bits == 8).any()))
        if isinstance(weight, MatryoshkaWeight):
            return weight.matmul(x, bits, linear.bias)
        y = F.linear(x.to(weight.dtype), weight).float()
        return y if linear.bias is None else y + linear.bias

    def _bits(self) -> torch.Tensor | None:
        return None if self.rows.bits is None else self.rows.at_active(self.rows.bits)

    def _keys_values(
        self, layer: Layer, normed: torch.Tensor, positions: torch.Tensor, bits: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        spec = self.model.spec
        shape = (-1, spec.num_kv_heads, spec.head_size)
        key = self._linear(normed, layer.k, bits).view(shape)
        value = self._linear(normed, layer.v, bits).view(shape)
        if layer.k_norm is not None:
            key = normalize(key, layer.k_norm)
        return self._rotate(key, positions), value

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cosine, sine = self.model.rotary_cos, self.model.rotary_sin
        return x if cosine is None or sine is None else rotate(x, cosine[positions, None], sine[positions, None])

    def attention_input(self, index: int, cache: LayerCache, slots: torch.Tensor | None) -> None:
        layer, rows = self.model.layers[index], self.rows
        positions, bits = rows.at_active(rows.positions), self._bits()
        self._previous = rows.hidden[rows.active]
        normed = normalize(self._previous, layer.attention_norm)
        query = self._linear(normed, layer.q, bits)
        query = query.view(-1, self.model.spec.num_heads, self.model.spec.head_size)
        if layer.q_norm is not None:
            query = normalize(query, layer.q_norm)
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
            self.model.spec.attention_scale_of(index),
            cache.until,
            cache.key_scale,
            cache.value_scale,
        )
        self._count_pairs(cache)
        return log_sum_exp if mass else None

    def _count_pairs(self, cache: LayerCache) -> None:
        """Books the (query head, visible entry) pairs of the active rows."""
        rows = self.rows
        seen = visible_entries(cache, rows.at_active(rows.positions), rows.at_active(rows.sequence))
        self._pairs.append(seen.sum() * self.model.spec.num_heads)

    @property
    def previous(self) -> torch.Tensor:
        return self._previous

    def queries(self) -> torch.Tensor:
        return self.query

    def attention_output(self, index: int) -> None:
        rows = self.rows
        out = self._linear(self.attended.flatten(1), self.model.layers[index].o, self._bits())
        rows.hidden[rows.active] = rows.hidden[rows.active] + out

    def mlp_input(self, index: int) -> None:
        layer, rows, bits = self.model.layers[index], self.rows, self._bits()
        normed = normalize(rows.hidden[rows.active], layer.mlp_norm)
        up = self._linear(normed, layer.up, bits)
        if layer.gate is None:
            self.inner = UNGATED[self.model.spec.activation](up)
        else:
            self.inner = F.silu(self._linear(normed, layer.gate, bits)) * up

    def mlp_output(self, index: int) -> None:
        rows = self.rows
        out = self._linear(self.inner, self.model.layers[index].down, self._bits())
        rows.hidden[rows.active] = rows.hidden[rows.active] + out

    def halt(self, test: HaltingTest) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.rows
        hidden = rows.hidden[rows.active]
        drift, _, index, count = ops.halting_update(
            hidden,
            self.previous,
            test.entropy,
            torch.zeros(len(hidden), dtype=torch.bool, device=self.device),
            rows.at_active(rows.positions),
            test.params,
            None if test.overrides is None else rows.at_active(test.overrides),
        )
        return rows.active[index[: int(count)]], drift

    def head(self, index: torch.Tensor) -> torch.Tensor:
        normed = normalize(self.rows.hidden[index], self.model.final_norm)
        return self._linear(normed, self.model.head, None)
