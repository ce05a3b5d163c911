"""Speed beside other systems, in one run, with the answers checked.

A shared machine's speed drifts, so systems take turns (A B C, A B C, ...), ratios are taken within a round, and between
two systems the memory's read ceiling is probed: a system's share of the ceiling is of the probes beside it. Before
anything is timed, systems that should agree are held against each other: a fast wrong answer is an error.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import datetime
import math
import mmap
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import _C
from .architectures import PRECISIONS, Layer, Linear, Model, load_model
from .causal_lm import QuickSilverForCausalLM, choose_precision
from .checkpoint import open_checkpoint, resolve
from .config import QuickSilverConfig
from .quantize import MatryoshkaWeight
from .shapes import SHAPES, Shape, write_shape

# Packages that each other system needs, and how to get them.
SYSTEMS = {
    "llama.cpp": ("llama_cpp", "pip install llama-cpp-python (it builds llama.cpp for this machine)"),
    "transformers": ("transformers", "pip install transformers"),
}
LLAMA_FTYPES = {"Q8_0": 7, "Q4_0": 2}
PACKED = ("int8", "int4", "adaptive")
PROBE_BYTES = 256 << 20
MAX_DENSE_PARAMETERS = 3e9  # above, fp32 and bf16 weights side by side take more than 18 GB

# Largest difference of the last token's logits from another system's, over their spread. Both quantize, and a prompt of
# random tokens is hard on that: against fp32 our INT8 is off by 0.07 on the demo model, and on random weights by 0.04
# (GPT-2) and 0.07 (Llama) at 32 layers. INT4 products in INT8's place give 0.2 to 0.4, a wrong layer or position 1.
LOGIT_BOUND = 0.15
CHECK_PROMPT, CHECK_NEW = 32, 8


_KEPT: list[Any] = []  # what C code calls back


class WrongAnswer(RuntimeError):
    """A system's answer that differs from what it has to be."""


@dataclass(frozen=True)
class Options:
    """What to measure; `check` says what of it makes no sense. ``shape`` goes before ``model``; ``layers`` cuts it."""

    model: str = "demo"
    shape: str | Shape | None = None
    layers: int | None = None
    precisions: Sequence[str] = ("int8", "int4")
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


# --- systems ---------------------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """Seconds of the prompts' pass and of the decode steps after it."""

    prefill_seconds: float
    decode_seconds: float


class System(Protocol):
    """What is timed. ``bytes_per_token``: weights and visible cache entries read in a decode step, over its tokens."""

    name: str
    batch: int
    bytes_per_token: float

    def run(self, prompts: Tensor, new: int) -> Timing:
        """One pass over prompts [batch, T], then ``new`` decode steps, each a token further for every prompt."""
        ...

    def logits(self, ids: Tensor) -> Tensor:
        """The last token's logits [V] fp32, of a prompt ids [T]."""
        ...


class Ours:
    """A QuickSilver model at one precision, one config and one batch size."""

    def __init__(self, name: str, lm: QuickSilverForCausalLM, batch: int, prompts: Tensor, new: int) -> None:
        self.name, self.lm, self.batch = name, lm, batch
        self._prompts, self._new = prompts, new
        self.bytes_per_token = 0.0

    def count_bytes(self) -> None:
        """Sets ``bytes_per_token`` by the kernels' counters; also the warm-up."""
        prefill, whole = (self._bytes(steps) for steps in (0, self._new))
        self.bytes_per_token = (whole - prefill) / (self._new * self.batch)

    def _bytes(self, steps: int) -> int:
        before = _C.counters().kv_bytes_read
        stats = self._generate(self._prompts, steps).stats
        return int(stats.weight_bytes_read + _C.counters().kv_bytes_read - before)

    def _generate(self, prompts: Tensor, steps: int) -> Any:
        # The prompts' pass makes the first new token, so that `steps` decode steps end with one token more.
        return self.lm.generate(prompts, max_new_tokens=steps + 1, eos_token_id=-1)

    def run(self, prompts: Tensor, new: int) -> Timing:
        stats = self._generate(prompts, new).stats
        return Timing(stats.prefill_seconds, stats.decode_seconds)

    def logits(self, ids: Tensor) -> Tensor:
        return self.lm(ids[None]).logits[0, -1]

    def check(self, prompts: Tensor) -> None:
        """WrongAnswer where logits aren't finite, or decoding gives other tokens than one pass over its own output."""
        config, packed = self.lm.quicksilver_config, self.lm.model.precision in PACKED
        if config.fusion is not None and config.fusion.scope == "prompt":
            packed = False  # such fusion looks at a prompt as a whole
        ids = self._generate(prompts, CHECK_NEW - 1).sequences
        logits = self.lm(ids[:, :-1]).logits[:, prompts.shape[1] - 1 :]
        if not bool(logits.isfinite().all()):
            raise WrongAnswer(f"{self.name}: logits aren't finite")
        if packed and not torch.equal(logits.argmax(-1), ids[:, prompts.shape[1] :]):
            raise WrongAnswer(f"{self.name}: decoding gives other tokens than one pass over the same text")


class LlamaCpp:
    """llama.cpp on a .gguf file, by llama-cpp-python."""

    batch = 1

    def __init__(self, name: str, path: Path, threads: int, prompt: int, new: int) -> None:
        from llama_cpp import Llama

        self.name = name
        size = max(512, prompt)  # the prompt in one batch
        self._llama = Llama(
            str(path),
            n_ctx=max(256, prompt + new + 1),
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=size,
            n_ubatch=size,
            verbose=False,
        )
        cache = _kv_bytes(open_checkpoint(path).config, prompt + (new + 1) / 2, 2)  # fp16
        self.bytes_per_token = gguf_bytes_per_token(path) + cache

    def run(self, prompts: Tensor, new: int) -> Timing:
        self._llama.reset()
        began = time.perf_counter()
        self._llama.eval(prompts[0].tolist())
        prefilled = time.perf_counter()
        for step in range(new):
            self._llama.eval([int(prompts[0, step % prompts.shape[1]])])
        return Timing(prefilled - began, time.perf_counter() - prefilled)

    def logits(self, ids: Tensor) -> Tensor:
        import llama_cpp

        self._llama.reset()
        self._llama.eval(ids.tolist())
        last = llama_cpp.llama_get_logits_ith(self._llama._ctx.ctx, -1)
        size = self._llama.n_vocab()
        values = (ctypes.c_float * size).from_address(ctypes.addressof(last.contents))
        return torch.frombuffer(values, dtype=torch.float32).clone()


class Transformers:
    """transformers' model, its own attention and cache, without a loop of generate() around it."""

    batch = 1

    def __init__(self, name: str, model: Any, prompt: int, new: int) -> None:
        self.name, self._model = name, model
        size = model.dtype.itemsize
        tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        head = model.get_output_embeddings().weight
        looked_up = {id(table.weight) for table in tables} - {id(head)}
        weights = sum(each.numel() for each in model.parameters() if id(each) not in looked_up) * size
        self.bytes_per_token = weights + _kv_bytes(model.config.to_dict(), prompt + (new + 1) / 2, size)

    @torch.inference_mode()
    def run(self, prompts: Tensor, new: int) -> Timing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # past_key_values gets another name in later releases
            began = time.perf_counter()
            past = self._model(prompts[:1], use_cache=True, logits_to_keep=1).past_key_values
            prefilled = time.perf_counter()
            for step in range(new):
                token = prompts[:1, step % prompts.shape[1], None]
                past = self._model(token, past_key_values=past, use_cache=True).past_key_values
            return Timing(prefilled - began, time.perf_counter() - prefilled)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._model(ids[None], logits_to_keep=1).logits[0, -1]
        return logits.float()


def _kv_bytes(config: dict[str, Any], entries: float, itemsize: int) -> float:
    """Bytes of keys and values that a step reads which sees ``entries`` positions."""
    gpt2 = config["model_type"] == "gpt2"
    layers, d, heads = (
        config[key]
        for key in (
            ("n_layer", "n_embd", "n_head") if gpt2 else ("num_hidden_layers", "hidden_size", "num_attention_heads")
        )
    )
    kv_heads = heads if gpt2 else config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or d // heads
    return 2 * layers * kv_heads * head_size * itemsize * entries


def gguf_bytes_per_token(path: Path) -> int:
    """Bytes of the tensors that a decode step reads all of: not of tables that it looks a row up in."""
    from gguf import GGML_QUANT_SIZES

    from .gguf_file import GgufFile

    tensors = GgufFile(path).tensors
    tables = ["position_embd.weight", *(["token_embd.weight"] if "output.weight" in tensors else [])]
    blocks = {name: GGML_QUANT_SIZES[tensor.type] for name, tensor in tensors.items() if name not in tables}
    return sum(math.prod(tensors[name].shape) // values * size for name, (values, size) in blocks.items())


def as_precision(model: Model, precision: str) -> Model:
    """The same planes, in the same memory, at another packed precision. ``model`` has both planes."""
    if precision != "int4":
        return dataclasses.replace(model, precision=precision)

    def without_low(linear: Linear) -> Linear:
        assert isinstance(linear.weight, MatryoshkaWeight)
        return Linear(dataclasses.replace(linear.weight, lo=None), linear.bias)

    def high(layer: Layer) -> Layer:
        parts = {name: getattr(layer, name) for name in model.spec.linear_shapes()}
        low: dict[str, Any] = {name: without_low(part) for name, part in parts.items()}
        return dataclasses.replace(layer, **low)

    return dataclasses.replace(model, precision=precision, layers=[high(layer) for layer in model.layers])


def our_systems(options: Options, path: Path, prompts: Tensor) -> list[Ours]:
    """All precisions, then the config, each at every batch size. Packed precisions share their planes."""
    wanted = [(precision, precision, QuickSilverConfig()) for precision in options.precisions]
    if options.config is not None:
        precision = choose_precision(None, options.config)
        wanted.append((f"{precision} with config", precision, options.config))
    packed = [precision for _, precision, _ in wanted if precision in PACKED]
    stored = "int4" if set(packed) == {"int4"} else "int8"
    shared = load_model(path, stored) if packed else None
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


def llama_file(source: Path, kind: str, folder: Path, threads: int) -> Path:
    """``source`` with its matrices in ``kind``: itself where they are, else made in ``folder`` by llama.cpp."""
    import llama_cpp

    from .gguf_file import GgufFile

    if {tensor.type.name for tensor in GgufFile(source).tensors.values()} <= {kind, "F32"}:
        return source
    path = folder / f"{source.stem.removesuffix('-Q8_0')}-{kind}.gguf"
    if not path.is_file():
        part = path.with_name(f".{path.name}")
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = LLAMA_FTYPES[kind], True, threads
        if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(params)):
            part.unlink(missing_ok=True)
            raise ValueError(f"{source}: llama.cpp could not make {kind} of it")
        part.replace(path)
    return path


def load_transformers(path: Path) -> Any:
    """The checkpoint as transformers' model in fp32, from our reader where it is a .gguf file."""
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    checkpoint = open_checkpoint(path)
    config = AutoConfig.for_model(**{key: value for key, value in checkpoint.config.items() if value is not None})
    state = {name: checkpoint.tensor(name).float().contiguous() for name in checkpoint.names()}
    family: Any = GPT2LMHeadModel if checkpoint.config["model_type"] == "gpt2" else LlamaForCausalLM
    return family.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()


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
    """A system's rounds: tokens per second, and the read ceiling beside each."""

    system: System
    prefill: list[float] = dataclasses.field(default_factory=list)
    decode: list[float] = dataclasses.field(default_factory=list)
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
                entry.ceiling.append(statistics.median((before, after)))
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
        _C.set_threads(torch.get_num_threads())
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
        draw = torch.Generator().manual_seed(options.seed)
        prompts = torch.randint(0, 2**31, (max(options.batches), options.prompt), generator=draw)
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
        import llama_cpp

        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        _KEPT.append(quiet)  # called for as long as llama.cpp is there
        for kind in LLAMA_FTYPES:
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
    from . import __version__

    found = {"quicksilver": __version__, "python": platform.python_version()}
    return found | {name: version(packages[name]) for name in ("torch", *against)}
