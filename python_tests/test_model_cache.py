"""Models on a KV cache of any kind: what an INT8 one costs, and that the promises bit for bit hold on it."""

from __future__ import annotations

from functools import cache as kept

import pytest
import torch
from decoding import Decoder, one_pass
from test_decoder import CPU_BACKENDS, FAMILIES, MIXES, config_of, in_steps, tokens

from quicksilver_ext import _C
from quicksilver_ext.architectures.loading import load_model
from quicksilver_ext.config import QuickSilverConfig
from quicksilver_ext.engine.kv_cache import KV_CACHE_DTYPES
from quicksilver_ext.kernels import testing
from quicksilver_ext.weights.model import Model


@kept
def load(family: str, precision: str) -> Model:
    return load_model(FAMILIES[family](7), precision, 64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.usefixtures("two_threads")
def test_an_int8_cache_keeps_the_promises(family: str, mix: str, backend: str) -> None:
    """Steps equal one pass, and neither the batch nor the number of threads changes a bit."""
    decoder = Decoder(load(family, "adaptive"), config_of(mix, family), "int8")
    rows = [tokens(40, seed=3), tokens(17, seed=4)]
    with testing.use_backend(backend):
        whole = [one_pass(decoder, ids) for ids in rows]
        for cuts in (list(range(1, 40)), [7, 8, 30]):
            assert torch.equal(in_steps(decoder, rows[0], cuts), whole[0]), f"cuts {cuts[:3]}"
        together = decoder.forward(
            torch.cat(rows),
            torch.cat([torch.arange(len(ids)) for ids in rows]),
            torch.cat([torch.full_like(ids, i) for i, ids in enumerate(rows)]),
            decoder.new_cache(2, 40),
        )
        _C.set_threads(1)
        alone = one_pass(decoder, rows[0])
    assert torch.equal(together, torch.cat(whole))
    assert torch.equal(alone, whole[0])


EVERY_SECOND = torch.tensor([0, 1] * 12, dtype=torch.int8)
DECIDED = {  # mechanisms whose decisions rounding can't turn over
    "off": {},
    "zero": {"halting": {"drift_threshold": 0.0, "sink_tokens": 2, "kv_policy": "zero"}},
    "propagate": {"halting": {"drift_threshold": 0.0, "sink_tokens": 2, "kv_policy": "propagate"}},
    "fusion": {"fusion": {"layer": 1, "threshold": 1e9, "scope": "cache", "weights": "attention"}},
    "prompt-fusion": {"fusion": {"layer": 1, "threshold": 1e9, "scope": "prompt", "weights": "attention"}},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mix", DECIDED)
def test_cache_dtypes_cost_what_they_round(family: str, mix: str, backend: str) -> None:
    """Relative error of fp32 weights' logits by an fp16, bf16 and INT8 cache: in this order, and bounded."""
    model, ids = load(family, "fp32"), tokens(24, seed=22)
    want = torch.arange(24) >= 12
    overrides = EVERY_SECOND if "halting" in DECIDED[mix] else None
    logits, keys = {}, {}
    for name in KV_CACHE_DTYPES:
        decoder = Decoder(model, QuickSilverConfig.from_dict(DECIDED[mix]), name)
        cache, at = decoder.new_cache(1, 24), torch.arange(24)
        logits[name] = decoder.forward(ids, at, torch.zeros_like(at), cache, logits=want, overrides=overrides)
        keys[name] = cache.layers[0].keys(cache.layers[0].slots(0))
    error, key_error = (
        {name: float((got[name] - got["fp32"]).norm() / got["fp32"].norm()) for name in got} for got in (logits, keys)
    )
    for errors, bound in ((error, {"fp16": 1e-3, "bf16": 8e-3, "int8": 3e-2}), (key_error, {"int8": 1e-2})):
        assert errors["fp32"] == 0 < errors["fp16"] < errors["bf16"] < errors["int8"], errors
        assert all(errors[name] < most for name, most in bound.items()), errors


def test_an_int8_cache_on_every_backend(backend: str) -> None:
    """The answer is the CPU's, and memory that no entry was written to has no part in it."""
    decoder, ids = Decoder(load("llama", "adaptive"), config_of("off"), "int8"), tokens(70, seed=23)
    cache = decoder.new_cache(1, 100)
    for layer in cache.layers:
        for codes, scales in ((layer.key, layer.key_scale), (layer.value, layer.value_scale)):
            codes.fill_(-128)
            scales.fill_(torch.nan)
    got = in_steps(decoder, ids, [64, 65], cache)
    with testing.use_backend(CPU_BACKENDS[-1]):
        want = one_pass(decoder, ids)
    assert (got - want).norm() / want.norm() < 2e-2
    if backend != "reference":
        assert torch.equal(got, one_pass(decoder, ids))


def test_bytes_of_the_cache() -> None:
    model, ids = load("llama", "int8"), tokens(70, seed=24)
    vectors = 70 * model.spec.num_layers * model.spec.num_kv_heads * 2
    for name, width in (("fp32", 4), ("fp16", 2), ("bf16", 2), ("int8", 1)):
        decoder = Decoder(model, QuickSilverConfig(), name)
        cache = decoder.new_cache(1, 70)
        in_steps(decoder, ids, [64], cache)
        assert cache.nbytes == vectors * (model.spec.head_size * width + (4 if name == "int8" else 0))
