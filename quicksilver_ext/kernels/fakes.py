"""The compiled operators' results as tensors without data: what tracing (torch.compile, opcheck) needs to know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.register_fake("quicksilver::halting_update")
def _(hidden: Tensor, previous: Tensor, entropy: Any, halted: Tensor, positions: Tensor, *rest: Any) -> Any:
    rows = hidden.shape[0]
    return hidden.new_empty(rows), torch.empty_like(halted), torch.empty_like(positions), positions.new_empty(1)


@torch.library.register_fake("quicksilver::softmax_entropy")
def _(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0])


@torch.library.register_fake("quicksilver::kv_allocate")
def _(sequence: Tensor, *rest: Any) -> Tensor:
    return sequence.new_empty(sequence.shape, dtype=torch.int64)


@torch.library.register_fake("quicksilver::kv_scatter")
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("quicksilver::kv_merge")
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("quicksilver::compacted_attention")
def _(query: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(query)


@torch.library.register_fake("quicksilver::attention_lse")
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:2])


@torch.library.register_fake("quicksilver::fusion_groups")
def _(hidden: Tensor, positions: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(positions), positions.new_empty(1)


@torch.library.register_fake("quicksilver::fusion_reduce")
def _(hidden: Tensor, weight: Tensor, group: Tensor, groups: int | None = None) -> Tensor:
    rows = torch.library.get_ctx().new_dynamic_size(min=1) if groups is None else groups
    return hidden.new_empty(rows, hidden.shape[1])


@torch.library.register_fake("quicksilver::fusion_expand")
def _(fused: Tensor, group: Tensor) -> Tensor:
    return fused.new_empty(group.shape[0], fused.shape[1])


@torch.library.register_fake("quicksilver::matryoshka_gemm")
def _(x: Tensor, hi: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], hi.shape[0])


@torch.library.register_fake("quicksilver::matryoshka_pack")
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("quicksilver::gguf_dequantize")
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("quicksilver::quantize_rows")
def _(x: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    padded, groups = (columns + 7) // 8 * 8, (columns + group_size - 1) // group_size
    return (
        x.new_empty(rows, padded, dtype=torch.int8),
        x.new_empty(rows, groups),
        x.new_empty(rows, groups, dtype=torch.int32),
    )
