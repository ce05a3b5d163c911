"""The decoder loop: against a naive oracle, one pass against steps to the bit, causality, and honest counts."""

from __future__ import annotations

import pytest
import torch
from decoding import Decoder, one_pass
from models import random_gpt2, random_llama
from naive import NaiveDecoder

from quicksilver_ext import _C
from quicksilver_ext.architectures.loading import load_model
from quicksilver_ext.config import QuickSilverConfig
from quicksilver_ext.engine.composed import ComposedStages
from quicksilver_ext.engine.cpu import CpuStages
from quicksilver_ext.engine.kv_cache import KV_CACHE_DTYPES, KVCache
from quicksilver_ext.engine.stages import Stages
from quicksilver_ext.kernels import testing
from quicksilver_ext.mechanisms.base import Rows
from quicksilver_ext.stats import GenerationStats
from quicksilver_ext.weights.model import Model

# Thresholds in the middle of what the random models' tokens have, so that some tokens pass each test and some don't.
LEVELS = {
    "gpt2": {
        "drift": 0.7,
        "absolute": 1.81,
        "latent": 7.41,
        "head": 9.77,
        "neighbour": 0.88,
        "amq": 0.9975,
        "amq-head": 0.98,
    },
    "llama": {
        "drift": 1.15,
        "absolute": 2.57,
        "latent": 7.24,
        "head": 9.785,
        "neighbour": 0.98,
        "amq": 0.9975,
        "amq-head": 0.981,
    },
}


def mixes(family: str) -> dict[str, dict]:
    return mixes_at(LEVELS[family])


def mixes_at(level: dict[str, float]) -> dict[str, dict]:
    halt = {"drift_threshold": level["drift"], "min_layer": 1, "sink_tokens": 2}
    fuse = {"layer": 1, "threshold": level["neighbour"], "scope": "cache"}
    amq = {"layer": 1, "entropy_threshold": level["amq"], "sink_tokens": 1}
    return {
        "off": {},
        "skip": {"halting": halt},
        "absolute": {"halting": {**halt, "drift_threshold": level["absolute"], "drift_norm": "absolute"}},
        "entropy": {"halting": {**halt, "entropy_threshold": level["latent"]}},
        "head-entropy": {"halting": {**halt, "entropy_threshold": level["head"], "entropy_source": "head"}},
        "zero": {"halting": {**halt, "kv_policy": "zero"}},
        "propagate": {"halting": {**halt, "kv_policy": "propagate"}},
        "recompute": {"halting": {**halt, "kv_policy": "recompute"}},
        "resume": {"halting": {**halt, "resume_layer": 4}},
        "resume-propagate": {"halting": {**halt, "resume_layer": 4, "kv_policy": "propagate"}},
        "fusion": {"fusion": fuse},
        "fusion-skip": {"fusion": fuse, "halting": halt},
        "fusion-propagate": {"fusion": fuse, "halting": {**halt, "kv_policy": "propagate"}},
        "amq": {"amq": amq},
        "amq-head": {"amq": {**amq, "entropy_source": "head", "entropy_threshold": level["amq-head"]}},
        "fusion-norm": {"fusion": {**fuse, "weights": "norm"}},
        "fusion-attention": {"fusion": {**fuse, "weights": "attention"}},
        "all": {"halting": halt, "fusion": fuse, "amq": amq},
        "all-recompute": {"halting": {**halt, "kv_policy": "recompute"}, "amq": amq},
    }


MIXES = list(mixes("gpt2"))
ORACLE_MIXES = MIXES[: MIXES.index("amq")]


def config_of(mix: str, family: str = "llama", **kwargs) -> QuickSilverConfig:
    return QuickSilverConfig.from_dict({**mixes(family)[mix], **kwargs})


FAMILIES = {"gpt2": random_gpt2, "llama": random_llama}
CPU_BACKENDS = [name for name in testing.backends() if name.startswith("cpu")]


@pytest.fixture(scope="module")
def load():
    loaded: dict[tuple[str, str], Model] = {}

    def get(family: str, precision: str) -> Model:
        if (family, precision) not in loaded:
            loaded[family, precision] = load_model(FAMILIES[family](7), precision, 64)
        return loaded[family, precision]

    return get


def tokens(count: int, seed: int, vocabulary: int = 900) -> torch.Tensor:
    return torch.randint(3, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def in_steps(
    decoder: Decoder, ids: torch.Tensor, cuts: list[int], cache: KVCache | None = None, **kwargs
) -> torch.Tensor:
    cache = cache or decoder.new_cache(1, len(ids))
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        at = torch.arange(start, end)
        parts.append(decoder.forward(ids[start:end], at, torch.zeros_like(at), cache, **kwargs))
    return torch.cat(parts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mix", ORACLE_MIXES)
def test_equals_the_naive_oracle(load, family: str, mix: str) -> None:
    model = load(family, "fp32")
    config = config_of(mix, family)
    ids = tokens(24, seed=len(mix))
    naive = NaiveDecoder(model, config)
    want = torch.stack([naive.feed(int(i)) for i in ids])
    stats = GenerationStats()
    got = one_pass(Decoder(model, config), ids, stats=stats)
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).max() < 1e-4
    assert sorted(stats.depth_histogram.elements()) == sorted(token.depth for token in naive.tokens)
    assert stats.tokens_fused == naive.fused
    if config.halting is not None:
        assert stats.layers_run - stats.layers_recomputed < stats.layers_full, "the case must halt somebody"
    if config.fusion is not None:
        assert stats.tokens_fused > 0, "the case must fuse somebody"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mix", ["off", "skip", "absolute", "entropy", "amq", "all-but-fusion"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_step_in_one_call_equals_passes(load, family: str, mix: str, backend: str) -> None:
    """The same bits and the same counts as the loop that decides in Python, for one, two and three sequences."""
    parts = mixes(family)
    parts["amq"]["amq"]["entropy_threshold"] = 0.998  # so that few tokens have both bits
    parts["all-but-fusion"] = {**parts["entropy"], **parts["amq"]}
    parts["all-but-fusion"]["halting"] = {**parts["entropy"]["halting"], "min_layer": 2}
    decoder = Decoder(
        load(family, "adaptive" if "amq" in parts[mix] else "int8"), QuickSilverConfig.from_dict(parts[mix])
    )
    depths, bits = set(), set()
    with testing.use_backend(backend):
        by_step, by_pass = decoder.new_cache(3, 20), decoder.new_cache(3, 20)
        for cache in (by_step, by_pass):
            at = torch.arange(4).repeat(3)
            decoder.forward(tokens(12, seed=5), at, torch.arange(3).repeat_interleave(4), cache)
        for step, sequences in enumerate([[0, 1, 2], [1], [0, 2], [0, 1, 2], [2, 0]] * 4):
            ids = tokens(len(sequences), seed=50 + step).tolist()
            at = [by_pass.next_position[s] for s in sequences]
            stats, want_stats = GenerationStats(), GenerationStats()
            got = decoder.step(ids, at, sequences, by_step, stats)
            want = decoder.forward(
                torch.tensor(ids), torch.tensor(at), torch.tensor(sequences), by_pass, stats=want_stats
            )
            assert torch.equal(got, want)
            assert stats.to_dict() == want_stats.to_dict()
            assert by_step.next_position == by_pass.next_position
            depths |= set(stats.depth_histogram)
            bits |= set(stats.bits_histogram)
    assert torch.equal(by_step.lengths, by_pass.lengths)
    assert (min(depths) < decoder.model.spec.num_layers) == (mix not in ("off", "amq")), depths
    assert (4 in bits) == ("amq" in parts[mix])


def test_a_step_refuses_what_a_pass_refuses(load) -> None:
    decoder = Decoder(load("llama", "int8"), QuickSilverConfig())
    cache = decoder.new_cache(2, 3)
    for ids, at, sequence, error in (
        ([900_000], [0], [0], IndexError),
        ([5], [1], [0], ValueError),
        ([5], [0], [2], ValueError),
    ):
        with pytest.raises(error):
            decoder.step(ids, at, sequence, cache, GenerationStats())
    assert cache.next_position == [0, 0] and not cache.lengths.any()
    for position in range(3):
        decoder.step([5], [position], [1], cache, GenerationStats())
    with pytest.raises(ValueError, match="holds 3 tokens"):
        decoder.step([5], [3], [1], cache, GenerationStats())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_steps_equal_one_pass_to_the_bit(load, family: str, mix: str, backend: str) -> None:
    config = config_of(mix, family)
    precisions = ["adaptive"] if config.amq else ["int8", "int4"]
    with testing.use_backend(backend):
        for precision in precisions:
            decoder = Decoder(load(family, precision), config)
            ids = tokens(40, seed=3)
            whole = one_pass(decoder, ids)
            for cuts in (list(range(1, 40)), [7, 8, 30]):
                assert torch.equal(in_steps(decoder, ids, cuts), whole), f"{precision}, cuts {cuts[:3]}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.usefixtures("two_threads")
def test_later_tokens_change_no_earlier_bit(load, family: str, mix: str) -> None:
    config = config_of(mix, family)
    decoder = Decoder(load(family, "adaptive"), config)
    ids = tokens(40, seed=4)
    whole = one_pass(decoder, ids)
    for cut in (3, 7, 20, 39):
        other = torch.cat((ids[:cut], tokens(40 - cut, seed=100 + cut)))
        assert torch.equal(one_pass(decoder, other)[:cut], whole[:cut])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.usefixtures("two_threads")
def test_a_sequence_does_not_feel_its_batch(load, family: str, mix: str) -> None:
    config = config_of(mix, family)
    decoder = Decoder(load(family, "adaptive"), config)
    lengths = [21, 1, 40, 9]
    rows = [tokens(n, seed=n) for n in lengths]
    cache = decoder.new_cache(4, 48)
    order = [2, 0, 3, 1]
    got = decoder.forward(
        torch.cat([rows[i] for i in order]),
        torch.cat([torch.arange(lengths[i]) for i in order]),
        torch.cat([torch.full((lengths[i],), i) for i in order]),
        cache,
    ).split([lengths[i] for i in order])
    for i, part in zip(order, got, strict=True):
        assert torch.equal(part, one_pass(decoder, rows[i]))
    # and on with a step of three of them
    going = [0, 2, 3]
    step = decoder.forward(
        torch.tensor([5, 6, 7]), torch.tensor([lengths[i] for i in going]), torch.tensor(going), cache
    )
    for i, logits in zip(going, step, strict=True):
        alone = one_pass(decoder, torch.cat((rows[i], torch.tensor([{0: 5, 2: 6, 3: 7}[i]]))))
        assert torch.equal(logits, alone[-1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["int8", "int4", "adaptive"])
@pytest.mark.parametrize("kv_cache_dtype", ["fp16", "int8"])
def test_fused_stages_equal_composed_ones(load, family: str, precision: str, kv_cache_dtype: str) -> None:
    """Stage by stage from the same input, since one rounding of an activation to the other side grows with depth. An
    INT8 cache's entries may round to the other side too."""
    model = load(family, precision)
    ids, at = tokens(33, seed=5), torch.arange(33, dtype=torch.int32)
    decoder = Decoder(model, QuickSilverConfig(), kv_cache_dtype)
    active = torch.tensor([0, 1, 4, 5, 6, 20, 31, 32], dtype=torch.int32)
    bits = torch.where(torch.arange(33) % 3 == 0, 4, 8).int() if precision == "adaptive" else None
    hidden = decoder.embed(ids, at)
    compared: dict[type[Stages], list[torch.Tensor]] = {}
    for kind in (CpuStages, ComposedStages):
        stages, cache = kind(model), decoder.new_cache(1, 40)
        got = compared[kind] = []
        with testing.use_backend("reference" if kind is ComposedStages else CPU_BACKENDS[-1]):
            for index, layer in enumerate(cache.layers):
                rows = Rows(hidden * (index + 1), at, torch.zeros_like(at), active, bits)
                stages.begin(rows)
                stages.attention_input(index, layer, None)
                got += [stages.queries().clone(), layer.keys(layer.slots(0))]
                stages.attention(index, layer)
                stages.attention_output(index)
                stages.mlp_input(index)
                stages.mlp_output(index)
                got.append(rows.hidden)
            got.append(stages.head(active))
    for native, composed in zip(*compared.values(), strict=True):
        assert (native - composed).norm() / composed.norm() < (8e-3 if kv_cache_dtype == "int8" else 4e-3)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("backend", ["native", "composed"])
def test_identities_between_counts(load, mix: str, backend: str) -> None:
    config = config_of(mix, trace=True)
    decoder = Decoder(load("llama", "adaptive"), config)
    ids = tokens(40, seed=6)
    stats, cache = GenerationStats(), decoder.new_cache(1, 40)
    with testing.use_backend("reference" if backend == "composed" else f"cpu-{_C.isa()}"):
        in_steps(decoder, ids, [20, 21, 22], cache, stats=stats)
    layers = decoder.model.spec.num_layers
    depth = sum(layer * count for layer, count in stats.depth_histogram.items())
    assert sum(stats.depth_histogram.values()) == 40 == len(stats.trace)
    assert stats.layers_full == 40 * layers
    assert stats.layers_run == depth + stats.layers_recomputed == sum(stats.bits_histogram.values())
    assert stats.kv_entries_written + stats.kv_entries_skipped + stats.kv_entries_fused == stats.layers_full
    if config.fusion is None:
        assert stats.kv_entries_written == sum(int(layer.lengths.sum()) for layer in cache.layers)
    if config.amq is not None:
        assert set(stats.bits_histogram) == {4, 8}, "the case must choose both"
    if mix == "off":
        assert stats.flops == stats.flops_full and stats.kv_entries_skipped == 0
    assert [record["token"] for record in stats.trace] == ids.tolist()
    assert sum(record["depth"] for record in stats.trace) == depth


def test_native_and_composed_count_the_same_work(load) -> None:
    for mix in ("off", "skip", "propagate", "fusion-skip", "amq", "recompute"):
        counts = []
        for backend in ("reference", f"cpu-{_C.isa()}"):
            decoder = Decoder(load("llama", "adaptive"), config_of(mix))
            stats = GenerationStats()
            with testing.use_backend(backend):
                one_pass(decoder, tokens(40, seed=8), stats=stats)
            counts.append((stats.flops, stats.weight_bytes_read, stats.layers_run))
        assert counts[0] == counts[1], mix


def test_work_falls_with_depth(load) -> None:
    model = load("llama", "int8")
    full, cut = GenerationStats(), GenerationStats()
    ids = tokens(40, seed=9)
    one_pass(Decoder(model, QuickSilverConfig()), ids, stats=full)
    deep_halt = {"halting": {"drift_threshold": 1e6, "min_layer": 2, "sink_tokens": 0}}
    one_pass(Decoder(model, QuickSilverConfig.from_dict(deep_halt)), ids, stats=cut)
    assert cut.depth_histogram == {2: 40} and cut.kv_entries_written == 80
    assert cut.flops < 0.75 * full.flops and cut.weight_bytes_read < 0.8 * full.weight_bytes_read
    assert cut.flops_full == full.flops_full == full.flops


def test_overrides_sinks_and_minimum_layer(load) -> None:
    decoder = Decoder(
        load("llama", "int8"),
        QuickSilverConfig.from_dict(
            {"halting": {"drift_threshold": 0.0, "min_layer": 2, "sink_tokens": 3}, "trace": True}
        ),
    )
    overrides = torch.zeros(10, dtype=torch.int8)
    overrides[[1, 5, 7]] = 1
    stats = GenerationStats()
    one_pass(decoder, tokens(10, seed=10), stats=stats, overrides=overrides)
    assert [r["depth"] for r in stats.trace] == [5, 5, 5, 5, 5, 2, 5, 2, 5, 5]
    never = Decoder(decoder.model, QuickSilverConfig.from_dict({"halting": {"drift_threshold": 1e9, "sink_tokens": 0}}))
    stats = GenerationStats()
    one_pass(never, tokens(10, seed=10), stats=stats, overrides=torch.full((10,), -1, dtype=torch.int8))
    assert stats.depth_histogram == {5: 10}


def test_recompute_leaves_exact_entries(load) -> None:
    """A token that never halts sees what it would see at full depth, whoever halted before it."""
    model = load("llama", "int8")
    config = QuickSilverConfig.from_dict(
        {"halting": {"drift_threshold": 1e9, "sink_tokens": 0, "kv_policy": "recompute"}}
    )
    ids = tokens(20, seed=11)
    overrides = torch.zeros(20, dtype=torch.int8)
    overrides[-1] = -1
    got = in_steps(Decoder(model, config), ids[:-1], list(range(1, 19)))
    assert not torch.equal(got, one_pass(Decoder(model, QuickSilverConfig()), ids[:-1]))
    decoder, cache = Decoder(model, config), None
    cache = decoder.new_cache(1, 20)
    in_steps(decoder, ids[:-1], list(range(1, 19)), cache)
    last = decoder.forward(ids[-1:], torch.tensor([19]), torch.tensor([0]), cache, overrides=overrides[-1:])
    assert torch.equal(last, one_pass(Decoder(model, QuickSilverConfig()), ids)[-1:])


def test_prompt_fusion_shortens_the_prompt_and_spares_the_newest(load) -> None:
    model = load("llama", "int8")
    config = QuickSilverConfig.from_dict({"fusion": {"layer": 2, "threshold": 1e9, "max_group": 3}})
    decoder = Decoder(model, config)
    ids, want = tokens(11, seed=12), torch.zeros(11, dtype=torch.bool)
    want[-1] = True
    stats, cache = GenerationStats(), decoder.new_cache(1, 12)
    at = torch.arange(11)
    logits = decoder.forward(ids, at, torch.zeros_like(at), cache, logits=want, stats=stats)
    assert logits.shape[0] == 1 and logits.isfinite().all()
    assert stats.tokens_fused == 6  # ten tokens in groups of 3, 3, 3 and 1; the newest alone
    assert [int(layer.lengths[0]) for layer in cache.layers] == [11, 11, 5, 5, 5]
    assert cache.layers[2].positions.view(-1)[:5].tolist() == [2, 5, 8, 9, 10]
    # Where all logits are asked for, there is nothing to fuse.
    stats = GenerationStats()
    assert torch.equal(one_pass(decoder, ids, stats=stats), one_pass(Decoder(model, QuickSilverConfig()), ids))
    assert stats.tokens_fused == 0


@pytest.mark.parametrize("weights", ["uniform", "norm", "attention"])
def test_prompt_fusion_equals_its_definition(load, weights: str) -> None:
    """Fusing by hand at the layer's input, then running the layers above on the shorter sequence."""
    from quicksilver_ext.kernels import reference

    model = load("llama", "fp32")
    ids, layer = tokens(9, seed=13), 2
    config = QuickSilverConfig.from_dict(
        {"fusion": {"layer": layer, "threshold": 1e9, "max_group": 2, "weights": weights}}
    )
    want = torch.zeros(9, dtype=torch.bool)
    want[-1] = True
    got = one_pass(Decoder(model, config), ids, logits=want)

    off = Decoder(model, QuickSilverConfig())
    cache, stages, at = off.new_cache(1, 9), ComposedStages(model), torch.arange(9, dtype=torch.int32)
    rows = Rows(off.embed(ids, at), at, torch.zeros_like(at), at.clone())
    stages.begin(rows)
    mass = torch.ones(9)
    for index in range(model.spec.num_layers):
        if index == layer:
            weight = {"uniform": torch.ones(9), "norm": rows.hidden.norm(dim=-1), "attention": mass}[weights]
            group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4], dtype=torch.int32)
            fused = reference.fusion_reduce(rows.hidden, weight, group)
            keep = torch.tensor([1, 3, 5, 7, 8], dtype=torch.int32)
            stages.begin(Rows(fused, at[keep], torch.zeros(5, dtype=torch.int32), torch.arange(5, dtype=torch.int32)))
        stages.attention_input(index, cache.layers[index], None)
        stages.attention(index, cache.layers[index])
        if index == layer - 1:
            spec = model.spec
            keys = cache.layers[index].key.transpose(1, 2).flatten(0, 1)[:9]
            keys = keys.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1)
            scores = torch.einsum("qhd,khd->hqk", stages.queries(), keys) * spec.attention_scale
            scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
            mass = torch.softmax(scores, -1).mean(0).sum(0)
        stages.attention_output(index)
        stages.mlp_input(index)
        stages.mlp_output(index)
    wanted = stages.head(torch.tensor([4]))
    assert ((got - wanted).norm() / wanted.norm()) < 1e-5


def test_translated_states(load) -> None:
    model = load("llama", "fp32")
    d, layers = model.spec.hidden_size, model.spec.num_layers
    generator = torch.Generator().manual_seed(14)
    tensors = {}
    for layer in range(1, layers):
        tensors[f"translator.{layer}.weight"] = torch.randn(d, d, generator=generator) * 0.1
        tensors[f"translator.{layer}.bias"] = torch.randn(d, generator=generator)
    halting = {"drift_threshold": 1e9, "sink_tokens": 0, "min_layer": 2, "state": "translated"}
    decoder = Decoder(model, QuickSilverConfig.from_dict({"halting": halting}, tensors))
    frozen = Decoder(model, QuickSilverConfig.from_dict({"halting": {**halting, "state": "frozen"}}))
    ids = tokens(6, seed=15)
    got = one_pass(decoder, ids)

    class Capture:
        hidden: torch.Tensor

    stages, capture = frozen.runner.stages(), Capture()
    original = stages.head

    def head(index: torch.Tensor) -> torch.Tensor:
        capture.hidden = stages.rows.hidden.clone()
        return original(index)

    stages.head = head  # type: ignore[method-assign]
    one_pass(frozen, ids)
    final = capture.hidden @ tensors["translator.2.weight"].T + tensors["translator.2.bias"]
    normed = final / (final.square().mean(-1, keepdim=True) + model.final_norm.eps).sqrt() * model.final_norm.weight
    want = normed @ model.head.weight.T
    assert ((got - want).norm() / want.norm()) < 1e-5


def test_probe_entropy(load) -> None:
    model = load("llama", "int8")
    tensors = {}
    for layer in range(1, model.spec.num_layers):
        tensors[f"probe.{layer}.weight"] = torch.zeros(model.spec.hidden_size)
        tensors[f"probe.{layer}.bias"] = torch.tensor(5.0 if layer < 3 else 1.0)
    halting = {"drift_threshold": 1e9, "sink_tokens": 0, "entropy_threshold": 2.0, "entropy_source": "probe"}
    stats = GenerationStats()
    one_pass(
        Decoder(model, QuickSilverConfig.from_dict({"halting": halting}, tensors)), tokens(6, seed=16), stats=stats
    )
    assert stats.depth_histogram == {3: 6}


@pytest.mark.parametrize("kv_cache_dtype", ["fp16", "int8"])
def test_reclaiming_expired_entries_changes_no_bit(load, kv_cache_dtype: str, monkeypatch) -> None:
    from quicksilver_ext.engine import kv_cache as cache_module

    config = QuickSilverConfig.from_dict({"fusion": {"layer": 1, "threshold": 1e9, "scope": "cache"}})
    decoder = Decoder(load("llama", "int8"), config, kv_cache_dtype)
    ids = tokens(40, seed=17)
    results = []
    for after in (1, 10**9):
        monkeypatch.setattr(cache_module, "RECLAIM_AFTER", after)
        cache = decoder.new_cache(1, 40, keeps=False)
        results.append((in_steps(decoder, ids, list(range(1, 40)), cache), int(cache.layers[-1].lengths[0])))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] <= 12 < results[1][1]  # groups of four: about a quarter of the entries


def test_threads_change_no_bit(load) -> None:
    decoder = Decoder(load("llama", "adaptive"), config_of("all"))
    ids = tokens(90, seed=21)
    results = []
    for threads in (1, 2, 3):
        _C.set_threads(threads)
        results.append(one_pass(decoder, ids))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_long_inputs_in_chunks_equal_short_ones(load, kv_cache_dtype: str, monkeypatch) -> None:
    from quicksilver_ext.engine import batch

    decoder = Decoder(load("gpt2", "adaptive"), config_of("all", "gpt2"), kv_cache_dtype)
    ids = tokens(100, seed=18)
    whole = one_pass(decoder, ids)
    monkeypatch.setattr(batch, "CHUNK", 7)
    assert torch.equal(one_pass(decoder, ids), whole)


def test_a_dropped_sequence_leaves_its_place(load) -> None:
    decoder = Decoder(load("llama", "adaptive"), config_of("all"))
    cache = decoder.new_cache(2, 30)
    ids = tokens(30, seed=19)
    at = torch.arange(30)
    decoder.forward(ids, at, torch.ones_like(at), cache)
    cache.drop(1)
    other = tokens(30, seed=20)
    assert torch.equal(decoder.forward(other, at, torch.ones_like(at), cache), one_pass(decoder, other))


@pytest.mark.parametrize(
    ("ids", "positions", "sequence", "error", "match"),
    [
        ([], [], [], ValueError, "empty"),
        ([5, 2000], [0, 1], [0, 0], IndexError, "input_ids"),
        ([5, -1], [0, 1], [0, 0], IndexError, "input_ids"),
        ([5, 5], [0, 2], [0, 0], ValueError, "positions"),
        ([5], [1], [0], ValueError, "positions"),
        ([5, 5, 5], [0, 0, 1], [0, 1, 0], ValueError, "sequence"),
        ([5], [0], [2], ValueError, "sequence"),
        ([5] * 9, list(range(9)), [0] * 9, ValueError, "cache holds 8"),
    ],
)
def test_bad_rows_are_refused_before_anything_is_written(load, ids, positions, sequence, error, match) -> None:
    decoder = Decoder(load("llama", "int8"), QuickSilverConfig())
    cache = decoder.new_cache(2, 8)
    with pytest.raises(error, match=match):
        decoder.forward(*(torch.tensor(column, dtype=torch.long) for column in (ids, positions, sequence)), cache)
    assert all(int(layer.lengths.sum()) == 0 for layer in cache.layers) and cache.next_position == [0, 0]


def test_amq_needs_both_planes(load) -> None:
    with pytest.raises(ValueError, match="adaptive"):
        Decoder(load("llama", "int8"), config_of("amq"))
