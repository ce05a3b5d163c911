"""The parts of gpu_check.sh that are Python: a small model on the GPU against the CPU, bandwidth, torch's own products,
and the table of figures. Wants torch and the built package alone.

    python tools/gpu_check.py model | bandwidth | matmul | figures FOLDER
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

LLAMA_7B = {"q": (4096, 4096), "gate": (11008, 4096), "down": (4096, 11008), "head": (32000, 4096)}


def seconds(run: Callable[[], object], repeat: int = 20) -> float:
    """The median time of a run on the GPU, by events, after a warm-up."""
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks)) / 1000


def bandwidth() -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.ones(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def check_bandwidth() -> None:
    rate = bandwidth()
    print(json.dumps({"device": torch.cuda.get_device_name(), "copy_GBps": round(rate / 1e9, 1)}))


def check_matmul() -> None:
    """torch's fp16 and int8 products at Llama-2-7B's shapes, microseconds, one JSON line each."""
    for name, (n, k) in LLAMA_7B.items():
        half = torch.randn(n, k, dtype=torch.float16, device="cuda")
        whole = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
        for rows in (1, 8, 32, 128, 1024, 4096):
            x = torch.randn(rows, k, dtype=torch.float16, device="cuda")
            fp16 = seconds(lambda x=x, half=half: x @ half.T)
            found = {"matrix": name, "rows": rows, "fp16_us": round(fp16 * 1e6, 1)}
            if rows > 16:  # what torch._int_mm takes
                q = torch.randint(-128, 128, (rows, k), dtype=torch.int8, device="cuda")
                int8 = seconds(lambda q=q, whole=whole: torch._int_mm(q, whole.T))
                found["int8_us"] = round(int8 * 1e6, 1)
            print(json.dumps(found))


def check_model() -> None:
    """Random models and the trained one: logits and greedy text of device "cuda" against "cpu", without mechanisms and
    with those that a step decides itself, steps from CUDA graphs and without."""
    from models import TRAINED_GPT2, random_gpt2, random_llama

    from quicksilver_ext import QuickSilverConfig, QuickSilverForCausalLM
    from quicksilver_ext.engine import cuda

    mixes = {
        "off": {},
        "halting": {"halting": {"drift_threshold": 1.1, "min_layer": 1}},
        "all": {
            "halting": {"drift_threshold": 1.1, "min_layer": 1, "entropy_threshold": 7.3},
            "fusion": {"layer": 1, "threshold": 0.9, "scope": "cache"},
            "amq": {"layer": 1, "entropy_threshold": 0.9975},
        },
    }
    wrong, checks = 0, 0
    for name, folder in (("llama", random_llama()), ("gpt2", random_gpt2()), ("trained", TRAINED_GPT2)):
        for mix, parts in mixes.items():
            for precision in ("adaptive",) if "amq" in parts else ("int8", "int4"):
                config = QuickSilverConfig.from_dict(parts)
                lms = [
                    QuickSilverForCausalLM.from_pretrained(folder, device, precision, quicksilver_config=config)
                    for device in ("cpu", "cuda")
                ]
                ids = torch.randint(3, 400, (3, 50), generator=torch.Generator().manual_seed(1))
                want, got = (lm(ids).logits.cpu() for lm in lms)
                error = ((got - want).norm() / want.norm()).item()
                texts = [lm.generate(ids, max_new_tokens=24, do_sample=False).sequences.cpu() for lm in lms]
                again = lms[1].generate(ids, max_new_tokens=24, do_sample=False).sequences.cpu()
                same = bool(torch.equal(again, texts[1]))
                equal = (texts[0] == texts[1]).double().mean().item()
                good = error < 0.02 and same
                print(f"{name} {mix} {precision}: logits differ by {error:.1e}, tokens equal {equal:.0%}, "
                      f"repeated {'the same' if same else 'DIFFERENT'}{'' if good else '  WRONG'}")  # fmt: skip
                wrong, checks = wrong + (not good), checks + 1
    lm = QuickSilverForCausalLM.from_pretrained(random_llama(), "cuda")
    ids = torch.arange(3, 40)[None]
    with_graphs = lm.generate(ids, max_new_tokens=32, do_sample=False)
    with mock.patch.object(cuda, "profiling", SimpleNamespace(enabled=lambda: True)):  # under a profiler, no graphs
        plain = QuickSilverForCausalLM.from_pretrained(random_llama(), "cuda").generate(
            ids, max_new_tokens=32, do_sample=False
        )
    same = bool(torch.equal(with_graphs.sequences, plain.sequences))
    rates = [round(out.stats.tokens_per_second) for out in (with_graphs, plain)]
    print(f"graphs: {'the same tokens' if same else 'OTHER TOKENS'}, {rates[0]} tokens/s with, {rates[1]} without")
    wrong, checks = wrong + (not same), checks + 1
    print(f"{checks - wrong} of {checks} checks hold")
    sys.exit(1 if wrong else 0)


def figures(folder: Path) -> None:
    """The report's table: quicksilver_profile's figures as shares of the copy bandwidth, and torch's products."""
    copy = json.loads((folder / "bandwidth.log").read_text().splitlines()[-1])["copy_GBps"]
    print(f"\nCopy bandwidth: {copy} GB/s.\n")
    print("| Llama-2-7B, 4 layers and head | batch | microseconds | GB/s | share of copy | TMAC/s | right |")
    print("|---|---|---|---|---|---|---|")
    for file in sorted(folder.glob("*-int*-*.json"), key=lambda f: (f.name[:8], int(f.stem.split("-")[-1]))):
        run = json.loads(file.read_text())
        rate, right = run["gigabytes_per_second"], all(check["ok"] for check in run["checks"])
        macs, batch = run["giga_multiply_adds_per_second"] / 1000, file.stem.split("-")[-1]
        print(f"| {run['kernel']} {run['precision']} | {batch} | {run['median_us']:.0f} | {rate:.0f} | "
              f"{rate / copy:.0%} | {macs:.1f} | {right} |")  # fmt: skip
    print("\n| torch, one matrix | rows | fp16 us | int8 us |\n|---|---|---|---|")
    for line in (folder / "matmul.log").read_text().splitlines():
        if line.startswith("{"):
            run = json.loads(line)
            print(f"| {run['matrix']} | {run['rows']} | {run['fp16_us']} | {run.get('int8_us', '-')} |")


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or ["help"]
    match command:
        case "model":
            check_model()
        case "bandwidth":
            check_bandwidth()
        case "matmul":
            check_matmul()
        case "figures":
            figures(Path(rest[0]))
        case _:
            sys.exit(__doc__)
