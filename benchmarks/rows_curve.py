"""How a product's time grows with its rows: a plot, and a table.

    pip install '.[bench]'
    python benchmarks/rows_curve.py build/gemm_bench docs/rows.svg

`gemm_bench` does the measuring: weights come out of memory. Several passes over all counts of rows, of which the
fastest counts: on a shared machine a slow one says what the neighbours were doing.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

ROWS = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64)
LINE = re.compile(r"K +(\d+) N +(\d+) rows +(\d+) (INT\d) .* ([\d.]+) GMAC/s")
SHAPES = {(4096, 4096): "4096 x 4096", (576, 1536): "1536 x 576"}  # (K, N): as N x K


def seconds(gemm_bench: Path, passes: int) -> tuple[str, dict[tuple[str, str], dict[int, float]]]:
    """The machine's line, and for each shape and precision the fastest seconds by rows."""
    best: dict[tuple[str, str], dict[int, float]] = {}
    machine = ""
    for _ in range(passes):
        command = [str(gemm_bench), *map(str, ROWS)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        machine = out.splitlines()[0]
        for match in LINE.finditer(out):
            k, n, rows = map(int, match.group(1, 2, 3))
            if (k, n) in SHAPES:
                times = best.setdefault((SHAPES[k, n], match[4]), {})
                times[rows] = min(times.get(rows, float("inf")), rows * n * k / (float(match[5]) * 1e9))
    return machine, best


def main(
    gemm_bench: Annotated[Path, typer.Argument(exists=True, help="The program of that name, built.")],
    output: Annotated[Path, typer.Argument(help="Where the plot goes: .svg, .png or .pdf.")],
    passes: Annotated[int, typer.Option(min=1, help="Over all counts of rows.")] = 3,
) -> None:
    machine, best = seconds(gemm_bench, passes)
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rows"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    print(machine)
    for (shape, precision), times in best.items():
        over_one = [times[rows] / times[1] for rows in ROWS]
        axes.plot(ROWS, over_one, marker=".", label=f"{precision}, {shape}")
        print(f"{precision} {shape}: " + ", ".join(f"{rows}: {t:.2f}" for rows, t in zip(ROWS, over_one)))
    axes.plot(ROWS, ROWS, color="gray", linewidth=0.8, linestyle="--", label="a product for each row")
    axes.set(xlabel="rows", ylabel="time over that of one row", xlim=(0, 65), ylim=(0, 16), xticks=range(0, 65, 8))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)
