"""The model object: logits and scores against transformers, padding that can't matter, loading and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TRAINED_GPT2, random_gpt2, random_llama
from test_generation import FAMILIES, ours, padded, prompts, run, theirs

from quicksilver_ext import QuickSilverConfig, QuickSilverForCausalLM
from quicksilver_ext import model as causal_lm

HALTING = {"drift_threshold": 0.85, "min_layer": 1, "sink_tokens": 2}


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_scores_equal_transformers(family: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "LOGITS_TOKENS", 10)  # so that passes begin in the middle of rows
    path, rows = FAMILIES[family](), prompts([37, 1, 64])
    ids, mask = padded(rows, side)
    logits, scores = ours(path)(ids, attention_mask=mask).logits, ours(path).score(ids, mask)
    real = mask.bool()
    assert logits.shape == (*ids.shape, 1003) and scores.shape == (3, ids.shape[1] - 1)
    assert not logits[~real].any() and not scores[~(real[:, 1:] & real[:, :-1])].any()
    for index, row in enumerate(rows):
        with torch.no_grad():
            want = theirs(path)(row[None]).logits[0]
        got = logits[index, real[index]]
        assert (got - want).norm() / want.norm() < 2e-4
        following = want.log_softmax(-1)[:-1].gather(1, row[1:, None]).squeeze(1)
        inside = real[index, 1:] & real[index, :-1]
        torch.testing.assert_close(scores[index, inside], following, atol=1e-3, rtol=1e-4)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.sampled_from(["left", "right", "both"]),
    st.booleans(),
    st.sampled_from(["fp16", "int8"]),
)
def test_neither_padding_nor_the_batch_changes_a_bit(
    lengths: list[int], side: str, halting: bool, kv_cache_dtype: str
) -> None:
    config = QuickSilverConfig.from_dict({"halting": HALTING} if halting else {})
    model = int8(random_llama(), config, kv_cache_dtype)
    rows = prompts(lengths, seed=len(lengths))
    ids, mask = padded(rows, side, pad=-1)
    logits = model(ids, mask).logits
    for index, row in enumerate(rows):
        assert torch.equal(logits[index, mask[index].bool()], model(row[None]).logits[0])


_INT8: dict[str, QuickSilverForCausalLM] = {}


def int8(path: Path, config: QuickSilverConfig, kv_cache_dtype: str | None = None) -> QuickSilverForCausalLM:
    key = f"{path} {config.to_dict()} {kv_cache_dtype}"
    if key not in _INT8:
        _INT8[key] = QuickSilverForCausalLM.from_pretrained(
            path, precision="int8", quicksilver_config=config, kv_cache_dtype=kv_cache_dtype
        )
    return _INT8[key]


@pytest.mark.parametrize("kv_cache_dtype", ["fp16", "int8"])
def test_steps_equal_one_pass(kv_cache_dtype: str) -> None:
    config = QuickSilverConfig.from_dict({"halting": {**HALTING, "drift_threshold": 0.7}})
    model = int8(random_gpt2(), config, kv_cache_dtype)
    output = run(model, prompts([21])[0][None], max_new_tokens=12, eos_token_id=-1)
    assert output.stats.mean_depth < 1, "the threshold should halt some token"
    scored = model(output.sequences[:, :-1]).logits[0, 20:]
    assert torch.equal(scored.argmax(-1), output.sequences[0, 21:])


def test_results_are_ordinary_tensors() -> None:
    """Made under inference_mode they could be neither changed in place nor used with autograd."""
    model, row = ours(random_llama()), prompts()[0][None]
    for tensor in (model(row).logits, model.score(row), run(model, row, max_new_tokens=2).sequences):
        assert not tensor.is_inference() and not tensor.requires_grad
        tensor += 1


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "adaptive"])
def test_a_saved_model_comes_back_with_its_precision_and_config(precision: str, tmp_path: Path) -> None:
    mechanisms: dict[str, Any] = {"halting": HALTING}
    if precision == "adaptive":
        mechanisms["amq"] = {"layer": 1, "entropy_threshold": 0.99}
    config = QuickSilverConfig.from_dict(mechanisms)
    model = QuickSilverForCausalLM.from_pretrained(
        random_llama(), precision=precision, group_size=32, quicksilver_config=config
    )
    model.save_pretrained(tmp_path / "saved")
    again = QuickSilverForCausalLM.from_pretrained(tmp_path / "saved")
    assert (again.model.precision, again.quicksilver_config) == (precision, config)
    ids, mask = padded(prompts())
    assert torch.equal(again(ids, mask).logits, model(ids, mask).logits)
    off = QuickSilverForCausalLM.from_pretrained(tmp_path / "saved", quicksilver_config=QuickSilverConfig())
    assert off.quicksilver_config == QuickSilverConfig()


def test_a_saved_model_keeps_its_tokenizer(tmp_path: Path) -> None:
    model = ours(TRAINED_GPT2)
    model.save_pretrained(tmp_path)
    text = "The for statement is used to"
    assert QuickSilverForCausalLM.from_pretrained(tmp_path).tokenizer(text) == model.tokenizer(text)


def test_precision_follows_the_config() -> None:
    amq = QuickSilverConfig.from_dict({"amq": {"layer": 1, "entropy_threshold": 0.5}})
    assert QuickSilverForCausalLM.from_pretrained(random_llama()).model.precision == "int8"
    adaptive = QuickSilverForCausalLM.from_pretrained(random_llama(), quicksilver_config=amq)
    assert adaptive.model.precision == "adaptive"
    for precision in ("fp32", "bf16", "int8", "int4"):
        with pytest.raises(ValueError, match=r"precision.*amq"):
            QuickSilverForCausalLM.from_pretrained("nowhere", precision=precision, quicksilver_config=amq)


def test_the_cache_follows_the_weights_unless_it_is_told() -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("int4", torch.float16)):
        model = QuickSilverForCausalLM.from_pretrained(random_llama(), precision=precision)
        assert model.new_cache(1, 1).layers[0].key.dtype == dtype
    model = QuickSilverForCausalLM.from_pretrained(random_llama(), precision="fp32", kv_cache_dtype="int8")
    assert model.new_cache(1, 1).layers[0].key.dtype == torch.int8
    ids = prompts()[2][None]
    got, want = model(ids).logits, ours(random_llama())(ids).logits
    assert 0 < (got - want).norm() / want.norm() < 3e-2


def test_bad_loading_arguments_are_named() -> None:
    path = random_llama()
    deep = QuickSilverConfig.from_dict({"halting": {**HALTING, "min_layer": 9}})
    for message, options in (
        ("device.*cuda", {"device": "cuda"}),
        ("precision.*int3", {"precision": "int3"}),
        ("group_size.*48", {"group_size": 48}),
        ("halting.min_layer", {"quicksilver_config": deep}),
        ("kv_cache_dtype must be one of fp32, fp16, bf16, int8; got 'int4'", {"kv_cache_dtype": "int4"}),
        ("kv_cache_dtype.*torch.int8", {"kv_cache_dtype": torch.int8}),
    ):
        with pytest.raises(ValueError, match=message):
            QuickSilverForCausalLM.from_pretrained(path, **options)
    with pytest.raises(ValueError, match="nowhere"):
        QuickSilverForCausalLM.from_pretrained("./nowhere")
    with pytest.raises(ValueError, match="kv_cache_dtype"):  # before anything is loaded
        QuickSilverForCausalLM.from_pretrained("./nowhere", kv_cache_dtype="")


def test_a_model_without_a_tokenizer_or_template_says_so() -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        _ = ours(random_llama()).tokenizer
    with pytest.raises(ValueError, match="chat template"):
        ours(TRAINED_GPT2).chat_prompt("hello")
