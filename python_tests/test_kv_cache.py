"""kv_allocate, kv_scatter and kv_merge on every backend."""

import pytest
import torch
from cases import int8_cache

from quicksilver_ext.kernels import ops, reference, testing

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def table(sequences=3, width=4, blocks=7, block_size=4, until=True):
    """An empty cache's bookkeeping, by kv_allocate's names."""
    return {
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


@pytest.mark.parametrize("until", [True, False])
def test_allocate_equals_reference(backend, until):
    got, want = table(until=until), table(until=until)
    g = torch.Generator().manual_seed(0)
    for step in range(4):
        sequence = torch.randint(0, 3, (5,), generator=g).sort().values.to(torch.int32)
        positions = torch.arange(5, dtype=torch.int32) + 10 * step
        testing.assert_equal(
            ops.kv_allocate(sequence, positions, **got), reference.kv_allocate(sequence, positions, **want), "slots"
        )
        for name in got:
            if got[name] is not None:
                testing.assert_equal(got[name], want[name], name)


def test_allocate_hands_out_blocks_in_order(backend):
    cache = table()
    slots = ops.kv_allocate(ints(0, 0, 1, 1, 1, 1, 1), ints(0, 2, 0, 1, 2, 3, 4), **cache)
    assert slots.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert cache["block_table"][:2, :2].tolist() == [[0, -1], [1, 2]]
    assert cache["kv_lengths"].tolist() == [2, 5, 0] and cache["blocks_used"].tolist() == [3]
    assert cache["kv_positions"].view(-1)[slots].tolist() == [0, 2, 0, 1, 2, 3, 4]
    assert (cache["kv_until"].view(-1)[slots] == 2**31 - 1).all()


@pytest.mark.parametrize("sequences", [[0] * 17, [0] * 16 + [1] * 13], ids=["a row of the table", "all blocks"])
def test_a_full_cache_changes_nothing(backend, sequences):
    cache = table()
    before = clone(cache)
    rows = len(sequences)
    with pytest.raises(ValueError, match="cache has 7 left and room for 4 a sequence"):
        ops.kv_allocate(ints(*sequences), torch.arange(rows, dtype=torch.int32), **cache)
    for name in cache:
        testing.assert_equal(cache[name], before[name], name)


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
    slots = torch.randperm(20, generator=g)[:9]
    slots[4] = -1
    caches = torch.randn(2, 5, heads, 4, size, generator=g).to(dtype)
    got, want = caches.clone(), caches.clone()
    ops.kv_scatter(key, value, slots, got[0], got[1])
    reference.kv_scatter(key, value, slots, want[0], want[1])
    testing.assert_equal(got, want)


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
    q, _, scale, _ = ops.quantize_rows(value[6, 0, None, :128].contiguous(), 128)
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


def test_opcheck():
    library, cache = torch.ops.quicksilver, table()
    bookkeeping = ("kv_lengths", "block_table", "kv_positions", "kv_until", "blocks_used")
    torch.library.opcheck(library.kv_allocate.default, (ints(0, 2), ints(0, 0), *(cache[n] for n in bookkeeping)))
    torch.library.opcheck(library.kv_scatter.default, tuple(scatter_arguments().values()))
    caches = torch.randn(2, 1, 1, 4, 8)
    one, weight = torch.tensor([1]), torch.tensor([1.0])
    rest = (one, one, one, weight, weight, ints(2), torch.ones(3, 4), torch.zeros(3, 4))
    torch.library.opcheck(library.kv_merge.default, (*caches, *rest))
    int8, scales = int8_cache(caches)
    torch.library.opcheck(library.kv_merge.default, (*int8, *rest, *scales))
    key, value = torch.randn(2, 1, 1, 8)
    torch.library.opcheck(library.kv_scatter.default, (key, value, one, *int8, *scales))
