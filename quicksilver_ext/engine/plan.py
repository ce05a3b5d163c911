"""What a config means for a model: the mechanisms in order, and what a compiled step would need to run them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..config import QuickSilverConfig
from ..mechanisms.amq import Amq, StepAmq
from ..mechanisms.base import Mechanism, Memory, Pass
from ..mechanisms.fusion import Fusion
from ..mechanisms.halting import Halting, StepHalting
from ..weights.model import Model
from .kv_cache import KVCache


@dataclass(frozen=True)
class StepParams:
    """The mechanisms of a plan that a compiled step runs by itself; None is off."""

    halting: StepHalting | None
    amq: StepAmq | None


class Plan:
    """A config for a model. Holds no weights and costs next to nothing. ValueError where the config doesn't fit the
    model or its precision."""

    def __init__(self, model: Model, config: QuickSilverConfig) -> None:
        spec = model.spec
        config.check_model(spec.num_layers, spec.hidden_size)
        if config.amq is not None and model.precision != "adaptive":
            raise ValueError(f"amq chooses bits per token and needs precision 'adaptive'; got {model.precision!r}")
        self.model, self.config = model, config
        self.device = model.embedding.device
        # May a row stop before the top?
        self.dynamic = config.halting is not None or config.fusion is not None
        self.step = self._step()

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """What calibration fitted, on the model's device."""
        return {name: tensor.to(self.device) for name, tensor in self.config.tensors.items()}

    def _step(self) -> StepParams | None:
        """None where only the loop can run the plan."""
        config = self.config
        halting = None if config.halting is None else Halting.step(config.halting)
        amq = None if config.amq is None else Amq.step(config.amq, self.model.spec.hidden_size)
        missing = (halting is None and config.halting) or (amq is None and config.amq) or config.fusion
        return None if missing else StepParams(halting, amq)

    def begin(self, run: Pass, overrides: Tensor | None) -> list[Mechanism]:
        """The mechanisms of one pass, in the order in which the loop asks them."""
        config, mechanisms = self.config, list[Mechanism]()
        if config.halting is not None:
            mechanisms.append(Halting(config.halting, run, overrides))
        if config.fusion is not None:
            mechanisms.append(Fusion(config.fusion, run))
        if config.amq is not None:
            mechanisms.append(Amq(config.amq, run))
        return mechanisms

    @property
    def merging_from(self) -> int | None:
        """The first layer whose cache entries merge."""
        fusion = self.config.fusion
        return fusion.layer if fusion is not None and fusion.scope == "cache" else None

    def new_cache(self, sequences: int, capacity: int, dtype: torch.dtype, keeps: bool) -> KVCache:
        """An empty cache for ``sequences`` sequences of at most ``capacity`` tokens, with what the mechanisms must
        remember of them."""
        config, width = self.config, self.model.spec.hidden_size
        cache = KVCache(
            self.model.spec,
            sequences,
            capacity,
            dtype,
            merging_from=self.merging_from,
            keeps=keeps,
            device=self.device,
        )
        memories: dict[str, Memory | None] = {}
        if config.halting is not None:
            memories["halting"] = Halting.memory(config.halting, width, self.device)
        if config.fusion is not None:
            memories["fusion"] = Fusion.memory(config.fusion, sequences, capacity, width, self.device)
        cache.memories.update({name: memory for name, memory in memories.items() if memory is not None})
        return cache

    def fits(self, cache: KVCache) -> bool:
        """Whether a cache of this model holds what this plan's mechanisms must remember, and no more."""
        halting = self.config.halting
        wanted = {"halting"} if halting is not None and halting.kv_policy == "recompute" else set()
        wanted |= {"fusion"} if self.merging_from is not None else set()
        return wanted == set(cache.memories) and cache.merging_from == self.merging_from

    def check_cache(self, cache: KVCache) -> None:
        """ValueError where a cache is of another model, or was made for a config whose mechanisms remember other
        things than this one's."""
        spec, other = self.model.spec, cache.spec
        sizes = ("num_layers", "num_kv_heads", "head_size", "windows")
        if any(getattr(spec, size) != getattr(other, size) for size in sizes):
            raise ValueError("cache is of a model of another shape; make one by this model's new_cache")
        if cache.layers[0].key.device != self.device:
            raise ValueError(f"cache is on {cache.layers[0].key.device}, the model on {self.device}")
        if not self.fits(cache):
            raise ValueError(
                "cache was made for a config with other mechanisms (fusion.scope 'cache', its layer, or kv_policy "
                "'recompute'); make one by new_cache(..., quicksilver_config=...)"
            )
