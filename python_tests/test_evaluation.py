"""Evaluation: windows that score each token once, and figures that an independent computation confirms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import TRAINED_GPT2
from test_generation import theirs, trained

from quicksilver_ext import QuickSilverConfig, QuickSilverForCausalLM
from quicksilver_ext import model as causal_lm
from quicksilver_ext.calibration import evaluation
from quicksilver_ext.calibration.evaluation import evaluate, read_text, windows

HALTING = {"halting": {"drift_threshold": 0.25, "min_layer": 2, "sink_tokens": 2}}


def with_config(values: dict[str, Any], precision: str = "fp32") -> QuickSilverForCausalLM:
    config = QuickSilverConfig.from_dict(values)
    return QuickSilverForCausalLM.from_pretrained(TRAINED_GPT2, precision=precision, quicksilver_config=config)


def unseen() -> torch.Tensor:
    """Tokens from the end of the text, which the trained model never saw."""
    return torch.tensor(trained().tokenizer(read_text("builtin:pydoc")[-1500:], verbose=False)["input_ids"])


@given(st.integers(2, 400), st.integers(2, 60), st.data())
def test_windows_score_each_token_once(total: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    scored: list[int] = []
    for begin, end, first in windows(total, window, stride):
        assert begin % stride == 0 and begin < first < end <= min(begin + window, total)
        assert begin == 0 or first - begin >= min(window - stride, 1)
        scored += range(first, end)
    unpredicted = set(range(0, total, stride)) if stride == window else {0}
    assert scored == [token for token in range(total) if token not in unpredicted]


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (64, 24), (50, 11), (200, 150)])
def test_perplexity_equals_transformers(window: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "LOGITS_TOKENS", 17)
    ids = unseen()[:230]
    loss, tokens = 0.0, 0
    for begin, end, first in windows(len(ids), window, stride):
        with torch.no_grad():
            logits = theirs(TRAINED_GPT2)(ids[None, begin:end]).logits[0]
        loss += F.cross_entropy(logits[first - begin - 1 : -1], ids[first:end], reduction="sum").item()
        tokens += end - first
    result = evaluate(trained(), ids, window=window, stride=stride)
    assert result.tokens == tokens
    assert result.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-4)


def test_full_depth_is_its_own_baseline() -> None:
    result = evaluate(trained(), unseen(), window=128, max_tokens=200)
    assert result.perplexity == result.baseline_perplexity and result.seconds == result.baseline_seconds > 0
    assert (result.kl_mean, result.flop_reduction, result.mean_depth, result.mean_bits) == (0, 0, 1, 32)
    assert result.tokens == 198 and result.protocol["text_tokens"] == 200 and result.protocol["windows"] == 2


def test_halting_is_measured_against_full_depth() -> None:
    model, ids = with_config(HALTING), unseen()[:192]
    result = evaluate(model, ids, window=96)
    halves = ids.view(2, 96)
    log_q, log_p = (m(halves[:, :-1]).logits.flatten(0, 1).log_softmax(-1) for m in (model, trained()))
    following = halves[:, 1:].flatten()
    assert result.perplexity == pytest.approx(math.exp(F.nll_loss(log_q, following).item()), rel=1e-4)
    assert result.baseline_perplexity == pytest.approx(math.exp(F.nll_loss(log_p, following).item()), rel=1e-4)
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="sum").item() / len(log_q)
    assert result.kl_mean == pytest.approx(divergence, rel=1e-3) and result.kl_mean > 0
    assert 0 < result.flop_reduction < 1 - result.mean_depth < 1, "the head is never skipped"


def test_context_that_nobody_scores_may_be_fused() -> None:
    fusion = {"fusion": {"layer": 2, "threshold": 1.2, "scope": "prompt"}}
    model, ids = with_config(fusion), unseen()[:160]
    assert evaluate(model, ids, window=80).flop_reduction == 0, "every token's logits are asked for"
    fused = evaluate(model, ids, window=80, stride=20)
    assert fused.flop_reduction > 0 and fused.perplexity != fused.baseline_perplexity


def test_adaptive_bits_are_measured_against_eight() -> None:
    ids = unseen()[:96]
    four = evaluate(with_config({"amq": {"layer": 3, "entropy_threshold": 2.0}}, "adaptive"), ids, window=96)
    eight = evaluate(with_config({}, "int8"), ids, window=96)
    assert four.mean_bits == pytest.approx(6.0), "three of six layers at 4 bits"
    assert four.baseline_perplexity == eight.perplexity
    assert four.flop_reduction == 0 and four.kl_mean > 0


def test_the_result_states_its_protocol_and_is_json() -> None:
    import json

    seen: list[tuple[int, int]] = []
    result = evaluate(trained(), unseen(), window=64, stride=32, max_tokens=130, progress=lambda *at: seen.append(at))
    values = json.loads(json.dumps(result.to_dict()))
    assert values["protocol"]["window"] == 64 and values["protocol"]["stride"] == 32
    assert "no earlier window scored" in values["protocol"]["scored"] and "full depth" in values["protocol"]["baseline"]
    assert values["protocol"]["config"] == QuickSilverConfig().to_dict()
    assert seen == [(i, 4) for i in range(5)]
    assert causal_lm.LOGITS_TOKENS == evaluation.LOGITS_TOKENS


def test_texts(tmp_path: Path) -> None:
    assert len(read_text("builtin:pydoc")) > 100_000
    file = tmp_path / "a.txt"
    file.write_text("für\n", encoding="utf-8")
    assert read_text(str(file)) == "für\n"
    file.write_bytes(b"\xff\xfe\x00")
    for source, message in ((str(file), "UTF-8"), (str(tmp_path / "none"), "no file"), ("builtin:x", "builtin:pydoc")):
        with pytest.raises(ValueError, match=message):
            read_text(source)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("window", {"window": 1}),
        ("window.*256", {"window": 300}),
        ("stride", {"stride": 0, "window": 8}),
        ("stride.*at most", {"stride": 9, "window": 8}),
        ("max_tokens", {"max_tokens": 1, "window": 8}),
        ("window", {"window": 8.0}),
    ],
)
def test_bad_arguments_are_named(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(trained(), unseen(), **options)


def test_a_text_of_one_token_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="1 tokens"):
        evaluate(trained(), torch.tensor([5]), window=8)
