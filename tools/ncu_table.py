"""Turns what Nsight Compute measured into a table with cuda_report's columns.

    ncu --set full --nvtx -o run quicksilver_profile decode --backend cuda --shape llama-2-7b --warmup 1 --repeat 1
    ncu --import run.ncu-rep --csv --page raw > run.csv
    python tools/ncu_table.py run.csv

Where ncu chose scaled units (Kbyte, usecond), they are undone; a metric that wasn't collected is a dash.
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import typer
from cuda_table import WARP, markdown, run_command, short_name


class TableError(Exception):
    """What a user can mend, in one line."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as measured. None: not collected."""

    name: str
    grid: str
    threads: int | None
    registers: float | None
    static_shared: float | None
    dynamic_shared: float | None
    blocks_per_sm: float | None  # the occupancy bound
    limited_by: str | None
    warps_per_sm: float | None  # the bound
    achieved_occupancy: float | None  # percent of the SM's warps, on average
    duration_us: float | None
    dram_bytes: float | None
    dram_percent: float | None  # of the peak rate
    l2_hit_percent: float | None
    sectors_per_load: float | None
    sectors_per_store: float | None
    shared_conflicts: float | None
    active_lanes: float | None  # threads per warp instruction
    imma: float | None  # tensor-core instructions that ran, integer
    hmma: float | None
    local: float | None  # loads and stores of local memory: spills


# Metrics' names, in the order in which to look: they differ between GPU generations.
_NAMES = {
    "registers": ["launch__registers_per_thread"],
    "static_shared": ["launch__shared_mem_per_block_static"],
    "dynamic_shared": ["launch__shared_mem_per_block_dynamic"],
    "achieved_occupancy": ["sm__warps_active.avg.pct_of_peak_sustained_active"],
    "dram_percent": [
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ],
    "l2_hit_percent": ["lts__t_sector_hit_rate.pct"],
    "sectors_per_load": ["l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio"],
    "sectors_per_store": ["l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio"],
    "shared_conflicts": ["l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum"],
    "active_lanes": ["smsp__thread_inst_executed_per_inst_executed.ratio"],
    "imma": ["sm__inst_executed_pipe_tensor_op_imma.sum", "smsp__inst_executed_pipe_tensor_op_imma.sum"],
    "hmma": ["sm__inst_executed_pipe_tensor_op_hmma.sum", "smsp__inst_executed_pipe_tensor_op_hmma.sum"],
}
_LIMITS = {
    "registers": "launch__occupancy_limit_registers",
    "shared memory": "launch__occupancy_limit_shared_mem",
    "threads": "launch__occupancy_limit_warps",
    "blocks": "launch__occupancy_limit_blocks",
}
_PREFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def _scale(unit: str) -> float:
    """What a value of this unit is to be multiplied by: bytes and seconds without a prefix."""
    unit = unit.split("/")[0]
    for base in ("byte", "second"):
        if unit.endswith(base):
            prefix = unit.removesuffix(base).replace("K", "k")
            return _PREFIXES.get(prefix, 1.0)
    return {"ns": 1e-9, "us": 1e-6, "ms": 1e-3}.get(unit, 1.0)


def _threads(size: str) -> int | None:
    """Of a block, from "(256, 1, 1)"."""
    try:
        product = 1
        for part in size.strip("() ").split(","):
            product *= int(part)
    except ValueError:
        return None
    return product


def parse(text: str) -> list[Launch]:
    """The launches in ``ncu --csv --page raw``: a header, a row of units, a row for each launch. Lines before the
    header (==PROF== and what the program printed) are passed over."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise TableError('no header that starts with "ID": was this written by ncu --csv --page raw?')
    header, units, *rows = [row for row in csv.reader(lines[start:]) if row]
    if "Kernel Name" not in header:
        raise TableError("no column 'Kernel Name': was this written by ncu --csv --page raw?")
    unit_of = dict(zip(header, units))
    launches = []
    for row in rows:
        if len(row) != len(header):
            continue  # what the program printed in between
        values = dict(zip(header, row))

        def number(*names: str, of: dict[str, str] = values) -> float | None:
            for name in names:
                try:
                    return float(of[name].replace(",", "")) * _scale(unit_of[name])
                except (KeyError, ValueError):
                    continue
            return None

        def total(*names: str) -> float | None:
            parts = [number(name) for name in names]
            known = [part for part in parts if part is not None]
            return sum(known) if known else None

        limits = {what: bound for what, name in _LIMITS.items() if (bound := number(name)) is not None}
        limit = min(limits, key=lambda what: limits[what], default=None)
        threads = _threads(values.get("Block Size", ""))
        blocks = None if limit is None else limits[limit]
        seconds = number("gpu__time_duration.sum")
        launches.append(
            Launch(
                name=short_name(values["Kernel Name"]),
                grid=values.get("Grid Size", ""),
                threads=threads,
                blocks_per_sm=blocks,
                limited_by=limit,
                warps_per_sm=None if blocks is None or threads is None else blocks * -(-threads // WARP),
                duration_us=None if seconds is None else seconds * 1e6,
                dram_bytes=total("dram__bytes_read.sum", "dram__bytes_write.sum"),
                local=total("smsp__inst_executed_op_local_ld.sum", "smsp__inst_executed_op_local_st.sum"),
                **{field: number(*names) for field, names in _NAMES.items()},
            )
        )
    return launches


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="Output of ncu --csv --page raw.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of Markdown.")] = False,
) -> None:
    """Nsight Compute's measurements as a table."""
    launches = parse(file.read_text())
    if as_json:
        typer.echo(json.dumps([asdict(launch) for launch in launches]))
        return
    header = [field.name.replace("_", " ") for field in fields(Launch)]
    typer.echo(markdown(header, [list(asdict(launch).values()) for launch in launches]), nl=False)


def main(arguments: list[str] | None = None) -> int:
    return run_command(app, "ncu_table", TableError, arguments)


if __name__ == "__main__":
    sys.exit(main())
