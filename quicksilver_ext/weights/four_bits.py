"""GGUF's block formats of 4 bits, taken apart: codes, scales and offsets of groups of 32, and no value changed.

A value of Q4_0 is d * (q - 8), of Q4_1 d * q + m, of Q4_K (d * s) * q - (e * m), with q in 0..15, d, e and Q4_1's m in
fp16, and Q4_K's s and m whole numbers below 64. So the first two are kept exactly; of Q4_K the two products are rounded
to fp16, once each.
"""

from __future__ import annotations

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

GROUP = 32
Parts = tuple[Tensor, Tensor, Tensor]  # codes uint8 [rows, K], scale and offset fp16 [rows, K / 32]


def parts_of(blocks: Tensor, kind: GGMLQuantizationType) -> Parts:
    """``blocks``: uint8 [rows, bytes of a row], of one of the types in `FORMATS`."""
    size, take_apart = FORMATS[kind]
    rows = blocks.shape[0]
    codes, scale, offset = take_apart(blocks.reshape(-1, size))
    return codes.reshape(rows, -1), scale.reshape(rows, -1), offset.reshape(rows, -1)


def _nibbles(packed: Tensor) -> Tensor:
    """[..., 2 * n] of [..., n] bytes: the low nibbles first."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _halves(part: Tensor) -> Tensor:
    return part.contiguous().view(torch.float16)


def _q4_0(blocks: Tensor) -> Parts:
    scale = _halves(blocks[:, :2])
    return _nibbles(blocks[:, 2:]), scale, (scale.float() * -8).half()


def _q4_1(blocks: Tensor) -> Parts:
    return _nibbles(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q4_k(blocks: Tensor) -> Parts:
    scale, offset = (_halves(blocks[:, at : at + 2]).float() for at in (0, 2))
    packed = blocks[:, 4:16]
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), dim=-1)
    offsets = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), dim=-1)
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, GROUP))  # 32 bytes hold two groups
    return codes, (scale * scales).half(), (offset * offsets).neg_().half()


# Bytes of a block, and what takes blocks apart.
FORMATS = {
    GGMLQuantizationType.Q4_0: (18, _q4_0),
    GGMLQuantizationType.Q4_1: (20, _q4_1),
    GGMLQuantizationType.Q4_K: (144, _q4_k),
}
