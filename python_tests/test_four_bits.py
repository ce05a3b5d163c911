"""Weights that a .gguf file has in 4 bits: their own codes, and no value changed."""

from __future__ import annotations

import warnings

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from models import random_llama, write_gguf

from quicksilver_ext import QuickSilverConfig, QuickSilverForCausalLM
from quicksilver_ext.architectures.loading import load_model
from quicksilver_ext.kernels import reference, testing
from quicksilver_ext.weights import four_bits
from quicksilver_ext.weights.gguf import GgufFile
from quicksilver_ext.weights.matryoshka import empty, pack_codes

TYPES = list(four_bits.FORMATS)
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def random_blocks(kind: GGMLQuantizationType, rows: int, seed: int = 0) -> torch.Tensor:
    """uint8 [rows, bytes of three blocks], whose fp16 fields are ordinary numbers."""
    size, _ = four_bits.FORMATS[kind]
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows * 3, size), dtype=torch.uint8, generator=g)
    halves = 1 if kind == GGMLQuantizationType.Q4_0 else 2
    fields = torch.randn(rows * 3, halves, generator=g).mul_(0.01).to(torch.float16)
    fields[0] = 3e-6  # subnormal
    blocks[:, : 2 * halves] = fields.view(torch.uint8).view(rows * 3, -1)
    return blocks.view(rows, -1)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_values_are_the_blocks_own(kind):
    blocks = random_blocks(kind, 21)
    want = torch.from_numpy(quants.dequantize(blocks.numpy(), kind))
    codes, scale, offset = four_bits.parts_of(blocks, kind)
    weight = empty(*want.shape, 32, keep_low=False)
    pack_codes(codes, None, scale, offset, weight)
    for bits in (4, 8):
        got = weight.dequantize(bits)
        if kind != GGMLQuantizationType.Q4_K:
            testing.assert_equal(got, want)
            continue
        # One rounding of fp16 for each of two products, whose sizes bound it.
        steps = (15 * scale.float().abs() + offset.float().abs()).repeat_interleave(32, 1)
        assert ((got - want).abs() <= steps * 2**-11 + 16 * 2**-25).all()


def test_bad_scales_are_named():
    codes, scale, offset = four_bits.parts_of(random_blocks(TYPES[0], 4), TYPES[0])
    weight = empty(4, codes.shape[1], 32, keep_low=False)
    for what, bad in (
        ("scales", (torch.full_like(scale, torch.inf), offset)),
        ("offsets", (scale, offset * torch.nan)),
    ):
        with pytest.raises(ValueError, match=f"up: its {what} hold NaN, Inf"):
            pack_codes(codes, None, *bad, weight, name="up")


@pytest.fixture(scope="module", params=["Q4_0", "Q4_1"])
def file(request):
    return write_gguf(
        random_llama(intermediate_size=416), request.param, kinds={"embed_tokens": "Q8_0", "down_proj": "Q8_0"}
    )


def test_a_file_in_4_bits_keeps_its_values(file):
    """And its other matrices keep 8 bits."""
    whole, four = load_model(file, "fp32"), load_model(file)
    assert (four.precision, four.group_size) == ("int4", 32)
    for dense, packed in zip(whole.layers, four.layers):
        for name in LINEARS:
            weight, want = getattr(packed, name).weight, getattr(dense, name).weight
            if name == "down":
                assert weight.lo is not None
                assert (weight.dequantize(8) - want).norm() < 0.01 * want.norm()
            else:
                assert weight.lo is None
                testing.assert_equal(weight.dequantize(4), want)
    ids = torch.arange(3, 43).view(2, 20)
    logits = [QuickSilverForCausalLM(m, QuickSilverConfig())(ids).logits for m in (whole, four)]
    assert (logits[1] - logits[0]).norm() < 0.03 * logits[0].norm()  # activations are quantized


def test_8_bits_of_4_are_the_same_numbers(file):
    ids = torch.arange(3, 43).view(2, 20)
    four = QuickSilverForCausalLM.from_pretrained(file)
    assert four.model.precision == "int4"
    for precision in ("int8", "adaptive"):
        with pytest.warns(UserWarning, match=f"precision {precision} is the same as int4"):
            other = QuickSilverForCausalLM.from_pretrained(file, precision=precision)
        testing.assert_equal(other(ids).logits, four(ids).logits)


def test_requantized_the_views_differ(file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm = QuickSilverForCausalLM.from_pretrained(file, precision="int8", requantize=True)
        default = QuickSilverForCausalLM.from_pretrained(file, requantize=True)
    assert default.model.precision == "int8" and lm.model.group_size == 64
    weight = lm.model.layers[0].up.weight
    assert not torch.equal(weight.dequantize(8), weight.dequantize(4))


def test_another_group_size_wants_another_grid(file):
    with pytest.raises(ValueError, match=r"group_size: got 64, but .*model\.gguf has 4-bit codes .* requantize"):
        load_model(file, group_size=64)
    assert load_model(file, group_size=32).group_size == 32
    assert load_model(file, "fp32", group_size=64).precision == "fp32"


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_saved_and_loaded_it_is_the_same(file, precision, tmp_path):
    ids = torch.arange(3, 43).view(2, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = QuickSilverForCausalLM.from_pretrained(file, precision=precision)
    lm.save_pretrained(tmp_path)
    again = QuickSilverForCausalLM.from_pretrained(tmp_path)
    assert (again.model.precision, again.model.group_size) == (precision, 32)
    testing.assert_equal(again(ids).logits, lm(ids).logits)
    four = QuickSilverForCausalLM.from_pretrained(tmp_path, precision="int4")
    assert four.model.layers[0].q.weight.lo is None and four.model.layers[0].down.weight.lo is not None
    testing.assert_equal(four(ids).logits, lm(ids).logits)


def test_steps_and_backends_agree(file):
    """Tokens one by one, and the emulated CUDA kernels, against one pass."""
    lm = QuickSilverForCausalLM.from_pretrained(file)
    ids = torch.arange(3, 40)[None]
    text = lm.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1).sequences
    want = lm(text).logits
    assert want[0, ids.shape[1] - 1 : -1].argmax(-1).tolist() == text[0, ids.shape[1] :].tolist()
    if "cuda-emulated" in testing.backends():
        with testing.use_backend("cuda-emulated"):
            # Attention differs in last bits; where that moves one 8-bit activation, later rows part by its noise.
            assert (lm(text).logits - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("eight", ["gate_proj", "up_proj", "v_proj"])
@pytest.mark.parametrize("rows", [1, 20, 50])
def test_one_of_a_stage_may_have_8_bits(eight, rows):
    """Weights that one launch multiplies with, with a low plane and without, on the CPU and on the emulated GPU."""
    kinds = {"embed_tokens": "Q8_0", "down_proj": "Q8_0", eight: "Q8_0"}
    path = write_gguf(random_llama(intermediate_size=416), "Q4_1", kinds=kinds)
    four, whole = (QuickSilverForCausalLM(load_model(path, p), QuickSilverConfig()) for p in ("int4", "fp32"))
    ids = torch.arange(3, 3 + rows)[None]
    want = whole(ids).logits
    for backend in testing.backends():
        if backend != "reference":
            with testing.use_backend(backend):
                assert (four(ids).logits - want).norm() < 0.04 * want.norm(), backend  # activations have 8 bits


def test_a_damaged_scale_is_named(file, tmp_path):
    found = GgufFile(file).tensors["blk.0.ffn_up.weight"]
    data = bytearray(file.read_bytes())
    data[found.offset : found.offset + 2] = b"\x00\x7c"  # fp16's infinity
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    with pytest.raises(ValueError, match=r"tensor .*up_proj.*: its scales hold NaN, Inf"):
        load_model(broken)


def test_reference_knows_offsets():
    """A product with a weight's own codes is that with its values."""
    blocks = random_blocks(GGMLQuantizationType.Q4_1, 20)
    codes, scale, offset = four_bits.parts_of(blocks, GGMLQuantizationType.Q4_1)
    weight = empty(20, 96, 32, keep_low=False)
    pack_codes(codes, None, scale, offset, weight)
    x = torch.randn(5, 96)
    got = reference.matryoshka_gemm(x, weight.hi, None, weight.scale, None, None, weight.offset)
    want = x.double() @ weight.dequantize(4).double().T
    assert (got - want).norm() < 1e-2 * want.norm()


def test_a_random_model_in_full_precision_has_no_codes_of_its_own():
    assert load_model(random_llama()).precision == "int8"
