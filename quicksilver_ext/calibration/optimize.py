"""Learned rounding: the 4-bit codes of a model, fitted layer after layer.

Each layer's matrices get, per value, a rounding offset in -0.5..0.5 steps and, per group, what its range is cut or
stretched by; signed gradient descent on both brings the layer's output on quantized inputs near to the original layer's
on its own inputs (SignRound, arXiv 2309.05516). The residual to the original weight goes to the second plane.

Two things are ours, because codes of 4 and of 8 bits are to be mixed by token. Each text has bits of its own, all 4 or
4 and 8 at random by token, and now and then a matrix runs at 8 for all: so errors aren't fitted to cancel those of
another matrix, which may not be made. And a row's error counts relative to the size of its row, since the first token's
activations are in some layers a thousand times larger than the others', and would be all that is fitted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architectures import dense, migration
from ..weights.arena import Arena
from ..weights.matryoshka import MatryoshkaWeight, empty, pack_codes, pack_matryoshka
from ..weights.model import Layer, Linear, Model

SINK_TOKENS = 4  # of a text whose tokens differ in bits, the first so many have 8


@dataclass(frozen=True)
class Settings:
    """How long to learn, and on what. length: tokens of a text."""

    iterations: int = 60
    texts: int = 128
    length: int = 256
    batch: int = 8
    seed: int = 0


class Rounding:
    """A matrix whose rounding is being learned: weight fp32 [N, K], and the grid that the search found for it."""

    def __init__(self, weight: Tensor, group_size: int, importance: Tensor) -> None:
        self.weight, self.size = weight, group_size
        rows, columns = weight.shape
        self.pad = -columns % group_size
        start = pack_matryoshka(weight, group_size, importance=importance, part=True)
        scale, low = start.groups()
        self.low, self.high = low, low + 15 * scale
        self.values = F.pad(weight, (0, self.pad)).view(rows, -1, group_size)
        self.offset = torch.zeros_like(self.values)
        self.cut_low, self.cut_high = torch.ones_like(self.low), torch.ones_like(self.low)
        self.gradient: Tensor | None = None

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and offset fp32 [N, G], as fp16 holds them."""
        low, high = self.low * self.cut_low, self.high * self.cut_high
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        return ((high - low) / 15).half().float(), low.half().float()

    def _steps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, start = (each[..., None] for each in self.grid())
        steps = (self.values - start) / scale.clamp(min=2.0**-24)
        return scale, start, steps, (steps + self.offset).round_()

    def quantized(self) -> Tensor:
        """The 4-bit values fp32 [N, K]."""
        scale, start, _, code = self._steps()
        return code.clamp_(0, 15).mul_(scale).add_(start).flatten(1)[:, : self.weight.shape[1]]

    def descend(self, gradient: Tensor, rate: float) -> None:
        """A step against the gradient of `quantized`'s values; through the rounding it goes unchanged."""
        gradient = F.pad(gradient, (0, self.pad)).view_as(self.values)
        _, _, steps, code = self._steps()
        clamped = code.clamp(0, 15)
        inside = clamped == code
        by_scale = (gradient * torch.where(inside, clamped - steps, clamped)).sum(-1)
        by_start = gradient.masked_fill(inside, 0.0).sum(-1)
        self.offset.sub_(gradient.sign_().mul_(inside), alpha=rate).clamp_(-0.5, 0.5)
        self.cut_low.sub_(((by_start - by_scale / 15) * self.low).sign_(), alpha=rate).clamp_(0.5, 1.25)
        self.cut_high.sub_((by_scale * self.high).sign_(), alpha=rate).clamp_(0.5, 1.25)

    def packed(self, out: MatryoshkaWeight) -> None:
        scale, start, steps, code = self._steps()
        code = code.clamp_(0, 15)
        residual = ((steps - code) * 8).round_().clamp_(-8, 7) + 8
        columns = self.weight.shape[1]
        code, residual = (each.to(torch.uint8).flatten(1)[:, :columns] for each in (code, residual))
        pack_codes(code, residual, scale.squeeze(-1).half(), start.squeeze(-1).half(), out)


class Quantized(torch.autograd.Function):
    """Rows times a matrix: those of 4 bits times its 4-bit values, the others times the original ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding, values: Tensor, four: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        ctx.rounding, ctx.values, ctx.four, ctx.shape = rounding, values, four, x.shape
        ctx.save_for_backward(rows[four])
        y = rows.new_empty(len(rows), len(values))
        y[four] = rows[four] @ values.T
        if not four.all():
            y[~four] = rows[~four] @ rounding.weight.T
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        four, rounding = ctx.four, ctx.rounding
        (rows,) = ctx.saved_tensors
        gradient = gradient.flatten(0, 1)
        of_four = gradient[four]
        rounding.gradient = of_four.T @ rows
        back = gradient.new_empty(len(gradient), rounding.weight.shape[1])
        back[four] = of_four @ ctx.values
        if not four.all():
            back[~four] = gradient[~four] @ rounding.weight
        return back.view(ctx.shape), None, None, None


def eight_bits(x: Tensor, group_size: int) -> Tensor:
    """Rows as INT8 holds them, for what is made of them; the gradient goes through unchanged."""
    with torch.no_grad():
        columns = x.shape[-1]
        groups = F.pad(x, (0, -columns % group_size)).unflatten(-1, (-1, group_size))
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        rounded = (groups / scale).round_().mul_(scale).flatten(-2)[..., :columns]
    return x + (rounded - x).detach()


def token_bits(texts: int, length: int, seed: int) -> Tensor:
    """bool [texts, length], whether a token has 4 bits: in every second text all of them, in the others a share that is
    drawn for each, the first SINK_TOKENS apart."""
    g = torch.Generator().manual_seed(seed)
    share = torch.rand(texts, 1, generator=g)
    four = torch.rand(texts, length, generator=g) < share
    four[:, :SINK_TOKENS] = False
    four[::2] = True
    return four


def fit_layer(
    spec: Any,
    index: int,
    layer: Layer,
    roundings: dict[str, Rounding],
    inputs: Tensor,
    targets: Tensor,
    four: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    settings: Settings,
) -> tuple[float, float]:
    """Learns the roundings of one layer: inputs and targets fp32 [texts, T, d], four bool [texts, T]. Returns the
    loss at first and at last, a mean over the first and last tenth."""
    g = torch.Generator().manual_seed(settings.seed * 1000 + index)
    size = targets.square().mean(-1, keepdim=True)
    weight = 1 / torch.maximum(size, size.median())
    weight = weight / (weight * (targets - inputs).square()).mean()
    losses = []
    for iteration in range(settings.iterations):
        chosen = torch.randperm(len(inputs), generator=g)[: settings.batch]
        # Of every second batch half of the matrices, on average, have 8 bits for all of some texts.
        apart = torch.rand(len(roundings), len(chosen), generator=g) < (0.5 if iteration % 2 else 0.0)
        masks = {name: (four[chosen] & ~apart[i][:, None]).flatten() for i, name in enumerate(roundings)}
        values = {name: rounding.quantized() for name, rounding in roundings.items()}

        def multiply(name: str, x: Tensor, linear: Linear) -> Tensor:
            x = eight_bits(x, roundings[name].size)
            y: Tensor = Quantized.apply(x, roundings[name], values[name], masks[name])  # noqa: B023
            return y if linear.bias is None else y + linear.bias

        with torch.enable_grad():
            x = inputs[chosen].requires_grad_()
            out = dense.run_layer(spec, index, layer, x, rotary, multiply)
            loss = (weight[chosen] * (out - targets[chosen]).square()).mean()
            loss.backward()
        losses.append(loss.item())
        rate = 1 / settings.iterations * (1 - iteration / settings.iterations)
        for rounding in roundings.values():
            assert rounding.gradient is not None
            rounding.descend(rounding.gradient, rate)
    some = max(1, len(losses) // 10)
    return sum(losses[:some]) / some, sum(losses[-some:]) / some


@torch.no_grad()
def fit(
    model: Model, ids: Tensor, group_size: int, settings: Settings, report: Callable[[int, float, float], None]
) -> Model:
    """A packed model of both planes from a dense one. ids int64 [texts, T]; report(layer, first loss, last loss)."""
    spec = model.spec
    rotary = None
    if model.rotary_cos is not None and model.rotary_sin is not None:
        rotary = model.rotary_cos, model.rotary_sin
    four = token_bits(*ids.shape, settings.seed)
    original = dense.embed(model.embedding, model.position_embedding, ids)
    quantized = original.clone()
    layers = []
    for index, layer in enumerate(model.layers):
        inputs = migration.Inputs()
        targets = torch.cat([dense.run_layer(spec, index, layer, part, rotary, inputs) for part in original.split(8)])
        layer, factors = migration.migrate(spec, layer, inputs)
        roundings = {}
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            if (linear := getattr(layer, name)) is not None:
                importance = inputs.importance(name, factors.get(migration.SAME_INPUT[name]))
                roundings[name] = Rounding(linear.weight.float(), group_size, importance)
        first, last = fit_layer(spec, index, layer, roundings, quantized, targets, four, rotary, settings)
        values = {name: rounding.quantized() for name, rounding in roundings.items()}

        def multiply(name: str, x: Tensor, linear: Linear) -> Tensor:
            return dense.plain(name, x, linear)

        out = []
        for part, mask in zip(quantized.split(8), four.split(8)):
            flat = mask.flatten()

            def mixed(name: str, x: Tensor, linear: Linear) -> Tensor:
                x = eight_bits(x, group_size)
                y: Tensor = Quantized.apply(x, roundings[name], values[name], flat)  # noqa: B023
                return y if linear.bias is None else y + linear.bias

            out.append(dense.run_layer(spec, index, layer, part, rotary, mixed))
        original, quantized = targets, torch.cat(out)
        packed = {}
        for name, rounding in roundings.items():
            linear = getattr(layer, name)
            packed[name] = Linear(empty(*linear.weight.shape, group_size), linear.bias)
            rounding.packed(packed[name].weight)
        layers.append(dataclasses.replace(layer, **packed))
        report(index, first, last)

    inputs = migration.Inputs()
    inputs.add("q", dense.normalize(model.final_norm, original))
    assert isinstance(model.head.weight, Tensor)
    head = model.head.weight.float()
    by = migration.factors(inputs.largest["q"], [head])
    head = pack_matryoshka(head * by, group_size, importance=inputs.importance("q", by))
    return dataclasses.replace(
        model,
        embedding=model.embedding.half(),
        layers=layers,
        final_norm=migration.divide_norm(model.final_norm, by),
        head=Linear(head, model.head.bias),
        precision="int8",
        group_size=group_size,
    )
