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

from quicksilver_ext import _C, QuickSilverConfig, QuickSilverForCausalLM
from quicksilver_ext import model as causal_lm
from quicksilver_ext.calibration import evaluation
from quicksilver_ext.calibration.evaluation import evaluate, read_text, windows
from quicksilver_ext.kernels import testing

HALTING = {"halting": {"drift_threshold": 0.25, "min_layer": 2, "sink_tokens": 2}}


def with_config(values: dict[str, Any], precision: str = "fp32") -> QuickSilverForCausalLM:
    config = QuickSilverConfig.from_dict(values)
    return QuickSilverForCausalLM.from_pretrained(TRAINED_GPT2, precision=precision, quicksilver_config=config)


def unseen() -> torch.Tensor:
    """Tokens from the end of the text, which the trained model never saw."""
    return torch.tensor(trained().tokenizer(read_text("builtin:pydoc")[-1500:], verbose=False)["input_ids"])


@given(st.integers(2, 400), st.integers(2, 60), st.data())
def test_windows_score_each_token_once(total: int, window: int, data: st.DataObject) -> None:
    context = data.draw(st.integers(0, window - 1))
    stride = data.draw(st.integers(1, window - context))
    scored: list[int] = []
    for begin, end, first in windows(total, window, stride, context):
        assert begin % stride == 0 and begin < first < end <= min(begin + window, total)
        assert first - begin >= (max(window - stride, 1) if begin else max(context, 1))
        scored += range(first, end)
    unpredicted = set(range(0, total, stride)) if stride == window else set(range(max(context, 1)))
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
    plain = evaluate(model, ids, window=80, context=0)
    assert (plain.flop_reduction, plain.tokens_fused) == (0, 0), "every token's logits are asked for"
    for options in ({}, {"context": 30}, {"stride": 20}):
        fused = evaluate(model, ids, window=80, **options)
        assert fused.flop_reduction > 0 and fused.tokens_fused > 0 and fused.perplexity != fused.baseline_perplexity


def test_context_is_half_of_the_window_where_the_config_fuses_prompts() -> None:
    ids = unseen()[:160]
    fusion = {"layer": 2, "threshold": 1.2}
    wanted = {
        "prompt": ({"fusion": fusion}, {}, 40, 40),
        "prompt, a stride given": ({"fusion": fusion}, {"stride": 70}, 70, 0),
        "cache": ({"fusion": {**fusion, "scope": "cache"}}, {}, 80, 0),
        "none": ({}, {}, 80, 0),
        "none, a context given": ({}, {"context": 10}, 70, 10),
    }
    for name, (config, options, stride, context) in wanted.items():
        result = evaluate(with_config(config), ids, window=80, **options)
        assert (result.protocol["stride"], result.protocol["context"]) == (stride, context), name
        assert result.tokens == (158 if stride == 80 else 160 - max(context, 1)), name
    assert "all tokens but the first 40" in evaluate(with_config({"fusion": fusion}), ids, window=80).protocol["scored"]


def naive_fused(ids: torch.Tensor, first: int, layer: int, threshold: float, largest: int) -> tuple[torch.Tensor, int]:
    """transformers' GPT-2 layer by layer, by hand: before ``layer``, tokens that come before ``first - 1`` and lie
    closer to their neighbour than ``threshold`` become their group's mean, in the place of its last. Log-probabilities
    of what follows each token from ``first - 1`` on, and the number of tokens that joined a group."""
    model = theirs(TRAINED_GPT2).transformer
    heads = model.config.n_head
    x = model.wte(ids) + model.wpe(torch.arange(len(ids), dtype=torch.int64, device="cpu"))
    joined = 0
    for index, block in enumerate(model.h):
        if index == layer:
            groups = [[0]]
            for t in range(1, len(x)):
                near = (x[t] - x[t - 1]).norm() / x[t - 1].norm() < threshold
                if t < first - 1 and near and len(groups[-1]) < largest:
                    groups[-1].append(t)
                    joined += 1
                else:
                    groups.append([t])
            x = torch.stack([x[group].mean(0) for group in groups])
        q, k, v = block.attn.c_attn(block.ln_1(x)).unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.c_proj(mixed.transpose(0, 1).flatten(1))
        x = x + block.mlp(block.ln_2(x))
    logits = model.ln_f(x[-(len(ids) - first + 1) :]) @ model.wte.weight.T
    return logits.log_softmax(-1), joined


@pytest.mark.parametrize(("context", "layer", "largest"), [(40, 2, 4), (33, 0, 2), (70, 5, 9)])
def test_a_continuation_of_a_fused_context_equals_plain_arithmetic(context: int, layer: int, largest: int) -> None:
    ids, threshold = unseen()[:160], 1.2
    model = with_config({"fusion": {"layer": layer, "threshold": threshold, "max_group": largest}})
    loss, kl, tokens, joined = 0.0, 0.0, 0, 0
    with torch.no_grad():
        for begin, end, first in windows(len(ids), 80, 80 - context, context):
            following = ids[first:end]
            log_q, more = naive_fused(ids[begin : end - 1], first - begin, layer, threshold, largest)
            log_p = theirs(TRAINED_GPT2)(ids[None, begin : end - 1]).logits[0, first - begin - 1 :].log_softmax(-1)
            loss += F.nll_loss(log_q, following, reduction="sum").item()
            kl += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
            tokens, joined = tokens + len(following), joined + more
    result = evaluate(model, ids, window=80, context=context)
    assert (result.tokens, result.tokens_fused) == (tokens, joined) and joined > 10
    assert result.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert result.kl_mean == pytest.approx(kl / tokens, rel=1e-3) and result.kl_mean > 0


@pytest.mark.skipif(not hasattr(_C, "emulated"), reason="built without the emulator: QUICKSILVER_EMULATOR=1")
def test_the_emulated_gpu_measures_the_same() -> None:
    config = {**HALTING, "amq": {"layer": 3, "entropy_threshold": 0.5}}
    config["fusion"] = {"layer": 2, "threshold": 1.0}
    model, ids = with_config(config, "adaptive"), unseen()[:60]
    want = evaluate(model, ids, window=30)
    with testing.use_backend("cuda-emulated"):
        got = evaluate(model, ids, window=30)
    assert (got.tokens, got.tokens_fused) == (want.tokens, want.tokens_fused) and got.tokens_fused > 0
    assert got.perplexity == pytest.approx(want.perplexity, rel=1e-3)


def test_every_tensor_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU ids stay on the host and logits come to it: the default device must not matter."""
    model, text = with_config({"fusion": {"layer": 2, "threshold": 1.0}}), read_text("builtin:pydoc")[-1500:]
    want = evaluate(model, text, window=30, max_tokens=60)
    with torch.device("meta"):
        got = evaluate(model, text, window=30, max_tokens=60)
    assert got.perplexity == want.perplexity and got.tokens_fused == want.tokens_fused > 0


def test_adaptive_bits_are_measured_against_eight() -> None:
    ids = unseen()[:96]
    four = evaluate(
        with_config({"amq": {"layer": 3, "entropy_threshold": 2.0, "sink_tokens": 0}}, "adaptive"), ids, window=96
    )
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
        ("context must be a whole number", {"context": -1, "window": 8}),
        ("context must be below window", {"context": 8, "window": 8}),
        ("stride must be at most window less context .5.", {"context": 3, "stride": 6, "window": 8}),
    ],
)
def test_bad_arguments_are_named(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(trained(), unseen(), **options)


def test_a_text_of_one_token_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="1 tokens"):
        evaluate(trained(), torch.tensor([5]), window=8)
    with pytest.raises(ValueError, match="4 tokens; at least 5"):
        evaluate(trained(), torch.tensor([5, 6, 7, 8]), window=8, context=4)
