"""torch's process-wide state is neither trusted nor changed, and what a fork leaves behind is enough to go on."""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache as kept
from pathlib import Path

import pytest
import torch
from models import TRAINED_GPT2, random_llama, random_model, write_gguf
from torch import Tensor

import quicksilver_ext
from quicksilver_ext import QuickSilverConfig, QuickSilverForCausalLM
from quicksilver_ext.calibration.evaluation import evaluate
from quicksilver_ext.kernels import testing
from quicksilver_ext.weights.model import PRECISIONS

PACKAGE = Path(quicksilver_ext.__file__).parent
SHARED = ("float16", "bfloat16", "float64", "meta")
HALT = {"drift_threshold": 1.15, "min_layer": 1, "entropy_threshold": 9.0}
AMQ = {"layer": 1, "entropy_threshold": 0.9975}
CONFIGS = {
    "off": {},
    "all": {"halting": HALT, "fusion": {"layer": 1, "threshold": 0.98, "scope": "cache"}, "amq": AMQ},
    "prompt": {"fusion": {"layer": 1, "threshold": 0.98, "scope": "prompt", "weights": "attention"}},
    "head": {
        "halting": {**HALT, "entropy_source": "head", "kv_policy": "recompute"},
        "amq": {**AMQ, "entropy_source": "head"},
        "trace": True,
    },
}


@pytest.fixture
def state(request: pytest.FixtureRequest) -> Iterator[str]:
    """torch's default dtype or device is another. "meta" holds no values, so whoever relies on it fails."""
    before = torch.get_default_dtype()
    try:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))
        yield request.param
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def every_state(test):
    return pytest.mark.parametrize("state", SHARED, indirect=True)(test)


@kept
def folders() -> dict[str, Path]:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    long = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
        "original_max_position_embeddings": 20,
        "rope_theta": 1e4,
    }
    return {
        "llama": random_llama(),
        "yarn": random_llama(rope_parameters=yarn),
        "long": random_llama(rope_parameters=long),
        "gpt2-inverse": random_model("gpt2-inverse"),
        "mistral": random_model("mistral"),
        "qwen3": random_model("qwen3"),
        "gguf": write_gguf(random_llama(intermediate_size=416), "Q8_0"),
        "q4_0": write_gguf(random_llama(intermediate_size=416), "Q4_0"),
    }


def ids_of(length: int, seed: int, vocabulary: int = 900) -> Tensor:
    draw = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(3, vocabulary, (1, length), generator=draw, dtype=torch.int64, device="cpu")


def everything(name: str, precision: str, configs: tuple[str, ...] = ("off", "all")) -> list[Tensor]:
    """What a user asks of a model, from the load on."""
    lm = QuickSilverForCausalLM.from_pretrained(folders()[name], precision=precision)
    ids, found = ids_of(30, 1), []
    for key in configs:
        parts = {k: v for k, v in CONFIGS[key].items() if k != "amq" or precision == "adaptive"}
        run = lm.with_config(QuickSilverConfig.from_dict(parts))
        sampled = run.generate(ids, max_new_tokens=6, do_sample=True, seed=5, top_p=0.9, top_k=40)
        found += [run(ids).logits, run.score(ids), run.generate(ids, max_new_tokens=6, do_sample=False).sequences]
        found.append(sampled.sequences)
    return found


@kept
def wanted(*case: str | tuple[str, ...]) -> list[Tensor]:
    return everything(*case)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.device == b.device
        assert torch.equal(a, b)


CASES = [
    *[("llama", precision) for precision in PRECISIONS],
    ("llama", "adaptive", ("prompt", "head")),
    *[(name, "adaptive") for name in ("yarn", "long", "gpt2-inverse", "mistral", "qwen3", "gguf", "q4_0")],
]


@pytest.fixture(scope="module", autouse=True)
def before() -> None:
    """All is known before a test changes anything, from one thread: fp32 matrices are PyTorch's."""
    torch.set_num_threads(1)
    for case in CASES:
        wanted(*case)


@every_state
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:2])))
def test_results_do_not_depend_on_it(state: str, case: tuple[str, ...]) -> None:
    assert_same(everything(*case), wanted(*case))


@every_state
@pytest.mark.parametrize("backend", [name for name in testing.backends() if not name.startswith("cpu-")])
def test_nor_do_backends(state: str, backend: str) -> None:
    with testing.use_backend(backend):
        got = everything("llama", "adaptive", ("all",))
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    with testing.use_backend(backend):
        assert_same(got, everything("llama", "adaptive", ("all",)))


@every_state
def test_nor_do_files(state: str, tmp_path: Path) -> None:
    lm = QuickSilverForCausalLM.from_pretrained(TRAINED_GPT2)
    lm.save_pretrained(tmp_path)
    again = QuickSilverForCausalLM.from_pretrained(tmp_path)
    assert again.config.torch_dtype != state
    got = [again(ids_of(20, 2, 300)).logits]
    text = "The for statement is used to iterate over the elements of a sequence."
    result = evaluate(again, text, window=16)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    want = QuickSilverForCausalLM.from_pretrained(TRAINED_GPT2)
    assert_same(got, [want(ids_of(20, 2, 300)).logits])
    timeless = {"seconds": 0.0, "baseline_seconds": 0.0}
    expected = evaluate(want, text, window=16)
    assert dataclasses.replace(expected, **timeless) == dataclasses.replace(result, **timeless)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_children_generate() -> None:
    """After PyTorch's own threads were at work, which it waits for in a child."""
    code = """
        import os, signal, sys, threading, time, torch
        torch.set_num_threads(2)
        from quicksilver_ext import QuickSilverForCausalLM

        lm = QuickSilverForCausalLM.from_pretrained(sys.argv[1])
        ids = torch.arange(300)[None]
        torch.ones(500, 500).exp().sum()  # large enough for both

        def generate():
            return lm.generate(ids, max_new_tokens=4, do_sample=False).sequences

        def forked():
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # a child that hangs is killed
                os._exit(0 if torch.equal(generate(), want) else 7)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        want, done = generate(), False
        codes = [forked()]

        def busy():
            while not done:
                generate()

        other = threading.Thread(target=busy)
        other.start()
        codes += [forked() for _ in range(4)]
        done = True
        other.join()
        assert torch.equal(generate(), want) and torch.get_num_threads() == 2
        print(codes)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(random_llama())]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.stdout.strip() == str([0] * 5), ran.stderr


def test_nothing_is_changed() -> None:
    def shared() -> tuple[object, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_num_threads(),
            torch.get_num_interop_threads(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.random.get_rng_state().tolist(),
        )

    torch.set_num_threads(2)
    before = shared()
    everything("llama", "adaptive", tuple(CONFIGS))
    assert shared() == before


# --- the source -------------------------------------------------------------------------------------------------------

MAKE = {
    *("tensor", "as_tensor", "asarray", "scalar_tensor", "empty", "empty_strided", "zeros", "ones", "full", "eye"),
    *("arange", "range", "linspace", "logspace", "rand", "randn", "randint", "randperm"),
}
CHANGE = {
    *("Tensor", "FloatTensor", "LongTensor", "manual_seed", "seed", "set_default_dtype", "set_default_device"),
    *("set_default_tensor_type", "set_grad_enabled", "set_num_interop_threads", "use_deterministic_algorithms"),
    *("set_float32_matmul_precision", "set_rng_state", "set_num_threads"),
}


def test_every_tensor_is_made_with_dtype_and_device() -> None:
    """Where torch's defaults would choose, somebody else may have set them."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("torch."):
                continue
            name = ast.unparse(node.func).removeprefix("torch.")
            where = f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)[:80]}"
            if name in MAKE and not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}:
                wrong.append(f"{where}: say dtype and device")
            # The command line is a process of our own; a forked child's threads aren't anybody's.
            if name in CHANGE and path.parent.name != "cli" and path.name != "backends.py":
                wrong.append(f"{where}: is the whole process's")
            if name == "Generator" and not node.args and not node.keywords:
                wrong.append(f"{where}: say the device")
    assert not wrong, "\n".join(wrong)
