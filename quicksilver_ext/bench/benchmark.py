"""Speed beside other systems, in one run, with the answers checked.

A shared machine's speed drifts, so systems take turns (A B C, A B C, ...), ratios are taken within a round, and between
two systems the memory's read ceiling is probed: a system's share of the ceiling is of the probes beside it. Before
anything is timed, systems that should agree are held against each other: a fast wrong answer is an error.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import mmap
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..architectures.loading import load_model
from ..config import QuickSilverConfig
from ..model import QuickSilverForCausalLM, choose_precision
from ..weights.checkpoint import resolve
from ..weights.model import PRECISIONS
from .shapes import SHAPES, Shape, write_shape
from .systems import (
    LLAMA_FTYPES,
    LLAMA_KINDS,
    PACKED,
    LlamaCpp,
    Ours,
    System,
    Transformers,
    WrongAnswer,
    as_precision,
    llama_file,
    load_transformers,
    silence_llama_cpp,
)

# Packages that each other system needs, and how to get them.
SYSTEMS = {
    "llama.cpp": ("llama_cpp", "pip install llama-cpp-python (it builds llama.cpp for this machine)"),
    "transformers": ("transformers", "pip install transformers"),
}
PROBE_BYTES = 256 << 20
MAX_DENSE_PARAMETERS = 3e9  # above, fp32 and bf16 weights side by side take more than 18 GB

# Largest difference of the last token's logits from another system's, over their spread. Both quantize, and a prompt of
# random tokens is hard on that: against fp32 our INT8 is off by 0.07 on the demo model, and on random weights by 0.04
# (GPT-2) and 0.07 (Llama) at 32 layers. INT4 products in INT8's place give 0.2 to 0.4, a wrong layer or position 1.
LOGIT_BOUND = 0.15
CHECK_PROMPT = 32


@dataclass(frozen=True)
class Options:
    """What to measure; `check` says what of it makes no sense. ``shape`` goes before ``model``; ``layers`` cuts it."""

    model: str = "demo"
    shape: str | Shape | None = None
    layers: int | None = None
    precisions: Sequence[str] = ("int8", "int4")
    requantize: bool = False
    config: QuickSilverConfig | None = None
    against: Sequence[str] = ()
    prompt: int = 128
    new: int = 96
    batches: Sequence[int] = (1,)
    rounds: int = 5
    folder: str | None = None
    seed: int = 0

    def check(self) -> None:
        """ValueError naming the argument; ImportError where a package is missing."""
        for name in ("prompt", "new", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.precisions:
            raise ValueError(f"precision must name at least one of {', '.join(PRECISIONS)}")
        for precision in self.precisions:
            choose_precision(precision, QuickSilverConfig())
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batch must list numbers of at least 1; got {list(self.batches)}")
        for name in self.against:
            if name not in SYSTEMS:
                raise ValueError(f"against must list {' or '.join(SYSTEMS)}; got {name!r}")
            module, mend = SYSTEMS[name]
            if find_spec(module) is None:
                raise ImportError(f"{name} isn't installed; run: {mend}")
        if isinstance(self.shape, str) and self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {self.shape!r}")
        shape = self.resolved_shape()
        if shape is None and self.layers is not None:
            raise ValueError("layers cuts a shape; give shape too")
        if shape is not None:
            full = SHAPES[self.shape].layers if isinstance(self.shape, str) else shape.layers
            if self.layers is not None and not 1 <= self.layers <= full:
                raise ValueError(f"layers must be 1 to {full} for {shape.name}; got {self.layers}")
            self.check_context(shape.context)
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ValueError(f"folder {self.folder!r} is no folder; make it first")

    def check_context(self, context: int) -> None:
        if self.prompt + self.new >= context:
            raise ValueError(
                f"prompt and new need {self.prompt + self.new + 1} positions and the model has {context}; lower one"
            )

    def resolved_shape(self) -> Shape | None:
        shape = SHAPES[self.shape] if isinstance(self.shape, str) else self.shape
        return shape if shape is None or self.layers is None else dataclasses.replace(shape, layers=self.layers)


def our_systems(options: Options, path: Path, prompts: Tensor) -> list[Ours]:
    """All precisions, then the config, each at every batch size. Packed precisions share their planes."""
    wanted = [(precision, precision, QuickSilverConfig()) for precision in options.precisions]
    if options.config is not None:
        precision = choose_precision(None, options.config)
        wanted.append((f"{precision} with config", precision, options.config))
    packed = [precision for _, precision, _ in wanted if precision in PACKED]
    stored = "int4" if set(packed) == {"int4"} else "int8"
    # Random weights gain nothing from being fitted, and a large model would take a while.
    fitted = options.shape is None
    shared = load_model(path, stored, requantize=options.requantize, statistics=fitted) if packed else None
    systems = []
    for name, precision, config in wanted:
        if precision not in PACKED:
            model = load_model(path, precision)
        else:
            assert shared is not None
            model = shared if precision == stored else as_precision(shared, precision)
        options.check_context(model.spec.max_positions)
        lm = QuickSilverForCausalLM(model, config, path)
        for batch in options.batches:
            label = name if batch == 1 else f"{name}, batch {batch}"
            systems.append(Ours(label, lm, batch, prompts[:batch] % model.spec.vocab_size, options.new))
    return systems


# --- answers ---------------------------------------------------------------------------------------------------------


def compare(name: str, got: Tensor, reference: str, want: Tensor, bound: float) -> float:
    """The difference of two systems' logits [V] over the spread of ``want``, which must stay within ``bound``.

    WrongAnswer where it doesn't, or where the likeliest token is another one by more than such a difference explains.
    """
    if got.shape != want.shape or not bool(got.isfinite().all() and want.isfinite().all()):
        raise WrongAnswer(f"{name} and {reference}: logits of shapes {list(got.shape)} and {list(want.shape)} or NaN")
    got, want = got.double() - got.double().mean(), want.double() - want.double().mean()
    error = float((got - want).norm() / want.norm())
    if not error <= bound:
        raise WrongAnswer(f"{name}: logits are {error:.3f} of their spread away from {reference}'s, at most {bound}")
    ours, theirs = int(got.argmax()), int(want.argmax())
    noise = float((got - want).square().mean().sqrt())
    # Two tokens may change places where both their logits' errors together outweigh the gap: 4 standard deviations.
    if ours != theirs and float(want[theirs] - want[ours]) > 4 * 2**0.5 * noise:
        raise WrongAnswer(f"{name}: the likeliest token is {ours}, {reference}'s is {theirs}")
    return error


def check_answers(ours: Sequence[Ours], others: Sequence[System], ids: Tensor) -> dict[str, float]:
    """Differences of our INT8 logits from those systems' that are as exact. WrongAnswer where one is too large."""
    errors = {}
    exact = next((system for system in ours if system.name == "int8"), None)
    for other in others:
        logits = other.logits(ids)
        if not bool(logits.isfinite().all()):
            raise WrongAnswer(f"{other.name}: logits aren't finite")
        if exact is not None and other.name in ("llama.cpp Q8_0", "transformers fp32"):
            errors[other.name] = compare("int8", exact.logits(ids), other.name, logits, LOGIT_BOUND)
    return errors


# --- timing ----------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """A system's rounds: tokens per second, the read ceiling beside each and, where known, the share of decoding that
    went by outside of kernels and attention's reading as a share of the ceiling."""

    system: System
    prefill: list[float] = dataclasses.field(default_factory=list)
    decode: list[float] = dataclasses.field(default_factory=list)
    host: list[float] = dataclasses.field(default_factory=list)
    attention: list[float] = dataclasses.field(default_factory=list)
    ceiling: list[float] = dataclasses.field(default_factory=list)


def interleave(
    systems: Sequence[System],
    prompts: Tensor,
    new: int,
    rounds: int,
    probe: Callable[[], float],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measured]:
    """Times every system once a round, in turn, after a round that warms up; ``probe`` gives bytes per second."""
    measured = [Measured(system) for system in systems]
    for number in range(rounds + 1):
        before = probe()
        for entry in measured:
            system = entry.system
            mine = prompts[: system.batch]
            timing = system.run(mine, new)
            after = probe()
            if number:
                entry.prefill.append(mine.numel() / timing.prefill_seconds)
                entry.decode.append(new * system.batch / timing.decode_seconds)
                ceiling = statistics.median((before, after))
                entry.ceiling.append(ceiling)
                entry.host += [] if timing.host_share is None else [timing.host_share]
                entry.attention += [] if timing.attention_rate is None else [timing.attention_rate / ceiling]
            before = after
        progress(number, rounds)
    return measured


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _ratios(mine: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Within a round each."""
    return _spread([a / b for a, b in zip(mine, other, strict=True)])


def rows(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One JSON object per system. Ratios, over every other system, are medians of ratios within a round."""
    out = []
    for entry in measured:
        size = entry.system.bytes_per_token
        fractions = [size * rate / ceiling for rate, ceiling in zip(entry.decode, entry.ceiling, strict=True)]
        others = [other for other in measured if other is not entry]
        out.append(
            {
                "system": entry.system.name,
                "batch": entry.system.batch,
                "prefill_tokens_per_s": statistics.median(entry.prefill),
                "decode_tokens_per_s": statistics.median(entry.decode),
                "bytes_per_token": size,
                "read_ceiling_GBps": statistics.median(entry.ceiling) / 1e9,
                "fraction_of_ceiling": statistics.median(fractions),
                "attention_fraction_of_ceiling": statistics.median(entry.attention) if entry.attention else None,
                "host_share": statistics.median(entry.host) if entry.host else None,
                "prefill_spread": _spread(entry.prefill),
                "decode_spread": _spread(entry.decode),
                "fraction_spread": _spread(fractions),
                "decode_over": {other.system.name: _ratios(entry.decode, other.decode) for other in others},
                "prefill_over": {other.system.name: _ratios(entry.prefill, other.prefill) for other in others},
            }
        )
    return out


class Probe:
    """The read ceiling of memory that no cache holds, in bytes per second."""

    def __init__(self, size: int = PROBE_BYTES) -> None:
        # Private, since the kernel gives no huge pages to anonymous memory that could be shared.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._block = torch.frombuffer(memory, dtype=torch.uint8).fill_(0x35)  # untouched, all of it were one page

    def __call__(self) -> float:
        """The best of three passes: the first one finds the threads asleep."""
        return max(_C.read_ceiling(self._block.data_ptr(), len(self._block)) for _ in range(3))


# --- the whole -------------------------------------------------------------------------------------------------------


def bench(options: Options, progress: Callable[[str], None] = lambda message: None) -> dict[str, Any]:
    """Measures what ``options`` say, with PyTorch's current number of threads; the result is JSON values.

    ValueError or ImportError for options that make no sense, before anything is loaded; WrongAnswer where a system's
    answer is wrong.
    """
    options.check()
    shape, threads, notes = options.resolved_shape(), torch.get_num_threads(), list[str]()
    with _folder(options.folder) as folder:
        if shape is not None:
            progress(f"making {shape.name} with random weights")
            path = write_shape(shape, folder, extra_bytes=_quantized_bytes(options, shape))
        else:
            path = resolve(options.model)
        if "llama.cpp" in options.against and path.suffix != ".gguf":
            raise ValueError(
                f"llama.cpp reads .gguf files, and {options.model} is none; leave llama.cpp out of against"
            )
        draw = torch.Generator("cpu").manual_seed(options.seed)
        size = (max(options.batches), options.prompt)
        prompts = torch.randint(0, 2**31, size, generator=draw, dtype=torch.int64, device="cpu")
        progress(f"loading {path.name}")
        ours = our_systems(options, path, prompts)
        vocab = ours[0].lm.model.spec.vocab_size
        prompts %= vocab
        for system in ours:
            progress(f"checking {system.name}")
            system.check(prompts[: system.batch, :CHECK_PROMPT])
            system.count_bytes()
        peak = _peak_bytes()
        others = list(_others(options, path, shape, folder, threads, notes, progress))
        errors = check_answers(ours, others, prompts[0, :CHECK_PROMPT])
        probe = Probe()
        measured = interleave(
            [*ours, *others],
            prompts,
            options.new,
            options.rounds,
            probe,
            lambda done, total: progress(f"round {done} of {total}" if done else "warmed up"),
        )
    ceilings = [ceiling for entry in measured for ceiling in entry.ceiling]
    return {
        "model": options.model if shape is None else f"{shape.name}, {shape.layers} layers, random weights",
        "rows": rows(measured),
        "prompt": options.prompt,
        "new": options.new,
        "rounds": options.rounds,
        "threads": threads,
        "isa": _C.isa(),
        "cpu": cpu_name(),
        "read_ceiling_GBps": statistics.median(ceilings) / 1e9,
        "int8_ceiling_GMACps": _C.int8_ceiling() / 1e9,
        "peak_memory_GB": peak / 1e9,
        "logit_errors": errors,
        "logit_error_bound": LOGIT_BOUND,
        "versions": _versions(options.against),
        "notes": notes,
        "date": datetime.date.today().isoformat(),
    }


def _quantized_bytes(options: Options, shape: Shape) -> int:
    """A generous size of the Q4_0 file that llama.cpp is given."""
    return int(0.7 * shape.parameters) if "llama.cpp" in options.against else 0


@contextmanager
def _folder(kept: str | None) -> Iterator[Path]:
    if kept is not None:
        yield Path(kept)
        return
    with tempfile.TemporaryDirectory(prefix="quicksilver-bench-") as name:
        yield Path(name)


def _others(
    options: Options,
    path: Path,
    shape: Shape | None,
    folder: Path,
    threads: int,
    notes: list[str],
    progress: Callable[[str], None],
) -> Iterator[System]:
    if "llama.cpp" in options.against:
        silence_llama_cpp()
        # Of a large model, one kind too many drives the others out of the memory.
        for kind in {LLAMA_KINDS[each]: 0 for each in options.precisions if each in LLAMA_KINDS} or LLAMA_FTYPES:
            progress(f"loading llama.cpp {kind}")
            file = llama_file(path, kind, folder, threads)
            yield LlamaCpp(f"llama.cpp {kind}", file, threads, options.prompt, options.new)
    if "transformers" in options.against:
        if shape is not None and shape.parameters > MAX_DENSE_PARAMETERS:
            size = 4 * shape.parameters / 1e9
            notes.append(f"transformers left out: {shape.name} takes {size:.0f} GB in fp32")
            return
        progress("loading transformers")
        model = load_transformers(path)
        yield Transformers("transformers fp32", model, options.prompt, options.new)
        half = copy.deepcopy(model).to(torch.bfloat16)
        yield Transformers("transformers bf16", half, options.prompt, options.new)


def _peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _versions(against: Sequence[str]) -> dict[str, str]:
    packages = {"torch": "torch", "transformers": "transformers", "llama.cpp": "llama-cpp-python"}
    from .. import __version__

    found = {"quicksilver": __version__, "python": platform.python_version()}
    return found | {name: version(packages[name]) for name in ("torch", *against)}
