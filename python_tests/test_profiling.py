"""NVTX ranges: what a profiler would be told, and that nothing is told while they are off."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from models import random_llama

from quicksilver_ext import QuickSilverConfig, QuickSilverForCausalLM, profiling


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for the package nvtx; the ranges that it was given."""
    seen: list[str] = []

    @contextmanager
    def annotate(name: str, domain: str) -> Iterator[None]:
        assert domain == "quicksilver"
        seen.append(name)
        yield

    monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(annotate=annotate))
    return seen


def test_every_stage_of_every_layer_has_a_range(names: list[str]) -> None:
    config = QuickSilverConfig.from_dict(
        {"halting": {"drift_threshold": 0.0}, "amq": {"layer": 2, "entropy_threshold": 0.5}}
    )
    lm = QuickSilverForCausalLM.from_pretrained(random_llama(), precision="adaptive", quicksilver_config=config)
    ids = torch.arange(3, 10)[None]
    want = lm(ids).logits
    assert names == []
    with profiling.ranges():
        assert torch.equal(lm(ids).logits, want)
    stages = ("attention_input", "attention", "attention_output", "mlp_input", "mlp_output")
    for index in range(5):
        for stage in stages:
            assert names.count(f"layer {index} {stage}") == 1
        assert names.count(f"layer {index} halting") == (index < 4)  # after the last layer nothing is left to skip
    assert names.count("layer 2 adaptive bits") == 1 and "layer 1 adaptive bits" not in names
    told = len(names)
    lm(ids)
    assert len(names) == told


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ImportError, match="pip install nvtx"), profiling.ranges():
        pass
    assert not profiling.enabled()
