"""``quicksilver optimize``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import Json, Model, Threads, print_json, print_table


def optimize_model(
    text: Annotated[str, typer.Option("--text", metavar="FILE", help="A UTF-8 text to fit to, or builtin:pydoc.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the fitted model goes.")],
    model: Model = "demo",
    group_size: Annotated[int, typer.Option("--group-size", help="Weights that share a scale: 32, 64 or 128.")] = 64,
    texts: Annotated[
        int, typer.Option("--texts", min=3, help="Pieces of text to fit to: two thirds are of the model's own making.")
    ] = 128,
    length: Annotated[int, typer.Option("--length", min=8, help="Tokens of a piece.")] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn at random.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Fit a model's 4-bit codes to a text; 8 bits stay what they are. Interrupted, it goes on when run again."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..calibration import evaluation, optimize

    contents = evaluation.read_text(text)
    settings = optimize.Settings(texts=texts, length=length, seed=seed)
    if threads is not None:
        torch.set_num_threads(threads)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        layers = bar.add_task("layers", total=None)
        values = optimize.optimize(
            model,
            contents,
            output,
            group_size=group_size,
            settings=settings,
            progress=lambda done, total: bar.update(layers, completed=done, total=total),
        )
    if as_json:
        print_json(values)
        return
    figures = {name: value for name, value in values.items() if name != "provenance"}
    print_table([(name, f"{value:.4f}" if isinstance(value, float) else str(value)) for name, value in figures.items()])
