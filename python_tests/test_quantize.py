"""The Matryoshka format: grid, storage order, nesting, and what happens at the edges of fp16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quicksilver_ext.weights import matryoshka as quantize
from quicksilver_ext.weights.matryoshka import pack_matryoshka, pack_plane, unpack_plane

SHAPES = [(1, 1, 32), (16, 64, 64), (17, 160, 64), (33, 424, 128), (5, 7, 32), (48, 96, 128), (700, 1000, 64)]


def codes_and_scales(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The architecture page's definition, group by group in fp32: codes u [N, K] and the scale of each value [N, K]."""
    codes, scales = torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, weight.shape[1], group_size):
        group = weight[:, start : start + group_size]
        high, low = group.amax(1, keepdim=True), group.amin(1, keepdim=True)
        largest = torch.where(high >= -low, high, low)
        scale = (-largest / 128).half().float()
        q = torch.where(scale == 0, 0.0, (group / scale).round().clamp(-128, 119))
        codes[:, start : start + group_size] = q + 136
        scales[:, start : start + group_size] = scale
    return codes.to(torch.uint8), scales


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_packing_follows_the_definition(rows: int, columns: int, group_size: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.05
    codes, scales = codes_and_scales(weight, group_size)
    packed = pack_matryoshka(weight, group_size)
    assert torch.equal(packed.codes(), codes)
    assert codes.min() >= 8
    assert torch.equal(packed.dequantize(8), scales * (codes.float() - 136))
    assert torch.equal(packed.dequantize(4), scales * (16 * (codes >> 4).float() - 128))


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_planes_and_scales_are_stored_by_panels(rows: int, columns: int, group_size: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    packed = pack_matryoshka(weight, group_size)
    codes, scales = codes_and_scales(weight, group_size)
    lines = -(-columns // 8)
    padded = torch.full((rows, lines * 8), 136, dtype=torch.uint8)
    padded[:, :columns] = codes
    high, low, scale = [], [], []
    for panel in range(0, rows, 16):
        block = padded[panel : panel + 16].view(-1, lines, 2, 4).transpose(0, 1)  # [line, row, half, byte]
        high.append(((block[:, :, 0] >> 4) | (block[:, :, 1] & 0xF0)).flatten())
        low.append(((block[:, :, 0] & 15) | (block[:, :, 1] << 4)).flatten())
        scale.append(scales[panel : panel + 16, ::group_size].t().flatten())
    assert packed.lo is not None
    assert packed.hi.shape == packed.lo.shape == (rows, lines * 4)
    assert torch.equal(packed.hi.flatten(), torch.cat(high))
    assert torch.equal(packed.lo.flatten(), torch.cat(low))
    assert torch.equal(packed.scale.flatten(), torch.cat(scale).half())
    assert packed.nbytes == 2 * rows * lines * 4 + 2 * packed.scale.numel()


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 90), seed=st.integers(0, 9))
def test_planes_unpack_to_what_was_packed(rows: int, columns: int, seed: int) -> None:
    nibbles = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    plane = pack_plane(nibbles)
    assert plane.shape == quantize.plane_shape(rows, columns)
    assert torch.equal(unpack_plane(plane, columns), nibbles)
    assert (unpack_plane(plane, plane.shape[1] * 2)[:, columns:] == 8).all()  # the pad is the zero code


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 150),
    group_size=st.sampled_from(quantize.GROUP_SIZES),
    magnitude=st.sampled_from([1e-30, 1e-7, 3e-5, 1e-3, 1.0, 1e5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_the_error_is_within_the_grid(
    rows: int, columns: int, group_size: int, magnitude: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    weight = (torch.randn(rows, columns, generator=generator) * magnitude).to(dtype)
    weight[0, 0] = max(1.0, magnitude)  # beside which a smaller magnitude is a dead channel's
    packed = pack_matryoshka(weight, group_size)
    _, scales = codes_and_scales(weight.float(), group_size)
    error = (packed.dequantize(8) - weight.float()).abs()
    # Half a step; at the clipped end nine, and 128 times an fp16 scale's rounding; what fp16 subnormals can't hold.
    clipped = weight.float() / scales > 119
    bound = torch.where(clipped, 9.0 + 128 * 2**-11, 0.5) * scales.abs() + 128 * 2**-25 + 1e-6 * weight.float().abs()
    assert (error <= bound).all()


def test_the_low_plane_can_be_left_out() -> None:
    weight = torch.randn(40, 72)
    both, high = pack_matryoshka(weight), pack_matryoshka(weight, keep_low=False)
    assert high.lo is None
    assert torch.equal(high.hi, both.hi)
    assert torch.equal(high.dequantize(4), both.dequantize(4))
    assert torch.equal(high.codes() & 0xF0, both.codes() & 0xF0)
    with pytest.raises(ValueError, match="high plane only"):
        high.dequantize()
    with pytest.raises(ValueError, match="wanted 8 or 4"):
        both.dequantize(3)


def test_a_group_of_zeros_has_scale_zero_and_the_zero_code() -> None:
    weight = torch.randn(20, 128)
    weight[3, 64:] = 0.0
    weight[4, :64] = -0.0
    packed = pack_matryoshka(weight, 64)
    assert (packed.codes()[3, 64:] == 136).all()
    assert (packed.codes()[4, :64] == 136).all()
    assert (packed.scale.view(torch.int16) == 0).sum() == 2  # plus zero, both of them


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_value_is_exact(sign: float) -> None:
    weight = torch.rand(16, 64) * 0.5
    weight[:, 9] = sign
    packed = pack_matryoshka(weight, 64)
    assert (packed.codes()[:, 9] == 8).all()
    assert torch.equal(packed.dequantize(8)[:, 9], weight[:, 9])
    assert torch.equal(packed.dequantize(4)[:, 9], weight[:, 9])


def test_any_strides_and_dtypes_give_the_same_planes() -> None:
    weight = torch.randn(100, 72).bfloat16()
    want = pack_matryoshka(weight.float())
    for other in (weight, weight.double(), weight.t().contiguous().t(), torch.cat((weight, weight), 1)[:, :72]):
        got = pack_matryoshka(other)
        assert torch.equal(got.hi, want.hi)
        assert got.lo is not None and want.lo is not None
        assert torch.equal(got.lo, want.lo)
        assert torch.equal(got.scale, want.scale)


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
    assert torch.equal(out.codes(), pack_matryoshka(weight, 32).codes())
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


def test_values_beyond_fp16_scales_are_refused_by_name() -> None:
    assert pack_matryoshka(torch.tensor([[8.3e6]])).dequantize().item() == pytest.approx(8.3e6, rel=1e-3)
    with pytest.raises(ValueError, match=r"head: holds a value of magnitude 8\.5e\+06"):
        pack_matryoshka(torch.tensor([[1.0, -8.5e6]]), name="head")


@pytest.mark.parametrize("magnitude", [1e-38, 1e-9, 1e-6, 1e-5, 3.7e-4])
def test_magnitudes_below_fp16_scales_are_refused_by_name(magnitude: float) -> None:
    weight = torch.rand(40, 130).sub_(0.5).mul_(2 * magnitude)
    weight[17, 3] = -magnitude
    message = rf"up\.weight: its magnitudes, {magnitude:.3g} at most, are too small.*precision bf16 or fp32"
    with pytest.raises(ValueError, match=message):
        pack_matryoshka(weight, name="up.weight")
    # The rule looks at the matrix as a whole: one ordinary value, and the rest is small beside it.
    weight[39, 129] = 0.5
    packed = pack_matryoshka(weight)
    assert (packed.dequantize() - weight).abs().max() < 0.01 * 0.5
    assert quantize.peak(weight, packed) == pytest.approx(0.5, rel=0.03)
    part = pack_matryoshka(weight[:16], part=True)
    assert quantize.peak(weight[:16], part) < quantize.SMALLEST_PEAK


def test_what_the_smallest_peak_promises() -> None:
    """From there on, rounding scales to fp16 costs no value more than 1% of the largest one beside its code's half
    step (or nine, at the clipped end)."""
    for peak in (3.9e-4, 5e-4, 1e-3, 0.01):
        weight = (torch.rand(64, 128) * 2 - 1) * peak * torch.logspace(-4, 0, 64)[:, None]
        weight[63, 0] = -peak
        packed = pack_matryoshka(weight, 64)
        _, scales = codes_and_scales(weight, 64)
        steps = torch.where(weight / scales > 119, 9.5, 0.5) * scales.abs()
        assert ((packed.dequantize() - weight).abs() <= steps.nan_to_num(0.0) + 0.01 * peak).all()


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
