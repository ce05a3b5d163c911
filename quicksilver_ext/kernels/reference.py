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


def quantize_rows(x: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    groups, padded = -(-columns // group_size), -(-columns // 8) * 8
    x = torch.nn.functional.pad(x, (0, groups * group_size - columns)).view(rows, groups, group_size)
    v, scale = _quantize(x, 127)
    q = v.to(torch.int8).view(rows, -1)
    q = torch.nn.functional.pad(q, (0, max(0, padded - q.shape[1])))[:, :padded].contiguous()
    return q, scale, v.to(torch.int32).sum(-1, dtype=torch.int32)


# --- packing: see csrc/cpu/pack.cpp, whose every rounding this repeats -----------------------------------------------
SHARES = (1.0, 0.9, 0.8, 0.7)
BIT = 0.1
EIGHT_WEIGHS = 4.0
FIFTEENTH = 1 / 15


def _sum_lanes(x: Tensor) -> Tensor:
    """Sums of [..., n], n a multiple of 16, in the kernels' order: lane by lane, then lanes 8, 4, 2 and 1 apart."""
    lanes = torch.zeros_like(x[..., :16])
    for start in range(0, x.shape[-1], 16):
        lanes = lanes + x[..., start : start + 16]
    for apart in (8, 4, 2, 1):
        lanes = lanes[..., :apart] + lanes[..., apart : 2 * apart]
    return lanes


def _steps(value: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and residuals (in eighths, plus 8) of values [..., n] on a grid [..., 1]."""
    inverse = torch.where(scale > 0, torch.ones_like(scale) / scale, 0.0)
    steps = (value - offset) * inverse
    code = steps.clamp(0, 15).round()
    return code, ((steps - code) * 8 + 8).clamp(0, 15).round()


def _refined(value: Tensor, weight: Tensor, low: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    q, _ = _steps(value, scale, offset)
    hq, w = weight * q, value - low
    h, sum_q, sum_qq = _sum_lanes(weight), _sum_lanes(hq), _sum_lanes(hq * q)
    sum_w, sum_wq = _sum_lanes(weight * w), _sum_lanes(hq * w)
    determinant = h * sum_qq - sum_q * sum_q
    step = (h * sum_wq - sum_q * sum_w) / determinant
    good = (determinant > 0) & (step > 0)
    start = low + (sum_w - step * sum_q) / h
    return torch.where(good, step.half().float(), scale), torch.where(good, start.half().float(), offset)


def matryoshka_pack(
    weight: Tensor, hi: Tensor, lo: Tensor | None, scale: Tensor, offset: Tensor, importance: Tensor | None = None
) -> None:
    rows, columns = weight.shape
    groups = scale.shape[1]
    size = group_size_of(columns, groups)
    pad = (0, groups * size - columns)
    value = torch.nn.functional.pad(weight.float(), pad).view(rows, groups, size)
    weighs = weight.new_ones(columns, dtype=torch.float32) if importance is None else importance
    weighs = torch.nn.functional.pad(weighs, pad).view(1, groups, size)
    inside = torch.nn.functional.pad(weight.new_ones(columns, dtype=torch.bool), pad).view(groups, size)
    value = torch.where(inside, value, value[..., :1])  # what it doesn't weigh leaves the range alone
    low, high = value.amin(-1, keepdim=True), value.amax(-1, keepdim=True)
    half = (high - low) * 0.5
    middle, largest = low + half, torch.maximum(-low, high)
    least = torch.full_like(low, torch.inf)
    best_scale, best_offset, share = torch.zeros_like(low), torch.zeros_like(low), torch.ones_like(low)

    def spanning(lower: Tensor | float, upper: Tensor | float) -> tuple[Tensor, Tensor]:
        begin, end = middle - half * lower, middle + half * upper
        step = (end - begin) * FIFTEENTH
        step = torch.where(step < largest * 2.0**-11, largest * 2.0**-11, step)
        return step.half().float(), ((begin + end) * 0.5 - 7.5 * step).half().float()

    def consider(grid: tuple[Tensor, Tensor], refinements: int) -> Tensor:
        nonlocal least, best_scale, best_offset
        for _ in range(refinements):
            grid = _refined(value, weighs, low, *grid)
        code, residual = _steps(value, *grid)
        rest = (value - grid[1]) - grid[0] * code
        finer = rest - (grid[0] * 0.125) * (residual - 8)
        error = _sum_lanes(weighs * (rest * rest)) + EIGHT_WEIGHS * _sum_lanes(weighs * (finer * finer))
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, grid[0], best_scale)
        best_offset = torch.where(better, grid[1], best_offset)
        return better

    for each in SHARES:
        share = torch.where(consider(spanning(each, each), 1), each, share)
    for other in (share - BIT, share + BIT):
        consider(spanning(other, share), 2)
        consider(spanning(share, other), 2)
    bad = ~(least < torch.inf)  # no grid within fp16's range
    consider((best_scale, best_offset), 2)
    code, residual = _steps(value, best_scale, best_offset)
    best_scale = torch.where(bad, torch.nan, best_scale)
    for plane, nibbles in ((hi, code), (lo, residual)):
        if plane is None:
            continue
        nibbles = nibbles.nan_to_num(0.0).to(torch.uint8).view(rows, -1)[:, : 2 * hi.shape[1]].reshape(rows, -1, 2, 4)
        first, second = nibbles.unbind(2)  # values 0..3 and 4..7 of each line
        _into_panels((first | second << 4).view(torch.int32).squeeze(-1), plane.view(torch.int32))
    _into_panels(best_scale.squeeze(-1).half(), scale)
    _into_panels(best_offset.squeeze(-1).half(), offset)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fp32 a * b + c, rounded once. The product is exact in fp64; their sum is rounded to odd there, so that the second
    rounding sees which side of a tie it was on (Boldo and Melquiond, 2008)."""
    product, c = a.double() * b.double(), c.double()
    sum = product + c
    of_c = sum - product
    lost = (product - (sum - of_c)) + (c - of_c)
    bits = sum.view(torch.int64)
    even = lost.isfinite() & (lost != 0) & (bits & 1 == 0)
    away = torch.where((lost > 0) == (sum > 0), 1, -1)
    return torch.where(even, bits + away, bits).view(torch.float64).float()


SEGMENTS = 8  # of K, csrc/include/quicksilver/matryoshka.h


def matryoshka_gemm(
    x: Tensor,
    hi: Tensor,
    lo: Tensor | None,
    scale: Tensor,
    bits: Tensor | None,
    bias: Tensor | None,
    offset: Tensor,
) -> Tensor:
    columns, features = x.shape[1], hi.shape[0]
    group_size = group_size_of(columns, scale.shape[1])
    q, x_scale, x_sum = quantize_rows(x, group_size)
    v, w_scale, w_offset = q.double(), _from_panels(scale).float(), _from_panels(offset).float()
    codes = {4: 8 * _nibbles(hi, columns)}
    codes[8] = codes[4] if lo is None else codes[4] + _nibbles(lo, columns) - 8
    if bits is None:
        bits = q.new_full((len(x),), 8, dtype=torch.int32)

    y = x_scale.new_empty(len(x), features)
    for width, w in codes.items():
        rows = (bits == width).nonzero().flatten()
        total = x_scale.new_zeros(len(rows), features)
        groups = scale.shape[1]
        for segment in range(SEGMENTS):  # in this order: fp32 sums depend on it
            acc = torch.zeros_like(total)
            for g in range(segment * groups // SEGMENTS, (segment + 1) * groups // SEGMENTS):
                part = slice(g * group_size, min((g + 1) * group_size, columns))
                dot = v[rows, part] @ w[:, part].T
                acc = fma(dot.float(), (x_scale[rows, g, None] / 8) * w_scale[:, g], acc)
                acc = fma(x_sum[rows, g, None].float() * x_scale[rows, g, None], w_offset[:, g], acc)
            total += acc
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
