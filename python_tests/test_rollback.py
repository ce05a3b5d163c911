"""Caches that give tokens back, sequences that come and go, plans that share weights, and who listens."""

from __future__ import annotations

from functools import cache as kept

import pytest
import torch
from decoding import Decoder, one_pass
from models import random_llama
from test_decoder import FAMILIES, MIXES, config_of, in_steps, tokens

from quicksilver_ext import QuickSilverConfig, QuickSilverForCausalLM
from quicksilver_ext.architectures.loading import load_model
from quicksilver_ext.engine.kv_cache import KVCache
from quicksilver_ext.engine.observer import LayerEvent, Observer
from quicksilver_ext.generation.loop import Session
from quicksilver_ext.stats import GenerationStats
from quicksilver_ext.weights.model import Model


@kept
def load(family: str, precision: str = "adaptive") -> Model:
    return load_model(FAMILIES[family](7), precision, 64)


def poison(cache: KVCache) -> None:
    """Fills what no entry holds, so that whoever reads it shows."""
    for index, layer in enumerate(cache.layers):
        free = layer.free_blocks[int(layer.blocks_used) :].long()
        for array in layer.arrays():
            array[free] = torch.nan if array.is_floating_point() else 99
        layer.positions[free] = 0
        assert int(layer.blocks_used) + len(free) == len(layer.free_blocks), index


# --- taking tokens back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mix", MIXES)
def test_truncated_is_never_having_run(family: str, mix: str, kernels: str) -> None:
    """From every kind of place, in one pass and in steps, by single rows and by many."""
    if kernels == "cuda-emulated":
        pytest.skip("every instruction is run by hand: test_cuda.py has one")
    decoder = Decoder(load(family), config_of(mix, family))
    first, second = tokens(40, seed=31), tokens(24, seed=32)
    for position in (0, 1, 2, 17, 39):
        text = torch.cat((first[:position], second))
        whole = one_pass(decoder, text)
        cache = decoder.new_cache(1, 80)
        in_steps(decoder, first, [9, 10, 11, 30], cache)
        cache.truncate(0, position)
        poison(cache)
        at = torch.arange(position, len(text))
        rest = decoder.forward(second[: len(at)], at, torch.zeros_like(at), cache)
        assert torch.equal(rest, whole[position:]), position
        cache.truncate(0, position)  # and once more, now step by step
        for i in range(position, position + 6):
            row = decoder.step([int(text[i])], [i], [0], cache)
            assert torch.equal(row[0], whole[i]), (position, i)


@pytest.mark.parametrize("mix", ["off", "skip", "fusion", "all", "all-recompute"])
def test_other_sequences_do_not_feel_a_truncation(mix: str) -> None:
    decoder = Decoder(load("llama"), config_of(mix))
    rows = [tokens(20, seed=33), tokens(31, seed=34)]
    cache = decoder.new_cache(2, 60)
    for s, row in enumerate(rows):
        at = torch.arange(len(row))
        decoder.forward(row, at, torch.full_like(at, s), cache)
    cache.truncate(0, 7)
    more = tokens(10, seed=35)
    at = torch.arange(31, 41)
    got = decoder.forward(more, at, torch.ones_like(at), cache)
    assert torch.equal(got, one_pass(decoder, torch.cat((rows[1], more)))[31:])


def test_blocks_are_used_again() -> None:
    """A cache for two sequences serves any number of them, one after the other, at full length."""
    decoder = Decoder(load("llama"), config_of("all"))
    cache = decoder.new_cache(2, 100)
    for turn in range(6):
        s = turn % 2
        cache.drop(s)
        ids = tokens(100, seed=40 + turn)
        at = torch.arange(100)
        assert torch.equal(decoder.forward(ids, at, torch.full_like(at, s), cache), one_pass(decoder, ids))
    for layer in cache.layers:
        used = layer.block_table[layer.block_table >= 0].tolist()
        free = layer.free_blocks[int(layer.blocks_used) :].tolist()
        assert sorted(used + free) == list(range(len(layer.free_blocks))), "a block was lost or given out twice"


def test_truncate_names_what_is_wrong() -> None:
    cache = Decoder(load("llama"), QuickSilverConfig()).new_cache(2, 8)
    for arguments, error, match in (
        ((2, 0), IndexError, "sequence must be from 0 to 1; got 2"),
        ((0, -1), IndexError, "position must be at least 0"),
        ((0, 1.5), TypeError, "position must be a whole number"),
        ((True, 0), TypeError, "sequence must be a whole number"),
    ):
        with pytest.raises(error, match=match):
            cache.truncate(*arguments)
    cache.truncate(0, 5)  # there is nothing beyond
    assert cache.tokens == [[], []]


# --- a cache in a user's hands ---------------------------------------------------------------------------------------


@kept
def lm(mix: str = "off") -> QuickSilverForCausalLM:
    config = config_of(mix)
    precision = "adaptive" if config.amq else "int8"
    return QuickSilverForCausalLM.from_pretrained(random_llama(7), precision=precision, quicksilver_config=config)


@pytest.mark.parametrize("mix", ["off", "skip", "recompute", "fusion", "all"])
def test_a_chat_pays_for_its_own_tokens_only(mix: str) -> None:
    model = lm(mix)
    first, more = tokens(30, seed=50)[None], tokens(9, seed=51)[None]
    cache = model.new_cache(sequences=1, capacity=128)
    one = model.generate(first, max_new_tokens=8, eos_token_id=-1, cache=cache)
    assert one.stats.prompt_tokens == 30 and len(cache.tokens[0]) == 37
    text = torch.cat((one.sequences, more), 1)
    two = model.generate(text, max_new_tokens=8, eos_token_id=-1, cache=cache)
    assert two.stats.prompt_tokens == 10  # the last new token was never run
    assert torch.equal(two.sequences, model.generate(text, max_new_tokens=8, eos_token_id=-1).sequences)
    # Another text: the common beginning stays, the rest is taken back.
    other = torch.cat((text[:, :20], tokens(5, seed=52)[None]), 1)
    three = model.generate(other, max_new_tokens=8, eos_token_id=-1, cache=cache)
    assert three.stats.prompt_tokens == 5
    assert torch.equal(three.sequences, model.generate(other, max_new_tokens=8, eos_token_id=-1).sequences)
    # The same text again: its last token alone, for the logits.
    assert model.generate(other, max_new_tokens=1, cache=cache).stats.prompt_tokens == 1


def test_a_cache_that_does_not_fit_is_refused() -> None:
    model, ids = lm(), tokens(10, seed=53)[None]
    with pytest.raises(TypeError, match="cache must be one that new_cache made"):
        model.generate(ids, cache=object())
    with pytest.raises(ValueError, match="room for 1 sequences of 12 tokens; wanted 1 of 17"):
        model.generate(ids, max_new_tokens=8, cache=model.new_cache(1, 12))
    with pytest.raises(ValueError, match="room for 1 sequences"):
        model.generate(ids.repeat(2, 1), max_new_tokens=2, cache=model.new_cache(1, 64))
    with pytest.raises(ValueError, match="made for a config with other mechanisms"):
        model.generate(ids, max_new_tokens=2, cache=lm("fusion").new_cache(1, 64))
    for sizes in ((0, 5), (1, 0), (1, 2.5), (True, 5)):
        with pytest.raises(ValueError, match="must be a whole number"):
            model.new_cache(*sizes)


def test_a_failed_call_leaves_the_next_one_whole() -> None:
    model, ids = lm(), tokens(10, seed=54)[None]
    want = model.generate(ids, max_new_tokens=6).sequences

    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        model.generate(ids, max_new_tokens=6, logits_processor=[fail])
    assert torch.equal(model.generate(ids, max_new_tokens=6).sequences, want)


# --- plans over the same weights -------------------------------------------------------------------------------------


def test_another_config_for_a_call_or_for_good() -> None:
    off = QuickSilverForCausalLM.from_pretrained(random_llama(7), precision="adaptive")
    config, ids = config_of("skip"), tokens(30, seed=55)[None]
    other = off.with_config(config)
    assert other.model is off.model and other.runner is off.runner and other.quicksilver_config is config
    assert off.quicksilver_config == QuickSilverConfig()
    want = QuickSilverForCausalLM.from_pretrained(random_llama(7), precision="adaptive", quicksilver_config=config)
    assert torch.equal(other(ids).logits, want(ids).logits) and not torch.equal(off(ids).logits, want(ids).logits)
    assert torch.equal(off(ids, quicksilver_config=config).logits, want(ids).logits)
    assert torch.equal(off.score(ids, quicksilver_config=config), want.score(ids))
    got = off.generate(ids, max_new_tokens=9, quicksilver_config=config)
    ours = want.generate(ids, max_new_tokens=9)
    assert torch.equal(got.sequences, ours.sequences) and got.stats.layers_run == ours.stats.layers_run
    with pytest.raises(TypeError, match="quicksilver_config must be a QuickSilverConfig; got dict"):
        off(ids, quicksilver_config={"halting": None})
    with pytest.raises(ValueError, match="min_layer is 99"):
        off.with_config(QuickSilverConfig.from_dict({"halting": {"drift_threshold": 0.1, "min_layer": 99}}))


def test_what_users_of_transformers_type() -> None:
    model = lm()
    assert model.device == torch.device("cpu") and model.dtype == torch.float16
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size) == (160, 5, 1003)
    assert model.generation_config.eos_token_id == 2 and model.generation_config.bos_token_id == 1
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(random_llama(7))
    assert model.num_parameters() == theirs.num_parameters()
    out = model.generate(tokens(5, seed=1)[None], max_new_tokens=2)
    assert out[0] is out.sequences and out["stats"] is out.stats and "trace" not in out
    sequences, _stats = out.to_tuple()
    assert sequences is out.sequences
    assert model(tokens(5, seed=1)[None])[0].shape == (1, 5, 1003)


# --- sequences that join and leave -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["off", "skip", "fusion", "all"])
def test_sequences_join_and_leave_between_steps(mix: str) -> None:
    """Whatever the company, each gets the logits of its own text alone."""
    decoder = Decoder(load("llama"), config_of(mix))
    session = Session(decoder.runner, decoder.plan, decoder.new_cache(3, 64))
    generator = torch.Generator().manual_seed(60)
    texts: dict[int, list[int]] = {}
    checked = 0
    for turn in range(24):
        free = [s for s in range(3) if s not in texts]
        fed: list[tuple[int, int]] = []
        for s in list(texts):
            if len(texts[s]) > 30 or torch.rand((), generator=generator) < 0.1:
                session.leave(s)
                del texts[s]
                continue
            new = tokens(1 + turn % 3, seed=100 * turn + s).tolist()
            session.feed(s, new, every=True)
            texts[s] += new
            fed.append((s, len(new)))
        if free:
            s = free[0]
            texts[s] = tokens(3 + turn % 9, seed=1000 + turn).tolist()
            assert session.admit(s, texts[s]) == len(texts[s])
            fed.append((s, 1))
        if not fed:
            continue
        logits = session.step()
        for (s, count), got in zip(fed, logits.split([count for _, count in fed]), strict=True):
            want = one_pass(decoder, torch.tensor(texts[s]))[-count:]
            assert torch.equal(got, want)
            checked += 1
    assert checked > 30


# --- observers -------------------------------------------------------------------------------------------------------


class Listener(Observer):
    def __init__(self, wants_states: bool = False) -> None:
        self.wants_states = wants_states
        self.events: list[LayerEvent] = []
        self.depth: list[int] = []

    def layer(self, event: LayerEvent) -> None:
        self.events.append(event)

    def end(self, depth: list[int]) -> None:
        self.depth += depth


@pytest.mark.parametrize("mix", ["off", "skip", "absolute", "entropy", "amq", "skip-amq"])
def test_a_step_in_one_launch_tells_what_the_loop_tells(mix: str) -> None:
    parts = {name: config_of(name) for name in ("skip", "amq")}
    config = QuickSilverConfig(parts["skip"].halting, None, parts["amq"].amq) if mix == "skip-amq" else config_of(mix)
    decoder = Decoder(load("llama"), config)
    ids = tokens(12, seed=70)
    heard = []
    for run in (decoder.step, decoder.forward):
        cache, listener = decoder.new_cache(1, 24), Listener()
        at = torch.arange(12)
        decoder.forward(ids, at, torch.zeros_like(at), cache)
        for i in range(6):
            row = ([int(ids[i])], [12 + i], [0])
            columns = row if run == decoder.step else [torch.tensor(column) for column in row]
            run(*columns, cache, observer=listener)
        heard.append(listener)
    step, loop = heard
    assert step.depth == loop.depth and len(step.events) == len(loop.events) > 5
    for a, b in zip(step.events, loop.events, strict=True):
        assert (a.layer, a.entries) == (b.layer, b.entries)
        for name in ("sequence", "positions", "bits", "halted"):
            assert torch.equal(getattr(a, name), getattr(b, name)), (a.layer, name)
        for name in ("drift", "entropy"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), equal_nan=True, rtol=1e-5, atol=1e-6)
    measured = torch.cat([event.drift for event in loop.events]).isfinite()
    assert bool(measured.any()) == (config.halting is not None)


@pytest.mark.parametrize("mix", MIXES)
def test_listening_changes_no_bit_and_no_count(mix: str) -> None:
    decoder = Decoder(load("llama"), config_of(mix))
    ids, stats, listener = tokens(30, seed=71), [GenerationStats(), GenerationStats()], Listener(wants_states=True)
    want = one_pass(decoder, ids, stats=stats[0])
    got = one_pass(decoder, ids, stats=stats[1], observer=listener)
    assert torch.equal(got, want) and stats[0].to_dict() == stats[1].to_dict()
    assert sum(len(event.positions) for event in listener.events) == stats[0].layers_run
    entries = sum(event.entries for event in listener.events)
    assert (
        entries <= stats[0].kv_entries_written
    )  # layers that nobody ran tell nothing, though halted rows leave entries
    first, last = listener.events[0], listener.events[-1]
    assert torch.equal(first.before, decoder.embed(ids, torch.arange(30)))
    assert last.after.shape == last.before.shape == (len(last.positions), decoder.model.spec.hidden_size)
    if decoder.config.fusion is not None:
        (grouped,) = [event for event in listener.events if event.group is not None]
        assert grouped.layer == decoder.config.fusion.layer and len(grouped.group.unique()) < len(grouped.positions)


# --- prompts in company ----------------------------------------------------------------------------------------------


def test_prompt_fusion_does_not_feel_the_batch() -> None:
    """Two prompts of 400 are more than one pass: where they are cut must not depend on each other."""
    config = QuickSilverConfig.from_dict({"fusion": {"layer": 1, "threshold": 0.98, "scope": "prompt"}})
    model = QuickSilverForCausalLM.from_pretrained(random_llama(7), precision="int8", quicksilver_config=config)
    ids = torch.stack([tokens(400, seed=80), tokens(400, seed=81)])
    both = model.generate(ids, max_new_tokens=4, eos_token_id=-1)
    alone = [model.generate(row[None], max_new_tokens=4, eos_token_id=-1) for row in ids]
    assert both.stats.tokens_fused == sum(each.stats.tokens_fused for each in alone) > 10
    for got, want in zip(both.sequences, alone, strict=True):
        assert torch.equal(got, want.sequences[0])
