"""The benchmark: its arithmetic on systems of known speed, its checks on wrong ones, and a small run of the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_llama
from test_cli import one_json
from torch import Tensor

from quicksilver_ext import _C
from quicksilver_ext.bench import benchmark
from quicksilver_ext.bench.benchmark import Options, compare, interleave
from quicksilver_ext.bench.shapes import SHAPES, Shape, write_shape
from quicksilver_ext.bench.systems import Timing, WrongAnswer
from quicksilver_ext.cli import app as cli

TINY = {
    "llama": Shape("tiny-llama", "llama", 3, 192, 3, 512, 517, 256),
    "gpt2": Shape("tiny-gpt2", "gpt2", 3, 192, 3, 768, 517, 256),
}
Here = Callable[..., tuple[int, str, str]]
PROMPTS = torch.arange(12).view(2, 6)


def options(shape: Shape, folder: Path, **changes: Any) -> Options:
    return Options(shape=shape, prompt=9, new=4, rounds=1, folder=str(folder), **changes)


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Here:
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.main(list(arguments))
        return code, *capfd.readouterr()

    return call


# --- arithmetic ------------------------------------------------------------------------------------------------------


class Fake:
    """Takes seconds from a list, one entry a run; the first one is the warm-up."""

    def __init__(self, name: str, batch: int, seconds: list[float], log: list[str], size: float = 100.0) -> None:
        self.name, self.batch, self.bytes_per_token = name, batch, size
        self.seconds, self.log = iter(seconds), log

    def run(self, prompts: Tensor, new: int) -> Timing:
        assert prompts.shape == (self.batch, 6)
        self.log.append(self.name)
        second = next(self.seconds)
        return Timing(second / 2, second)

    def logits(self, ids: Tensor) -> Tensor:
        return torch.ones(3)


def test_systems_take_turns_with_a_probe_between_and_ratios_are_within_a_round() -> None:
    log: list[str] = []
    # A machine that is three times slower in the second round, and a second system that takes half, then all the time.
    systems = [Fake("a", 1, [99, 1, 3, 1], log), Fake("b", 2, [99, 0.5, 3, 0.4], log, size=50.0)]
    ceilings = iter([1e9] * 3 + [1000.0, 2000.0, 4000.0] + [800.0, 1600.0, 1600.0] + [1000.0, 1000.0, 1000.0])

    def probe() -> float:
        log.append("probe")
        return next(ceilings)

    measured = interleave(systems, PROMPTS, 8, 3, probe)
    assert log == ["probe", "a", "probe", "b", "probe"] * 4
    first, second = benchmark.rows(measured)
    assert first["system"] == "a" and second["batch"] == 2
    assert first["decode_spread"] == {"median": 8.0, "min": pytest.approx(8 / 3), "max": 8.0}
    assert first["prefill_tokens_per_s"] == 12.0  # 6 tokens in half a second
    assert second["decode_tokens_per_s"] == 32.0  # 8 steps of two sequences in half a second
    over = second["decode_over"]["a"]
    assert (over["median"], over["min"], over["max"]) == pytest.approx((4.0, 2.0, 5.0))
    assert first["decode_over"]["b"]["median"] == pytest.approx(1 / 4)
    # Per round: 100 bytes * 8/s over 1500, * 8/3 over 1200, * 8 over 1000.
    assert first["fraction_spread"]["max"] == pytest.approx(800 / 1000)
    assert first["fraction_of_ceiling"] == pytest.approx(800 / 1500)
    assert first["read_ceiling_GBps"] == pytest.approx(1200e-9)
    # 50 bytes * 32 over 3000, * 16/3 over 1600, * 40 over 1000
    assert second["fraction_of_ceiling"] == pytest.approx(1600 / 3000)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answers_are_compared_by_error_and_by_the_likeliest_token() -> None:
    torch.manual_seed(0)
    want = torch.randn(500)
    near = want + 0.05 * torch.randn(500)
    assert 0.03 < compare("a", near + 7, "b", want, 0.1) < 0.07  # softmax doesn't see a constant
    with pytest.raises(WrongAnswer, match=r"a: logits are .* away from b's"):
        compare("a", want.roll(1), "b", want, 0.1)
    with pytest.raises(WrongAnswer, match="NaN"):
        compare("a", want * torch.nan, "b", want, 0.1)
    with pytest.raises(WrongAnswer, match="shapes"):
        compare("a", want[:-1], "b", want, 0.1)
    spoiled = want.clone()
    spoiled[want.abs().argmin()] = want.max() + 0.1  # a small error on the whole, and another token
    with pytest.raises(WrongAnswer, match="likeliest token"):
        compare("a", spoiled, "b", want, 0.5)
    tied = want.clone()
    tied[3] = want.max() - 1e-4
    assert compare("a", tied + 1e-3 * torch.randn(500), "b", tied, 0.1) < 0.1


def test_a_wrong_system_ends_the_run_with_exit_1(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "gpt2-large", TINY["gpt2"])
    arguments = ["bench", "--shape", "gpt2-large", "--prompt", "9", "--new", "4", "--rounds", "1", "--json"]
    arguments += ["--folder", str(tmp_path)]
    monkeypatch.setattr(benchmark, "PROBE_BYTES", 1 << 20)
    wrong = Fake("llama.cpp Q8_0", 1, [1.0] * 9, [])
    wrong.logits = lambda ids: torch.linspace(0, 1, TINY["gpt2"].vocab)  # type: ignore[method-assign]
    monkeypatch.setattr(benchmark, "_others", lambda *arguments: iter([wrong]))
    code, out, err = here(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("quicksilver: wrong answer: int8: logits are") and len(err.splitlines()) == 1


def test_decoding_is_held_against_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_shape(TINY["llama"], tmp_path)
    (system,) = benchmark.our_systems(options(TINY["llama"], tmp_path, precisions=["int8"]), path, PROMPTS)
    system.check(PROMPTS[:1])
    forward = type(system.lm).forward
    monkeypatch.setattr(type(system.lm), "__call__", lambda lm, ids: forward(lm, ids.flip(1)))
    with pytest.raises(WrongAnswer, match="int8: decoding gives other tokens"):
        system.check(PROMPTS[:1])


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("other", ["llama.cpp", "transformers"])
def test_systems_agree_on_the_same_random_weights(family: str, other: str, tmp_path: Path) -> None:
    pytest.importorskip(benchmark.SYSTEMS[other][0])
    values = benchmark.bench(options(TINY[family], tmp_path, against=[other], precisions=["int8", "int4"]))
    names = [row["system"] for row in values["rows"]]
    kinds = ("Q8_0", "Q4_0") if other == "llama.cpp" else ("fp32", "bf16")
    assert names == ["int8", "int4", *(f"{other} {kind}" for kind in kinds)]
    assert values["logit_error_bound"] == 0.15
    assert values["logit_errors"] == {f"{other} {kinds[0]}": pytest.approx(0, abs=0.1)}
    sizes = [row["bytes_per_token"] for row in values["rows"]]
    assert sizes[1] < 0.75 * sizes[0] and sizes[3] < 0.8 * sizes[2]
    # 8 bits, and 32 per group of 64 values; llama.cpp's 16 per 32 are as much; fp32 has 32.
    assert sizes[2] / sizes[0] == pytest.approx(1.0 if other == "llama.cpp" else 3.76, rel=0.05)


# --- the whole -------------------------------------------------------------------------------------------------------


def test_json_of_a_run_of_ours_alone(here: Here, tmp_path: Path) -> None:
    model = random_llama()
    config = json.dumps({"halting": {"drift_threshold": 1e6, "min_layer": 2, "sink_tokens": 1}})
    arguments = ["bench", "--model", str(model), "--prompt", "9", "--new", "4", "--rounds", "2", "--batch", "1,3"]
    values = one_json(here(*arguments, "--config", config, "--json")[1])
    names = [row["system"] for row in values["rows"]]
    assert names == [f"{name}{batch}" for name in ("int8", "int4", "int8 with config") for batch in ("", ", batch 3")]
    for row in values["rows"]:
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "read_ceiling_GBps", "fraction_of_ceiling"):
            assert row[key] > 0
    size = {row["system"]: row["bytes_per_token"] for row in values["rows"]}
    assert size["int8 with config"] < size["int8"] and size["int4"] < size["int8"]
    assert size["int8, batch 3"] < 0.5 * size["int8"]  # weights are read once for three
    top = "threads isa cpu prompt new rounds read_ceiling_GBps int8_ceiling_GMACps versions notes date peak_memory_GB"
    assert set(top.split()) <= set(values)
    assert values["isa"] == _C.isa() and values["notes"] == [] and values["prompt"] == 9


def test_table(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "llama-2-7b", TINY["llama"])
    arguments = ["--shape", "llama-2-7b", "--layers", "1", "--prompt", "5", "--new", "3", "--rounds", "1"]
    code, out, _ = here("bench", *arguments, "--folder", str(tmp_path))
    assert code == 0 and [file.suffix for file in tmp_path.iterdir()] == [".gguf"]
    for part in ("system", "int8", "int4", "over int8", "1 layers, random weights", "peak memory of ours"):
        assert part in out


def test_int8_and_int4_share_their_planes(tmp_path: Path) -> None:
    path = write_shape(TINY["gpt2"], tmp_path)
    eight, four = benchmark.our_systems(options(TINY["gpt2"], tmp_path), path, PROMPTS)
    for one, other in zip(eight.lm.model.layers, four.lm.model.layers):
        assert one.up.weight.hi.data_ptr() == other.up.weight.hi.data_ptr()  # type: ignore[union-attr]
        assert other.up.weight.lo is None  # type: ignore[union-attr]
    four.count_bytes()
    alone = benchmark.our_systems(options(TINY["gpt2"], tmp_path, precisions=["int4"]), path, PROMPTS)[0]
    alone.count_bytes()
    assert four.bytes_per_token == alone.bytes_per_token
    assert torch.equal(four.logits(PROMPTS[0]), alone.logits(PROMPTS[0]))


def test_a_kept_file_is_taken_again_and_a_full_disk_is_told(tmp_path: Path) -> None:
    path = write_shape(TINY["gpt2"], tmp_path)
    first = path.stat()
    assert first.st_size > TINY["gpt2"].parameters
    assert write_shape(TINY["gpt2"], tmp_path).stat().st_mtime_ns == first.st_mtime_ns
    with pytest.raises(ValueError, match=r"GB free and tiny-gpt2 needs .* --folder"):
        write_shape(TINY["gpt2"], tmp_path, seed=1, extra_bytes=1 << 60)
    assert list(tmp_path.iterdir()) == [path]


def test_shapes_have_the_sizes_of_their_models() -> None:
    assert SHAPES["gpt2-large"].parameters == 774_030_080
    assert SHAPES["llama-2-7b"].parameters == 6_738_415_616


MISTAKES = {
    "unknown system": (["--against", "vllm"], "against"),
    "unknown shape": (["--shape", "gpt5"], "shape"),
    "layers without a shape": (["--layers", "2"], "layers"),
    "more layers than there are": (["--shape", "gpt2-large", "--layers", "37"], "1 to 36"),
    "unknown precision": (["--precision", "int8,int3"], "int3"),
    "no precision": (["--precision", ","], "precision"),
    "batch that is no number": (["--batch", "1,many"], "--batch"),
    "empty batch": (["--batch", "0"], "batch"),
    "no rounds": (["--rounds", "0"], "rounds"),
    "beyond the context": (["--shape", "gpt2-large", "--prompt", "1000", "--new", "24"], "1025 positions"),
    "no folder": (["--folder", "/nonexistent"], "folder"),
    "config that is no JSON": (["--config", "{"], "--config"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_options_are_checked_before_anything_is_loaded(name: str, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, part = MISTAKES[name]
    monkeypatch.setattr(benchmark, "bench", lambda *arguments: pytest.fail("went on"))
    code, out, err = here("bench", *arguments, "--json")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("quicksilver: ") and part in err


@pytest.mark.parametrize("name", benchmark.SYSTEMS)
def test_a_missing_package_is_named_with_the_way_to_get_it(
    name: str, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda module: None)
    code, _, err = here("bench", "--against", name)
    assert code == 2 and "pip install " in err and len(err.splitlines()) == 1


def test_llama_cpp_needs_a_gguf_file() -> None:
    pytest.importorskip("llama_cpp")
    with pytest.raises(ValueError, match=r"llama.cpp reads .gguf files"):
        benchmark.bench(Options(model=str(random_llama()), against=["llama.cpp"]))


# --- ceilings --------------------------------------------------------------------------------------------------------


def test_ceilings() -> None:
    with pytest.raises(ValueError, match="address"):
        _C.read_ceiling(0, 1 << 20)
    block = torch.ones(32 << 20, dtype=torch.uint8)
    start = -block.data_ptr() % 64
    with pytest.raises(ValueError, match="address"):
        _C.read_ceiling(block.data_ptr() + start + 1, 1 << 20)
    with pytest.raises(ValueError, match="bytes"):
        _C.read_ceiling(block.data_ptr() + start, 100)
    rate = _C.read_ceiling(block.data_ptr() + start, 16 << 20)
    assert 0 < rate < 1e13
    before = _C.isa()
    try:
        for isa in _C.supported_isas():
            _C.set_isa(isa)
            # A product whose loop the compiler emptied would be a thousand times faster.
            assert 0 < _C.int8_ceiling() / _C.threads() < 2e12
    finally:
        _C.set_isa(before)
