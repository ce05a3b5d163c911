"""What can be known about the CUDA kernels without a GPU, in three parts.

kernels   compiles csrc/cuda/*.cu for every architecture: registers, spills, shared memory, the occupancy that they
          allow, counts of the instructions that matter in the machine code, and issue slots of the loops that multiply
emulated  runs the stages in the emulator (quicksilver_profile --backend emulated): sectors per request, bank
          conflicts, active lanes, bytes moved over the least possible
roofline  Llama-2-7B's stages: bytes and operations by formula, and the time that they'd take at peak rates

Example:
    python tools/cuda_report.py > report.md
    python tools/cuda_report.py --part kernels --arch 80 --check     # exit 1 where tools/cuda_budgets.toml is broken
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import cuda_roofline
import typer
from cuda_table import ARCHITECTURES, KIB, WARP, demangle, markdown, occupancy, run_command, short_name

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = Path(__file__).with_name("cuda_budgets.toml")
PARTS = ("kernels", "emulated", "roofline")
TOOLKIT = Path("/usr/local/cuda/bin")
COMPILER_PACKAGES = "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime"


class ReportError(Exception):
    """What a user can mend, in one line."""


# --- the toolkit -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    nvdisasm: Path | None


def _package_folders(path: Iterable[str]) -> list[Path]:
    """bin folders of NVIDIA's wheels: nvidia/cu13/bin, before CUDA 13 nvidia/cuda_nvcc/bin."""
    folders: list[Path] = []
    for entry in path:
        base = Path(entry) / "nvidia"
        if base.is_dir():
            folders += sorted(base.glob("cu[0-9]*/bin"), reverse=True) + sorted(base.glob("cuda_*/bin"))
    return folders


def find_toolkit(path: Iterable[str] | None = None) -> Toolkit:
    """nvcc: $CUDACXX, the PATH, /usr/local/cuda, or the wheels in site-packages. nvdisasm: beside it, or likewise."""
    packages = _package_folders(sys.path if path is None else path)
    named = os.environ.get("CUDACXX")
    if named and shutil.which(named) is None:
        raise ReportError(f"CUDACXX={named}: there is no such program")
    places = [TOOLKIT, *packages]

    def find(name: str, first: str | Path | None) -> Path | None:
        candidates = [first, shutil.which(name), *(place / name for place in places)]
        return next((Path(found) for one in candidates if one and (found := shutil.which(one))), None)

    nvcc = find("nvcc", named)
    if nvcc is None:
        raise ReportError(
            "no CUDA compiler: put nvcc on the PATH, set CUDACXX to it, or run 'pip install " + COMPILER_PACKAGES + "'"
        )
    return Toolkit(nvcc, find("nvdisasm", nvcc.resolve().parent / "nvdisasm"))


# --- compiling and reading -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel."""

    registers: int
    stack: int
    spill: int  # bytes, stores and loads
    static_shared: int


@dataclass(frozen=True)
class Loop:
    """An innermost loop that multiplies on tensor cores. All of its instructions count, also those that a branch skips
    in most rounds, so its slots are an upper bound."""

    instructions: int
    mmas: int
    integer: bool  # are the MMAs
    kib: float  # that a warp reads through the read-only path, as products do weights and their scales

    @property
    def slots_per_mma(self) -> float:
        return self.instructions / self.mmas

    @property
    def slots_per_kib(self) -> float | None:
        return self.instructions / self.kib if self.kib else None


@dataclass(frozen=True)
class Code:
    """What a kernel's machine code says."""

    threads: int | None  # of a block, by __launch_bounds__
    instructions: dict[str, int]
    loops: tuple[Loop, ...] = ()


@dataclass
class Kernel:
    """A kernel instantiation on an architecture. None: not known."""

    file: str
    name: str
    arch: int
    registers: int
    stack: int
    spill: int
    static_shared: int
    dynamic_shared: int | None = None
    threads: int | None = None
    blocks_per_sm: int | None = None
    warps_per_sm: int | None = None
    limited_by: str | None = None
    instructions: dict[str, int] | None = None
    loops: tuple[Loop, ...] = ()


def parse_ptxas(text: str) -> dict[str, Resources]:
    """Of every entry function in the output of ``ptxas -v``, by mangled name."""
    found: dict[str, Resources] = {}
    name, stack, spill = None, 0, 0
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)'", line):
            name, stack, spill = match[1], 0, 0
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spill = int(match[1]), int(match[2]) + int(match[3])
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] = Resources(int(match[1]), stack, spill, int(shared[1]) if shared else 0)
            name = None
    return found


# Column and what an opcode must look like. A warp reduction (REDUX) is no atomic.
INSTRUCTIONS = {
    "IMMA": r"IMMA\b",
    "HMMA": r"HMMA\b",
    "LDGSTS": r"LDGSTS\b",
    "LDSM": r"LDSM\b",
    "LDG.128": r"LDG\.\S*128\b",
    "STG.128": r"STG\.\S*128\b",
    "LDS.128": r"LDS\.\S*128\b",
    "BAR": r"BAR\b",
    "atomics": r"(?:ATOM|ATOMG|ATOMS|RED|REDG)\b",
    "local": r"(?:LDL|STL)\b",
}
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes of a lane; 4 where an opcode says nothing


def _loop(opcodes: list[str]) -> Loop:
    mmas = [opcode for opcode in opcodes if re.match(r"[IH]MMA\b", opcode)]
    constant = [opcode.split(".") for opcode in opcodes if re.match(r"LDG\b.*\bCONSTANT\b", opcode)]
    read = sum(next((_WIDTHS[word] for word in words if word in _WIDTHS), 4) for words in constant)
    return Loop(len(opcodes), len(mmas), any(opcode[0] == "I" for opcode in mmas), WARP * read / KIB)


def find_loops(opcodes: list[str], back: dict[int, int]) -> tuple[Loop, ...]:
    """back: the last branch back to each instruction, by the instruction's number, as the number after the branch."""
    found = [(begin, end) for begin, end in back.items() if _loop(opcodes[begin:end]).mmas]
    inner = [
        (begin, end)
        for begin, end in found
        if not any((begin, end) != other and begin <= other[0] and other[1] <= end for other in found)
    ]
    return tuple(_loop(opcodes[begin:end]) for begin, end in sorted(inner))


def parse_disassembly(text: str) -> dict[str, Code]:
    """Of every kernel in nvdisasm's output, by mangled name."""
    threads: dict[str, int] = {}
    opcodes: dict[str, list[str]] = {}
    labels: dict[str, dict[str, int]] = {}
    back: dict[str, dict[int, int]] = {}
    info = text_of = None
    words: list[int] | None = None  # of the attribute being read
    for line in text.splitlines():
        if match := re.match(r"//-+ \.(\S+)", line):
            section = match[1]
            info = section.removeprefix("nv.info.") if section.startswith("nv.info.") else None
            text_of = section.removeprefix("text.") if section.startswith("text.") else None
            if text_of:
                opcodes[text_of], labels[text_of], back[text_of] = [], {}, {}
        elif info and "nvinfo :" in line:
            words = [] if re.search(r"EIATTR_(MAX_THREADS|REQNTID)\b", line) else None
        elif info and words is not None and (match := re.search(r"\.word\s+(0x[0-9a-f]+)", line)):
            words.append(int(match[1], 16))
            if len(words) == 3:
                threads[info] = words[0] * words[1] * words[2]
        elif text_of and (match := re.match(r"\.(L_\w+):", line)):
            labels[text_of][match[1]] = len(opcodes[text_of])
        elif text_of and (match := _OPCODE.match(line)):
            opcodes[text_of].append(match[1])
            target = re.search(r"\(\.(L_\w+)\)", match[2]) if match[1].startswith("BRA") else None
            if target and target[1] in labels[text_of]:
                back[text_of][labels[text_of][target[1]]] = len(opcodes[text_of])
    return {
        name: Code(threads.get(name), count_instructions(ones), find_loops(ones, back[name]))
        for name, ones in opcodes.items()
    }


def count_instructions(opcodes: list[str]) -> dict[str, int]:
    counts = {
        column: sum(re.match(pattern, one) is not None for one in opcodes) for column, pattern in INSTRUCTIONS.items()
    }
    return {"all": len(opcodes), **counts}


def compile_file(toolkit: Toolkit, source: Path, arch: int, folder: Path) -> list[Kernel]:
    """Compiles one file for one architecture: with the flags of the build, to machine code alone."""
    cubin = folder / f"{source.stem}.{arch}.cubin"
    command = [str(toolkit.nvcc), "-std=c++20", "-O3", f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc/cuda'}"]
    command += ["-Wno-deprecated-gpu-targets", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v"]
    done = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0:
        raise ReportError(f"{source.name} doesn't compile for sm_{arch}:\n{done.stdout}{done.stderr}")
    resources = parse_ptxas(done.stdout + done.stderr)
    codes: dict[str, Code] = {}
    if toolkit.nvdisasm is not None and resources:
        shown = subprocess.run([str(toolkit.nvdisasm), str(cubin)], capture_output=True, text=True)
        if shown.returncode != 0:
            raise ReportError(f"{toolkit.nvdisasm} can't read {cubin.name}: {shown.stderr.strip()}")
        codes = parse_disassembly(shown.stdout)
    cubin.unlink()
    kernels = []
    for (mangled, found), name in zip(resources.items(), demangle(list(resources))):
        kernel = Kernel(source.name, short_name(name), arch, **asdict(found))
        if code := codes.get(mangled):
            kernel.threads, kernel.instructions, kernel.loops = code.threads, code.instructions, code.loops
        kernels.append(kernel)
    return kernels


def compile_all(toolkit: Toolkit, sources: list[Path], arches: list[int], jobs: int) -> list[Kernel]:
    """All files for all architectures, `jobs` compilers at a time, sorted."""
    work = [(source, arch) for source in sources for arch in arches]
    done = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:

        def one(item: tuple[Path, int]) -> list[Kernel]:
            nonlocal done
            kernels = compile_file(toolkit, *item, Path(folder))
            done += 1
            if sys.stderr.isatty():
                print(f"\rcompiled {done} of {len(work)}", end="" if done < len(work) else "\n", file=sys.stderr)
            return kernels

        futures = [pool.submit(one, item) for item in work]
        try:
            found = [kernel for future in futures for kernel in future.result()]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sorted(found, key=lambda kernel: (kernel.file, kernel.name, kernel.arch))


# --- budgets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What the kernels that match may use. dynamic_shared is also what occupancy is computed with: the launch gives
    it, so the compiler doesn't know it."""

    name: str  # a pattern; the first budget that matches counts
    registers: int
    dynamic_shared: int
    blocks_per_sm: dict[str, int]  # at least, by architecture, or "other"
    launch: str = ""  # the launches' name in the emulator's counts, a pattern
    spill: int = 0
    stack: int = 0
    # Issue slots in any loop that multiplies, at most, by architecture, or "other"; nothing where nothing is said.
    slots_per_mma: dict[str, float] = field(default_factory=dict)
    slots_per_kib: dict[str, float] = field(default_factory=dict)


def read_budgets(path: Path) -> list[Budget]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return [Budget(**entry) for entry in tomllib.loads(path.read_text())["kernel"]]


def apply_budgets(kernels: list[Kernel], budgets: list[Budget]) -> list[str]:
    """Fills in dynamic shared memory and occupancy; returns what is broken."""
    broken = []
    for kernel in kernels:
        where = f"{kernel.name} on sm_{kernel.arch}"
        if kernel.static_shared:
            broken.append(f"{where}: {kernel.static_shared} bytes of static shared memory, wanted none")
        budget = next((one for one in budgets if fnmatchcase(kernel.name, one.name)), None)
        if budget is None:
            broken.append(f"{where}: no budget in {BUDGETS.name}")
            continue
        if kernel.spill > budget.spill or kernel.stack > budget.stack:
            broken.append(
                f"{where}: {kernel.spill} bytes of spills and {kernel.stack} of stack, budget {budget.spill} and "
                f"{budget.stack}"
            )
        kernel.dynamic_shared = budget.dynamic_shared
        if kernel.registers > budget.registers:
            broken.append(f"{where}: {kernel.registers} registers, budget {budget.registers}")
        for what, allowed, slots in (
            ("MMA", budget.slots_per_mma, [loop.slots_per_mma for loop in kernel.loops]),
            ("KiB", budget.slots_per_kib, [loop.slots_per_kib or 0 for loop in kernel.loops]),
        ):
            most, worst = allowed.get(str(kernel.arch), allowed.get("other")), max(slots, default=0)
            if most is not None and worst > most:
                broken.append(f"{where}: {worst:.1f} issue slots per {what} in a loop, budget {most:g}")
        if kernel.threads is None:
            continue
        bound = occupancy(kernel.arch, kernel.threads, kernel.registers, kernel.static_shared + budget.dynamic_shared)
        kernel.blocks_per_sm, kernel.warps_per_sm, kernel.limited_by = bound.blocks, bound.warps, bound.limit
        wanted = budget.blocks_per_sm.get(str(kernel.arch), budget.blocks_per_sm["other"])
        if bound.blocks < wanted:
            broken.append(f"{where}: {bound.blocks} blocks per SM (limited by {bound.limit}), wanted {wanted}")
    return broken


def check_launches(launches: list[dict[str, Any]], budgets: list[Budget]) -> list[str]:
    """Launches in the emulator that ask for more shared memory than the budget of their kernel says."""
    broken = []
    for launch in launches:
        allowed = [one.dynamic_shared for one in budgets if one.launch and fnmatchcase(launch["name"], one.launch)]
        asked = launch.get("shared_bytes")
        if asked is not None and allowed and asked > max(allowed):
            broken.append(f"{launch['name']}: launched with {asked} bytes of shared memory, budget {max(allowed)}")
    return sorted(set(broken))


# --- the emulator ----------------------------------------------------------------------------------------------------

STAGES = ("attention_input", "attention", "attention_output", "mlp_input", "mlp_output", "lm_head")
MECHANISMS = ("quantize_rows", "kv_scatter", "halting_update")
SMALL_MODEL = "--d 512 --heads 4 --kv-heads 2 --head-size 128 --ffn 1024 --vocab 1024 --kv-type f16 --context 200"
# 16 sequences that decode a token each, and a prompt
CASES = {"decode, 16 rows": "--rows 16", "prefill, 64 rows": "--rows 64 --sequences 1"}
HALTING_RATIOS = (0.0, 0.5, 0.9)


def find_profiler() -> Path | None:
    """quicksilver_profile: the newest in build/, or on the PATH."""
    built = [path for path in (ROOT / "build").rglob("quicksilver_profile") if os.access(path, os.X_OK)]
    if built:
        return max(built, key=lambda path: path.stat().st_mtime)
    found = shutil.which("quicksilver_profile")
    return Path(found) if found else None


def emulate(profiler: Path) -> list[dict[str, Any]]:
    """Runs stages and mechanisms in the emulator; one entry for each run."""
    runs = []
    for case, rows in CASES.items():
        for kernel in STAGES + MECHANISMS:
            for ratio in HALTING_RATIOS:
                command = f"{kernel} --backend emulated {SMALL_MODEL} {rows} --halting-ratio {ratio}"
                words = [str(profiler), *command.split(), "--warmup", "0", "--repeat", "1", "--json", "-"]
                done = subprocess.run(words, capture_output=True, text=True)
                if done.returncode != 0:
                    raise ReportError(f"quicksilver_profile {command}: {done.stderr.strip()}")
                runs.append({"case": case, **json.loads(done.stdout)})
    return runs


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def figures(run: dict[str, Any]) -> dict[str, float | None]:
    """The emulator's counts of a run, over all its launches, as ratios."""
    total: Counter[str] = Counter()
    for launch in run["counts"]:
        total.update({name: value for name, value in launch.items() if name != "name"})
    sectors = total["global_load_sectors"] + total["global_store_sectors"] + total["cp_async_sectors"]
    return {
        "launches": total["launches"],
        "blocks": total["blocks"],
        "sectors per load": _ratio(total["global_load_sectors"], total["global_load_requests"]),
        "sectors per store": _ratio(total["global_store_sectors"], total["global_store_requests"]),
        "conflicts per shared access": _ratio(total["shared_conflicts"], total["shared_requests"]),
        "active lanes": _ratio(total["active_lanes"], total["instructions"]),
        "MMAs": sum(number for name, number in total.items() if name.startswith("mma_")),
        "moved over least": _ratio(32 * sectors, run["bytes"]),
    }


# --- the report ------------------------------------------------------------------------------------------------------


def kernel_table(kernels: list[Kernel]) -> str:
    header = ["kernel", "sm", "registers", "spill", "stack", "static shared", "dynamic shared", "threads"]
    header += ["blocks/SM", "warps/SM", "limited by", *INSTRUCTIONS, "instructions"]
    rows = []
    for k in kernels:
        row: list[object] = [k.name, k.arch, k.registers, k.spill, k.stack, k.static_shared, k.dynamic_shared]
        row += [k.threads, k.blocks_per_sm, k.warps_per_sm, k.limited_by]
        for column in (*INSTRUCTIONS, "all"):
            row.append("not counted" if k.instructions is None else k.instructions.get(column, 0))
        rows.append(row)
    return markdown(header, rows)


def slots_table(kernels: list[Kernel]) -> str:
    header = ["kernel", "GPU", "loop", "MMAs", "KiB", "slots/MMA", "slots/KiB", "at most", "of"]
    rows = []
    for kernel, gpu in ((k, gpu) for k in kernels for gpu in cuda_roofline.GPUS if gpu.arch == k.arch):
        for loop in kernel.loops:
            share, of = cuda_roofline.issue_bound(gpu, loop.slots_per_mma, loop.integer, loop.slots_per_kib)
            row: list[object] = [kernel.name, gpu.name, loop.instructions, loop.mmas, loop.kib]
            rows.append([*row, loop.slots_per_mma, loop.slots_per_kib, f"{100 * share:.0f}%", of])
    return markdown(header, rows)


def emulated_table(runs: list[dict[str, Any]]) -> str:
    rows = [[run["case"], run["kernel"], run["halting_ratio"], *figures(run).values()] for run in runs]
    return markdown(["case", "kernel", "halting ratio", *figures(runs[0])], rows)


def text_report(report: dict[str, Any], kernels: list[Kernel]) -> str:
    parts = ["# CUDA kernels, without a GPU\n"]
    if "kernels" in report:
        parts.append("## Compiled\n\n" + report["compiler"] + "\n\n" + kernel_table(kernels))
        parts.append("## Issue slots\n\n" + cuda_roofline.ISSUE_NOTE + "\n\n" + slots_table(kernels))
    if "emulated" in report:
        parts.append(f"## In the emulator\n\n`quicksilver_profile KERNEL --backend emulated {SMALL_MODEL} ...`\n")
        parts.append(emulated_table(report["emulated"]))
    if "roofline" in report:
        parts.append("## Roofline, Llama-2-7B\n\n" + cuda_roofline.NOTE + "\n")
        parts.append(cuda_roofline.table(report["roofline"]))
    parts += [f"Note: {note}\n" for note in report["notes"]]
    return "\n".join(parts)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main_command(
    part: Annotated[
        list[str] | None, typer.Option("--part", help="kernels, emulated or roofline. (default: all)")
    ] = None,
    arch: Annotated[
        list[int] | None, typer.Option("--arch", help="80 and so on. (default: all that we build for)")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option("--source", help="Files of csrc/cuda, patterns. (default: *.cu)")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Compilers at a time.")] = len(os.sched_getaffinity(0)),
    profiler: Annotated[
        Path | None, typer.Option("--profiler", help="quicksilver_profile. (default: build/, PATH)")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 where a budget is broken.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of Markdown.")] = False,
) -> int:
    """Registers, occupancy, instructions, memory accesses and roofline of the CUDA kernels."""
    parts = part or list(PARTS)
    for name in parts:
        if name not in PARTS:
            raise ReportError(f"--part: got {name!r}, wanted one of {', '.join(PARTS)}")
    arches = arch or list(ARCHITECTURES)
    for number in arches:
        if number not in ARCHITECTURES:
            raise ReportError(f"--arch: got {number}, wanted one of {', '.join(map(str, ARCHITECTURES))}")
    budgets = read_budgets(BUDGETS)
    report: dict[str, Any] = {"notes": []}
    kernels: list[Kernel] = []
    broken: list[str] = []
    if "kernels" in parts:
        toolkit = find_toolkit()
        sources = sorted({path for name in source or ["*.cu"] for path in (ROOT / "csrc/cuda").glob(name)})
        if not sources:
            raise ReportError(f"--source: no file of csrc/cuda matches {' '.join(source or [])}")
        kernels = compile_all(toolkit, sources, arches, jobs)
        broken += apply_budgets(kernels, budgets)
        version = subprocess.run([str(toolkit.nvcc), "--version"], capture_output=True, text=True).stdout
        report["compiler"] = "nvcc " + (re.search(r"V([\d.]+)", version) or ["", "of unknown version"])[1]
        report["kernels"] = [asdict(kernel) for kernel in kernels]
        if toolkit.nvdisasm is None:
            report["notes"].append(
                "instructions, block sizes and occupancy weren't counted, since there is no nvdisasm: "
                "pip install nvidia-cuda-nvdisasm"
            )
    if "emulated" in parts:
        found = profiler or find_profiler()
        if found is None:
            report["notes"].append(
                "nothing was emulated, since there is no quicksilver_profile: build it, or --profiler"
            )
        else:
            report["emulated"] = emulate(found)
            broken += check_launches([one for run in report["emulated"] for one in run["counts"]], budgets)
    if "roofline" in parts:
        report["roofline"] = cuda_roofline.roofline()
    report["broken"] = broken
    typer.echo(json.dumps(report) if as_json else text_report(report, kernels))
    if not check:
        return 0
    for line in broken:
        typer.echo(f"cuda_report: {line}", err=True)
    return 1 if broken else 0


def main(arguments: list[str] | None = None) -> int:
    return run_command(app, "cuda_report", ReportError, arguments)


if __name__ == "__main__":
    sys.exit(main())
