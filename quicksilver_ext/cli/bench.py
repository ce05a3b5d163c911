"""``quicksilver bench``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from .common import Config, Json, Model, Requantize, Threads, choose_config, one_line, print_json, print_table, say


def bench(
    model: Model = "demo",
    shape: Annotated[
        str | None, typer.Option("--shape", help="Instead of --model, random weights: gpt2-large or llama-2-7b.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Of a shape, only so many layers. (default: all)")
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="Comma-separated: ours, one by one.")] = "int8,int4",
    requantize: Requantize = False,
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
    chosen = None if config is None else choose_config(None, config)
    import torch

    from ..bench import benchmark, systems

    options = benchmark.Options(
        model=model,
        shape=shape,
        layers=layers,
        precisions=_names(precision),
        requantize=requantize,
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
        values = benchmark.bench(options, say)
    except systems.WrongAnswer as error:
        print(f"quicksilver: wrong answer: {one_line(error)}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print_json(values)
    else:
        _print_speeds(values)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _print_speeds(values: dict[str, Any]) -> None:
    """A line per system, then what the figures depend on."""
    first = values["rows"][0]["system"]
    table = [("system", "prefill tokens/s", "decode tokens/s", f"over {first}", "MB per token", "of the read ceiling")]
    for row in values["rows"]:
        ratio = row["decode_over"].get(first)
        table.append(
            (
                row["system"],
                f"{row['prefill_tokens_per_s']:.0f}",
                "{median:.1f} ({min:.1f}..{max:.1f})".format(**row["decode_spread"]),
                "{median:.2f} ({min:.2f}..{max:.2f})".format(**ratio) if ratio else "1",
                f"{row['bytes_per_token'] / 1e6:.1f}",
                f"{row['fraction_of_ceiling']:.0%}",
            )
        )
    print_table(table)
    print(
        f"{values['model']}: prompt {values['prompt']}, {values['new']} steps, {values['rounds']} rounds, "
        f"{values['threads']} threads, {values['isa']}, {values['cpu']}; median (min..max)\n"
        f"reads {values['read_ceiling_GBps']:.1f} GB/s, INT8 ceiling {values['int8_ceiling_GMACps']:.0f} GMAC/s; "
        f"peak memory of ours {values['peak_memory_GB']:.2f} GB"
    )
    for row in values["rows"]:
        if row["host_share"] is not None:
            attention = row["attention_fraction_of_ceiling"]
            print(
                f"{row['system']}: {row['host_share']:.1%} of decoding went by outside of kernels; attention read at "
                f"{attention:.0%} of the ceiling"
            )
    for other, error in values["logit_errors"].items():
        print(f"int8 logits differ from {other}'s by {error:.3f} of their spread")
    for note in values["notes"]:
        print(f"note: {note}")
