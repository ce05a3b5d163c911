"""Cases that tests share: shapes that are awkward on purpose, and random inputs of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quicksilver_ext.weights import matryoshka as quantize


@dataclass(frozen=True)
class Gemm:
    rows: int
    features: int
    columns: int
    group: int
    bias: bool = False

    def make(self, seed: int = 0) -> tuple[Tensor, quantize.MatryoshkaWeight, Tensor, Tensor | None]:
        """x, weight, mixed bits, bias."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(self.rows, self.columns, generator=g)
        x *= 10 ** (2 * torch.rand(self.rows, 1, generator=g) - 1)
        weight = quantize.pack_matryoshka(torch.randn(self.features, self.columns, generator=g) * 0.05, self.group)
        bits = torch.where(torch.rand(self.rows, generator=g) < 0.5, 4, 8).to(torch.int32)
        return x, weight, bits, torch.randn(self.features, generator=g) if self.bias else None


# Features: a part of a panel of 16, whole panels, both. Columns: short of a line of 8, of a group, of both.
GEMMS = [
    Gemm(1, 16, 64, 64),
    Gemm(1, 7, 33, 32),
    Gemm(2, 1, 5, 128),
    Gemm(3, 100, 200, 64, bias=True),
    Gemm(4, 64, 576, 64, bias=True),
    Gemm(5, 48, 96, 32),
    Gemm(6, 33, 136, 128),
    Gemm(9, 160, 640, 128),
    Gemm(17, 130, 320, 64, bias=True),
    Gemm(40, 49, 96, 32, bias=True),
    Gemm(70, 257, 192, 64),
]


def int8_cache(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """An int8 cache array of float32 [..., D], and its scales [...]."""
    scale = vectors.abs().amax(-1) / 127
    return (vectors / scale[..., None]).round().to(torch.int8), scale


@dataclass(frozen=True)
class Attention:
    rows: int
    heads: int
    kv_heads: int
    head_size: int
    lengths: tuple[int, ...]
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    until: bool = False

    def make(self, seed: int = 0) -> dict[str, Any]:
        """compacted_attention's arguments by name: blocks shuffled, positions with gaps as skipping leaves."""
        g = torch.Generator().manual_seed(seed)
        per_sequence = [-(-n // self.block_size) for n in self.lengths]
        blocks, sequences = sum(per_sequence) + 2, len(self.lengths)
        order = torch.randperm(blocks, generator=g).to(torch.int32)
        table = torch.full((sequences, max(per_sequence) + 1), -1, dtype=torch.int32)
        kv_positions = torch.zeros(blocks, self.block_size, dtype=torch.int32)
        until = torch.full_like(kv_positions, 2**31 - 1)
        taken, last = 0, []
        for s, (length, count) in enumerate(zip(self.lengths, per_sequence)):
            table[s, :count] = order[taken : taken + count]
            taken += count
            at = torch.randint(1, 3, (length,), generator=g).cumsum(0).to(torch.int32) - 1
            entry = torch.arange(length)
            where = (table[s, entry // self.block_size].long(), entry % self.block_size)
            kv_positions[where] = at
            until[where] = torch.where(torch.rand(length, generator=g) < 0.3, at + 3, until[where])
            last.append(int(at[-1]) if length else 0)
        sequence = torch.randint(0, sequences, (self.rows,), generator=g).to(torch.int32)
        position = (torch.rand(self.rows, generator=g) * (torch.tensor(last)[sequence.long()] + 1)).to(torch.int32)
        query = torch.randn(self.rows, self.heads, self.head_size, generator=g)
        arrays = torch.randn(2, blocks, self.kv_heads, self.block_size, self.head_size, generator=g)
        arrays, scales = int8_cache(arrays) if self.dtype == torch.int8 else (arrays.to(self.dtype), (None, None))
        return {
            "query": query,
            "key_cache": arrays[0],
            "value_cache": arrays[1],
            "block_table": table,
            "kv_positions": kv_positions,
            "kv_lengths": torch.tensor(self.lengths, dtype=torch.int32),
            "query_positions": position,
            "query_sequence": sequence,
            "scale": self.head_size**-0.5,
            "kv_until": until if self.until else None,
            "key_scale": scales[0],
            "value_scale": scales[1],
        }


ATTENTIONS = [
    Attention(1, 1, 1, 64, (1,)),
    Attention(1, 9, 3, 64, (37,)),
    Attention(5, 4, 4, 80, (3, 50), until=True),
    Attention(7, 6, 2, 64, (130, 1, 17), block_size=64, dtype=torch.float16),
    Attention(33, 8, 1, 128, (200, 40), block_size=64, dtype=torch.bfloat16, until=True),
    Attention(12, 2, 2, 10, (24, 24, 24), block_size=8, dtype=torch.bfloat16),
    Attention(3, 3, 3, 33, (300,), dtype=torch.float16),
    Attention(7, 6, 2, 64, (130, 1, 17), block_size=64, dtype=torch.int8),
    Attention(5, 4, 4, 80, (3, 50), dtype=torch.int8, until=True),
    Attention(12, 3, 1, 33, (150, 40), dtype=torch.int8),
]


def rows_like_a_layer(rows: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """hidden and previous [rows, d], differing by anything from 1% to 100%."""
    g = torch.Generator().manual_seed(seed)
    previous = torch.randn(rows, d, generator=g)
    step = torch.logspace(-2, 0, rows)[torch.randperm(rows, generator=g), None]
    return previous + step * torch.randn(rows, d, generator=g), previous
