"""Decode speed of the demo model beside llama.cpp and transformers, interleaved in one process.

    python benchmarks/decode.py --against llama.cpp        (needs: pip install llama-cpp-python)

Each round times every system once, in turn, on the same prompt and number of tokens; ratios are taken within a round
and their median is printed, because a shared machine's speed drifts. One row of ours per precision.
"""

from __future__ import annotations

import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from quicksilver_ext import QuickSilverConfig, QuickSilverForCausalLM
from quicksilver_ext.checkpoint import resolve

Run = Callable[[int, int], float]  # prompt tokens, new tokens -> new tokens per second
HALT = {"drift_threshold": 1e6, "min_layer": 10, "sink_tokens": 4}


def ours(precision: str, config: dict | None = None) -> Run:
    model = QuickSilverForCausalLM.from_pretrained(
        "demo", precision=precision, quicksilver_config=QuickSilverConfig.from_dict(config or {})
    )

    def run(prompt: int, new: int) -> float:
        ids = torch.arange(1000, 1000 + prompt)[None]
        return model.generate(ids, max_new_tokens=new, eos_token_id=-1).stats.tokens_per_second

    return run


def llama_cpp(kind: str, threads: int, folder: Path) -> Run:
    import llama_cpp

    path = folder / f"{kind}.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = {"Q8_0": 7, "Q4_0": 2}[kind], True, threads
    source = str(resolve("demo")).encode()
    if llama_cpp.llama_model_quantize(source, str(path).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not make {kind}")
    model = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(prompt: int, new: int) -> float:
        model.reset()
        model.eval(list(range(1000, 1000 + prompt)))
        begin = time.perf_counter()
        for step in range(new):
            model.eval([500 + step])
        return new / (time.perf_counter() - begin)

    return run


def transformers_fp32() -> Run:
    from transformers import AutoModelForCausalLM

    path = resolve("demo")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()

    def run(prompt: int, new: int) -> float:
        ids = torch.arange(1000, 1000 + prompt)[None]
        begin = time.perf_counter()
        model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
        prefill = time.perf_counter() - begin
        begin = time.perf_counter()
        model.generate(ids, max_new_tokens=new + 1, min_new_tokens=new + 1, do_sample=False, pad_token_id=0)
        return new / (time.perf_counter() - begin - prefill)

    return run


def main(
    against: Annotated[str, typer.Option(help="Comma-separated: llama.cpp, transformers.")] = "",
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 128,
    new: Annotated[int, typer.Option(min=2, help="New tokens.")] = 96,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    threads: Annotated[int, typer.Option(min=1)] = torch.get_num_threads(),
) -> None:
    torch.set_num_threads(threads)
    systems: dict[str, Run] = {
        "int8": ours("int8"),
        "int8, layers above 10 skipped": ours("int8", {"halting": HALT}),
        "int4": ours("int4"),
        "adaptive, 4 bits from layer 15": ours("adaptive", {"amq": {"layer": 15, "entropy_threshold": 2.0}}),
    }
    with tempfile.TemporaryDirectory() as folder:
        if "llama.cpp" in against:
            for kind in ("Q8_0", "Q4_0"):
                systems[f"llama.cpp {kind}"] = llama_cpp(kind, threads, Path(folder))
        if "transformers" in against:
            systems["transformers fp32"] = transformers_fp32()
        times: dict[str, list[float]] = {name: [] for name in systems}
        for number in range(rounds + 1):
            for name, run in systems.items():
                speed = run(prompt, new)
                if number:  # the first round warms up
                    times[name].append(speed)
    print(f"{'tokens/s':>10} {'over int8':>10}   prompt {prompt}, {new} new tokens, {threads} threads, {rounds} rounds")
    for name, speeds in times.items():
        ratio = statistics.median(a / b for a, b in zip(speeds, times["int8"], strict=True))
        print(f"{statistics.median(speeds):10.1f} {ratio:10.2f}   {name}")


if __name__ == "__main__":
    typer.run(main)
