"""``quicksilver eval``."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from .common import (
    Config,
    Device,
    Json,
    KvCacheDtype,
    Model,
    NoStatistics,
    Precision,
    Preset,
    Requantize,
    Threads,
    check_numbers,
    choose_config,
    load,
    print_json,
    print_table,
)


def evaluate_text(
    text: Annotated[str, typer.Option("--text", metavar="FILE", help="A UTF-8 text file, or builtin:pydoc.")],
    model: Model = "demo",
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens that see each other.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            min=1,
            help="A window starts every so many tokens; a token is scored by the first window that can. "
            "(default: --window less --context)",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=0,
            help="A window's first tokens, which aren't scored and which prompt fusion may merge. (default: 0; half of "
            "--window where the config fuses prompts)",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=2, help="Tokens of the text to read. (default: all)")
    ] = None,
    precision: Precision = None,
    requantize: Requantize = False,
    no_statistics: NoStatistics = False,
    kv_cache_dtype: KvCacheDtype = None,
    preset: Preset = None,
    config: Config = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Perplexity on a text, by a stated protocol, against the same model at full depth."""
    chosen = choose_config(preset, config)
    check_numbers(precision, kv_cache_dtype, chosen)

    from ..calibration import evaluation

    evaluation.check_windows(window, stride, max_tokens, context)
    contents = evaluation.read_text(text)
    lm = load(model, precision, kv_cache_dtype, chosen, device, threads, requantize, no_statistics)
    result = evaluation.evaluate(
        lm, contents, window=window, stride=stride, max_tokens=max_tokens, context=context, progress=_progress
    )
    values = result.to_dict()
    values["protocol"] = {"text": text, **values["protocol"]}
    if as_json:
        print_json(values)
    else:
        print_table(_rows(values), right=False)


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rwindow {done} of {total}", end=end, file=sys.stderr, flush=True)


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Figures, then the protocol that they were made by."""
    protocol = values["protocol"]
    figures = [(name, value) for name, value in values.items() if name != "protocol"]
    return [
        *((name, f"{value:.4f}" if isinstance(value, float) else str(value)) for name, value in figures),
        *(
            (f"protocol: {name}", json.dumps(value) if isinstance(value, dict) else str(value))
            for name, value in protocol.items()
        ),
    ]
