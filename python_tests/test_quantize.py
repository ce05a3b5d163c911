"""The Matryoshka format: grid, storage order, nesting, and what happens at the edges of fp16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, testing

from quicksilver_ext.weights import matryoshka as quantize
from quicksilver_ext.weights.matryoshka import MatryoshkaWeight, pack_matryoshka, pack_plane, unpack_plane

SHAPES = [(1, 1, 32), (16, 64, 64), (17, 160, 64), (33, 424, 128), (5, 7, 32), (48, 96, 128), (700, 1000, 64)]


def unpacked(packed: MatryoshkaWeight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, residuals, and each value's scale and offset: fp32 [N, K]."""
    columns = packed.in_features
    assert packed.lo is not None
    code, residual = (unpack_plane(plane, columns).float() for plane in (packed.hi, packed.lo))
    scale, offset = (
        quantize._from_panels(each).float().repeat_interleave(packed.group_size, 1)[:, :columns]
        for each in (packed.scale, packed.offset)
    )
    return code, residual, scale, offset


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_codes_are_the_nearest_and_residuals_what_is_left(rows: int, columns: int, group_size: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.05
    packed = pack_matryoshka(weight, group_size)
    code, residual, scale, offset = unpacked(packed)
    steps = (weight.double() - offset) / scale.double()
    nearest = steps.round().clamp(0, 15)
    assert ((code - nearest).abs() <= ((steps - nearest).abs() > 0.4999)).all()  # but for ties in fp32
    assert ((residual - 8) / 8 - (steps - code).clamp(-1, 0.875)).abs().max() <= 1 / 16 + 1e-4
    testing.assert_close(packed.dequantize(8), scale * (code + (residual - 8) / 8) + offset, rtol=0, atol=1e-7)
    testing.assert_close(packed.dequantize(4), scale * code + offset, rtol=0, atol=1e-7)


def squared_errors(weight: Tensor, packed: MatryoshkaWeight, bits: int, importance: Tensor) -> Tensor:
    return ((packed.dequantize(bits) - weight).square() * importance).sum(1)


def test_the_search_beats_the_grid_from_end_to_end() -> None:
    """In the sum that it minimizes, for nearly all rows of one group; and columns that weigh more come out better."""
    g = torch.Generator().manual_seed(3)
    weight, ones = torch.randn(512, 64, generator=g) * 0.05, torch.ones(64)
    packed = pack_matryoshka(weight)
    low, high = weight.amin(1, keepdim=True).half().float(), weight.amax(1, keepdim=True)
    step = ((high - low) / 15).half().float()
    plain = ((weight - low) / step).round().clamp(0, 15) * step + low
    ours, theirs = squared_errors(weight, packed, 4, ones), (plain - weight).square().sum(1)
    assert (ours <= theirs).float().mean() > 0.98 and ours.sum() < 0.9 * theirs.sum()

    importance = torch.ones(64)
    importance[:8] = 100.0
    weighed = pack_matryoshka(weight, importance=importance)
    assert (
        squared_errors(weight, weighed, 4, importance).sum() < 0.8 * squared_errors(weight, packed, 4, importance).sum()
    )


def test_an_importance_that_is_the_same_for_all_changes_nothing() -> None:
    weight = torch.randn(40, 130)
    plain, weighed = pack_matryoshka(weight), pack_matryoshka(weight, importance=torch.ones(130))
    assert torch.equal(plain.hi, weighed.hi) and torch.equal(plain.offset, weighed.offset)


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_planes_and_scales_are_stored_by_panels(rows: int, columns: int, group_size: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    packed = pack_matryoshka(weight, group_size)
    code, residual, scale, offset = unpacked(packed)
    lines = -(-columns // 8)
    assert packed.lo is not None
    assert packed.hi.shape == packed.lo.shape == (rows, lines * 4)
    inside = torch.zeros(rows, lines * 8, dtype=torch.bool)
    inside[:, :columns] = True
    for plane, nibbles in ((packed.hi, code), (packed.lo, residual)):
        padded = torch.zeros(rows, lines * 8, dtype=torch.uint8)
        padded[:, :columns] = nibbles.to(torch.uint8)
        at = 0
        for panel in range(0, rows, 16):
            block = padded[panel : panel + 16].view(-1, lines, 2, 4).transpose(0, 1)  # [line, row, half, byte]
            known = inside[panel : panel + 16].view(-1, lines, 2, 4).transpose(0, 1)
            stored = plane.flatten()[at : at + block[:, :, 0].numel()].view(block[:, :, 0].shape)
            assert torch.equal((stored & 15)[known[:, :, 0]], block[:, :, 0][known[:, :, 0]])
            assert torch.equal((stored >> 4)[known[:, :, 1]], block[:, :, 1][known[:, :, 1]])
            at += stored.numel()
    for stored, of_values in ((packed.scale, scale), (packed.offset, offset)):
        panels = [of_values[panel : panel + 16, ::group_size].t().flatten() for panel in range(0, rows, 16)]
        assert torch.equal(stored.flatten(), torch.cat(panels).half())
    assert packed.nbytes == 2 * rows * lines * 4 + 4 * packed.scale.numel()


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 90), seed=st.integers(0, 9))
def test_planes_unpack_to_what_was_packed(rows: int, columns: int, seed: int) -> None:
    nibbles = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    plane = pack_plane(nibbles)
    assert plane.shape == quantize.plane_shape(rows, columns)
    assert torch.equal(unpack_plane(plane, columns), nibbles)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 150),
    group_size=st.sampled_from(quantize.GROUP_SIZES),
    magnitude=st.sampled_from([1e-30, 1e-7, 3e-5, 1e-3, 1.0, 3000.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_the_error_is_within_the_grid(
    rows: int, columns: int, group_size: int, magnitude: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    weight = (torch.randn(rows, columns, generator=generator) * magnitude).to(dtype)
    weight[0, 0] = max(1.0, magnitude)  # beside which a smaller magnitude is a dead channel's
    packed = pack_matryoshka(weight, group_size)
    _, _, scale, offset = unpacked(packed)
    values = weight.float()
    # Half an eighth of a step; what the grid was shrunk by; what fp16 subnormals can't hold.
    steps = (values - offset) / scale
    beyond = torch.maximum(steps - 15.875, -1 - steps).clamp(min=0).masked_fill(scale == 0, 0.0)
    bound = (beyond + 1 / 16 + 1e-3) * scale + 16 * 2**-25 + 1e-6 * values.abs()
    assert ((packed.dequantize(8) - values).abs() <= bound).all()
    assert beyond.max() < 2.5  # of the 15 steps of a range


def test_the_low_plane_can_be_left_out() -> None:
    weight = torch.randn(40, 72)
    both, high = pack_matryoshka(weight), pack_matryoshka(weight, keep_low=False)
    assert high.lo is None
    assert torch.equal(high.hi, both.hi)
    assert torch.equal(high.dequantize(4), both.dequantize(4))
    assert torch.equal(high.dequantize(8), both.dequantize(4))
    with pytest.raises(ValueError, match="wanted 8 or 4"):
        both.dequantize(3)


def test_a_group_of_zeros_is_zeros() -> None:
    weight = torch.randn(20, 128)
    weight[3, 64:] = 0.0
    weight[4, :64] = -0.0
    packed = pack_matryoshka(weight, 64)
    for bits in (4, 8):
        values = packed.dequantize(bits)
        assert (values[3, 64:] == 0).all() and (values[4, :64] == 0).all()
    assert (packed.scale == 0).sum() == 2


@pytest.mark.parametrize("value", [1.0, -0.3, 0.0123, 3e-3, 500.0])
def test_a_group_of_one_value_is_that_value(value: float) -> None:
    """Though its range is nothing, and fp16 offsets are coarse."""
    for bits, bound in ((4, 2**-11), (8, 2**-14)):
        got = pack_matryoshka(torch.full((3, 64), value)).dequantize(bits)
        assert (got - value).abs().max() <= bound * abs(value)


def test_any_strides_and_dtypes_give_the_same_planes() -> None:
    weight = torch.randn(100, 72).bfloat16()
    want = pack_matryoshka(weight.float())
    for other in (weight, weight.double(), weight.t().contiguous().t(), torch.cat((weight, weight), 1)[:, :72]):
        got = pack_matryoshka(other)
        assert torch.equal(got.hi, want.hi)
        assert got.lo is not None and want.lo is not None
        assert torch.equal(got.lo, want.lo)
        assert torch.equal(got.scale, want.scale) and torch.equal(got.offset, want.offset)


def test_chunks_of_rows_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(77, 200)
    want = pack_matryoshka(weight)
    monkeypatch.setattr(quantize, "CHUNK_VALUES", 1)
    got = pack_matryoshka(weight.t().contiguous().t())
    assert torch.equal(got.hi, want.hi)
    assert torch.equal(got.scale, want.scale)


def test_out_is_filled_in_place() -> None:
    weight, out = torch.randn(20, 100), quantize.empty(20, 100, 32)
    assert pack_matryoshka(weight, 32, out=out) is out
    assert torch.equal(out.dequantize(), pack_matryoshka(weight, 32).dequantize())
    with pytest.raises(ValueError, match="out: is for"):
        pack_matryoshka(weight, 64, out=out)


def test_packing_leaves_the_number_of_threads_alone() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="NaN"):
        pack_matryoshka(torch.full((2, 2), torch.nan))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused_by_name(value: float) -> None:
    weight = torch.randn(40, 130)
    weight[37, 129] = value
    with pytest.raises(ValueError, match=r"layer\.3\.q: holds NaN or Inf"):
        pack_matryoshka(weight, name="layer.3.q")


def test_values_beyond_fp16_are_refused_by_name() -> None:
    assert pack_matryoshka(torch.tensor([[6.5e4]])).dequantize().item() == pytest.approx(6.5e4, rel=1e-3)
    for value in (1.5e6, -1e5, -8.5e6, 3e38):
        with pytest.raises(
            ValueError, match=r"head: holds a value of magnitude .*fp16's range.*precision bf16 or fp32"
        ):
            pack_matryoshka(torch.tensor([[1.0, value]]), name="head")


@pytest.mark.parametrize("magnitude", [1e-38, 1e-9, 1e-6, 4.7e-5])
def test_magnitudes_below_fp16_are_refused_by_name(magnitude: float) -> None:
    weight = torch.rand(40, 130).sub_(0.5).mul_(2 * magnitude)
    weight[17, 3] = -magnitude
    message = rf"up\.weight: its magnitudes, {magnitude:.3g} at most, are too small.*precision bf16 or fp32"
    with pytest.raises(ValueError, match=message):
        pack_matryoshka(weight, name="up.weight")
    # The rule looks at the matrix as a whole: one ordinary value, and the rest is small beside it.
    weight[39, 129] = 0.5
    packed = pack_matryoshka(weight)
    assert (packed.dequantize() - weight).abs().max() < 0.01 * 0.5
    assert quantize.peak(weight, packed) == pytest.approx(0.5, rel=0.1)
    part = pack_matryoshka(weight[:16], part=True)
    assert quantize.peak(weight[:16], part) < quantize.SMALLEST_PEAK


def test_what_the_smallest_peak_promises() -> None:
    """From there on, rounding scales and offsets to fp16 costs no value more than 1% of the largest one beside its
    code's rounding."""
    for peak in (4.8e-5, 1e-4, 1e-3, 0.01):
        weight = (torch.rand(64, 128) * 2 - 1) * peak * torch.logspace(-4, 0, 64)[:, None]
        weight[63, 0] = -peak
        packed = pack_matryoshka(weight, 64)
        _, _, scale, offset = unpacked(packed)
        beyond = torch.maximum((weight - offset) / scale - 15.875, -1 - (weight - offset) / scale).clamp(min=0)
        step = (beyond.nan_to_num(0.0, posinf=0.0) + 1 / 16) * scale
        assert ((packed.dequantize() - weight).abs() <= step + 0.01 * peak).all()


def test_zeros_are_packed() -> None:
    packed = pack_matryoshka(torch.zeros(17, 70))
    assert (packed.dequantize() == 0).all() and (packed.scale == 0).all()


@pytest.mark.parametrize(
    ("weight", "group_size", "error", "message"),
    [
        (torch.ones(4, 4, dtype=torch.int32), 64, TypeError, "weight: got torch.int32"),
        ([[1.0]], 64, TypeError, "weight: got list"),
        (torch.ones(4), 64, ValueError, r"weight: got shape \[4\]"),
        (torch.ones(0, 4), 64, ValueError, r"weight: got shape \[0, 4\]"),
        (torch.ones(4, 4), 48, ValueError, "group_size: got 48"),
    ],
)
def test_bad_arguments_are_named(weight: Tensor, group_size: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_matryoshka(weight, group_size)
