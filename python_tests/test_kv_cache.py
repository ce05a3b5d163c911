"""kv_allocate, kv_scatter and kv_merge on every backend."""

import pytest
import torch
from cases import int8_cache

from quicksilver_ext.kernels import ops, reference, testing

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def table(sequences=3, width=4, blocks=7, block_size=4, until=True, free=None, window=0):
    """An empty cache's bookkeeping, by kv_allocate's names."""
    return {
        "free_blocks": None if free is None else ints(*free),
        "window": window,
        "kv_lengths": torch.zeros(sequences, dtype=torch.int32),
        "block_table": torch.full((sequences, width), -1, dtype=torch.int32),
        "kv_positions": torch.full((blocks, block_size), 99, dtype=torch.int32),
        "kv_until": torch.zeros(blocks, block_size, dtype=torch.int32) if until else None,
        "blocks_used": torch.zeros(1, dtype=torch.int32),
    }


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def clone(arguments):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"until": False},
        {"free": [3, 6, 0, 5, 1, 2, 4]},
        {"window": 3},
        {"free": [6, 5, 4, 3, 2, 1, 0], "window": 1},
    ],
    ids=str,
)
def test_allocate_equals_reference(backend, options):
    got, want = table(**options), table(**options)
    g = torch.Generator().manual_seed(0)
    for step in range(4):
        sequence = torch.randint(0, 3, (5,), generator=g).sort().values.to(torch.int32)
        positions = torch.arange(5, dtype=torch.int32) + 10 * step
        testing.assert_equal(
            ops.kv_allocate(sequence, positions, **got), reference.kv_allocate(sequence, positions, **want), "slots"
        )
        assert_same(got, want)


def assert_same(got, want):
    for name in got:
        if isinstance(got[name], torch.Tensor):
            testing.assert_equal(got[name], want[name], name)


def test_blocks_come_back(backend):
    cache = table(free=[2, 4, 6, 0, 1, 3, 5])
    slots = ops.kv_allocate(ints(0, 0, 0, 0, 0, 1), ints(0, 1, 2, 3, 4, 0), **cache)
    assert slots.tolist() == [8, 9, 10, 11, 16, 24] and cache["blocks_used"].tolist() == [3]
    # The first sequence goes; a block that the table keeps is taken before any other.
    cache["free_blocks"][2] = 4
    cache["blocks_used"][0] = 2
    cache["block_table"][0, 1] = -1
    cache["kv_lengths"][0] = 0
    slots = ops.kv_allocate(ints(0, 2, 0, 1, 0, 0, 0), ints(0, 0, 1, 1, 2, 3, 4), **cache)
    assert slots.tolist() == [8, 16, 9, 25, 10, 11, 0] and cache["blocks_used"].tolist() == [4]
    assert cache["block_table"].tolist() == [[2, 0, -1, -1], [6, -1, -1, -1], [4, -1, -1, -1]]


def test_a_window_is_seen_as_transformers_sees_it(backend):
    """MistralConfig.sliding_window: a query at i sees the keys at j with i - window < j <= i."""
    g = torch.Generator().manual_seed(0)
    rows, window, at = 11, 4, torch.arange(11, dtype=torch.int32)
    cache, caches = table(window=window), torch.zeros(2, 7, 2, 4, 8)
    key, value, query = torch.randn(3, rows, 2, 8, generator=g)
    slots = ops.kv_allocate(torch.zeros_like(at), at, **cache)
    ops.kv_scatter(key, value, slots, *caches)
    bookkeeping = (cache["block_table"], cache["kv_positions"], cache["kv_lengths"])
    got = ops.compacted_attention(query, *caches, *bookkeeping, at, torch.zeros_like(at), 0.3, cache["kv_until"])
    visible = (at[None] <= at[:, None]) & (at[:, None] - at[None] < window)
    heads = (x.transpose(0, 1) for x in (query, key, value))
    want = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=visible, scale=0.3)
    torch.testing.assert_close(got, want.transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_a_window_ends_at_the_last_position(backend):
    cache, never = table(window=3), 2**31 - 1
    slots = ops.kv_allocate(ints(0, 0, 0), ints(never - 4, never - 3, never), **cache)
    assert cache["kv_until"].view(-1)[slots].tolist() == [never - 1, never, never]


def test_allocate_hands_out_blocks_in_order(backend):
    cache = table()
    slots = ops.kv_allocate(ints(0, 0, 1, 1, 1, 1, 1), ints(0, 2, 0, 1, 2, 3, 4), **cache)
    assert slots.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert cache["block_table"][:2, :2].tolist() == [[0, -1], [1, 2]]
    assert cache["kv_lengths"].tolist() == [2, 5, 0] and cache["blocks_used"].tolist() == [3]
    assert cache["kv_positions"].view(-1)[slots].tolist() == [0, 2, 0, 1, 2, 3, 4]
    assert (cache["kv_until"].view(-1)[slots] == 2**31 - 1).all()


@pytest.mark.parametrize("free", [None, [6, 5, 4, 3, 2, 1, 0]], ids=["in order", "free list"])
@pytest.mark.parametrize("sequences", [[0] * 17, [0] * 16 + [1] * 13], ids=["a row of the table", "all blocks"])
def test_a_full_cache_changes_nothing(backend, sequences, free):
    cache = table(free=free)
    before = clone(cache)
    rows = len(sequences)
    with pytest.raises(ValueError, match="cache has 7 left and room for 4 a sequence"):
        ops.kv_allocate(ints(*sequences), torch.arange(rows, dtype=torch.int32), **cache)
    assert_same(cache, before)


def test_the_last_slot_can_be_had(backend):
    cache = table()
    ops.kv_allocate(ints(*[0] * 16, *[1] * 12), torch.arange(28, dtype=torch.int32), **cache)
    assert cache["blocks_used"].tolist() == [7] and cache["kv_lengths"].tolist() == [16, 12, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, size", [(1, 64), (3, 10), (2, 33)])
def test_scatter_equals_reference(backend, dtype, heads, size):
    g = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 9, heads, size, generator=g)
    key[0, 0, :5] = torch.tensor([float("nan"), float("inf"), 1e-8, 65519.0, 3e38])  # subnormal, rounding, overflow
    if dtype == torch.float16:
        key[0, 0, 4] = -65519.0
    slots = torch.randperm(20, generator=g)[:9]
    slots[4] = -1
    key[4] = 1e30  # which isn't written
    caches = torch.randn(2, 5, heads, 4, size, generator=g).to(dtype)
    got, want = caches.clone(), caches.clone()
    ops.kv_scatter(key, value, slots, got[0], got[1])
    reference.kv_scatter(key, value, slots, want[0], want[1])
    testing.assert_equal(got, want)


@pytest.mark.parametrize("name", ["key", "value"])
def test_what_fp16_cannot_hold_is_refused(backend, name):
    rows = {"key": torch.randn(3, 2, 8), "value": torch.randn(3, 2, 8)}
    rows[name][1, 1, 5] = -65520.0
    slots = torch.tensor([0, 1, 2])
    half = torch.ones(2, 2, 2, 4, 8, dtype=torch.float16)
    message = rf"{name}: got -65520 at \[1, 1, 5\], beyond fp16's range.*bfloat16, float32 or int8"
    with pytest.raises(ValueError, match=message):
        ops.kv_scatter(**rows, slot_mapping=slots, key_cache=half[0], value_cache=half[1])
    assert (half == 1).all()
    wide = torch.ones(2, 2, 2, 4, 8, dtype=torch.bfloat16)
    ops.kv_scatter(**rows, slot_mapping=slots, key_cache=wide[0], value_cache=wide[1])
    assert wide[int(name == "value"), 0, 1, 1, 5] == -65536.0


def int8_pair(*shape):
    """Key and value caches full of what must stay, by kv_scatter's names."""
    arrays = torch.full((2, *shape), 99, dtype=torch.int8)
    scales = torch.full((2, *shape[:-1]), 7.0)
    return {"key_cache": arrays[0], "value_cache": arrays[1], "key_scale": scales[0], "value_scale": scales[1]}


@pytest.mark.parametrize("heads, size", [(1, 64), (3, 10), (2, 33), (1, 200)])
def test_int8_scatter_equals_reference(backend, heads, size):
    g = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 9, heads, size, generator=g) * 10 ** torch.linspace(-3, 3, 9)[:, None, None]
    key[0, 0, 3], key[1, 0, 0] = float("nan"), float("-inf")
    key[2, 0], key[3, 0], value[0, 0, -1] = 0.0, 1e-40, 3e38
    slots = torch.randperm(20, generator=g)[:9]
    slots[4] = -1
    got, want = int8_pair(5, heads, 4, size), int8_pair(5, heads, 4, size)
    ops.kv_scatter(key, value, slots, **got)
    reference.kv_scatter(key, value, slots, **want)
    for name in got:
        testing.assert_equal(got[name], want[name], name)
    # A vector is quantized as a row of one group is.
    slot = int(slots[6])
    q, scale, _ = ops.quantize_rows(value[6, 0, None, :128].contiguous(), 128)
    if size <= 128:
        testing.assert_equal(got["value_cache"][slot // 4, 0, slot % 4], q[0, :size])
        testing.assert_equal(got["value_scale"][slot // 4, 0, slot % 4], scale[0, 0])
    bad, zero = (got["key_scale"][int(slots[i]) // 4, 0, int(slots[i]) % 4] for i in (0, 2))
    assert bad.isnan() and zero == 0


def test_scatter_writes_nothing_when_a_slot_is_bad(backend):
    key, value = torch.randn(2, 3, 2, 8)
    caches = torch.zeros(2, 2, 2, 4, 8)
    for bad in (8, -2, 2**40):
        with pytest.raises(IndexError, match=rf"slot_mapping: got {bad} at \[2\].*wanted -1 to 7"):
            ops.kv_scatter(key, value, torch.tensor([0, 1, bad]), caches[0], caches[1])
        assert (caches == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary", [True, False])
def test_merge(backend, dtype, rotary):
    g = torch.Generator().manual_seed(0)
    caches = torch.randn(2, 3, 2, 8, 12, generator=g).to(dtype)
    angle = torch.arange(5)[:, None] * torch.rand(6, generator=g)
    slots = torch.tensor([[1, 0, 1], [2, 1, 2], [20, 9, 23]])  # the second item reads what the first wrote
    weights = torch.rand(2, 3, generator=g) + 0.1
    rest = (*slots.T.contiguous(), *weights, ints(1, 1, 4))
    turns = (angle.cos(), angle.sin()) if rotary else (None, None)
    got, want, exact = caches.clone(), caches.clone(), caches.double()
    ops.kv_merge(got[0], got[1], *rest, *turns)
    reference.kv_merge(want[0], want[1], *rest, *turns)
    reference.kv_merge(exact[0], exact[1], *rest, *turns)
    testing.assert_close(got, exact, want)
    untouched = torch.ones(24, dtype=torch.bool)
    untouched[slots[:, 0]] = False
    flat = caches.transpose(2, 3).flatten(1, 2)[:, untouched]
    testing.assert_equal(got.transpose(2, 3).flatten(1, 2)[:, untouched], flat)


@pytest.mark.parametrize("rotary", [True, False])
def test_int8_merge(backend, rotary):
    g = torch.Generator().manual_seed(0)
    arrays, scales = int8_cache(torch.randn(2, 3, 2, 8, 12, generator=g))
    angle = torch.arange(5)[:, None] * torch.rand(6, generator=g)
    slots = torch.tensor([[1, 0, 1], [2, 1, 2], [20, 9, 23]])  # the second item reads what the first wrote
    rest = (*slots.T.contiguous(), *(torch.rand(2, 3, generator=g) + 0.1), ints(1, 1, 4))
    rest = (*rest, angle.cos(), angle.sin()) if rotary else (*rest, None, None)
    got, got_scales, want, want_scales = arrays.clone(), scales.clone(), arrays.clone(), scales.clone()
    ops.kv_merge(*got, *rest, *got_scales)
    reference.kv_merge(*want, *rest, *want_scales)
    torch.testing.assert_close(got_scales, want_scales, rtol=1e-6, atol=0.0)
    assert (got.int() - want.int()).abs().max() <= 1  # where a tie was rounded the other way
    untouched = torch.ones(24, dtype=torch.bool)
    untouched[slots[:, 0]] = False
    for a, b in ((got, arrays), (got_scales[..., None], scales[..., None])):
        kept, before = (x.transpose(2, 3).flatten(1, 2)[:, untouched] for x in (a, b))
        testing.assert_equal(kept, before)
        assert (a != b).any()


def test_merging_like_with_like_changes_nothing(backend):
    caches = torch.randn(2, 1, 1, 4, 8)
    caches[:, :, :, 1] = caches[:, :, :, 0]
    before = caches.clone()
    one, half = torch.tensor([1]), torch.tensor([0.5])
    ops.kv_merge(caches[0], caches[1], one, torch.tensor([0]), one, half, half, ints(0), None, None)
    testing.assert_equal(caches, before)


def scatter_arguments(**changes):
    return {
        "key": torch.randn(3, 2, 8),
        "value": torch.randn(3, 2, 8),
        "slot_mapping": torch.tensor([0, 1, 2]),
        "key_cache": torch.zeros(2, 2, 4, 8),
        "value_cache": torch.zeros(2, 2, 4, 8),
        **changes,
    }


INT8 = {name: torch.zeros(2, 2, 4, 8, dtype=torch.int8) for name in ("key_cache", "value_cache")}
SCALE = torch.zeros(2, 2, 4)
BAD_SCATTER = [
    ({"key": torch.zeros(3, 2, 9)}, ValueError, "value: got shape"),
    ({"slot_mapping": ints(0, 1, 2)}, TypeError, "slot_mapping: got int32, wanted int64"),
    ({"key_cache": torch.zeros(2, 2, 4, 8, dtype=torch.float64)}, TypeError, "key_cache: got float64"),
    ({"value_cache": torch.zeros(2, 2, 4, 8, dtype=torch.float16)}, TypeError, "value_cache: got float16"),
    ({"key_cache": torch.zeros(2, 2, 8, 4).transpose(2, 3)}, ValueError, "key_cache: got strides"),
    ({"key": torch.zeros(0, 2, 8)}, ValueError, "key: got shape .* empty"),
    ({**INT8, "value_scale": SCALE}, TypeError, "key_scale: got NoneType, wanted a float32 tensor"),
    ({**INT8, "key_scale": SCALE}, TypeError, "value_scale: got NoneType, wanted a float32 tensor"),
    ({**INT8, "key_scale": SCALE, "value_scale": SCALE[:1]}, ValueError, "value_scale: got shape"),
    ({**INT8, "key_scale": SCALE.half(), "value_scale": SCALE}, TypeError, "key_scale: got float16, wanted float32"),
    ({"key_scale": SCALE}, ValueError, "key_scale: got a Tensor, wanted None, because key_cache is float32"),
]


@pytest.mark.parametrize("change, error, message", BAD_SCATTER, ids=[m for *_, m in BAD_SCATTER])
def test_bad_scatter_is_named(backend, change, error, message):
    with pytest.raises(error, match=message):
        ops.kv_scatter(**scatter_arguments(**change))


def test_bad_allocate_is_named(backend):
    one = ints(0)
    with pytest.raises(IndexError, match=r"sequence: got 3 at \[0\]"):
        ops.kv_allocate(ints(3), one, **table())
    with pytest.raises(IndexError, match="kv_lengths: got 17"):
        ops.kv_allocate(one, one, **{**table(), "kv_lengths": ints(17, 0, 0)})
    with pytest.raises(IndexError, match="block_table: got 7"):
        ops.kv_allocate(
            one,
            one,
            **{**table(), "kv_lengths": ints(1, 0, 0), "block_table": torch.full((3, 4), 7, dtype=torch.int32)},
        )


def free_list(*blocks):
    return {"free_blocks": ints(*blocks)}


BAD_TABLES = [
    # In columns that no length reaches yet, but this call does, and in ones that it doesn't.
    ({"block_table": ints(*[7, -1, -1, -1] * 3).view(3, 4)}, IndexError, r"block_table: got 7 at \[0, 0\].*-1 to 6"),
    ({"block_table": ints(*[-1, -1, -1, -2] * 3).view(3, 4)}, IndexError, r"block_table: got -2 at \[0, 3\]"),
    ({"block_table": torch.full((3, 4), 2**31 - 1, dtype=torch.int32)}, IndexError, "block_table: got 2147483647"),
    (free_list(0, 1, 2, 3, 4, 5), ValueError, "free_blocks: got shape"),
    (free_list(0, 1, 2, 3, 4, 5, 7), IndexError, "free_blocks: got 7"),
    (free_list(0, 1, 2, 3, -1, 5, 6), IndexError, "free_blocks: got -1"),
    (free_list(0, 1, 2, 3, 4, 5, 0), ValueError, "free_blocks: got block 0 .* twice or in use"),
    (
        {**free_list(6, 1, 2, 3, 4, 5, 0), "block_table": ints(*[5, -1, -1, -1] * 3).view(3, 4)},
        ValueError,
        "free_blocks: got block 5",
    ),
    ({"window": -1}, ValueError, "window: got -1"),
    ({"window": 2.0}, TypeError, "window: got float"),
    ({"window": 2, "kv_until": None}, ValueError, "kv_until: got None.*window"),
]


@pytest.mark.parametrize("change, error, message", BAD_TABLES, ids=[m for *_, m in BAD_TABLES])
def test_bad_tables_are_named(backend, change, error, message):
    cache = {**table(), **change}
    before = clone(cache)
    with pytest.raises(error, match=message):
        ops.kv_allocate(ints(0), ints(0), **cache)
    assert_same(cache, before)


def test_bad_merge_is_named(backend):
    caches = torch.zeros(2, 1, 1, 4, 8)
    one, weight = torch.tensor([1]), torch.tensor([1.0])
    with pytest.raises(IndexError, match="second: got 4"):
        ops.kv_merge(*caches, one, one, torch.tensor([4]), weight, weight, ints(0), None, None)
    int8 = caches.to(torch.int8)
    with pytest.raises(TypeError, match="key_scale: got NoneType"):
        ops.kv_merge(*int8, one, one, one, weight, weight, ints(0), None, None)
    with pytest.raises(ValueError, match="sine: got None"):
        ops.kv_merge(*caches, one, one, one, weight, weight, ints(0), torch.zeros(3, 4), None)
    with pytest.raises(IndexError, match="distance: got 3"):
        ops.kv_merge(*caches, one, one, one, weight, weight, ints(3), torch.zeros(3, 4), torch.zeros(3, 4))


def test_direct_calls_cannot_write_outside():
    arguments = scatter_arguments()
    before = arguments["key_cache"].clone()
    for bad in (8, -2):
        with pytest.raises(RuntimeError, match="slot_mapping"):
            torch.ops.quicksilver.kv_scatter(**{**arguments, "slot_mapping": torch.tensor([0, 1, bad])})
        testing.assert_equal(arguments["key_cache"], before)
    for change, name in (
        (INT8, "key_scale"),
        ({**INT8, "key_scale": SCALE}, "value_scale"),
        ({**INT8, "key_scale": SCALE[:1], "value_scale": SCALE}, "key_scale"),
        ({"key_scale": SCALE}, "key_scale"),
    ):
        with pytest.raises(RuntimeError, match=name):
            torch.ops.quicksilver.kv_scatter(**{**arguments, **change})
    with pytest.raises(RuntimeError, match="full"):
        torch.ops.quicksilver.kv_allocate(ints(*[0] * 17), torch.arange(17, dtype=torch.int32), **table())
    for change, name in (
        ({"block_table": torch.full((3, 4), 7, dtype=torch.int32)}, "block_table"),
        (free_list(0, 1, 2, 3, 4, 5, 7), "free_blocks"),
        ({"window": -1}, "window"),
        ({"window": 2, "kv_until": None}, "kv_until"),
    ):
        cache = {**table(), **change}
        before = clone(cache)
        with pytest.raises(RuntimeError, match=name):
            torch.ops.quicksilver.kv_allocate(ints(0), ints(0), **cache)
        assert_same(cache, before)


@pytest.mark.skipif("cuda-emulated" not in testing.backends(), reason="built without the emulator")
def test_kernels_do_not_follow_what_is_not_there():
    """The CUDA operators don't read values, so their kernels look before they write or read."""
    library = torch.ops.quicksilver_emulated
    cache = {**table(free=[9, -5, 2, 3, 4, 5, 6]), "block_table": ints(7, -1, -1, -1, *[-1] * 8).view(3, 4)}
    cache["kv_lengths"][2] = 99
    before = clone(cache)
    slots = library.kv_allocate(ints(0, 1, 2, 3, -1, 1), ints(0, 0, 0, 0, 0, 1), **cache)
    assert slots.tolist() == [-1] * 6
    testing.assert_equal(cache["kv_positions"], before["kv_positions"])
    assert cache["kv_lengths"].tolist() == [0, 0, 99]

    arguments = scatter_arguments(slot_mapping=torch.tensor([8, -2, 2**40]))
    library.kv_scatter(**arguments)
    assert (arguments["key_cache"] == 0).all() and (arguments["value_cache"] == 0).all()

    caches, weight = torch.randn(2, 1, 1, 4, 8), torch.ones(3)
    kept = caches.clone()
    places = (torch.tensor([4, 0, 1]), torch.tensor([0, -1, 2]), torch.tensor([0, 1, 9]))
    library.kv_merge(*caches, *places, weight, weight, ints(0, 0, 0), None, None)
    testing.assert_equal(caches, kept)

    tables = (ints(0, 5).view(1, 2), torch.zeros(1, 4, dtype=torch.int32), ints(8))
    query = torch.randn(2, 1, 8)
    for dtype in (torch.float32, torch.float16):
        narrow = caches.to(dtype)
        out, lse = library.attention_lse(query, *narrow, *tables, ints(3, 3), ints(0, 4), 1.0)
        want = ops.attention_lse(query, *narrow, *tables[:2], ints(4), ints(3, 3), ints(0, 0), 1.0)
        torch.testing.assert_close(out[0], want[0][0], rtol=1e-4, atol=1e-5)
        assert (out[1] == 0).all() and lse[1].isneginf().all()


def test_opcheck():
    library, cache = torch.ops.quicksilver, table()
    bookkeeping = ("kv_lengths", "block_table", "kv_positions", "kv_until", "blocks_used")
    torch.library.opcheck(library.kv_allocate.default, (ints(0, 2), ints(0, 0), *(cache[n] for n in bookkeeping)))
    cache = table(free=[6, 5, 4, 3, 2, 1, 0])
    arguments = (ints(0, 2), ints(0, 0), *(cache[n] for n in bookkeeping), cache["free_blocks"], 3)
    torch.library.opcheck(library.kv_allocate.default, arguments)
    torch.library.opcheck(library.kv_scatter.default, tuple(scatter_arguments().values()))
    caches = torch.randn(2, 1, 1, 4, 8)
    one, weight = torch.tensor([1]), torch.tensor([1.0])
    rest = (one, one, one, weight, weight, ints(2), torch.ones(3, 4), torch.zeros(3, 4))
    torch.library.opcheck(library.kv_merge.default, (*caches, *rest))
    int8, scales = int8_cache(caches)
    torch.library.opcheck(library.kv_merge.default, (*int8, *rest, *scales))
    key, value = torch.randn(2, 1, 1, 8)
    torch.library.opcheck(library.kv_scatter.default, (key, value, one, *int8, *scales))
