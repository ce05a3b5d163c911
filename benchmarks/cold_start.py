"""Seconds of a cold start of the demo model: imports, and `quicksilver generate` from process start to the first token.

    python benchmarks/cold_start.py

Every figure is the median over fresh processes, started in turn; files are in the page cache, as after a first start.
CPU seconds, user and system of all threads, stand beside: they tell a slow start from a busy machine. Imports are timed
by a child's own clock, the first token by its arrival here.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

IMPORTS = """
import os, time
def now():
    t = os.times()
    return time.perf_counter(), t.user + t.system
begin = now()
import torch
middle = now()
from quicksilver_ext import QuickSilverForCausalLM
end = now()
print(*(b - a for parts in (zip(begin, middle), zip(middle, end)) for a, b in parts))
"""
Seconds = tuple[float, float]  # wall, CPU


def imports() -> dict[str, Seconds]:
    out = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True).stdout
    torch_wall, torch_cpu, ours_wall, ours_cpu = map(float, out.split())
    return {"import torch": (torch_wall, torch_cpu), "import quicksilver_ext, beyond torch": (ours_wall, ours_cpu)}


def first_token(model: str) -> Seconds:
    """From the start of the process until its first token's text is here."""
    command = [sys.executable, "-m", "quicksilver_ext", "generate", "--model", model, "--prompt", "The museum opens at"]
    begin = time.perf_counter()
    child = subprocess.Popen([*command, "--max-new-tokens", "1"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    text = child.stdout.read(1)
    wall = time.perf_counter() - begin
    child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode or not text:
        raise RuntimeError(f"{' '.join(command)} failed")
    return wall, usage.ru_utime + usage.ru_stime


def main(
    runs: Annotated[int, typer.Option(min=1, help="Processes for each figure.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    from quicksilver_ext import QuickSilverForCausalLM

    times: dict[str, list[Seconds]] = {}
    with tempfile.TemporaryDirectory() as folder:
        packed = str(Path(folder) / "packed")
        QuickSilverForCausalLM.from_pretrained("demo").save_pretrained(packed)
        for number in range(runs + 1):
            figures = imports()
            figures["first token, from the GGUF file"] = first_token("demo")
            figures["first token, from a saved folder"] = first_token(packed)
            for name, seconds in figures.items():
                if number:  # the first round brings files into the page cache
                    times.setdefault(name, []).append(seconds)
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in times.items()}
    if as_json:
        print(json.dumps({name: {"seconds": wall, "cpu_seconds": cpu} for name, (wall, cpu) in medians.items()}))
        return
    print(f"{'seconds':>8} {'CPU':>8}   medians of {runs} processes")
    for name, (wall, cpu) in medians.items():
        print(f"{wall:8.2f} {cpu:8.2f}   {name}")


if __name__ == "__main__":
    typer.run(main)
