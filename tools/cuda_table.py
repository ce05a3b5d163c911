"""What the reports on CUDA kernels share: an SM's limits, the occupancy that follows, kernel names, tables, and how a
command ends."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import typer

KIB = 1024
WARP = 32


@dataclass(frozen=True)
class Sm:
    """Limits of one multiprocessor. Source: CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute
    Capability"; granularities from the toolkit's cuda_occupancy.h."""

    threads: int
    blocks: int
    shared: int  # bytes of shared memory
    shared_per_block: int  # the most that a launch may ask for
    reserved: int  # bytes that the system takes of every block's shared memory
    granularity: int  # bytes, of shared memory's allocation
    registers: int = 64 * KIB
    partitions: int = 4  # each with its share of the registers
    register_granularity: int = 256  # registers, of a warp's allocation

    @property
    def warps(self) -> int:
        return self.threads // WARP


ARCHITECTURES = {
    75: Sm(1024, 16, 64 * KIB, 64 * KIB, 0, 256),
    80: Sm(2048, 32, 164 * KIB, 163 * KIB, KIB, 128),
    86: Sm(1536, 16, 100 * KIB, 99 * KIB, KIB, 128),
    89: Sm(1536, 24, 100 * KIB, 99 * KIB, KIB, 128),
    90: Sm(2048, 32, 228 * KIB, 227 * KIB, KIB, 128),
    100: Sm(2048, 32, 228 * KIB, 227 * KIB, KIB, 128),
    120: Sm(1536, 24, 100 * KIB, 99 * KIB, KIB, 128),
}


@dataclass(frozen=True)
class Occupancy:
    blocks: int  # per SM
    warps: int
    limit: str  # what allows no more: registers, shared memory, threads or blocks


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: int, threads: int, registers: int, shared: int) -> Occupancy:
    """Blocks of one kernel that fit on an SM, by the rules of the toolkit's cuda_occupancy.h. shared: static and
    dynamic bytes of a block."""
    sm = ARCHITECTURES[arch]
    warps = -(-threads // WARP)
    by_register = sm.blocks
    if registers > 0:
        each = _up(registers * WARP, sm.register_granularity)
        fits = each * _up(warps, sm.partitions) <= sm.registers  # what the hardware checks at a launch
        by_register = sm.registers // sm.partitions // each * sm.partitions // warps if fits else 0
    allocated = _up(shared + sm.reserved, sm.granularity)
    by_shared = sm.blocks
    if allocated > 0:
        by_shared = 0 if allocated > sm.shared_per_block + sm.reserved else sm.shared // allocated
    limits = {
        "threads": sm.warps // warps if threads <= 1024 else 0,
        "blocks": sm.blocks,
        "registers": by_register,
        "shared memory": by_shared,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limits[limit] * warps, limit)


# --- names -----------------------------------------------------------------------------------------------------------

_KV_TYPES = ("f32", "f16", "bf16", "i8")


def demangle(names: Sequence[str]) -> list[str]:
    """By binutils' c++filt; as they came where there is none."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return list(names)
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def short_name(name: str) -> str:
    """A demangled kernel without its namespaces, return type and parameters:
    ``void quicksilver::cuda::foo_kernel<(quicksilver::KvType)1, 64>(int*)`` is ``foo_kernel<f16, 64>``."""
    name = re.sub(r"\(quicksilver::KvType\)(\d)", lambda m: _KV_TYPES[int(m[1])], name)
    name = re.sub(r"(?:\w+::|\(anonymous namespace\)::)+", "", name)
    name = re.sub(r"\(\w+\)(-?\d+)", r"\1", name)  # (int)4 is 4
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:at]
            break
    return re.sub(r"^void ", "", name)


# --- tables ----------------------------------------------------------------------------------------------------------


def cell(value: object) -> str:
    """A figure for people: None is a dash, large integers have separators, fractions three digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell(value).replace("|", "\\|") for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# --- commands --------------------------------------------------------------------------------------------------------


def run_command(app: typer.Typer, name: str, mistake: type[Exception], arguments: list[str] | None) -> int:
    """Runs a command line (of the process, or these arguments); returns the exit code. What a user can mend (`mistake`,
    a file, wrong usage) is one line and 2."""
    try:
        return app(args=arguments, prog_name=name, standalone_mode=False) or 0
    except (mistake, OSError) as error:
        message = str(error)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        message = usage()
    typer.echo(f"{name}: {message}", err=True)
    return 2
