"""A model and a plan with tensors in and out, for tests of what happens below `generate`."""

from __future__ import annotations

import torch
from torch import Tensor

from quicksilver_ext.config import QuickSilverConfig
from quicksilver_ext.engine.batch import Batch
from quicksilver_ext.engine.kv_cache import KVCache
from quicksilver_ext.engine.observer import Observer
from quicksilver_ext.engine.plan import Plan
from quicksilver_ext.engine.runner import Runner
from quicksilver_ext.stats import GenerationStats
from quicksilver_ext.weights.model import Model


class Decoder:
    def __init__(self, model: Model, config: QuickSilverConfig, kv_cache_dtype: str | None = None) -> None:
        self.model, self.config = model, config
        self.runner, self.plan = Runner(model, kv_cache_dtype), Plan(model, config)

    def new_cache(self, sequences: int, capacity: int, keeps: bool = True) -> KVCache:
        return self.runner.new_cache(self.plan, sequences, capacity, keeps)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.runner.embed(ids, positions)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        sequence: Tensor,
        cache: KVCache,
        logits: Tensor | None = None,
        stats: GenerationStats | None = None,
        overrides: Tensor | None = None,
        observer: Observer | None = None,
    ) -> Tensor:
        """As the loop runs it, though a step in one launch might do."""
        batch = Batch.of(ids, positions, sequence, logits, overrides)
        step, self.plan.step = self.plan.step, None
        try:
            return self.runner.run(self.plan, batch, cache, observer, stats)
        finally:
            self.plan.step = step

    def step(
        self,
        ids: list[int],
        positions: list[int],
        sequence: list[int],
        cache: KVCache,
        stats: GenerationStats | None = None,
        observer: Observer | None = None,
    ) -> Tensor:
        """As the runner chooses; the logits are the caller's."""
        return self.runner.run(self.plan, Batch.of(ids, positions, sequence), cache, observer, stats).clone()


def one_pass(decoder: Decoder, ids: Tensor, **kwargs) -> Tensor:
    cache = decoder.new_cache(1, len(ids))
    return decoder.forward(ids, torch.arange(len(ids)), torch.zeros_like(ids), cache, **kwargs)
