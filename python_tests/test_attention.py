"""compacted_attention and attention_lse on every backend."""

import math

import pytest
import torch
from cases import ATTENTIONS, Attention

from quicksilver_ext import _C
from quicksilver_ext.kernels import ops, reference, testing

CASE_IDS = [f"{c.rows}q{c.heads}h{c.kv_heads}kv{c.head_size}d{str(c.dtype)[6:]}" for c in ATTENTIONS]


def in_double(arguments):
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def rows_of(arguments, rows):
    part = {name: arguments[name][rows].contiguous() for name in ("query", "query_positions", "query_sequence")}
    return {**arguments, **part}


@pytest.mark.parametrize("case", ATTENTIONS, ids=CASE_IDS)
def test_equals_reference(backend, case):
    a = case.make()
    out, log_sum_exp = ops.attention_lse(**a)
    exact, same = reference.attention_lse(**in_double(a)), reference.attention_lse(**a)
    if backend.startswith("cuda") and case.dtype == torch.bfloat16:
        # Tensor cores take bf16 alone here: a query is the sum of two bf16 numbers, 16 bits in all.
        high = a["query"].bfloat16().float()
        same = reference.attention_lse(**{**a, "query": high + (a["query"] - high).bfloat16().float()})
    testing.assert_close(out, exact[0], same[0], "out")
    testing.assert_close(log_sum_exp, exact[1], same[1], "log_sum_exp")
    testing.assert_equal(ops.compacted_attention(**a), out)


@pytest.mark.parametrize("case", ATTENTIONS, ids=CASE_IDS)
def test_a_query_does_not_depend_on_the_others(kernels, case):
    a = case.make(seed=1)
    whole = ops.compacted_attention(**a)
    for rows in ([0], list(range(case.rows))[::-1], [case.rows // 2]):
        testing.assert_equal(ops.compacted_attention(**rows_of(a, rows)), whole[rows], f"rows {rows}")


@pytest.mark.parametrize("case", ATTENTIONS, ids=CASE_IDS)
def test_what_cannot_be_seen_changes_no_bit(kernels, case):
    """The causal law: entries at later positions, expired ones and other sequences' may hold anything, NaN included."""
    a = case.make(seed=2)
    at = int(a["query_positions"][0])
    s = int(a["query_sequence"][0])
    first = rows_of(a, [0])
    want = ops.compacted_attention(**first)
    block_size, length = case.block_size, int(a["kv_lengths"][s])
    seen = torch.zeros(a["kv_positions"].shape, dtype=torch.bool)
    entry = torch.arange(length)
    where = (a["block_table"][s, entry // block_size].long(), entry % block_size)
    visible = a["kv_positions"][where] <= at
    if a["kv_until"] is not None:
        visible &= a["kv_until"][where] > at
    seen[where] = visible
    for name in ("key_cache", "value_cache", "key_scale", "value_scale"):
        if first[name] is not None:
            first[name] = first[name].clone()
            first[name].transpose(1, 2)[~seen] = float("nan") if first[name].is_floating_point() else -128
    testing.assert_equal(ops.compacted_attention(**first), want)
    # The same entries without the unseen ones behind the last seen: a step sees what a prefill saw.
    if a["kv_until"] is None:
        lengths = a["kv_lengths"].clone()
        lengths[s] = int(visible.sum())
        testing.assert_equal(ops.compacted_attention(**{**first, "kv_lengths": lengths}), want)


def test_a_query_that_sees_nothing_is_zero(backend):
    a = Attention(3, 2, 1, 16, (0, 5)).make()
    a["query_sequence"] = torch.tensor([0, 1, 1], dtype=torch.int32)
    a["query_positions"] = torch.tensor([4, -1, 99], dtype=torch.int32)
    out, log_sum_exp = ops.attention_lse(**a)
    assert (out[:2] == 0).all() and out[2].abs().sum() > 0
    assert (log_sum_exp[:2] == -math.inf).all()


def test_grouped_heads_read_their_own_kv_head(kernels):
    a = Attention(4, 6, 2, 32, (20,), dtype=torch.int8).make()
    grouped = ops.compacted_attention(**a)
    for name in ("key_cache", "value_cache", "key_scale", "value_scale"):
        a[name] = a[name].repeat_interleave(3, 1)
    testing.assert_equal(ops.compacted_attention(**a), grouped)


def test_threads_do_not_change_a_bit(kernels):
    a = Attention(37, 6, 3, 64, (300, 77)).make()
    whole = ops.compacted_attention(**a)
    before = _C.threads()
    try:
        for threads in (1, 3):
            _C.set_threads(threads)
            testing.assert_equal(ops.compacted_attention(**a), whole, f"{threads} threads")
    finally:
        _C.set_threads(before)


def test_large_scores_do_not_overflow(backend):
    a = Attention(3, 1, 1, 64, (50,)).make()
    a["query"] *= 1e4
    testing.assert_close(
        ops.compacted_attention(**a), reference.compacted_attention(**in_double(a)), reference.compacted_attention(**a)
    )


def test_nan_stays_in_its_query(kernels):
    a = Attention(4, 2, 1, 32, (30,)).make()
    clean = ops.compacted_attention(**a)
    a["query"][2, 1, 5] = float("nan")
    got = ops.compacted_attention(**a)
    sees = clean[2, 1].abs().sum() > 0
    assert not sees or got[2, 1].isnan().all()
    keep = torch.ones(4, 2, dtype=torch.bool)
    keep[2, 1] = False
    testing.assert_equal(got[keep], clean[keep])


BAD = [
    ({"query": torch.zeros(5, 3, 80)}, ValueError, "query: got 3 heads, wanted a multiple of key_cache's 4"),
    ({"query": torch.zeros(5, 4, 64)}, ValueError, "key_cache: got shape"),
    ({"query": torch.zeros(5, 4, 80, dtype=torch.bfloat16)}, TypeError, "query: got bfloat16"),
    ({"kv_lengths": torch.tensor([3, 500], dtype=torch.int32)}, IndexError, "kv_lengths: got 500"),
    ({"kv_lengths": torch.tensor([3, -1], dtype=torch.int32)}, IndexError, "kv_lengths: got -1"),
    ({"kv_lengths": torch.tensor([40, 50], dtype=torch.int32)}, IndexError, "block_table: got -1"),
    ({"query_sequence": torch.full((5,), 2, dtype=torch.int32)}, IndexError, "query_sequence: got 2"),
    ({"query_positions": torch.zeros(5)}, TypeError, "query_positions: got float32"),
    ({"kv_until": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, "kv_until: got shape"),
    ({"scale": float("nan")}, ValueError, "scale: got nan"),
    ({"value_scale": torch.zeros(1)}, ValueError, "value_scale: got a Tensor, wanted None, because key_cache is float"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m for *_, m in BAD])
def test_bad_input_is_named(backend, change, error, message):
    with pytest.raises(error, match=message):
        ops.compacted_attention(**{**ATTENTIONS[2].make(), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"kv_lengths": torch.tensor([3, 500], dtype=torch.int32)},
        {"kv_lengths": torch.tensor([40, 50], dtype=torch.int32)},
        {"query_sequence": torch.full((5,), 2, dtype=torch.int32)},
        {"kv_positions": torch.zeros(2, 2, dtype=torch.int32)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_direct_calls_cannot_read_outside(change):
    with pytest.raises(RuntimeError, match=next(iter(change)) + "|block_table"):
        torch.ops.quicksilver.compacted_attention(**{**ATTENTIONS[2].make(), **change})


def test_counters_count_visible_pairs():
    a = Attention(7, 6, 2, 32, (40, 9), until=True).make()
    visible = 0
    for at, s in zip(a["query_positions"].tolist(), a["query_sequence"].tolist()):
        entry = torch.arange(int(a["kv_lengths"][s]))
        where = (a["block_table"][s, entry // 16].long(), entry % 16)
        visible += int(((a["kv_positions"][where] <= at) & (a["kv_until"][where] > at)).sum())
    _C.reset_counters()
    with testing.use_backend(f"cpu-{_C.isa()}"):
        ops.compacted_attention(**a)
    assert _C.counters().attention_pairs == 6 * visible


def test_opcheck():
    for case in (ATTENTIONS[0], ATTENTIONS[2], ATTENTIONS[-1]):
        a = tuple(case.make().values())
        torch.library.opcheck(torch.ops.quicksilver.compacted_attention.default, a)
        torch.library.opcheck(torch.ops.quicksilver.attention_lse.default, a)
