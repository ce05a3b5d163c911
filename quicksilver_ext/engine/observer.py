"""Who wants to hear what a pass does, layer by layer: trace, calibration, tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights.model import WEIGHT_BITS
from .batch import Batch
from .plan import Plan
from .stages import Step


@dataclass(frozen=True)
class LayerEvent:
    """What happened at a layer to the n rows that ran it: ``sequence``, ``positions`` [n] int32 name them.

    drift, entropy  [n] fp32 as far as the mechanisms measured them, NaN elsewhere: drift over this layer, entropy
                    (bits) of the state that a decision was made on, at the layer's input (AMQ) or output (halting)
    bits            [n] int32 of the weights that they used
    halted          [n] bool: those that stopped after it
    group           [n] int32 fusion groups, at the fusion layer, else None
    entries         cache entries that the layer got, those of halted rows included
    before, after   [n, d] fp32, the states at its input and output, for an observer with ``wants_states``, else None
    """

    layer: int
    sequence: Tensor
    positions: Tensor
    drift: Tensor
    entropy: Tensor
    bits: Tensor
    halted: Tensor
    group: Tensor | None
    entries: int
    before: Tensor | None = None
    after: Tensor | None = None


class Observer:
    """Hears of each layer that ran. ``wants_states`` costs copies, and takes the loop where a whole step in one launch
    would do."""

    wants_states = False

    def layer(self, event: LayerEvent) -> None:
        """A layer ran, with at least one row."""

    def end(self, depth: list[int]) -> None:
        """The pass is over: layers that each of the batch's rows ran."""


def tell_step(observer: Observer, plan: Plan, batch: Batch, step: Step) -> None:
    """What a step in one launch noted, as the loop would have told it."""
    assert plan.step is not None
    amq, halting = plan.step.amq, plan.step.halting
    tests = halting is not None and halting.entropy_threshold is not None
    layers, own = plan.model.spec.num_layers, WEIGHT_BITS[plan.model.precision]
    for layer in range(max(step.depth)):
        ran = [row for row, depth in enumerate(step.depth) if depth > layer]
        # Noted of the state that comes into a layer; AMQ decides on that, halting on the state that comes out.
        entropy = None
        if amq is not None and layer == amq.layer:
            entropy = step.entropy[layer]
        elif tests and layer + 1 < layers:
            entropy = step.entropy[layer + 1]

        def column(values: list[int] | list[float] | None, dtype: torch.dtype, ran: list[int] = ran) -> Tensor:
            return torch.tensor([values[row] if values else torch.nan for row in ran], dtype=dtype, device="cpu")

        chosen = step.bits if amq is not None and layer >= amq.layer else None
        observer.layer(
            LayerEvent(
                layer,
                column(batch.sequence, torch.int32),
                column(batch.positions, torch.int32),
                column(step.drift[layer], torch.float32),
                column(entropy, torch.float32),
                column(chosen or [own] * len(batch), torch.int32),
                torch.tensor([layer + 1 == step.depth[row] < layers for row in ran], dtype=torch.bool, device="cpu"),
                None,
                len(ran),
            )
        )
