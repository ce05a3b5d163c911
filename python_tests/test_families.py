"""Every family and variant: against transformers, its GGUF file, plain arithmetic, and with every mechanism."""

from __future__ import annotations

import dataclasses
from functools import cache as kept

import pytest
import torch
from decoding import Decoder, one_pass
from models import VARIANTS, dense_logits, logits_of, random_model, write_gguf
from naive import NaiveDecoder
from test_decoder import MIXES, ORACLE_MIXES, in_steps, mixes_at, tokens

from quicksilver_ext import QuickSilverConfig, QuickSilverForCausalLM
from quicksilver_ext.architectures.loading import BY_GGUF, BY_MODEL_TYPE, load_model
from quicksilver_ext.engine.observer import LayerEvent, Observer
from quicksilver_ext.kernels import testing
from quicksilver_ext.stats import GenerationStats
from quicksilver_ext.weights.model import Model

NEW = [variant for variant in VARIANTS if variant not in ("gpt2", "llama")]  # test_decoder.py has these two
IN_GGUF = [variant for variant in VARIANTS if variant not in ("gpt2-inverse", "gpt2-relu", "gpt2-gelu", "qwen2-window")]


@kept
def load(variant: str, precision: str) -> Model:
    return load_model(random_model(variant, 7), precision, 64)


def middle(values: list[float]) -> float:
    """A threshold that about half of the values pass, in the widest gap there: rounding doesn't decide."""
    ordered = sorted(values)
    some = range(2 * len(ordered) // 5, 3 * len(ordered) // 5)
    at = max(some, key=lambda i: ordered[i + 1] - ordered[i])
    return (ordered[at] + ordered[at + 1]) / 2


@kept
def levels(variant: str) -> dict[str, float]:
    """Thresholds in the middle of what the model's tokens have."""

    class States(Observer):
        wants_states = True

        def layer(self, event: LayerEvent) -> None:
            assert event.before is not None and event.after is not None
            states.append((event.before, event.after))

    model, states = load(variant, "fp32"), []
    decoder = Decoder(model, QuickSilverConfig())
    one_pass(decoder, tokens(24, seed=4), observer=States())
    before, after = (torch.cat(parts) for parts in zip(*states[:-1], strict=True))
    drift, entropy = (after - before).norm(dim=-1), entropy_of(after)
    head = entropy_of(logits_of(model, after))
    first = states[1][0]
    neighbour = (first[1:] - first[:-1]).norm(dim=-1) / first[:-1].norm(dim=-1)
    width, vocabulary = (torch.log2(torch.tensor(float(n))) for n in (first.shape[1], model.spec.vocab_size))
    return {
        "drift": middle((drift / before.norm(dim=-1)).tolist()),
        "absolute": middle(drift.tolist()),
        "latent": middle(entropy.tolist()),
        "head": middle(head.tolist()),
        "neighbour": middle(neighbour.tolist()),
        "amq": middle((entropy_of(first) / width).tolist()),
        "amq-head": middle((entropy_of(logits_of(model, first)) / vocabulary).tolist()),
    }


def entropy_of(x: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=x).entropy() / torch.log(torch.tensor(2.0))


def config_of(variant: str, mix: str) -> QuickSilverConfig:
    return QuickSilverConfig.from_dict(mixes_at(levels(variant))[mix])


# --- without mechanisms -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_text_equal_transformers(variant: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = random_model(variant, 3)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = QuickSilverForCausalLM.from_pretrained(folder, precision="fp32")
    rows, longest = [tokens(length, seed=length) for length in (29, 4, 41)], 41
    ids = torch.zeros(3, longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    logits = ours(ids, attention_mask=mask).logits
    text = ours.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False).sequences[:, longest:]
    for i, row in enumerate(rows):
        want = reference(row[None]).logits[0]
        assert (logits[i, longest - len(row) :] - want).norm() < 2e-4 * want.norm()
        want = reference.generate(row[None], max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(row) :]
        assert torch.equal(text[i, : len(want)], want)


@pytest.mark.parametrize("variant", IN_GGUF)
def test_gguf_files_equal_their_folders(variant: str) -> None:
    folder = random_model(variant, 3)
    metadata, vectors = {}, {}
    if variant == "llama3":  # a converter stores the scaling as a divisor for each frequency
        model = load_model(folder, "fp32")
        plain = 1.0 / 5e5 ** (torch.arange(0, model.spec.head_size, 2) / model.spec.head_size)
        scaled = torch.atan2(model.rotary_sin[1], model.rotary_cos[1])
        vectors["rope_freqs.weight"] = plain / scaled
    file = write_gguf(folder, metadata=metadata, vectors=vectors)
    got, want = load_model(file, "fp32"), load_model(folder, "fp32")
    ignored = {"name": "", "family": "", "pad_token_id": None}
    assert dataclasses.replace(got.spec, **ignored) == dataclasses.replace(want.spec, **ignored)
    ids = tokens(40, seed=8)
    assert torch.allclose(dense_logits(got, ids), dense_logits(want, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", BY_GGUF)
def test_gguf_names_are_the_formats_own(name: str) -> None:
    """Against the gguf package's table of Hugging Face's names, which its converter uses."""
    import gguf

    family = BY_GGUF[name]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table = gguf.get_tensor_name_map(architecture, 1)
    for short, original in family.gguf_tensors.items():
        want = short if "{}" not in original else f"blk.0.{short}"
        assert table.get_name(original.format(0)) == want


@pytest.mark.parametrize("variant", NEW)
@pytest.mark.parametrize(("precision", "bits", "bound"), [("int8", 8, 0.03), ("int4", 4, 0.03), ("bf16", 8, 0.02)])
def test_packed_weights_equal_plain_arithmetic(variant: str, precision: str, bits: int, bound: float) -> None:
    """Apart from the rounding of activations to 8 bits: the same weights, dequantized."""
    model, ids = load(variant, precision), tokens(40, seed=9)
    got, want = one_pass(Decoder(model, QuickSilverConfig()), ids), dense_logits(model, ids, bits)
    assert (got - want).norm() < bound * want.norm()


# --- with mechanisms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", NEW)
@pytest.mark.parametrize("mix", ORACLE_MIXES)
def test_equals_the_naive_oracle(variant: str, mix: str) -> None:
    model, config, ids = load(variant, "fp32"), config_of(variant, mix), tokens(24, seed=4)
    naive, stats = NaiveDecoder(model, config), GenerationStats()
    want = torch.stack([naive.feed(int(i)) for i in ids])
    got = one_pass(Decoder(model, config), ids, stats=stats)
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).max() < 1e-4
    assert sorted(stats.depth_histogram.elements()) == sorted(token.depth for token in naive.tokens)
    assert stats.tokens_fused == naive.fused
    if config.halting is not None:
        assert stats.layers_run - stats.layers_recomputed < stats.layers_full, "the case must halt somebody"
    if config.fusion is not None:
        assert stats.tokens_fused > 0, "the case must fuse somebody"


@pytest.mark.parametrize("variant", NEW)
@pytest.mark.parametrize("mix", MIXES)
def test_steps_passes_and_truncated_caches_agree_to_the_bit(variant: str, mix: str) -> None:
    config = config_of(variant, mix)
    decoder, ids = Decoder(load(variant, "adaptive" if config.amq else "int8"), config), tokens(40, seed=3)
    whole = one_pass(decoder, ids)
    for cuts in (list(range(1, 40)), [7, 8, 30]):
        cache = decoder.new_cache(1, 40)
        assert torch.equal(in_steps(decoder, ids, cuts, cache), whole)
        cache.truncate(0, 19)
        at = torch.arange(19, 40)
        assert torch.equal(decoder.forward(ids[19:], at, torch.zeros_like(at), cache), whole[19:])
    by_step, got = decoder.new_cache(1, 40), []
    decoder.forward(ids[:30], torch.arange(30), torch.zeros(30, dtype=torch.int64), by_step)
    for position in range(30, 40):
        got.append(decoder.step([int(ids[position])], [position], [0], by_step))
    assert torch.equal(torch.cat(got), whole[30:])


@pytest.mark.parametrize("variant", NEW)
@pytest.mark.parametrize("mix", ["off", "skip", "fusion", "all"])
def test_backends_agree(variant: str, mix: str) -> None:
    """CUDA's kernels, emulated, and the CPU's, by the naive oracle's tolerance; a window is left by then."""
    config = config_of(variant, mix)
    model, ids = load(variant, "adaptive" if config.amq else "int8"), tokens(17, seed=3)
    want = one_pass(Decoder(model, config), ids)
    names = [name for name in testing.backends() if name.startswith("cuda")]
    if not names:
        pytest.skip("this build has no emulator")
    for name in names:
        with testing.use_backend(name):
            got = one_pass(Decoder(model, config), ids)
        assert (got - want).norm() < 0.03 * want.norm(), name


def test_every_family_is_tested() -> None:
    tested = {load(variant, "fp32").spec.family for variant in VARIANTS}
    assert tested == set(BY_MODEL_TYPE)
