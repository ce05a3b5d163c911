"""Every operator in plain PyTorch: the definition that the compiled kernels are tested against.

Same signatures as in ops.py, which checks the arguments. quantize_rows and matryoshka_gemm equal the kernels bit for
bit; the others work in the dtype of their first tensor, so that a test can ask for the same in float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .ops import HaltingParams, group_size_of, register_python_backend

INT32_MAX = 2**31 - 1


# --- halting ---------------------------------------------------------------------------------------------------------


def _distance(a: Tensor, b: Tensor, relative: bool) -> Tensor:
    """||a - b|| by row, over ||b|| if relative; 0 / 0 is 0."""
    distance = (a - b).norm(dim=-1)
    return torch.where(distance == 0, distance, distance / b.norm(dim=-1)) if relative else distance


def halting_update(
    hidden: Tensor,
    previous: Tensor,
    entropy: Tensor | None,
    halted: Tensor,
    positions: Tensor,
    params: HaltingParams,
    overrides: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    drift = _distance(hidden, previous, params.relative)
    halts = drift < drift.new_tensor(params.drift_threshold)
    if params.entropy_threshold is not None:
        assert entropy is not None
        halts &= entropy < entropy.new_tensor(params.entropy_threshold)
    if overrides is not None:
        halts = (halts | (overrides == 1)) & (overrides != -1)
    halts &= positions >= params.sink_tokens
    goes_on = (~halted & ~halts).nonzero().flatten().to(torch.int32)
    active_index = torch.full_like(positions, -1)
    active_index[: len(goes_on)] = goes_on
    count = goes_on.new_tensor([len(goes_on)])
    return drift.masked_fill(halted, 0.0), halted | halts, active_index, count


def softmax_entropy(hidden: Tensor) -> Tensor:
    log_p = hidden.log_softmax(-1)
    p = log_p.exp()
    return torch.where(p == 0, 0.0, -p * log_p).sum(-1) / math.log(2)


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
    block_size = kv_positions.shape[1]
    slots = []
    for s in sequence.tolist():
        block, offset = divmod(int(kv_lengths[s]), block_size)
        if block_table[s, block] < 0:
            block_table[s, block] = blocks_used[0] if free_blocks is None else free_blocks[int(blocks_used)]
            blocks_used += 1
        slots.append(int(block_table[s, block]) * block_size + offset)
        kv_lengths[s] += 1
    slot_mapping = torch.tensor(slots, dtype=torch.int64, device=sequence.device)
    kv_positions.view(-1)[slot_mapping] = positions
    if kv_until is not None:
        until = positions.long() + window if window else torch.full_like(positions, INT32_MAX)
        kv_until.view(-1)[slot_mapping] = until.clamp(max=INT32_MAX).to(torch.int32)
    return slot_mapping


def _read(cache: Tensor, scale: Tensor | None, block: Any, offset: Any, dtype: torch.dtype) -> Tensor:
    """Vectors [..., Hkv, D] of a cache array, an int8 one dequantized."""
    vectors = cache[block, :, offset].to(dtype)
    return vectors if scale is None else vectors * scale[block, :, offset, None].to(dtype)


def _write(cache: Tensor, scale: Tensor | None, block: Any, offset: Any, vectors: Tensor) -> None:
    if scale is not None:
        vectors, scale[block, :, offset] = _quantize(vectors, 127)
    cache[block, :, offset] = vectors.to(cache.dtype)


def kv_scatter(
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    block_size = key_cache.shape[2]
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    at = slots // block_size, slots % block_size
    _write(key_cache, key_scale, *at, key[written])
    _write(value_cache, value_scale, *at, value[written])


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
    block_size = key_cache.shape[2]
    work = torch.float64 if key_cache.dtype == torch.float64 else torch.float32
    for i in range(len(destination)):  # in order: an item may read what an earlier one wrote
        to, a, b = ((int(slots[i]) // block_size, int(slots[i]) % block_size) for slots in (destination, first, second))
        key = _read(key_cache, key_scale, *a, work)
        if cosine is not None and sine is not None:
            x, y = key.chunk(2, -1)
            c, s = cosine[distance[i]].to(work), sine[distance[i]].to(work)
            key = torch.cat((x * c - y * s, y * c + x * s), -1)
        wa, wb = weight_first[i].to(work), weight_second[i].to(work)
        key = (wa * key + wb * _read(key_cache, key_scale, *b, work)) / (wa + wb)
        value = _read(value_cache, value_scale, *a, work)
        value = (wa * value + wb * _read(value_cache, value_scale, *b, work)) / (wa + wb)
        _write(key_cache, key_scale, *to, key)
        _write(value_cache, value_scale, *to, value)


# --- attention -------------------------------------------------------------------------------------------------------


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
    block_size = key_cache.shape[2]
    shared = query.shape[1] // key_cache.shape[1]  # query heads per KV head
    out = torch.zeros_like(query)
    log_sum_exp = query.new_full(query.shape[:2], -math.inf)
    for s in query_sequence.unique().tolist():
        entry = torch.arange(int(kv_lengths[s]), dtype=torch.int64, device=query.device)
        block, offset = block_table[s, entry // block_size].long(), entry % block_size
        rows = (query_sequence == s).nonzero().flatten()
        at = query_positions[rows, None]
        visible = kv_positions[block, offset] <= at
        if kv_until is not None:
            visible &= at < kv_until[block, offset]
        key = _read(key_cache, key_scale, block, offset, query.dtype).repeat_interleave(shared, 1)
        value = _read(value_cache, value_scale, block, offset, query.dtype).repeat_interleave(shared, 1)
        scores = torch.einsum("qhd,ehd->qhe", query[rows], key) * scale
        scores = scores.masked_fill(~visible[:, None], -math.inf)
        weights = scores.softmax(-1).masked_fill(~visible[:, None], 0.0)
        out[rows] = torch.einsum("qhe,ehd->qhd", weights, value)
        log_sum_exp[rows] = scores.logsumexp(-1)
    return out, log_sum_exp


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
    return attention_lse(
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
    )[0]


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
    distance = _distance(hidden[1:], hidden[:-1], relative)
    joins = distance < distance.new_tensor(tau)
    joins &= fusible[1:] & fusible[:-1]
    joins &= (sequence[1:] == sequence[:-1]) & (positions[1:] == positions[:-1] + 1)
    group, size = [0], 1
    for join in joins.tolist():
        size = size + 1 if join and size < max_group else 1
        group.append(group[-1] + (size == 1))
    index = torch.tensor(group, dtype=torch.int32, device=hidden.device)
    return index, index[-1:] + 1


def fusion_reduce(hidden: Tensor, weight: Tensor, group: Tensor, groups: int | None = None) -> Tensor:
    count = int(group[-1]) + 1
    total = hidden.new_zeros(groups or count, hidden.shape[1]).index_add_(0, group, weight[:, None] * hidden)
    total[:count] /= weight.new_zeros(count).index_add_(0, group, weight)[:, None]
    return total


def fusion_expand(fused: Tensor, group: Tensor) -> Tensor:
    return fused[group]


# --- Matryoshka quantization -----------------------------------------------------------------------------------------


def _quantize(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """x = scale * v: v [..., n] as whole numbers up to the limit in x's dtype, and scale [...]."""
    largest = x.abs().amax(-1)
    finite = largest.isfinite()
    good = finite & (largest != 0)
    # Rounded up to bfloat16, so that rows which hardly differ get the same scale.
    rounded = ((largest.float().view(torch.int32) + 0xFFFF) & ~0xFFFF).clamp(max=0x7F7F0000)
    largest = rounded.view(torch.float32).to(x.dtype)
    scale = torch.where(finite, largest / limit, torch.nan)
    # Where limit / largest overflows (subnormal values), 0 * inf is no number; it stands for 0.
    # (Tensors on both sides: for number / tensor, PyTorch multiplies by a reciprocal, which rounds twice.)
    inverse = torch.full_like(largest, limit) / largest
    v = torch.where(x == 0, x, x * inverse[..., None]).round().clamp(-limit, limit)
    return torch.where(good[..., None], v, 0.0), scale


def _from_panels(storage: Tensor) -> Tensor:
    """[N, columns] in panel order (16 rows at a time, column by column) -> the same in row order."""
    rows, columns = storage.shape
    full = rows // 16 * 16
    flat = storage.flatten()
    panels = flat[: full * columns].view(full // 16, columns, 16).transpose(1, 2).reshape(full, columns)
    tail = flat[full * columns :].view(columns, rows - full).T
    return torch.cat((panels, tail))


def _into_panels(matrix: Tensor, storage: Tensor) -> None:
    """Fills ``storage`` (panel order) from a matrix [N, columns] in row order."""
    rows, columns = matrix.shape
    full = rows // 16 * 16
    panels = matrix[:full].view(full // 16, 16, columns).transpose(1, 2)
    storage.view(-1).copy_(torch.cat((panels.flatten(), matrix[full:].T.flatten())))


def _nibbles(plane: Tensor, columns: int) -> Tensor:
    """A plane -> its nibbles [N, K], as float64: sums of products of integers this small are exact in it."""
    lines = _from_panels(plane.view(torch.int32)).contiguous().view(torch.uint8).view(plane.shape[0], -1, 4)
    return torch.cat((lines & 15, lines >> 4), -1).flatten(1)[:, :columns].double()


def quantize_rows(x: Tensor, group_size: int, planes: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    groups, padded = -(-columns // group_size), -(-columns // 8) * 8
    x = torch.nn.functional.pad(x, (0, groups * group_size - columns)).view(rows, groups, group_size)
    v, scale = _quantize(x, 127 if planes == 1 else 32512)
    v = v.to(torch.int32)
    q = v if planes == 1 else (v + 128) >> 8
    low = v - 256 * q

    def stored(part: Tensor) -> Tensor:
        part = part.to(torch.int8).view(rows, -1)
        return torch.nn.functional.pad(part, (0, max(0, padded - part.shape[1])))[:, :padded].contiguous()

    empty = q.new_empty(rows, 0, dtype=torch.int8)
    return stored(q), stored(low) if planes == 2 else empty, scale, v.sum(-1, dtype=torch.int32)


def matryoshka_pack(weight: Tensor, hi: Tensor, lo: Tensor | None, scale: Tensor) -> None:
    rows, columns = weight.shape
    groups = scale.shape[1]
    group_size = group_size_of(columns, groups)
    values = torch.nn.functional.pad(weight.float(), (0, groups * group_size - columns)).view(rows, groups, group_size)
    low, high = values.amin(-1), values.amax(-1)
    largest = torch.where(high >= -low, high, low)
    stored = (largest / -128 + 0.0).half()  # + 0 makes the scale of a group of zeros +0
    stored[~stored.isfinite()] = torch.nan
    good = (stored.abs() > 0)[..., None]
    q = torch.where(good, values / stored.float()[..., None], 0.0).round().clamp(-128, 119)
    codes = (q + 136).to(torch.uint8).view(rows, -1)[:, : 2 * hi.shape[1]].reshape(rows, -1, 2, 4)
    first, second = codes.unbind(2)  # values 0..3 and 4..7 of each line
    _into_panels((first >> 4 | second & 0xF0).view(torch.int32).squeeze(-1), hi.view(torch.int32))
    if lo is not None:
        _into_panels((first & 15 | second << 4).view(torch.int32).squeeze(-1), lo.view(torch.int32))
    _into_panels(stored, scale)


def matryoshka_gemm(
    x: Tensor,
    hi: Tensor,
    lo: Tensor | None,
    scale: Tensor,
    bits: Tensor | None,
    bias: Tensor | None = None,
    *,
    planes: int = 1,
    offset: Tensor | None = None,
) -> Tensor:
    columns, features = x.shape[1], hi.shape[0]
    group_size = group_size_of(columns, scale.shape[1])
    q, q_low, x_scale, x_sum = quantize_rows(x, group_size, planes)
    v = q.double() if planes == 1 else 256 * q.double() + q_low.double()
    w_scale = _from_panels(scale).float()
    w_offset = None if offset is None else _from_panels(offset).float()
    zero = 128 if offset is None else 0
    high = 16 * _nibbles(hi, columns)
    if bits is None:
        bits = q.new_full((len(x),), 4 if lo is None else 8, dtype=torch.int32)

    y = x_scale.new_empty(len(x), features)
    for width in (4, 8):
        rows = (bits == width).nonzero().flatten()
        if len(rows) == 0:
            continue
        if width == 4:
            w = high - zero
        else:
            assert lo is not None
            w = high + _nibbles(lo, columns) - 8 - zero
        total = x_scale.new_zeros(len(rows), features)
        for g, start in enumerate(range(0, columns, group_size)):  # in this order: fp32 sums depend on it
            part = slice(start, min(start + group_size, columns))
            dot = v[rows, part] @ w[:, part].T
            unit = 1.0 if w_offset is None else 1 / 16
            term = dot.float() * ((x_scale[rows, g, None] * unit) * w_scale[:, g])
            if w_offset is not None:
                term = term + (x_sum[rows, g, None].float() * x_scale[rows, g, None]) * w_offset[:, g]
            total += term
        y[rows] = total
    return y if bias is None else y + bias


def gguf_dequantize(blocks: Tensor, type: int, values: Tensor) -> None:
    from gguf import GGMLQuantizationType, quants  # the format's own library

    values.copy_(torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType(type))))


register_python_backend(
    "reference",
    {
        function.__name__: function
        for function in (
            halting_update,
            softmax_entropy,
            kv_allocate,
            kv_scatter,
            kv_merge,
            compacted_attention,
            attention_lse,
            fusion_groups,
            fusion_reduce,
            fusion_expand,
            gguf_dequantize,
            matryoshka_gemm,
            matryoshka_pack,
            quantize_rows,
        )
    },
)
