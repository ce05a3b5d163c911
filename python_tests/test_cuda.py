"""Whole models on the CUDA kernels, run by the emulator: against the reference, steps against passes, and the promise
that a decode step never waits for the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import TRAINED_GPT2, random_gpt2, random_llama
from torch.overrides import TorchFunctionMode

from quicksilver_ext import _C, QuickSilverConfig, QuickSilverForCausalLM
from quicksilver_ext.engine import cuda
from quicksilver_ext.engine.batch import Batch
from quicksilver_ext.engine.cpu import CpuStages
from quicksilver_ext.engine.cuda import CudaStages
from quicksilver_ext.kernels import ops, testing
from quicksilver_ext.mechanisms.base import Rows
from quicksilver_ext.weights import matryoshka as quantize

pytestmark = pytest.mark.skipif(
    not hasattr(_C, "emulated"), reason="built without the emulator: QUICKSILVER_EMULATOR=1"
)

HALT = {"drift_threshold": 1.28, "min_layer": 1, "sink_tokens": 2}
# Kernels that differ in the last bit of a sum now and then quantize a value to the neighbouring integer, which is worth
# 1e-3 of a row. CPU and CUDA differ in attention alone, PyTorch's norms and activations from both.
CLOSE, CLOSE_TO_REFERENCE = 8e-3, 1e-2
# In an INT8 cache such a value stays: all later rows of its sequence see it.
INT8_CACHE = 2
# Small, since every instruction is run by hand; of sizes that fill no tile.
SMALL_GPT2 = {"vocab_size": 203, "n_embd": 88, "n_head": 11, "n_layer": 3}
SMALL_LLAMA = {
    "vocab_size": 203,
    "hidden_size": 96,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 152,
    "num_hidden_layers": 3,
}
MODELS = {
    "gpt2": lambda: random_gpt2(**SMALL_GPT2),
    "gpt2-trained": lambda: TRAINED_GPT2,
    "llama": lambda: random_llama(**SMALL_LLAMA),
    # head size 64, the tensor cores' own, with query heads that share a KV head
    "llama-64": lambda: random_llama(
        vocab_size=203,
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=320,
        num_hidden_layers=2,
    ),
}
# In the middle of what these models' tokens have, so that some pass each test and some don't.
LEVELS = {
    "gpt2": {"drift": 0.94, "absolute": 0.97, "entropy": 6.4427, "amq": 0.99867},
    "llama": {"drift": 1.28, "absolute": 1.31, "entropy": 6.5667, "amq": 0.9989},
}
MIXES = ("off", "halting", "absolute", "entropy", "everyone", "amq", "halting-amq")


def mixture(name: str, mix: str) -> dict[str, Any]:
    """The config of a mix of mechanisms, with thresholds for a model."""
    level = LEVELS[name]
    halt = {"drift_threshold": level["drift"], "min_layer": 1, "sink_tokens": 2}
    amq = {"layer": 1, "entropy_threshold": level["amq"], "sink_tokens": 1}
    return {
        "off": {},
        "halting": {"halting": halt},
        "absolute": {"halting": {**halt, "drift_threshold": level["absolute"], "drift_norm": "absolute"}},
        "entropy": {"halting": {**halt, "drift_threshold": 1e9, "entropy_threshold": level["entropy"]}},
        "everyone": {"halting": {**halt, "drift_threshold": 1e9}},
        "amq": {"amq": amq},
        "halting-amq": {"halting": halt, "amq": amq},
    }[mix]


def model(name: str, precision: str = "int8", kv_cache_dtype: str | None = None, **mix: Any) -> QuickSilverForCausalLM:
    config = QuickSilverConfig.from_dict({"halting": None, "fusion": None, "amq": None, "trace": False, **mix})
    return QuickSilverForCausalLM.from_pretrained(
        MODELS[name](), precision=precision, quicksilver_config=config, kv_cache_dtype=kv_cache_dtype
    )


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(("precision", "kv_cache_dtype"), [("int8", "fp16"), ("int4", "fp16"), ("int8", "int8")])
@pytest.mark.parametrize("name", MODELS)
def test_forward_equals_the_cpu_s_and_the_reference_s(name: str, precision: str, kv_cache_dtype: str) -> None:
    """Prefill kernels (more rows than a decode step has) and the decode kernels that a short pass takes."""
    lm, slack = model(name, precision, kv_cache_dtype), INT8_CACHE if kv_cache_dtype == "int8" else 1
    for shape in ((2, 21), (1, 9)):
        ids = tokens(*shape)
        want = lm(ids).logits
        with testing.use_backend("cuda-emulated"):
            got = lm(ids).logits
        assert error(got, want) < slack * CLOSE, shape
    with testing.use_backend("reference"):
        reference = lm(ids).logits
    assert error(got, reference) < slack * CLOSE_TO_REFERENCE


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("name", ["gpt2", "llama-64"])
def test_stages_have_the_cpu_s_bits_but_for_attention(name: str, rows: int) -> None:
    """Norms, quantization, projections, rotary embedding, cache entries and activations, of one layer."""
    if _C.isa() == "baseline":
        pytest.skip("baseline has no fused multiply-add, so its norms differ in the last bits")
    lm = model(name)
    native, emulated = CpuStages(lm.model), CudaStages(lm.model, _C.emulated)
    positions = torch.arange(rows, dtype=torch.int32)
    sequence = torch.zeros(rows, dtype=torch.int32)
    results = []
    for stages in (native, emulated):
        cache = lm.new_cache(1, rows)
        hidden = lm.runner.embed(tokens(1, rows)[0], positions)
        stages.begin(Rows(hidden, positions, sequence, positions))
        stages.attention_input(0, cache.layers[0], None)
        slots = cache.layers[0].slots(0)
        entries = [t.transpose(1, 2).flatten(0, 1)[slots] for t in (cache.layers[0].key, cache.layers[0].value)]
        queries = stages.queries().clone()
        stages.mlp_input(0)
        stages.mlp_output(0)
        results.append((queries, *entries, hidden))
    for what, want, got in zip(("queries", "keys", "values", "hidden"), *results):
        testing.assert_equal(got, want, what)


@pytest.mark.parametrize("kv_cache_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("name", ["gpt2", "llama-64"])
def test_rows_do_not_depend_on_the_batch(name: str, kv_cache_dtype: str) -> None:
    """One row, five rows and prefill give the same bits, as on the CPU."""
    lm, ids = model(name, kv_cache_dtype=kv_cache_dtype), tokens(3, 14)
    with testing.use_backend("cuda-emulated"):
        whole = lm(ids).logits
        for row in range(3):
            testing.assert_equal(lm(ids[row : row + 1]).logits, whole[row : row + 1], f"row {row}")
        testing.assert_equal(lm(ids[:1, :5]).logits, whole[:1, :5], "prefix")


@pytest.mark.parametrize(
    ("mix", "kv_cache_dtype"), [*((mix, "fp16") for mix in MIXES), ("off", "int8"), ("halting-amq", "int8")]
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_steps_on_the_device_equal_passes(
    name: str, mix: str, kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The captured step against the loop that decides on the host: the same bits, the same counts."""
    lm = model(name, "adaptive" if "amq" in mix else "int8", kv_cache_dtype, **mixture(name, mix))
    ids = tokens(3, 5, seed=1)
    results = []
    with testing.use_backend("cuda-emulated"):
        for on_device in (True, False):
            if not on_device:
                monkeypatch.setattr(lm.plan, "step", None)
            out = lm.generate(ids, max_new_tokens=4, eos_token_id=-1)
            stats = {k: v for k, v in out.stats.to_dict().items() if "second" not in k}
            again = lm(out.sequences[:, :-1]).logits[:, 4:].argmax(-1)
            assert torch.equal(again, out.sequences[:, 5:])
            results.append((out.sequences, stats))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    depths = results[0][1]["depth_histogram"]
    assert (len(depths) > 1) == (mix not in ("off", "amq")), depths
    assert (results[0][1]["bits_histogram"].get("4", 0) > 0) == ("amq" in mix)


@pytest.mark.parametrize("name", ["gpt2-trained", "llama-64"])
def test_greedy_generation_equals_the_cpu_s(name: str) -> None:
    lm, ids = model(name, halting={**HALT, "drift_threshold": 0.7}), tokens(2, 6, seed=2)
    want = lm.generate(ids, max_new_tokens=6, eos_token_id=-1)
    with testing.use_backend("cuda-emulated"):
        got = lm.generate(ids, max_new_tokens=6, eos_token_id=-1)
    assert torch.equal(got.sequences, want.sequences)
    for key in ("layers_run", "kv_entries_written", "flops", "weight_bytes_read", "depth_histogram"):
        assert got.stats.to_dict()[key] == want.stats.to_dict()[key], key


@pytest.mark.parametrize(
    "mix",
    [
        {"halting": {**HALT, "kv_policy": "propagate"}},
        {"halting": {**HALT, "kv_policy": "zero"}},
        {"halting": {**HALT, "kv_policy": "recompute"}},
        {"halting": {**HALT, "entropy_threshold": 9.78, "entropy_source": "head"}},
        {"fusion": {"layer": 1, "threshold": 0.95, "scope": "cache", "weights": "attention"}},
    ],
    ids=["propagate", "zero", "recompute", "head-entropy", "fusion"],
)
@pytest.mark.parametrize("kv_cache_dtype", ["fp16", "int8"])
def test_mechanisms_that_the_host_decides(mix: dict[str, Any], kv_cache_dtype: str) -> None:
    lm, ids = model("llama", kv_cache_dtype=kv_cache_dtype, **mix), tokens(1, 12, seed=3)
    want = lm(ids).logits
    with testing.use_backend("cuda-emulated"):
        assert error(lm(ids).logits, want) < CLOSE


class NoHost(TorchFunctionMode):
    """Fails on whatever would wait for the device: a value read, a size that depends on values, a copy to the host."""

    FORBIDDEN = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "unique")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index), "a mask as an index"
        return func(*args, **(kwargs or {}))


@contextmanager
def watched_steps() -> Iterator[list[dict[str, int]]]:
    """Runs the launches of every step under NoHost; gives each step's kernels and how often each was launched."""
    seen: list[dict[str, int]] = []
    original, settings = cuda.CapturedStep._launch, _C.emulator.settings

    def launch(self: cuda.CapturedStep) -> None:
        _C.emulator.take_counts()
        with NoHost():
            original(self)
        seen.append({kernel["name"]: kernel["launches"] for kernel in _C.emulator.take_counts()})

    cuda.CapturedStep._launch = launch  # type: ignore[method-assign]
    settings.counts = True
    try:
        yield seen
    finally:
        settings.counts = False
        cuda.CapturedStep._launch = original  # type: ignore[method-assign]


@pytest.mark.parametrize("mix", ["off", "entropy", "everyone", "halting-amq"])
def test_a_step_is_nine_launches_a_layer_and_never_waits_for_the_host(mix: str) -> None:
    """Whatever halts: rows that go away make the kernels above return early, not the host leave them out."""
    lm = model("llama", "adaptive" if "amq" in mix else "int8", **mixture("llama", mix))
    with testing.use_backend("cuda-emulated"), watched_steps() as steps:
        lm.generate(tokens(3, 5), max_new_tokens=3, eos_token_id=-1)
    assert len(steps) == 2  # the first token comes from the prompt's pass
    for step in steps:
        entropy = step.pop("softmax_entropy", 0)
        assert entropy == (1 if "amq" in mix else 0)
        assert step.pop("decode_lm_head") == 1
        layers = len(lm.model.layers)
        assert step.pop("decode_rows") == 4 * layers + 1  # before every product
        assert len(step) == 5 and set(step.values()) == {layers}, step


def test_the_watch_would_see_a_wait() -> None:
    for waits in (lambda t: t.item(), lambda t: bool(t), lambda t: t[t > 0], lambda t: t.nonzero(), lambda t: int(t)):
        with pytest.raises(AssertionError), NoHost():
            waits(torch.ones(1))


def test_a_full_cache_is_an_error_not_a_lost_token() -> None:
    lm = model("llama")
    ids, at = tokens(1, 4)[0], torch.arange(4)
    with testing.use_backend("cuda-emulated"):
        cache = lm.new_cache(1, 4)
        lm.runner.run(lm.plan, Batch.of(ids, at, torch.zeros(4, dtype=torch.int64)), cache)
        with pytest.raises(ValueError, match="holds 4 tokens"):
            lm.runner.run(lm.plan, Batch.of(ids[:1], at[:1] + 4, torch.zeros(1, dtype=torch.int64)), cache)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"device 'cuda' (needs CUDA kernels|is not there)"):
        QuickSilverForCausalLM.from_pretrained(MODELS["llama"](), device="cuda")
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda'; got 'tpu'"):
        QuickSilverForCausalLM.from_pretrained(MODELS["llama"](), device="tpu")


def test_planes_that_the_kernels_cannot_read_are_refused() -> None:
    weight = quantize.pack_matryoshka(torch.randn(16, 64))
    shifted = torch.empty(weight.hi.numel() + 4, dtype=torch.uint8)[4:].view_as(weight.hi).copy_(weight.hi)
    with testing.use_backend("cuda-emulated"), pytest.raises(RuntimeError, match="hi must be aligned to 16 bytes"):
        ops.matryoshka_gemm(torch.randn(1, 64), shifted, weight.lo, weight.scale, None)


def test_operators_on_a_device_copy_there_and_back() -> None:
    """What the backend "cuda" does with CPU tensors, here with the CPU in the GPU's place."""
    table = testing.on_device(ops.compiled("quicksilver"), torch.device("cpu"))
    key, value = torch.randn(2, 3, 1, 8)
    caches = torch.zeros(2, 1, 1, 4, 8)
    table["kv_scatter"](key, value, torch.tensor([2, -1, 0]), *caches, None, None)
    assert torch.equal(caches[0, 0, 0, [2, 0]], key[[0, 2], 0]) and torch.equal(caches[1, 0, 0, 2], value[0, 0])
    group, count = table["fusion_groups"](
        torch.ones(3, 4),
        torch.arange(3, dtype=torch.int32),
        torch.zeros(3, dtype=torch.int32),
        torch.ones(3, dtype=torch.bool),
        0.1,
        True,
        4,
    )
    assert group.tolist() == [0, 0, 0] and count.tolist() == [1]


def test_work_memory_is_not_shared_by_caches_of_other_sizes() -> None:
    """Attention's counters lie where the number of sequences says, and must find zeros there."""
    lm = model("llama")
    stages = CudaStages(lm.model, _C.emulated)
    memories = []
    for sequences, rows in ((40, 4), (1, 4), (40, 2), (40, 6), (40, 5)):
        cache = lm.new_cache(sequences, 600)
        at = torch.zeros(rows, dtype=torch.int32)
        stages.begin(Rows(lm.runner.embed(tokens(1, rows)[0], at), at, at, torch.arange(rows, dtype=torch.int32)))
        stages.attention_input(0, cache.layers[0], None)
        memories.append(stages._memory)
    assert memories[1] is not memories[0] and memories[2] is not memories[1]
    assert memories[3] is not memories[2] and memories[4] is memories[3]
