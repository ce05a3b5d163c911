"""fusion_groups, fusion_reduce and fusion_expand on every backend."""

import pytest
import torch

from quicksilver_ext.kernels import ops, reference, testing


def arguments(rows=60, d=48, seed=0, **changes):
    """Rows that drift slowly, so that about half of the neighbours are closer than tau."""
    g = torch.Generator().manual_seed(seed)
    step = torch.rand(rows, 1, generator=g) * torch.randn(rows, d, generator=g)
    sequence = torch.arange(rows) * 3 // rows
    positions = torch.arange(rows) + (torch.rand(rows, generator=g) < 0.1).cumsum(0)
    return {
        "hidden": torch.randn(d, generator=g) * 3 + step,
        "positions": positions.to(torch.int32),
        "sequence": sequence.to(torch.int32),
        "fusible": torch.rand(rows, generator=g) < 0.9,
        "tau": 0.25,
        "relative": True,
        "max_group": 4,
        **changes,
    }


@pytest.mark.parametrize("rows, d", [(1, 5), (2, 16), (60, 48), (130, 576)])
@pytest.mark.parametrize("relative, tau", [(True, 0.25), (False, 5.0), (True, 0.0), (True, float("inf"))])
@pytest.mark.parametrize("max_group", [1, 2, 4])
def test_groups_equal_reference(backend, rows, d, relative, tau, max_group):
    a = arguments(rows, d, relative=relative, tau=tau, max_group=max_group)
    group, count = ops.fusion_groups(**a)
    want_group, want_count = reference.fusion_groups(**{**a, "hidden": a["hidden"].double()})
    testing.assert_equal(group, want_group, "group")
    testing.assert_equal(count, want_count, "count")


def test_what_divides_groups(backend):
    rows = 8
    a = arguments(rows, 16, hidden=torch.ones(rows, 16), tau=0.1, max_group=3)
    a["sequence"] = torch.zeros(rows, dtype=torch.int32)
    a["positions"] = torch.arange(rows, dtype=torch.int32)
    a["fusible"] = torch.ones(rows, dtype=torch.bool)
    assert ops.fusion_groups(**a)[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    a["fusible"][1] = False
    assert ops.fusion_groups(**a)[0].tolist() == [0, 1, 2, 2, 2, 3, 3, 3]
    a["positions"][3:] += 1
    assert ops.fusion_groups(**a)[0].tolist() == [0, 1, 2, 3, 3, 3, 4, 4]
    a["sequence"][5:] = 1
    assert ops.fusion_groups(**a)[0].tolist() == [0, 1, 2, 3, 3, 4, 4, 4]
    a["hidden"][6] = float("nan")
    group, count = ops.fusion_groups(**a)
    assert group.tolist() == [0, 1, 2, 3, 3, 4, 5, 6] and count.tolist() == [7]


def test_a_later_row_never_changes_an_earlier_group(backend):
    a = arguments(40)
    group, _ = ops.fusion_groups(**a)
    for cut in (1, 13, 39):
        part = {name: value[:cut] if isinstance(value, torch.Tensor) else value for name, value in a.items()}
        testing.assert_equal(ops.fusion_groups(**part)[0], group[:cut], f"cut {cut}")


@pytest.mark.parametrize("rows, d", [(1, 5), (60, 48), (130, 576)])
def test_reduce_equals_reference(backend, rows, d):
    a = arguments(rows, d)
    group, count = reference.fusion_groups(**a)
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(2)) + 0.1
    got = ops.fusion_reduce(a["hidden"], weight, group)
    assert got.shape == (int(count), d)
    exact = reference.fusion_reduce(a["hidden"].double(), weight.double(), group)
    testing.assert_close(got, exact, reference.fusion_reduce(a["hidden"], weight, group))


def test_reduce_to_a_number_of_rows(kernels):
    """With room for more groups than there are, as where only a GPU knows their number: zeros, and no other result."""
    a = arguments(60, 48)
    group, count = reference.fusion_groups(**a)
    weight = torch.rand(60, generator=torch.Generator().manual_seed(2)) + 0.1
    want = ops.fusion_reduce(a["hidden"], weight, group)
    for rows in (int(count), int(count) + 1, 60):
        got = ops.fusion_reduce(a["hidden"], weight, group, rows)
        testing.assert_equal(got[: len(want)], want)
        assert got.shape == (rows, 48) and not got[len(want) :].any()
    exact = reference.fusion_reduce(a["hidden"], weight, group, 60)
    assert exact.shape == (60, 48) and not exact[len(want) :].any()
    for bad in (int(count) - 1, 61, 0):
        with pytest.raises(ValueError, match=f"groups: got {bad}"):
            ops.fusion_reduce(a["hidden"], weight, group, bad)
        with pytest.raises(RuntimeError, match="groups must be"):
            torch.ops.quicksilver.fusion_reduce(a["hidden"], weight, group, bad)
    with pytest.raises(TypeError, match="groups: got float"):
        ops.fusion_reduce(a["hidden"], weight, group, 60.0)


def test_a_group_of_one_is_the_row_itself(backend):
    hidden = torch.randn(5, 40)
    got = ops.fusion_reduce(hidden, torch.ones(5), torch.arange(5, dtype=torch.int32))
    testing.assert_equal(got, hidden)


@pytest.mark.parametrize("rows, d", [(1, 5), (60, 48), (130, 576)])
def test_expand_gives_every_member_its_group(backend, rows, d):
    a = arguments(rows, d)
    group, _ = reference.fusion_groups(**a)
    fused = reference.fusion_reduce(a["hidden"], torch.ones(rows), group)
    fused[0, 0] = float("nan")
    got = ops.fusion_expand(fused, group)
    testing.assert_equal(got, fused[group])
    back = torch.randperm(len(fused)).to(torch.int32)  # any numbers, in any order
    testing.assert_equal(ops.fusion_expand(fused, back), fused[back])


BAD = [
    ({"tau": float("nan")}, ValueError, "tau: got nan"),
    ({"max_group": 0}, ValueError, "max_group: got 0"),
    ({"max_group": 2.0}, TypeError, "max_group: got float"),
    ({"fusible": torch.ones(60)}, TypeError, "fusible: got float32, wanted bool"),
    ({"positions": torch.zeros(59, dtype=torch.int32)}, ValueError, "positions: got shape"),
    ({"hidden": torch.zeros(60, 0)}, ValueError, "empty"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m for *_, m in BAD])
def test_bad_input_is_named(backend, change, error, message):
    with pytest.raises(error, match=message):
        ops.fusion_groups(**arguments(**change))


@pytest.mark.parametrize("group", [[1, 1, 2], [0, 2, 2], [0, 1, 0]])
def test_bad_groups_are_refused(backend, group):
    group = torch.tensor(group, dtype=torch.int32)
    with pytest.raises(ValueError, match="group: got numbers"):
        ops.fusion_reduce(torch.zeros(3, 4), torch.ones(3), group)
    with pytest.raises(RuntimeError, match="group must rise"):
        torch.ops.quicksilver.fusion_reduce(torch.zeros(3, 4), torch.ones(3), group)


BAD_EXPAND = [
    ({"group": torch.tensor([0, 3], dtype=torch.int32)}, IndexError, r"group: got 3 at \[1\]"),
    ({"group": torch.tensor([-1, 0], dtype=torch.int32)}, IndexError, r"group: got -1 at \[0\]"),
    ({"group": torch.tensor([0, 1])}, TypeError, "group: got int64, wanted int32"),
    ({"fused": torch.zeros(3, 4, dtype=torch.float16)}, TypeError, "fused: got float16"),
    ({"fused": torch.zeros(4, 3).T}, ValueError, "fused: got strides"),
]


@pytest.mark.parametrize("change, error, message", BAD_EXPAND, ids=[m for *_, m in BAD_EXPAND])
def test_bad_expand_is_named(backend, change, error, message):
    a = {"fused": torch.zeros(3, 4), "group": torch.tensor([0, 2], dtype=torch.int32), **change}
    with pytest.raises(error, match=message):
        ops.fusion_expand(**a)
    with pytest.raises(RuntimeError, match=next(iter(change))):
        torch.ops.quicksilver.fusion_expand(**a)


def test_opcheck():
    a = arguments(9)
    torch.library.opcheck(torch.ops.quicksilver.fusion_groups.default, tuple(a.values()))
    group, _ = ops.fusion_groups(**a)
    torch.library.opcheck(torch.ops.quicksilver.fusion_reduce.default, (a["hidden"], torch.ones(9), group))
    torch.library.opcheck(torch.ops.quicksilver.fusion_reduce.default, (a["hidden"], torch.ones(9), group, 9))
    torch.library.opcheck(torch.ops.quicksilver.fusion_expand.default, (a["hidden"], group))
