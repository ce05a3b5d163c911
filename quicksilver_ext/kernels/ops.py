"""QuickSilver's operators: validated wrappers that run on the backend in use.

A backend is "cpu-<instruction set>" (the compiled kernels, ``torch.ops.quicksilver``) or one registered in Python, such
as "reference" (plain PyTorch) and "cuda-emulated". Tensors are contiguous and on the CPU, or, on a CPU backend, all on
a GPU: then the CUDA kernels take them, and checking their values waits for the GPU. T is the number of rows (tokens) of
a ragged, packed batch. Each wrapper raises, before anything is written and naming the argument:

TypeError   for something that isn't a tensor, or has the wrong dtype
ValueError  for a wrong shape or device, a tensor that isn't contiguous, an empty batch, a NaN threshold, a full cache
IndexError  for a slot, block or sequence number out of range

The mechanisms are those of "QuickSilver", arXiv 2506.22396; docs/mechanisms.md gives their equations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import compiled, current_backend, on_host, register_python_backend, run, set_backend
from .checks import (
    check_cache,
    check_fits_half,
    check_free_blocks,
    check_int,
    check_number,
    check_range,
    check_table,
    check_tensor,
)

__all__ = [
    "GGUF_BLOCKS",
    "HaltingParams",
    "attention_lse",
    "compacted_attention",
    "compiled",
    "current_backend",
    "fusion_expand",
    "fusion_groups",
    "fusion_reduce",
    "gguf_dequantize",
    "group_size_of",
    "halting_update",
    "kv_allocate",
    "kv_merge",
    "kv_scatter",
    "matryoshka_gemm",
    "matryoshka_pack",
    "quantize_rows",
    "register_python_backend",
    "set_backend",
    "softmax_entropy",
]

# --- halting ---------------------------------------------------------------------------------------------------------


class HaltingParams(NamedTuple):
    """Thresholds of Dynamic Token Halting.

    drift_threshold    halt where drift is below this; of ||h'|| if relative, else absolute
    entropy_threshold  and entropy below this, in bits; None: no entropy test
    sink_tokens        positions below this never halt
    """

    drift_threshold: float
    relative: bool = True
    entropy_threshold: float | None = None
    sink_tokens: int = 0


def halting_update(
    hidden: Tensor,
    previous: Tensor,
    entropy: Tensor | None,
    halted: Tensor,
    positions: Tensor,
    params: HaltingParams,
    overrides: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Drift of each row over a layer, the halting decision, and the compaction of the rows that go on.

    hidden, previous  float32 [T, d], the states after and before the layer
    entropy           float32 [T], bits, or None where params has no entropy_threshold
    halted            bool [T]: rows that halted earlier are not judged and stay halted, with drift 0
    positions         int32 [T]
    overrides         int8 [T]: 1 halts, -1 never halts, 0 leaves it to the test; or None

    Returns drift float32 [T] (||h - h'|| / ||h'|| if relative, else ||h - h'||), halted bool [T], active_index int32
    [T] (the rows that go on, ascending, then -1) and active_count int32 [1]. A NaN never halts.
    """
    rows, d = check_tensor("hidden", hidden, torch.float32, ("T", "d"))
    check_tensor("previous", previous, torch.float32, (rows, d))
    check_tensor("halted", halted, torch.bool, (rows,))
    check_tensor("positions", positions, torch.int32, (rows,))
    check_number("drift_threshold", params.drift_threshold)
    check_int("sink_tokens", params.sink_tokens, 0)
    if params.entropy_threshold is not None:
        check_number("entropy_threshold", params.entropy_threshold)
        if entropy is None:
            raise ValueError("entropy: got None, wanted float32 [T], because params.entropy_threshold is set")
    if entropy is not None:
        check_tensor("entropy", entropy, torch.float32, (rows,))
    if overrides is not None:
        check_tensor("overrides", overrides, torch.int8, (rows,))
    return run("halting_update", hidden, previous, entropy, halted, positions, params, overrides)


def softmax_entropy(hidden: Tensor) -> Tensor:
    """The paper's "latent" entropy: entropy in bits of softmax over each row. float32 [T, d] -> float32 [T]."""
    check_tensor("hidden", hidden, torch.float32, ("T", "d"))
    return run("softmax_entropy", hidden)


# --- KV cache --------------------------------------------------------------------------------------------------------


def kv_allocate(
    sequence: Tensor,
    positions: Tensor,
    kv_lengths: Tensor,
    block_table: Tensor,
    kv_positions: Tensor,
    kv_until: Tensor | None,
    blocks_used: Tensor,
    free_blocks: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Gives each row the next slot of its sequence, in row order, and notes its position there.

    sequence, positions      int32 [T]
    kv_lengths, block_table  int32 [S] and [S, MB], updated: -1 stands for a block that has yet to be handed out
    kv_positions, kv_until   int32 [B, bs], updated: a new entry is visible from its position p on (until INT32_MAX)
    blocks_used              int32 [1], updated: how many blocks are handed out
    free_blocks              int32 [B]: the next block is free_blocks[blocks_used]; None: blocks in order
    window                   above 0: visible to queries at p .. p + window - 1 only, which kv_until says

    Returns slot_mapping int64 [T], slot = block * bs + offset. ValueError where the cache is full; it stays as it was.
    """
    (rows,) = check_tensor("sequence", sequence, torch.int32, ("T",))
    check_tensor("positions", positions, torch.int32, (rows,))
    blocks, block_size = check_tensor("kv_positions", kv_positions, torch.int32, ("B", "bs"))
    if kv_until is not None:
        check_tensor("kv_until", kv_until, torch.int32, (blocks, block_size))
    sequences, width = check_table(block_table, kv_lengths, blocks, block_size, grows=True)
    check_tensor("blocks_used", blocks_used, torch.int32, (1,))
    check_range("blocks_used", blocks_used, 0, blocks + 1)
    check_range("sequence", sequence, 0, sequences)
    check_int("window", window, 0)
    if window and kv_until is None:
        raise ValueError("kv_until: got None, wanted int32 [B, bs], because window is set")
    if free_blocks is not None:
        check_free_blocks(free_blocks, blocks_used, block_table, blocks)
    if not torch.compiler.is_compiling():
        grown = kv_lengths + torch.bincount(sequence, minlength=sequences)
        wanted = -(-grown // block_size)
        reached = torch.arange(width, dtype=torch.int64, device=wanted.device) < wanted[:, None]
        fresh = int((reached & (block_table < 0)).sum()) + int((wanted - width).clamp(min=0).sum())
        if wanted.max() > width or fresh > blocks - int(blocks_used):
            left = blocks - int(blocks_used)
            raise ValueError(
                f"sequence: got {rows} rows that want {fresh} new blocks and up to {int(wanted.max())} a sequence, "
                f"but the cache has {left} left and room for {width} a sequence"
            )
    cache = (kv_lengths, block_table, kv_positions, kv_until, blocks_used, free_blocks, window)
    return run("kv_allocate", sequence, positions, *cache)


def kv_scatter(
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """Writes rows of keys and values into cache slots; slot -1 writes nothing.

    key, value              float32 [T, Hkv, D]
    slot_mapping            int64 [T], block * bs + offset, or -1
    key_cache, value_cache  float32, float16, bfloat16 or int8 [B, Hkv, bs, D], written
    key_scale, value_scale  float32 [B, Hkv, bs], written; for an int8 cache, else None

    An int8 cache holds x = scale * q for each vector of D elements, scale = max |x| / 127 (the maximum rounded up to
    bfloat16), as quantize_rows makes it. A float16 one takes no finite number beyond 65504: ValueError.
    """
    rows, heads, size = check_tensor("key", key, torch.float32, ("T", "Hkv", "D"))
    check_tensor("value", value, torch.float32, (rows, heads, size))
    check_tensor("slot_mapping", slot_mapping, torch.int64, (rows,))
    blocks, _, block_size, _ = check_cache(key_cache, value_cache, key_scale, value_scale, heads, size)
    check_range("slot_mapping", slot_mapping, -1, blocks * block_size)
    if key_cache.dtype == torch.float16:
        check_fits_half("key", key, slot_mapping)
        check_fits_half("value", value, slot_mapping)
    run("kv_scatter", key, value, slot_mapping, key_cache, value_cache, key_scale, value_scale)


def kv_merge(
    key_cache: Tensor,
    value_cache: Tensor,
    destination: Tensor,
    first: Tensor,
    second: Tensor,
    weight_first: Tensor,
    weight_second: Tensor,
    distance: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """Merges pairs of cache entries into one (token fusion with scope "cache"), item by item in order.

    key_cache, value_cache       [B, Hkv, bs, D], written at destination; an int8 cache is quantized anew there
    destination, first, second   int64 [M] slots
    weight_first, weight_second  float32 [M]: the result is the mean with these weights, in fp32
    distance                     int32 [M]: positions by which the first key's rotary embedding is turned ahead
    cosine, sine                 float32 [P, D / 2], P > every distance; None: no rotary embedding
    key_scale, value_scale       float32 [B, Hkv, bs], written at destination; for an int8 cache, else None
    """
    blocks, _, block_size, size = check_cache(key_cache, value_cache, key_scale, value_scale, "Hkv", "D")
    (items,) = check_tensor("destination", destination, torch.int64, ("M",))
    for name, slots in (("destination", destination), ("first", first), ("second", second)):
        check_tensor(name, slots, torch.int64, (items,))
        check_range(name, slots, 0, blocks * block_size)
    check_tensor("weight_first", weight_first, torch.float32, (items,))
    check_tensor("weight_second", weight_second, torch.float32, (items,))
    check_tensor("distance", distance, torch.int32, (items,))
    if (cosine is None) != (sine is None):
        raise ValueError(f"{'cosine' if cosine is None else 'sine'}: got None, wanted cosine and sine together")
    if cosine is not None:
        if size % 2:
            raise ValueError(f"key_cache: got head size {size}, wanted an even one for a rotary embedding")
        span, _ = check_tensor("cosine", cosine, torch.float32, ("P", size // 2))
        check_tensor("sine", sine, torch.float32, (span, size // 2))
        check_range("distance", distance, 0, span)
    run(
        "kv_merge",
        key_cache,
        value_cache,
        destination,
        first,
        second,
        weight_first,
        weight_second,
        distance,
        cosine,
        sine,
        key_scale,
        value_scale,
    )


# --- attention -------------------------------------------------------------------------------------------------------


def _check_attention(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    block_table: Any,
    kv_positions: Any,
    kv_lengths: Any,
    query_positions: Any,
    query_sequence: Any,
    scale: float,
    kv_until: Any,
    key_scale: Any,
    value_scale: Any,
) -> None:
    rows, heads, size = check_tensor("query", query, torch.float32, ("T", "H", "D"))
    blocks, kv_heads, block_size, _ = check_cache(key_cache, value_cache, key_scale, value_scale, "Hkv", size)
    if heads % kv_heads:
        raise ValueError(f"query: got {heads} heads, wanted a multiple of key_cache's {kv_heads}")
    check_tensor("kv_positions", kv_positions, torch.int32, (blocks, block_size))
    if kv_until is not None:
        check_tensor("kv_until", kv_until, torch.int32, (blocks, block_size))
    sequences, _ = check_table(block_table, kv_lengths, blocks, block_size)
    check_tensor("query_positions", query_positions, torch.int32, (rows,))
    check_tensor("query_sequence", query_sequence, torch.int32, (rows,))
    check_range("query_sequence", query_sequence, 0, sequences)
    check_number("scale", scale, finite=True)


def compacted_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    kv_positions: Tensor,
    kv_lengths: Tensor,
    query_positions: Tensor,
    query_sequence: Tensor,
    scale: float,
    kv_until: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """Attention of active queries over the entries that are present: softmax(scale * q . k) v, fp32 inside.

    query                   float32 [T, H, D]; head h reads KV head h // (H / Hkv)
    key_cache, value_cache  float32, float16, bfloat16 or int8 [B, Hkv, bs, D]
    block_table             int32 [S, MB]: entry e of sequence s is in block [s, e // bs] at e % bs
    kv_positions, kv_until  int32 [B, bs]: an entry is visible to queries with kv_positions <= position < kv_until
    kv_lengths              int32 [S], entries of each sequence
    query_positions, query_sequence  int32 [T]
    key_scale, value_scale  float32 [B, Hkv, bs], for an int8 cache, else None

    Returns float32 [T, H, D]; zeros where a query sees nothing.
    """
    args = (
        query,
        key_cache,
        value_cache,
        block_table,
        kv_positions,
        kv_lengths,
        query_positions,
        query_sequence,
        scale,
        kv_until,
        key_scale,
        value_scale,
    )
    _check_attention(*args)
    return run("compacted_attention", *args)


def attention_lse(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    kv_positions: Tensor,
    kv_lengths: Tensor,
    query_positions: Tensor,
    query_sequence: Tensor,
    scale: float,
    kv_until: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """compacted_attention, and the natural log of the sum of exp(scale * q . k): float32 [T, H], -inf for no entry."""
    args = (
        query,
        key_cache,
        value_cache,
        block_table,
        kv_positions,
        kv_lengths,
        query_positions,
        query_sequence,
        scale,
        kv_until,
        key_scale,
        value_scale,
    )
    _check_attention(*args)
    return run("attention_lse", *args)


# --- fusion ----------------------------------------------------------------------------------------------------------


def fusion_groups(
    hidden: Tensor,
    positions: Tensor,
    sequence: Tensor,
    fusible: Tensor,
    tau: float,
    relative: bool = True,
    max_group: int = 4,
) -> tuple[Tensor, Tensor]:
    """Groups adjacent similar tokens: row t joins row t - 1's group where both are fusible, of one sequence, at
    consecutive positions, closer than tau (||h_t - h_u||, over ||h_u|| if relative), and that group is not yet full.

    hidden float32 [T, d]; positions, sequence int32 [T]; fusible bool [T]; max_group at least 1.
    Returns group int32 [T], counting from 0 in row order, and count int32 [1].
    """
    rows, _ = check_tensor("hidden", hidden, torch.float32, ("T", "d"))
    check_tensor("positions", positions, torch.int32, (rows,))
    check_tensor("sequence", sequence, torch.int32, (rows,))
    check_tensor("fusible", fusible, torch.bool, (rows,))
    check_number("tau", tau)
    check_int("max_group", max_group, 1)
    return run("fusion_groups", hidden, positions, sequence, fusible, tau, relative, max_group)


def fusion_reduce(hidden: Tensor, weight: Tensor, group: Tensor, groups: int | None = None) -> Tensor:
    """Weighted mean of each group's rows: sum of weight * hidden over the sum of weight.

    hidden float32 [T, d]; weight float32 [T]; group int32 [T] as fusion_groups gives it. Returns float32 [G, d]; or,
    where ``groups`` says how many rows the result is to have (G, or more, T at most), the others zero. On a GPU the
    latter doesn't wait for it: nothing is read there, and numbers from ``groups`` on are left out.
    """
    rows, _ = check_tensor("hidden", hidden, torch.float32, ("T", "d"))
    check_tensor("weight", weight, torch.float32, (rows,))
    check_tensor("group", group, torch.int32, (rows,))
    if groups is not None:
        check_int("groups", groups, 1)
        if groups > rows:
            raise ValueError(f"groups: got {groups}, wanted at most {rows}, the number of rows")
    if not torch.compiler.is_compiling() and (groups is None or group.device.type == "cpu"):
        steps = group.diff(prepend=group.new_zeros(1))
        if group[0] != 0 or ((steps != 0) & (steps != 1)).any():
            raise ValueError("group: got numbers that don't rise from 0 by steps of 0 or 1, row by row")
        if groups is not None and groups <= group[-1]:
            raise ValueError(f"groups: got {groups}, wanted at least {int(group[-1]) + 1}, as many as group numbers")
    return run("fusion_reduce", hidden, weight, group, groups)


def fusion_expand(fused: Tensor, group: Tensor) -> Tensor:
    """The map back from groups to tokens: row t of the result is fused[group[t]].

    fused float32 [G, d]; group int32 [T], numbers below G. Returns float32 [T, d].
    """
    groups, _ = check_tensor("fused", fused, torch.float32, ("G", "d"))
    check_tensor("group", group, torch.int32, ("T",))
    check_range("group", group, 0, groups)
    return run("fusion_expand", fused, group)


# --- Matryoshka quantization -----------------------------------------------------------------------------------------


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def group_size_of(columns: int, groups: int) -> int:
    """The group size (128, 64 or 32) that cuts ``columns`` into ``groups``; the largest where several do."""
    for size in (128, 64, 32):
        if _ceil_div(columns, size) == groups:
            return size
    raise ValueError(f"scale: got {groups} groups for {columns} columns, which fits no group size of 32, 64 or 128")


def matryoshka_gemm(
    x: Tensor,
    hi: Tensor,
    lo: Tensor | None,
    scale: Tensor,
    bits: Tensor | None,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias with Matryoshka weights (quantize.pack_matryoshka) and rows of x quantized to INT8 on the fly.

    A weight's value is scale * (hi + (lo - 8) / 8) + offset, of 4 bits scale * hi + offset.

    x       float32 [T, K]
    hi, lo  uint8 [N, ceil(K / 8) * 4], in panel order; lo None: the weight has 4 bits only
    scale   float16 [N, ceil(K / g)], in panel order
    bits    int32 [T], 8 (all that the weight has) or 4 per row; None: 8 for all
    bias    float32 [N]
    offset  float16, shaped and ordered as scale; None: zeros

    Returns float32 [T, N]. Products are summed in integers per group and scaled in a fixed order, so a row's bits
    depend neither on the other rows nor on the instruction set. A row that holds NaN or Inf comes out as NaN.
    """
    rows, columns = check_tensor("x", x, torch.float32, ("T", "K"))
    features, _ = check_tensor("hi", hi, torch.uint8, ("N", _ceil_div(columns, 8) * 4))
    if lo is not None:
        check_tensor("lo", lo, torch.uint8, (features, hi.shape[1]))
    _, groups = check_tensor("scale", scale, torch.float16, (features, "G"))
    group_size_of(columns, groups)
    if bits is not None:
        check_tensor("bits", bits, torch.int32, (rows,))
        if not torch.compiler.is_compiling():
            good = (bits == 4) | (bits == 8)
            if not good.all():
                at = int((~good).nonzero()[0])
                raise ValueError(f"bits: got {int(bits[at])} at [{at}], wanted 8 or 4")
    if bias is not None:
        check_tensor("bias", bias, torch.float32, (features,))
    if offset is None:
        offset = torch.zeros_like(scale)
    check_tensor("offset", offset, torch.float16, (features, groups))
    return run("matryoshka_gemm", x, hi, lo, scale, bits, bias, offset)


def quantize_rows(x: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes each row per group of group_size (32, 64 or 128) columns: x = scale * q.

    x float32 [T, K]. Returns q int8 [T, Kp] (Kp: K rounded up to a multiple of 8, the pad being 0), scale float32
    [T, G], sum int32 [T, G] (of the integers of each group).
    A group that holds NaN or Inf has scale NaN and q 0.
    """
    check_tensor("x", x, torch.float32, ("T", "K"))
    if group_size not in (32, 64, 128):
        raise ValueError(f"group_size: got {group_size!r}, wanted 32, 64 or 128")
    return run("quantize_rows", x, group_size)


def matryoshka_pack(
    weight: Tensor,
    hi: Tensor,
    lo: Tensor | None,
    scale: Tensor,
    offset: Tensor,
    importance: Tensor | None = None,
) -> None:
    """Quantizes a weight matrix and writes its planes, scales and offsets, as weights/matryoshka.py defines them, in
    panel order.

    weight         float32, float16 or bfloat16 [N, K], on the CPU
    hi, lo         uint8 [N, ceil(K / 8) * 4], written; lo None: the high plane alone
    scale, offset  float16 [N, G], written; G says the group size, 128, 64 or 32
    importance     float32 [K], above 0: what a squared error in a column weighs; None: the same for all

    A group that holds NaN, Inf or a value beyond fp16's range gets scale NaN. On the CPU whatever the backend, but for
    the reference.
    """
    rows, columns = check_tensor("weight", weight, (torch.float32, torch.float16, torch.bfloat16), ("N", "K"))
    check_tensor("hi", hi, torch.uint8, (rows, _ceil_div(columns, 8) * 4))
    if lo is not None:
        check_tensor("lo", lo, torch.uint8, (rows, hi.shape[1]))
    _, groups = check_tensor("scale", scale, torch.float16, (rows, "G"))
    group_size_of(columns, groups)
    check_tensor("offset", offset, torch.float16, (rows, groups))
    if importance is not None:
        check_tensor("importance", importance, torch.float32, (columns,))
    parts = {"weight": weight, "hi": hi, "lo": lo, "scale": scale, "offset": offset, "importance": importance}
    on_host("matryoshka_pack", parts)(*parts.values())


# Values and bytes of a block, by GGUF's number of the type: Q4_0, Q4_1, Q8_0, Q4_K and Q6_K.
GGUF_BLOCKS = {2: (32, 18), 3: (32, 20), 8: (32, 34), 12: (256, 144), 14: (256, 210)}


def gguf_dequantize(blocks: Tensor, type: int, values: Tensor) -> None:
    """Blocks of a GGUF file to the values that the gguf package gives, bit for bit (NaN's aside).

    blocks  uint8 [n, bytes of a block], on the CPU
    type    GGUF's number of the block format, one of GGUF_BLOCKS
    values  float32 [n, values of a block], written

    On the CPU whatever the backend, but for the reference.
    """
    if type not in GGUF_BLOCKS:
        raise ValueError(f"type: got {type!r}, wanted one of {', '.join(map(str, GGUF_BLOCKS))}")
    count, size = GGUF_BLOCKS[type]
    (n, _) = check_tensor("blocks", blocks, torch.uint8, ("n", size))
    check_tensor("values", values, torch.float32, (n, count))
    on_host("gguf_dequantize", {"blocks": blocks, "values": values})(blocks, type, values)
