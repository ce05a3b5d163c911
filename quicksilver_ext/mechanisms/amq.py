"""Adaptive Matryoshka Quantization: 8 or 4 bits per token. See config.AMQConfig and docs/mechanisms.md."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..config import AMQConfig
from ..profiling import span
from .base import Judged, Mechanism, Pass


class StepAmq(NamedTuple):
    """What a compiled step needs to choose bits by itself. ``full_entropy``: the largest possible one, log2(d)."""

    layer: int
    threshold: float
    full_entropy: float
    sink_tokens: int


class Amq(Mechanism):
    """One pass's choice of bits."""

    def __init__(self, config: AMQConfig, run: Pass) -> None:
        super().__init__(run)
        self.config = config

    @staticmethod
    def step(config: AMQConfig, hidden_size: int) -> StepAmq | None:
        """The parameters by which a compiled step does the same; None where it can't."""
        if config.entropy_source != "latent":
            return None
        return StepAmq(config.layer, config.entropy_threshold, math.log2(hidden_size), config.sink_tokens)

    def next_event(self, layer: int) -> int:
        return self.config.layer if layer < self.config.layer else self.run.layers

    def before_layer(self, layer: int) -> None:
        if layer != self.config.layer:
            return
        config, run, rows = self.config, self.run, self.run.rows
        with span(f"layer {layer} adaptive bits"):
            run.book()
            assert rows.bits is not None
            if len(rows.active):
                spec = run.model.spec
                width = spec.hidden_size if config.entropy_source == "latent" else spec.vocab_size
                entropy = run.stages.entropy(config.entropy_source, run.probe(config.entropy_source, config.layer))
                self.judged = Judged(rows.active, entropy=entropy)
                full = torch.log2(torch.tensor(float(width), dtype=torch.float32, device=entropy.device))
                high = entropy / full >= config.entropy_threshold
                sinks = rows.at_active(rows.positions) < config.sink_tokens
                rows.bits[rows.active] = torch.where(high | sinks, 8, 4).int()
            run.stages.begin(rows)
