"""halting_update and softmax_entropy on every backend."""

import math

import pytest
import torch
from cases import rows_like_a_layer

from quicksilver_ext.kernels import ops, reference, testing
from quicksilver_ext.kernels.ops import HaltingParams


def arguments(rows=50, d=100, seed=0, **changes):
    g = torch.Generator().manual_seed(seed)
    hidden, previous = rows_like_a_layer(rows, d, seed)
    return {
        "hidden": hidden,
        "previous": previous,
        "entropy": 3 * torch.rand(rows, generator=g),
        "halted": torch.rand(rows, generator=g) < 0.2,
        "positions": torch.arange(rows, dtype=torch.int32),
        "params": HaltingParams(0.15, True, 1.5, 4),
        "overrides": torch.randint(-1, 2, (rows,), generator=g).to(torch.int8),
        **changes,
    }


@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (50, 100), (200, 576)])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
def test_equals_reference(backend, shape, relative, entropy):
    rows, d = shape
    threshold = 0.15 if relative else 0.15 * math.sqrt(d)
    params = HaltingParams(threshold, relative, 1.5 if entropy else None, 1)
    a = arguments(rows, d, params=params)
    drift, halted, index, count = ops.halting_update(**a)
    exact = reference.halting_update(**{**a, "hidden": a["hidden"].double(), "previous": a["previous"].double()})
    testing.assert_close(drift, exact[0], reference.halting_update(**a)[0], "drift")
    testing.assert_equal(halted, exact[1], "halted")
    testing.assert_equal(index, exact[2], "active_index")
    testing.assert_equal(count, exact[3], "active_count")


def test_compaction_keeps_the_order_and_the_dead_stay_dead(backend):
    a = arguments()
    drift, halted, index, count = ops.halting_update(**a)
    n = int(count)
    assert index[:n].tolist() == (~halted).nonzero().flatten().tolist()
    assert (index[n:] == -1).all()
    assert halted[a["halted"]].all() and (drift[a["halted"]] == 0).all()
    assert not halted.equal(a["halted"])  # the input is left alone, and something halted
    assert a["halted"].equal(arguments()["halted"])


def test_sinks_and_overrides(backend):
    a = arguments(8, 32, halted=torch.zeros(8, dtype=torch.bool), entropy=None)
    a["hidden"] = a["previous"].clone()  # drift 0: all would halt
    a["overrides"] = torch.tensor([1, 0, 0, -1, 0, 1, -1, 0], dtype=torch.int8)
    a["params"] = HaltingParams(0.1, sink_tokens=3)
    assert ops.halting_update(**a)[1].tolist() == [False, False, False, False, True, True, False, True]
    a["hidden"] = 2 * a["previous"]  # drift 1: none would, but for those forced
    assert ops.halting_update(**a)[1].tolist() == [False, False, False, False, False, True, False, False]


@pytest.mark.parametrize("relative", [True, False])
def test_nan_never_halts_and_zero_over_zero_is_zero(backend, relative):
    a = arguments(4, 16, entropy=None, overrides=None, halted=torch.zeros(4, dtype=torch.bool))
    a["hidden"] = a["previous"].clone()
    a["hidden"][1, 3] = float("nan")
    a["hidden"][2] = a["previous"][2] = 0.0
    a["previous"][3], a["hidden"][3] = 0.0, 1.0  # relative drift: infinite
    a["params"] = HaltingParams(0.5, relative)
    drift, halted, _, _ = ops.halting_update(**a)
    assert drift[0] == 0 and drift[1].isnan() and drift[2] == 0
    assert drift[3] == (math.inf if relative else 4.0)
    assert halted.tolist() == [True, False, True, False]


def test_nan_entropy_never_halts(backend):
    a = arguments(3, 16, overrides=None, halted=torch.zeros(3, dtype=torch.bool), params=HaltingParams(9.0, True, 9.0))
    a["entropy"] = torch.tensor([0.0, float("nan"), 10.0])
    assert ops.halting_update(**a)[1].tolist() == [True, False, False]


def test_a_row_does_not_depend_on_the_others(backend):
    a = arguments(40, 123)
    whole = ops.halting_update(**a)[0]
    part = {name: value[7:9].clone() if isinstance(value, torch.Tensor) else value for name, value in a.items()}
    testing.assert_equal(ops.halting_update(**part)[0], whole[7:9])


def test_all_rows_halted_already(backend):
    a = arguments(5, 16, halted=torch.ones(5, dtype=torch.bool))
    _, halted, index, count = ops.halting_update(**a)
    assert halted.all() and (index == -1).all() and count.tolist() == [0]


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("d", [1, 7, 576, 1000])
def test_softmax_entropy(backend, scale, d):
    x = torch.randn(9, d, generator=torch.Generator().manual_seed(1)) * scale
    exact = reference.softmax_entropy(x.double())
    testing.assert_close(ops.softmax_entropy(x), exact, reference.softmax_entropy(x), "entropy")
    if scale == 0:
        assert ops.softmax_entropy(x).sub(math.log2(d)).abs().max() < 1e-5


def test_softmax_entropy_of_nan_is_nan(backend):
    x = torch.randn(3, 40)
    x[1, 5] = float("nan")
    assert ops.softmax_entropy(x).isnan().tolist() == [False, True, False]


BAD = [
    ({"previous": torch.zeros(50, 99)}, ValueError, "previous: got shape"),
    ({"hidden": torch.zeros(50, 100, dtype=torch.float16)}, TypeError, "hidden: got float16"),
    ({"halted": torch.zeros(50, dtype=torch.uint8)}, TypeError, "halted: got uint8, wanted bool"),
    ({"positions": torch.zeros(50, dtype=torch.int64)}, TypeError, "positions: got int64"),
    ({"entropy": None}, ValueError, "entropy: got None"),
    ({"overrides": torch.zeros(49, dtype=torch.int8)}, ValueError, "overrides: got shape"),
    ({"params": HaltingParams(float("nan"))}, ValueError, "drift_threshold: got nan"),
    ({"params": HaltingParams(0.1, True, float("nan"))}, ValueError, "entropy_threshold: got nan"),
    ({"params": HaltingParams(0.1, sink_tokens=-1)}, ValueError, "sink_tokens: got -1"),
    ({"hidden": torch.zeros(0, 100)}, ValueError, "empty"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m for *_, m in BAD])
def test_bad_input_is_named(backend, change, error, message):
    with pytest.raises(error, match=message):
        ops.halting_update(**arguments(**change))


def test_opcheck():
    a = arguments(6, 20)
    tensors = tuple(a[name] for name in ("hidden", "previous", "entropy", "halted", "positions"))
    op = torch.ops.quicksilver.halting_update.default
    torch.library.opcheck(op, (*tensors, 0.15, True, 1.5, 4, a["overrides"]))
    torch.library.opcheck(op, (*tensors[:2], None, *tensors[3:], 0.15))
    torch.library.opcheck(torch.ops.quicksilver.softmax_entropy.default, (a["hidden"],))
