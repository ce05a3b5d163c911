"""Fitting weights to what they will be multiplied by, while a model streams in.

A short text runs through the model layer by layer, in fp32. What its activations look like decides two things.

* Scale migration. A channel of large activations stretches the group that it is quantized in; a column of large weights
  does so too. A factor can go from one to the other: what comes out of a norm, and of a gated up, is linear in the
  norm's weight and in the rows of up, so those are divided by a factor per channel and the columns behind them
  multiplied (SmoothQuant, arXiv 2211.10438, equation 4, with alpha 0.5). Factors are powers of two, so nothing is
  rounded by that.
* What an error of a weight counts: the mean square of what its column is multiplied by.

Both are rounded, so that the same file gives the same codes on every machine.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..weights.matryoshka import MatryoshkaWeight, pack_matryoshka
from ..weights.model import Layer, Linear, Norm, Spec
from . import dense
from .dense import Multiply, plain

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # of a layer
# Matrices that multiply the same rows; the first one's name is the input's.
SAME_INPUT = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "up", "up": "up", "down": "down"}


@dataclass
class Inputs:
    """Statistics of what each matrix is multiplied by, gathered by being `multiply` of `dense.run_layer`."""

    largest: dict[str, Tensor] = field(default_factory=dict)  # [K], magnitudes
    squares: dict[str, Tensor] = field(default_factory=dict)  # [K], sums

    def __call__(self, name: str, x: Tensor, linear: Linear) -> Tensor:
        if SAME_INPUT[name] == name:
            self.add(name, x)
        return plain(name, x, linear)

    def add(self, name: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2)
        squares, largest = held_down(rows).square().double().sum(0), rows.abs().amax(0)
        if name in self.squares:
            squares, largest = squares + self.squares[name], torch.maximum(largest, self.largest[name])
        self.squares[name], self.largest[name] = squares, largest

    def importance(self, name: str, factors: Tensor | None = None) -> Tensor:
        """fp32 [K], what a squared error in a column of matrix ``name`` weighs: the mean square of its input (divided
        by factors), rounded, so that it is the same on every machine."""
        squares = self.squares[SAME_INPUT[name]]
        if factors is not None:
            squares = squares / factors.double().square()
        squares = squares / squares.mean().clamp(min=1e-300)
        return power_of_two(squares.clamp(min=2.0**-20, max=2.0**20), parts=4).float()


def held_down(rows: Tensor) -> Tensor:
    """Rows [n, K], those made smaller whose squares are more than three times those of the row in the middle. Of the
    first token, whose activations are in some layers a thousand times larger, they would be all that counts."""
    size = rows.square().mean(-1, keepdim=True)
    return rows * (3 * size.median() / size).clamp(max=1).sqrt()


def power_of_two(x: Tensor, parts: int = 1) -> Tensor:
    """The nearest one, on the scale of logarithms; or the nearest of so many between one and the next."""
    return torch.exp2((torch.log2(x.double()) * parts).round() / parts)


def factors(largest: Tensor, weights: list[Tensor]) -> Tensor:
    """fp32 [K], powers of two: what activations of these magnitudes [K] are divided by and columns of weights [N, K]
    multiplied by."""
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).float()
    known = (largest > 0) & (columns > 0)
    ratio = torch.where(known, (largest / columns).sqrt(), 1.0)
    ratio = ratio / ratio[known].log().median().exp() if known.any() else ratio
    return torch.where(known, power_of_two(ratio.clamp(2.0**-8, 2.0**8)).float(), 1.0)


def divide_norm(norm: Norm, by: Tensor) -> Norm:
    return dataclasses.replace(norm, weight=norm.weight / by, bias=None if norm.bias is None else norm.bias / by)


def _columns(linear: Linear, by: Tensor) -> Linear:
    assert isinstance(linear.weight, Tensor)
    return dataclasses.replace(linear, weight=linear.weight * by)


def _rows(linear: Linear, by: Tensor) -> Linear:
    assert isinstance(linear.weight, Tensor)
    return Linear(linear.weight / by[:, None], None if linear.bias is None else linear.bias / by)


def migrate(spec: Spec, layer: Layer, inputs: Inputs) -> tuple[Layer, dict[str, Tensor]]:
    """A dense layer that computes the same, and by the name of an input what its channels were divided by."""
    parts: dict[str, Any] = {name: getattr(layer, name) for name in MATRICES if getattr(layer, name) is not None}

    def found(name: str) -> Tensor:
        return factors(inputs.largest[name], [parts[each].weight for each in parts if SAME_INPUT[each] == name])

    by = {"q": found("q"), "up": found("up")}
    if spec.activation == "silu_gated":
        by["down"] = found("down")
        parts["up"] = _rows(parts["up"], by["down"])
    for name in parts:
        if (own := by.get(SAME_INPUT[name])) is not None:
            parts[name] = _columns(parts[name], own)
    return dataclasses.replace(
        layer,
        attention_norm=divide_norm(layer.attention_norm, by["q"]),
        mlp_norm=divide_norm(layer.mlp_norm, by["up"]),
        **parts,
    ), by


class Fitter:
    """Takes a model's layers in their order, dense, and fills their packed matrices.

    ids: int64 [texts, T], what runs through the model.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    @torch.no_grad()
    def begin(
        self, spec: Spec, embedding: Tensor, positions: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> None:
        """Before the first layer. ``rotary``: cosines and sines [positions, head_size / 2]."""
        self.spec, self.rotary = spec, rotary
        self.hidden = dense.embed(embedding, positions, self.ids)

    @torch.no_grad()
    def layer(self, index: int, layer: Layer, out: dict[str, MatryoshkaWeight]) -> Layer:
        """The layer with its matrices in ``out``, which holds a weight to be filled for each. Raises ValueError, naming
        the matrix, for one that can't be packed."""
        inputs = Inputs()
        self.hidden = self.run(index, layer, self.hidden, inputs)
        if not all(each.isfinite().all() for each in (self.hidden, *inputs.squares.values())):
            inputs.squares = {name: torch.ones_like(each) for name, each in inputs.squares.items()}
            by: dict[str, Tensor] = {}  # a model whose numbers leave fp32's range teaches nothing
        else:
            layer, by = migrate(self.spec, layer, inputs)
        importance = {name: inputs.importance(name, by.get(SAME_INPUT[name])) for name in out}
        self.pack(index, layer, importance, out)
        packed: dict[str, Any] = {name: Linear(weight, getattr(layer, name).bias) for name, weight in out.items()}
        return dataclasses.replace(layer, **packed)

    def run(self, index: int, layer: Layer, hidden: Tensor, multiply: Multiply) -> Tensor:
        """The layer's output, some texts at a time."""
        some = [dense.run_layer(self.spec, index, layer, part, self.rotary, multiply) for part in hidden.split(8)]
        return torch.cat(some)

    def pack(
        self,
        index: int,
        layer: Layer,
        importance: dict[str, Tensor],
        out: dict[str, MatryoshkaWeight],
    ) -> None:
        """Fills ``out`` from a dense layer."""
        for name, weight in out.items():
            source = getattr(layer, name).weight
            pack_matryoshka(source, weight.group_size, importance=importance[name], name=name, out=weight)

    @torch.no_grad()
    def end(self, norm: Norm, columns: Tensor) -> tuple[Norm, Tensor | None]:
        """The final norm, and what the head's columns are multiplied by; columns fp32 [K]: the head's largest
        magnitudes."""
        inputs = Inputs()
        inputs.add("q", dense.normalize(self.hidden, norm))
        if not inputs.squares["q"].isfinite().all():
            self.head_importance = torch.ones_like(columns)
            return norm, None
        by = factors(inputs.largest["q"], [columns[None]])
        self.head_importance = inputs.importance("q", by)
        return divide_norm(norm, by), by

    def pack_head(self, rows: Tensor, out: MatryoshkaWeight, name: str) -> None:
        """Fills ``out`` from some rows of the head, after `end`. It is used with 8 bits only."""
        pack_matryoshka(rows, out.group_size, importance=self.head_importance, name=name, out=out, part=True)
