"""matryoshka_gemm, quantize_rows and matryoshka_pack: bit for bit the reference, on every backend."""

from dataclasses import replace

import pytest
import torch
from cases import GEMMS, Gemm
from hypothesis import given, settings
from hypothesis import strategies as st

from quicksilver_ext import _C
from quicksilver_ext.kernels import ops, reference, testing
from quicksilver_ext.weights import matryoshka as quantize

CASE_IDS = [f"{c.rows}x{c.features}x{c.columns}g{c.group}" for c in GEMMS]


@pytest.mark.parametrize("case", GEMMS, ids=CASE_IDS)
@pytest.mark.parametrize("bits", ["mixed", "all", "high plane only"])
def test_gemm_equals_reference_bit_for_bit(backend, case, bits):
    x, w, mixed, bias = case.make()
    w.offset[0, 0] = -65504.0
    lo = w.lo if bits != "high plane only" else None
    args = (x, w.hi, lo, w.scale, None if bits == "all" else mixed, bias, w.offset)
    testing.assert_equal(ops.matryoshka_gemm(*args), reference.matryoshka_gemm(*args))


def test_bad_offsets_are_named(backend):
    x, w, _, _ = Gemm(3, 20, 64, 32).make()
    for bad, text in ((w.offset[:, :1], "offset"), (w.offset.float(), "offset: got float32")):
        with pytest.raises((TypeError, ValueError), match=text):
            ops.matryoshka_gemm(x, w.hi, w.lo, w.scale, None, offset=bad.contiguous())


def test_no_offsets_are_zeros(backend):
    x, w, bits, _ = Gemm(3, 20, 64, 32).make()
    want = ops.matryoshka_gemm(x, w.hi, w.lo, w.scale, bits, offset=torch.zeros_like(w.scale))
    testing.assert_equal(ops.matryoshka_gemm(x, w.hi, w.lo, w.scale, bits), want)


@pytest.mark.parametrize("case", GEMMS, ids=CASE_IDS)
def test_reference_is_the_product_of_the_dequantized(case):
    x, w, bits, bias = case.make()
    q, scale, _ = reference.quantize_rows(x, case.group)
    rows = q.double()[:, : case.columns] * scale.double().repeat_interleave(case.group, 1)[:, : case.columns]
    want = torch.where(
        (bits == 8)[:, None], rows @ w.dequantize(bits=8).double().T, rows @ w.dequantize(bits=4).double().T
    )
    if bias is not None:
        want = want + bias
    got = reference.matryoshka_gemm(x, w.hi, w.lo, w.scale, bits, bias, w.offset)
    assert (got - want).norm() <= 1e-6 * want.norm()
    assert (rows - x).abs().max() / x.abs().max() < 1e-2


def test_int4_is_the_high_plane_of_int8(backend):
    x, w, _, _ = Gemm(6, 50, 200, 64).make()
    four = torch.full((6,), 4, dtype=torch.int32)
    both = w.matmul(x, four)
    testing.assert_equal(both, replace(w, lo=None).matmul(x))
    testing.assert_equal(both, replace(w, lo=None).matmul(x, torch.full_like(four, 8)))
    testing.assert_equal(both, replace(w, lo=torch.randint(0, 256, w.lo.shape, dtype=torch.uint8)).matmul(x, four))


def test_a_row_does_not_depend_on_the_others(backend):
    x, w, bits, _ = Gemm(37, 83, 328, 64).make()
    whole = w.matmul(x, bits)
    for rows in ([0], [3, 4], list(range(5, 10)), list(range(36, -1, -1))):
        part = w.matmul(x[rows].contiguous(), bits[rows].contiguous())
        testing.assert_equal(part, whole[rows], f"rows {rows}")


def test_threads_do_not_change_a_bit(backend):
    x, w, bits, bias = Gemm(21, 300, 576, 64, bias=True).make()
    whole = w.matmul(x, bits, bias)
    before = _C.threads()
    try:
        for threads in (1, 3, 5):
            _C.set_threads(threads)
            testing.assert_equal(w.matmul(x, bits, bias), whole, f"{threads} threads")
    finally:
        _C.set_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_row_only(backend, value):
    x, w, bits, _ = Gemm(9, 40, 128, 32).make()
    clean = w.matmul(x, bits)
    x[4, 77] = value
    got = w.matmul(x, bits)
    assert got[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    testing.assert_equal(got[others], clean[others])


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    group=st.sampled_from([32, 64, 128]),
    exponent=st.integers(-44, 37),
    seed=st.integers(0, 2**20),
)
def test_quantize_rows_equals_reference(rows, columns, group, exponent, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * torch.tensor(10.0, dtype=torch.float64).pow(exponent).float()
    x[torch.rand(rows, columns, generator=g) < 0.1] = 0.0
    want = reference.quantize_rows(x, group)
    for backend in testing.backends():
        with testing.use_backend(backend):
            got = ops.quantize_rows(x, group)
        for name, a, b in zip(("q", "scale", "sum"), got, want):
            testing.assert_equal(a, b, f"{backend} {name}")


def test_quantize_rows_at_the_edges(backend):
    x = torch.randn(6, 70)
    x[0] = 0
    x[1, :32] = 0
    x[2, 40] = float("nan")
    x[3, 5] = float("inf")
    x[4, 33] = -3e38
    x[5, 64:] = torch.tensor([1.5, -2.5, 127.0, -127.0, 0.5, -0.5])  # ties go to even
    got = ops.quantize_rows(x, 32)
    for name, a, b in zip(("q", "scale", "sum"), got, reference.quantize_rows(x, 32)):
        testing.assert_equal(a, b, name)
    q, scale, total = got
    assert (q[0] == 0).all() and (scale[0] == 0).all() and (total[0] == 0).all()
    assert scale[2, 1].isnan() and scale[3, 0].isnan() and not scale[2, 0].isnan()
    assert (q[2, 32:64] == 0).all()
    assert q[5, 64:70].tolist() == [2, -2, 127, -127, 0, 0]
    assert q.shape == (6, 72) and (q[:, 70:] == 0).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    group=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    exponent=st.integers(-44, 37),
    both=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_packing_equals_reference(rows, columns, group, dtype, exponent, both, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) * torch.tensor(10.0, dtype=torch.float64).pow(exponent).float()
    weight[torch.rand(rows, columns, generator=g) < 0.1] = 0.0
    weight[torch.rand(rows, generator=g) < 0.1] = -0.0
    weight[torch.rand(rows, columns, generator=g) < 0.002] = float("nan")
    weight[torch.rand(rows, columns, generator=g) < 0.002] = -float("inf")
    weight[torch.rand(rows, columns, generator=g) < 0.05] *= -1.0
    weight = weight.to(dtype)
    importance = torch.rand(columns, generator=g).add_(0.01) if seed % 2 else None

    def packed(backend):
        w = quantize.empty(rows, columns, group, both)
        for tensor in (w.hi, w.lo, w.scale, w.offset):
            if tensor is not None:
                tensor.view(torch.uint8).fill_(0xA5)
        with testing.use_backend(backend):
            ops.matryoshka_pack(weight, w.hi, w.lo, w.scale, w.offset, importance)
        return w

    want = packed("reference")
    for isa in _C.supported_isas():
        got = packed(f"cpu-{isa}")
        testing.assert_equal(got.hi, want.hi, f"{isa} hi")
        if both:
            testing.assert_equal(got.lo, want.lo, f"{isa} lo")
        for name in ("scale", "offset"):
            a, b = getattr(got, name), getattr(want, name)
            testing.assert_equal(a, b, f"{isa} {name}")
            assert torch.equal(a.signbit(), b.signbit())  # a zero's sign too


def test_packing_of_large_weights_is_shared_out_and_stays_the_same():
    weight = torch.randn(1003, 577)
    before = _C.threads()
    w = []
    try:
        for threads in (1, 3):
            _C.set_threads(threads)
            w.append(quantize.pack_matryoshka(weight))
    finally:
        _C.set_threads(before)
    testing.assert_equal(w[0].hi, w[1].hi)
    testing.assert_equal(w[0].lo, w[1].lo)
    testing.assert_equal(w[0].scale, w[1].scale)
    testing.assert_equal(w[0].offset, w[1].offset)


BAD_PACK = [
    ({"weight": torch.zeros(16, 64, dtype=torch.float64)}, TypeError, "weight: got float64, wanted float32 or float16"),
    ({"weight": torch.zeros(64, 16).T}, ValueError, "weight: got strides"),
    ({"hi": torch.zeros(16, 16, dtype=torch.uint8)}, ValueError, "hi: got shape"),
    ({"lo": torch.zeros(17, 32, dtype=torch.uint8)}, ValueError, "lo: got shape"),
    ({"scale": torch.zeros(16, 1)}, TypeError, "scale: got float32, wanted float16"),
    ({"scale": torch.zeros(16, 5, dtype=torch.float16)}, ValueError, "scale: got 5 groups for 64 columns"),
    ({"offset": torch.zeros(16, 2, dtype=torch.float16)}, ValueError, "offset: got shape"),
    ({"importance": torch.ones(63)}, ValueError, r"importance: got shape \[63\], wanted \[64\]"),
]


@pytest.mark.parametrize("change, error, message", BAD_PACK, ids=[m for *_, m in BAD_PACK])
def test_bad_arguments_of_packing_are_named(change, error, message):
    w = quantize.empty(16, 64)
    with pytest.raises(error, match=message):
        parts = {"weight": torch.zeros(16, 64), "hi": w.hi, "lo": w.lo, "scale": w.scale, "offset": w.offset}
        ops.matryoshka_pack(**{**parts, **change})


def test_layout_is_the_header_s():
    """A slow reading of csrc/include/quicksilver/matryoshka.h, byte by byte."""
    features, columns, group = 21, 19, 32
    w = quantize.pack_matryoshka(torch.randn(features, columns), group)
    values = torch.empty(features, columns)
    lines = -(-columns // 8)
    for n in range(features):
        panel, row = divmod(n, 16)
        height = min(16, features - panel * 16)
        for k in range(columns):
            line, value = divmod(k, 8)
            at = panel * 16 * lines * 4 + (line * height + row) * 4 + value % 4
            shift = 4 if value >= 4 else 0
            hi, lo = (int(plane.flatten()[at]) >> shift & 15 for plane in (w.hi, w.lo))
            scale, offset = (float(t.flatten()[panel * 16 + row]) for t in (w.scale, w.offset))
            values[n, k] = scale * (hi + (lo - 8) / 8) + offset
    torch.testing.assert_close(values, w.dequantize(8), rtol=0, atol=1e-6)
    torch.testing.assert_close(w.matmul(torch.eye(columns)), w.dequantize(8).T, rtol=0, atol=1e-5)


BAD = [
    ({"x": torch.zeros(3, 64, dtype=torch.float64)}, TypeError, "x: got float64, wanted float32"),
    ({"x": [1.0]}, TypeError, "x: got list"),
    ({"x": torch.zeros(64)}, ValueError, r"x: got shape \[64\], wanted \[T, K\]"),
    ({"x": torch.zeros(0, 64)}, ValueError, "x: got shape .* empty"),
    ({"x": torch.zeros(64, 3).T}, ValueError, "x: got strides"),
    ({"x": torch.zeros(3, 80)}, ValueError, "hi: got shape"),
    ({"x": torch.zeros(3, 64, device="meta")}, ValueError, "x: got a tensor on meta"),
    ({"lo": torch.zeros(17, 32, dtype=torch.uint8)}, ValueError, "lo: got shape"),
    ({"scale": torch.zeros(16, 1)}, TypeError, "scale: got float32, wanted float16"),
    ({"scale": torch.zeros(16, 5, dtype=torch.float16)}, ValueError, "scale: got 5 groups for 64 columns"),
    ({"bits": torch.tensor([8, 4, 5], dtype=torch.int32)}, ValueError, r"bits: got 5 at \[2\], wanted 8 or 4"),
    ({"bits": torch.tensor([8, 4])}, TypeError, "bits: got int64"),
    ({"bias": torch.zeros(15)}, ValueError, r"bias: got shape \[15\], wanted \[16\]"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m for *_, m in BAD])
def test_bad_input_is_named(backend, change, error, message):
    x, w, bits, _ = Gemm(3, 16, 64, 64).make()
    arguments = {"x": x, "hi": w.hi, "lo": w.lo, "scale": w.scale, "bits": bits, **change}
    with pytest.raises(error, match=message):
        ops.matryoshka_gemm(**arguments)


def test_direct_calls_cannot_read_outside():
    x, w, _, _ = Gemm(3, 16, 64, 64).make()
    gemm = torch.ops.quicksilver.matryoshka_gemm
    for bad in (
        (x, w.hi[:, :16].contiguous(), w.lo, w.scale, None, None, w.offset),
        (x, w.hi, w.lo[:8], w.scale, None, None, w.offset),
        (x, w.hi, w.lo, w.scale[:, :0], None, None, w.offset),
        (x, w.hi, w.lo, w.scale, None, None, w.offset[:8]),
        (x, w.hi, w.lo, w.scale, torch.full((3,), 7, dtype=torch.int32), None, w.offset),
        (x.double(), w.hi, w.lo, w.scale, None, None, w.offset),
    ):
        with pytest.raises(RuntimeError):
            gemm(*bad)


def test_group_size_that_does_not_fit():
    with pytest.raises(ValueError, match="group_size: got 48"):
        ops.quantize_rows(torch.zeros(1, 96), 48)


def test_opcheck():
    x, w, bits, bias = Gemm(3, 20, 72, 32, bias=True).make()
    gemm = torch.ops.quicksilver.matryoshka_gemm.default
    torch.library.opcheck(gemm, (x, w.hi, w.lo, w.scale, bits, bias, w.offset))
    torch.library.opcheck(gemm, (x, w.hi, None, w.scale, None, None, w.offset))
    torch.library.opcheck(torch.ops.quicksilver.quantize_rows.default, (x, 32))
    pack = torch.ops.quicksilver.matryoshka_pack.default
    torch.library.opcheck(pack, (torch.randn(20, 72), w.hi, w.lo, w.scale, w.offset))
    torch.library.opcheck(pack, (torch.randn(20, 72), w.hi, None, w.scale, w.offset, torch.ones(72)))


def test_counters_count_what_was_computed():
    x, w, _, bias = Gemm(5, 48, 128, 64, bias=True).make()
    for bits, planes_read in ((8, 2), (4, 1)):
        _C.reset_counters()
        w.matmul(x, torch.full((5,), bits, dtype=torch.int32), bias)
        counted = _C.counters()
        assert counted.gemm_macs == 5 * 48 * 128
        assert counted.weight_bytes_read == planes_read * w.hi.nbytes + w.group_nbytes + bias.nbytes
