"""``quicksilver generate``."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

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
    encode,
    load,
    print_json,
    read_prompt,
)

if TYPE_CHECKING:
    from ..config import QuickSilverConfig
    from ..stats import GenerationStats

# What each mechanism is, for a table that explains itself.
MECHANISMS = {
    "halting": "halting: tokens stop early",
    "fusion": "fusion: neighbours merge",
    "amq": "amq: 8 or 4 bits per token",
}
OFF = "off: all layers, all bits"


def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="The text to go on from, in UTF-8; - reads stdin.")],
    model: Model = "demo",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")] = 64,
    precision: Precision = None,
    requantize: Requantize = False,
    no_statistics: NoStatistics = False,
    kv_cache_dtype: KvCacheDtype = None,
    preset: Preset = None,
    config: Config = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Sample, flatter the higher. (default: 0, the likeliest token)"),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt to the model as a chat message.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer with all mechanisms off too, and set the costs side by side.")
    ] = False,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt: streams the text, then reports speed, layers, bits and bytes on one line."""
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"--temperature must be 0 (the likeliest token) or a positive number; got {temperature}")
    prompt = read_prompt(prompt)
    chosen = choose_config(preset, config)
    check_numbers(precision, kv_cache_dtype, chosen)
    lm = load(model, precision, kv_cache_dtype, chosen, device, threads, requantize, no_statistics)
    inputs = encode(lm, prompt, chat)

    from transformers import TextStreamer

    from ..config import QuickSilverConfig

    configs = [lm.quicksilver_config]
    if compare:
        configs.insert(0, QuickSilverConfig())
        if mechanisms(configs[1]) == OFF:
            raise ValueError("--compare finds no mechanism on; choose some by --config or --preset")
        if not as_json:
            print(f"prompt: {prompt}")
    runs: list[dict[str, Any]] = []
    costs: list[GenerationStats] = []
    for each in configs:
        if compare and not as_json:
            print(f"\n== {', '.join(mechanisms(each).splitlines())} ==")
        output = lm.generate(
            inputs,
            max_new_tokens=max_new_tokens,
            do_sample=bool(temperature),
            temperature=temperature or None,
            seed=seed,
            streamer=None if as_json else TextStreamer(lm.tokenizer, skip_prompt=True, skip_special_tokens=True),
            quicksilver_config=each,
        )
        new = output.sequences[0, inputs.shape[1] :].tolist()
        text = lm.tokenizer.decode(new, skip_special_tokens=True)
        runs.append({"text": text, "token_ids": new, "stats": output.stats.to_dict()})
        costs.append(output.stats)
    if as_json:
        print_json({"off": runs[0], "mechanisms": runs[1]} if compare else runs[0])
    elif compare:
        print_comparison([mechanisms(each) for each in configs], costs)
    else:
        print(report(costs[0]), file=sys.stderr)


def mechanisms(config: QuickSilverConfig) -> str:
    """Those that are on, a line each."""
    return "\n".join(text for name, text in MECHANISMS.items() if getattr(config, name) is not None) or OFF


def print_comparison(names: list[str], costs: list[GenerationStats]) -> None:
    """What each run cost, under columns that need no explanation."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)  # fits 80 columns
    table.add_column("mechanisms", no_wrap=True)
    for title in ("tokens\nper second", "weights read\nper token", "layers\nper token", "bits\nper weight"):
        table.add_column(title, justify="right")
    for name, stats in zip(names, costs, strict=True):
        layers, bits = f"{layers_per_token(stats):.1f} of {full_depth(stats)}", f"{stats.mean_bits:.1f}"
        speed = f"{stats.tokens_per_second:.1f}"
        table.add_row(name, speed, f"{megabytes_per_token(stats):.1f} MB", layers, bits)
    print()
    Console(highlight=False, markup=False).print(table)


def report(stats: GenerationStats) -> str:
    """Speed, layers, bits and bytes on one line."""
    return ", ".join(
        (
            f"{stats.new_tokens} tokens",
            f"{stats.tokens_per_second:.1f} tokens/s",
            f"{layers_per_token(stats):.1f} of {full_depth(stats)} layers per token",
            f"{stats.mean_bits:.1f} bits per weight",
            f"{megabytes_per_token(stats):.1f} MB of weights read per new token",
        )
    )


def layers_per_token(stats: GenerationStats) -> float:
    return stats.layers_run / sum(stats.depth_histogram.values())


def full_depth(stats: GenerationStats) -> int:
    return stats.layers_full // sum(stats.depth_histogram.values())


def megabytes_per_token(stats: GenerationStats) -> float:
    """Of weights. The pass over the prompt made the first token, so there were as many passes, each of which reads the
    weights once, as new tokens."""
    return stats.weight_bytes_read / stats.new_tokens / 1e6
