"""What the commands share: options, loading, text on its way in and out."""

from __future__ import annotations

import codecs
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import QuickSilverConfig
    from ..model import QuickSilverForCausalLM

Model = Annotated[
    str, typer.Option("--model", help="Model folder, hub id, .gguf file, or 'demo' (SmolLM2-135M-Instruct).")
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="fp32, bf16, int8, int4 or adaptive. (default: int8, or int4 of a 4-bit file; adaptive where AMQ is on)",
    ),
]
Requantize = Annotated[
    bool, typer.Option("--requantize", help="Put a file's own 4-bit codes on our grid, where 8 and 4 bits differ.")
]
NoStatistics = Annotated[
    bool,
    typer.Option("--no-statistics", help="Pack weights without running a short text: loads sooner, 4 bits suffer."),
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


LONGEST_LINE = 1000


# --- options ---------------------------------------------------------------------------------------------------------


def choose_config(preset: str | None, config: str | None) -> QuickSilverConfig | None:
    """The mechanisms asked for; None where nothing was said. ValueError for what can't be."""
    from ..config import QuickSilverConfig, parse_json

    if config is None:
        return None if preset is None else QuickSilverConfig.preset(preset)
    if preset is not None:
        raise ValueError("--preset and --config both choose the mechanisms; give one of them")
    if config.lstrip().startswith("{"):
        return QuickSilverConfig.from_dict(parse_json(config, "--config"))
    return QuickSilverConfig.from_pretrained(config)


def check_numbers(precision: str | None, kv_cache_dtype: str | None, config: QuickSilverConfig | None) -> None:
    """ValueError for kinds of numbers, of weights and of the cache, that can't be."""
    from ..config import QuickSilverConfig
    from ..engine.kv_cache import check_kv_cache_dtype
    from ..model import choose_precision

    choose_precision(precision, config or QuickSilverConfig())
    check_kv_cache_dtype(kv_cache_dtype)


def read_prompt(prompt: str) -> str:
    """The prompt itself, or for ``-`` all of stdin less the newline at its end. ValueError where it isn't UTF-8."""
    name = "--prompt"
    try:
        if prompt == "-":
            name = "stdin"
            prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
        elif any("\ud800" <= character <= "\udfff" for character in prompt):
            prompt = os.fsencode(prompt).decode("utf-8")  # so come bytes that the locale can't read
    except UnicodeError as error:
        assert isinstance(error, UnicodeDecodeError | UnicodeEncodeError)
        raise ValueError(f"{name} is not UTF-8 text (from position {error.start} on); convert it first") from None
    if not prompt:
        raise ValueError(f"{name} is empty; give at least one character to go on from")
    return prompt


# --- loading ---------------------------------------------------------------------------------------------------------


def load(
    model: str,
    precision: str | None,
    kv_cache_dtype: str | None,
    config: QuickSilverConfig | None,
    device: str,
    threads: int | None,
    requantize: bool = False,
    no_statistics: bool = False,
) -> QuickSilverForCausalLM:
    import torch

    from ..model import QuickSilverForCausalLM

    if threads is not None:
        torch.set_num_threads(threads)  # the runner's own pool follows it
    say(f"loading {model}")
    return QuickSilverForCausalLM.from_pretrained(
        model,
        device,
        precision,
        quicksilver_config=config,
        kv_cache_dtype=kv_cache_dtype,
        requantize=requantize,
        statistics=not no_statistics,
    )


def encode(lm: QuickSilverForCausalLM, prompt: str, chat: bool) -> Tensor:
    """Token ids [1, T] of a prompt, or of a chat with it as the user's message."""
    import torch

    ids = lm.chat_prompt(prompt) if chat else lm.tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError("--prompt becomes no tokens at all; give a longer one")
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


# --- printing --------------------------------------------------------------------------------------------------------


def say(message: str) -> None:
    """Progress, for someone who watches."""
    if sys.stderr.isatty():
        print(message, file=sys.stderr)


def print_json(values: dict[str, Any]) -> None:
    """One line; ASCII where stdout can't show all of Unicode. JSON has no infinities and no NaN: null."""
    encoding = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name
    print(json.dumps(_finite(values), ensure_ascii=encoding != "utf-8", allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(rows: Sequence[Sequence[str]], right: bool = True) -> None:
    """Columns under each other; all but the first end at the right, or begin at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            f"{cell:>{width}}" if right and i else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        print("  ".join(cells).rstrip())


def one_line(text: object) -> str:
    """Of a message; of one that quotes a whole file, its two ends."""
    line = " ".join(str(text).split()) or type(text).__name__
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
