"""What a layer's inputs look like, and what follows for its weights.

A channel of large activations stretches the group that it is quantized in; a column of large weights does so too. A
factor can go from one to the other: what comes out of a norm, of v and of a gated up is linear in the norm's weight, in
the rows of v and in those of up, so those are divided by a factor per channel and the columns behind them multiplied
(SmoothQuant, arXiv 2211.10438, equation 4, with alpha 0.5). Factors are powers of two, so nothing is rounded by that.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..weights.model import Layer, Linear, Norm, Spec
from .dense import Multiply, plain

# Matrices that multiply the same rows; the first one's name is the input's.
SAME_INPUT = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "up", "up": "up", "down": "down"}


@dataclass
class Inputs:
    """Statistics of what each matrix is multiplied by, gathered by being `multiply` of `dense.run_layer`."""

    multiply: Multiply = plain
    largest: dict[str, Tensor] = field(default_factory=dict)  # [K], magnitudes
    squares: dict[str, Tensor] = field(default_factory=dict)  # [K], sums
    rows: int = 0

    def __call__(self, name: str, x: Tensor, linear: Linear) -> Tensor:
        if SAME_INPUT[name] == name:
            self.add(name, x)
        return self.multiply(name, x, linear)

    def add(self, name: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2)
        # Of rows whose magnitudes are far above the others' (the first token's, in some layers) the square would be all
        # that counts: they weigh no more than three times as much as the row in the middle.
        size = rows.square().mean(-1, keepdim=True)
        limit = 3 * size.median()
        squares = (rows.square() * (limit / size).clamp(max=1)).double().sum(0)
        largest = rows.abs().amax(0)
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
    parts = {name: getattr(layer, name) for name in ("q", "k", "v", "o", "gate", "up", "down")}
    parts = {name: linear for name, linear in parts.items() if linear is not None}

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
