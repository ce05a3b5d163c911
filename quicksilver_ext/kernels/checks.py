"""Checks of operators' arguments, before anything is written: each names the argument, what came, what was wanted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def _shape_text(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def check_tensor(
    name: str, tensor: Any, dtype: torch.dtype | tuple[torch.dtype, ...], shape: tuple[int | str, ...]
) -> tuple[int, ...]:
    """Checks a tensor argument; a str in ``shape`` names a size that may be anything but 0. Returns its shape."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, wanted a {wanted} tensor {_shape_text(shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got {str(tensor.dtype).removeprefix('torch.')}, wanted {wanted}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: got a tensor on {tensor.device}, wanted one on the CPU or a GPU")
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(isinstance(want, int) and have != want for have, want in zip(got, shape)):
        raise ValueError(f"{name}: got shape {list(got)}, wanted {_shape_text(shape)}")
    if 0 in got:
        raise ValueError(f"{name}: got shape {list(got)}, which is empty")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {list(tensor.stride())}, wanted a contiguous tensor (.contiguous())")
    return got


def check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Checks that all values are in low .. high - 1. The compiled operators check again, so not while tracing."""
    if torch.compiler.is_compiling():
        return
    least, most = tensor.aminmax()
    if least < low or most >= high:
        at = ((tensor < low) | (tensor >= high)).nonzero()[0].tolist()
        value = int(tensor[tuple(at)])
        raise IndexError(f"{name}: got {value} at {at}, which is out of range, wanted {low} to {high - 1}")


def check_number(name: str, value: float, *, finite: bool = False) -> None:
    if math.isnan(value) or (finite and math.isinf(value)):
        raise ValueError(f"{name}: got {value}, wanted a {'finite ' if finite else ''}number")


def check_int(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted int")
    if not low <= value < 2**31:
        raise ValueError(f"{name}: got {value}, wanted at least {low}")


def check_free_blocks(free_blocks: Any, blocks_used: Tensor, block_table: Tensor, blocks: int) -> None:
    """Checks that what is yet to be handed out is there, and belongs to nobody."""
    check_tensor("free_blocks", free_blocks, torch.int32, (blocks,))
    if torch.compiler.is_compiling() or int(blocks_used) == blocks:
        return
    free = free_blocks[int(blocks_used) :]
    check_range("free_blocks", free, 0, blocks)
    owners = torch.bincount(torch.cat((free, block_table[block_table >= 0])), minlength=blocks)[free]
    if owners.max() > 1:
        block = int(free[owners.argmax()])
        raise ValueError(f"free_blocks: got block {block} from blocks_used on, which is there twice or in use")


HALF_OVERFLOW = 65520.0  # from here on, numbers round to fp16's infinity


def check_fits_half(name: str, rows: Tensor, slots: Tensor) -> None:
    """Checks that what is finite in rows [T, ...] stays so in fp16, but for rows whose slot is -1."""
    if torch.compiler.is_compiling() or rows.abs().amax() < HALF_OVERFLOW:
        return
    bad = rows.isfinite() & (rows.abs() >= HALF_OVERFLOW) & (slots >= 0).view(-1, *[1] * (rows.dim() - 1))
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: got {float(rows[tuple(at)]):g} at {at}, beyond fp16's range of 65504; "
            "wanted a bfloat16, float32 or int8 cache for such numbers"
        )


KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def check_cache(
    key_cache: Any, value_cache: Any, key_scale: Any, value_scale: Any, heads: int | str, size: int | str
) -> tuple[int, int, int, int]:
    """Checks a cache's arrays and, for an int8 one, their scales. Returns B, Hkv, bs, D."""
    blocks, kv_heads, block_size, head_size = check_tensor("key_cache", key_cache, KV_DTYPES, ("B", heads, "bs", size))
    check_tensor("value_cache", value_cache, key_cache.dtype, (blocks, kv_heads, block_size, head_size))
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        if key_cache.dtype == torch.int8:
            check_tensor(name, scale, torch.float32, (blocks, kv_heads, block_size))
        elif scale is not None:
            dtype = str(key_cache.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: got a {type(scale).__name__}, wanted None, because key_cache is {dtype}")
    return blocks, kv_heads, block_size, head_size


def check_table(
    block_table: Any, kv_lengths: Any, blocks: int, block_size: int, *, grows: bool = False
) -> tuple[int, int]:
    """Checks that every entry which a length says is there lies in a block that exists, and if the table ``grows`` that
    what it says beyond is -1 or such a block. Returns S, MB."""
    (sequences,) = check_tensor("kv_lengths", kv_lengths, torch.int32, ("S",))
    _, width = check_tensor("block_table", block_table, torch.int32, (sequences, "MB"))
    check_range("kv_lengths", kv_lengths, 0, width * block_size + 1)
    used = torch.arange(width, dtype=torch.int32, device=kv_lengths.device)[None] * block_size < kv_lengths[:, None]
    check_range("block_table", torch.where(used, block_table, 0), 0, blocks)
    if grows:
        check_range("block_table", block_table, -1, blocks)
    return sequences, width
