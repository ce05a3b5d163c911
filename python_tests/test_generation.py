"""Decoding against transformers', and what it promises beyond: rows that finish leave, seeds that ignore the batch."""

from __future__ import annotations

import random
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TRAINED_GPT2, random_gpt2, random_llama
from transformers.utils import ModelOutput

from quicksilver_ext import _C, QuickSilverForCausalLM
from quicksilver_ext.engine.batch import Batch
from quicksilver_ext.generation import sampling
from quicksilver_ext.generation.loop import Session, StopStrings, pack

FAMILIES = {"gpt2": random_gpt2, "llama": random_llama}
LENGTHS = [7, 3, 12]


@cache
def ours(path: Path) -> QuickSilverForCausalLM:
    return QuickSilverForCausalLM.from_pretrained(path, precision="fp32")


@cache
def theirs(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@cache
def trained() -> QuickSilverForCausalLM:
    return ours(TRAINED_GPT2)


def prompts(lengths: list[int] = LENGTHS, seed: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 1003, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str = "left", pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask; ``both`` puts one column of padding on the right and the rest on the left."""
    width = max(map(len, rows)) + (side == "both")
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for row, prompt in enumerate(rows):
        start = {"left": width - len(prompt), "right": 0, "both": width - len(prompt) - 1}[side]
        ids[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = 1
    return ids, mask


def run(model: QuickSilverForCausalLM, *args: Any, **options: Any) -> Any:
    output = model.generate(*args, **options)
    assert isinstance(output, ModelOutput)
    return output


def reference(path: Path, row: torch.Tensor, **options: Any) -> torch.Tensor:
    """What transformers adds to one prompt, without padding."""
    return theirs(path).generate(row[None], do_sample=False, pad_token_id=0, **options)[0, len(row) :]


# --- equal to transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_whatever_the_padding(family: str, side: str) -> None:
    path, rows = FAMILIES[family](), prompts()
    ids, mask = padded(rows, side)
    output = run(ours(path), ids, attention_mask=mask, max_new_tokens=16)
    assert torch.equal(output.sequences[:, : ids.shape[1]], ids)
    for got, row in zip(output.sequences[:, ids.shape[1] :], rows, strict=True):
        want = reference(path, row, max_new_tokens=16)
        assert torch.equal(got[: len(want)], want)


def test_ends_and_padding_are_those_of_transformers() -> None:
    path = random_llama()
    ids, mask = padded(prompts())
    free = run(ours(path), ids, attention_mask=mask, max_new_tokens=12, eos_token_id=-1).sequences[:, ids.shape[1] :]
    # Each row ends somewhere else, one of them at its first token.
    eos = [int(free[0, 0]), int(free[1, 4]), int(free[2, 8])]
    options = {"attention_mask": mask, "max_new_tokens": 12, "eos_token_id": eos, "pad_token_id": 1}
    want = theirs(path).generate(ids, do_sample=False, **options)
    assert torch.equal(run(ours(path), ids, **options).sequences, want)
    assert want.shape[1] < ids.shape[1] + 12, "the last row should end before the count does"


PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[5], [7, 8], [900]]},
    "sequence_bias": {"sequence_bias": [[[11], 6.0], [[12, 13], -4.0]]},
    "suppress": {"suppress_tokens": list(range(3, 500)), "begin_suppress_tokens": list(range(500, 900))},
    "forced_eos": {"forced_eos_token_id": 2},
    "decay": {"exponential_decay_length_penalty": (3, 1.9)},
    "renormalize": {"renormalize_logits": True, "remove_invalid_values": True},
    "together": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "suppress_tokens": [4], "bad_words_ids": [[9]]},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_equal_transformers(name: str) -> None:
    path, rows = random_gpt2(), prompts()
    ids, mask = padded(rows, "right")
    options = {**PROCESSORS[name], "max_new_tokens": 10, "eos_token_id": 2}
    output = run(ours(path), ids, attention_mask=mask, **options)
    for got, row in zip(output.sequences[:, ids.shape[1] :], rows, strict=True):
        want = reference(path, row, **options)
        assert torch.equal(got[: len(want)], want)


@pytest.mark.parametrize("minimum", [{"min_new_tokens": 6}, {"min_length": 18}])
def test_minimum_lengths_hold_back_the_end(minimum: dict[str, int]) -> None:
    path, row = random_llama(), prompts()[2]
    first = int(run(ours(path), row[None], max_new_tokens=1).sequences[0, -1])
    options = {"max_new_tokens": 12, "eos_token_id": [first, 5]}
    assert run(ours(path), row[None], **options).stats.new_tokens == 1
    output = run(ours(path), row[None], **options, **minimum)
    assert output.stats.new_tokens >= 6
    assert torch.equal(output.sequences[0, len(row) :], reference(path, row, **options, **minimum))


WARPERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.7},
    "cutoffs": {"epsilon_cutoff": 2e-3, "eta_cutoff": 1e-3},
    "together": {"repetition_penalty": 1.4, "temperature": 0.8, "top_k": 40, "top_p": 0.8, "renormalize_logits": True},
}


KERNEL = ("temperature", "top_k", "top_p")  # drawn by a kernel where there is nothing else


@pytest.mark.parametrize("name", [name for name in WARPERS if name not in KERNEL])
def test_sampling_draws_from_the_scores_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, row = random_llama(), prompts()[2]
    drawn_from: list[torch.Tensor] = []

    def record(scores: torch.Tensor, generator: torch.Generator) -> int:
        drawn_from.append(scores.clone())
        return int(scores.argmax())

    monkeypatch.setattr(sampling, "_draw", record)
    run(ours(path), row[None], do_sample=True, max_new_tokens=1, **WARPERS[name])
    hf = {"top_k": 0, **WARPERS[name], "return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0}
    want = theirs(path).generate(row[None], do_sample=True, max_new_tokens=1, **hf).scores[0][0]
    assert torch.equal(drawn_from[0].isinf(), want.isinf())
    torch.testing.assert_close(drawn_from[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(40))
def test_the_kernel_draws_from_the_scores_of_transformers(seed: int) -> None:
    """At the borders between tokens, and in the middle of each: the same token as the warped scores have there."""
    import transformers

    draw = random.Random(seed)
    count = draw.choice([1, 2, 5, 60, 1003, 50000])
    logits = torch.randn(1, count, generator=torch.Generator().manual_seed(seed)) * draw.choice([0.1, 1.0, 8.0])
    if seed % 3 == 0:
        logits = (logits * 2).round() / 2  # equals
    if seed % 4 == 1 and count > 2:
        logits[0, ::2] = -torch.inf
    temperature = draw.choice([1.0, 0.3, 1.7])
    top_k, top_p = draw.choice([0, 1, 7, count, 5 * count]), draw.choice([1.0, 0.999, 0.9, 0.5, 0.01])
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = logits
    for warper in warpers:
        scores = warper(None, scores)
    share = scores[0].double().softmax(-1)
    ends = share.cumsum(-1)
    kept = share.nonzero().flatten().tolist()
    drawn = set()
    for token in kept if len(kept) < 200 else draw.sample(kept, 200):
        if share[token] < 1e-7:
            continue
        point = min(float(ends[token] - share[token] / 2), 1 - 1e-12)
        got = _C.sample(logits.data_ptr(), count, temperature, top_k, top_p, point)
        drawn.add(got)
        if seed % 3 == 0 and top_p < 1:
            # Of equals at the end of the nucleus any may be kept.
            assert logits[0, got] >= logits[0, kept].min()
        else:
            assert abs(got - token) == 0 or abs(float(ends[got] - ends[token])) < 1e-5
    assert drawn, "the case must draw somebody"
    for point in (0.0, 1 - 2**-53):
        assert _C.sample(logits.data_ptr(), count, temperature, top_k, top_p, point) >= 0


def test_the_kernel_follows_the_distribution_and_refuses_what_is_no_number() -> None:
    scores = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([sampling._draw_by_kernel(scores, (1.0, 0, 1.0), generator) for _ in range(4000)])
    share = drawn.bincount(minlength=5) / 4000
    assert share[1] == 0
    torch.testing.assert_close(share, scores.exp(), atol=0.03, rtol=0)
    for bad in ([1.0, torch.nan], [torch.inf, 1.0], [-torch.inf, -torch.inf]):
        with pytest.raises(ValueError, match="not finite"):
            sampling._draw_by_kernel(torch.tensor(bad), (1.0, 0, 1.0), generator)
    for wrong in (
        (0.0, 0, 1.0, 0.5),
        (torch.nan, 0, 1.0, 0.5),
        (1.0, -1, 1.0, 0.5),
        (1.0, 0, -0.1, 0.5),
        (1.0, 0, 1.0, 1.0),
    ):
        with pytest.raises(ValueError, match="sample wants"):
            _C.sample(scores.data_ptr(), 5, *wrong)


@pytest.mark.parametrize("name", KERNEL)
def test_the_kernel_and_operators_draw_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = ours(random_llama()), prompts()
    ids, mask = padded(rows)
    options = {"max_new_tokens": 12, "do_sample": True, "seed": 3, **WARPERS[name]}
    by_kernel = run(model, ids, mask, **options).sequences
    monkeypatch.setattr(sampling, "_kernel_options", lambda *args: None)
    assert torch.equal(run(model, ids, mask, **options).sequences, by_kernel)


def test_generation_config_objects_work_and_arguments_go_before_them() -> None:
    from transformers import GenerationConfig

    path, row = random_llama(), prompts()[0]
    config = GenerationConfig(max_new_tokens=5, eos_token_id=[1001, 1002], repetition_penalty=1.5, min_new_tokens=2)
    want = reference(path, row, generation_config=config)
    assert torch.equal(run(ours(path), row[None], generation_config=config).sequences[0, len(row) :], want)
    shorter = run(ours(path), row[None], generation_config=config, max_new_tokens=3).sequences[0, len(row) :]
    assert torch.equal(shorter, want[:3])
    longest = run(ours(path), row[None], generation_config=GenerationConfig(max_length=len(row) + 4)).sequences
    assert longest.shape[1] == len(row) + 4


# --- users' objects --------------------------------------------------------------------------------------------------


class Dictate:
    """A LogitsProcessor that keeps its place per row: token 10 * row + step + 20. Wants every row, at every step."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert scores.shape[0] == input_ids.shape[0] == self.rows
        self.seen.append(input_ids.clone())
        scores[:] = -torch.inf
        scores[range(self.rows), [10 * row + len(self.seen) + 20 for row in range(self.rows)]] = 0.0
        return scores


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_processors_see_the_whole_batch_padded_on_the_left(side: str) -> None:
    rows = prompts()
    ids, mask = padded(rows, side)
    dictate = Dictate(3)
    end = 10 * 1 + 2 + 20  # row 1's second token
    options = {"max_new_tokens": 4, "eos_token_id": end, "pad_token_id": 0, "logits_processor": [dictate]}
    output = run(ours(random_llama()), ids, attention_mask=mask, **options)
    assert output.sequences[:, ids.shape[1] :].tolist() == [[21, 22, 23, 24], [31, 32, 0, 0], [41, 42, 43, 44]]
    assert output.stats.new_tokens == 10
    left, _ = padded(rows, "left")
    assert torch.equal(dictate.seen[0], left)
    assert dictate.seen[3][:, -3:].tolist() == [[21, 22, 23], [31, 32, 0], [41, 42, 43]]


def test_a_processor_of_the_user_takes_the_place_of_an_arguments() -> None:
    from transformers import SuppressTokensLogitsProcessor

    path, row = random_llama(), prompts()[2]
    likeliest = reference(path, row, max_new_tokens=1).tolist()
    mine = SuppressTokensLogitsProcessor([5])
    got = run(ours(path), row[None], max_new_tokens=1, suppress_tokens=likeliest, logits_processor=[mine]).sequences
    assert got[0, len(row) :].tolist() == likeliest


def test_stopping_criteria() -> None:
    from transformers import MaxLengthCriteria, StoppingCriteriaList

    ids, mask = padded(prompts())
    width, model = ids.shape[1], ours(random_llama())
    limit = StoppingCriteriaList([MaxLengthCriteria(width + 3)])
    assert run(model, ids, mask, stopping_criteria=limit, eos_token_id=-1).sequences.shape[1] == width + 3

    def row_by_row(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        assert scores is None
        return torch.arange(len(input_ids)) < input_ids.shape[1] - width  # row 0 after one token, row 1 after two ...

    output = run(model, ids, mask, stopping_criteria=[row_by_row], eos_token_id=-1, pad_token_id=0)
    assert (output.sequences[:, width:] != 0).sum(1).tolist() == [1, 2, 3]

    def all_at_once(input_ids: torch.Tensor, scores: Any, **_: Any) -> bool:
        return True

    assert run(model, ids, mask, stopping_criteria=[all_at_once]).stats.new_tokens == 3
    assert run(model, ids, mask, max_time=0.0).stats.new_tokens == 3


class Recorder:
    """A BaseStreamer that keeps what it gets."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended += 1


def test_streamers_get_the_prompt_then_every_token() -> None:
    ids, mask = padded(prompts())
    recorder = Recorder()
    output = run(ours(random_llama()), ids, mask, streamer=recorder, max_new_tokens=5, eos_token_id=-1)
    assert torch.equal(recorder.values[0], ids) and recorder.ended == 1
    assert torch.equal(torch.stack(recorder.values[1:], 1), output.sequences[:, ids.shape[1] :])


def test_text_streams_from_another_thread() -> None:
    from transformers import TextIteratorStreamer

    model = trained()
    ids = model.tokenizer("The for statement is used to", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=60)
    options = {"max_new_tokens": 20, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    want = run(model, ids, max_new_tokens=20).sequences[0, ids.shape[1] :]
    assert text == model.tokenizer.decode(want)


# --- stop strings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["The for statement is used to", "Note that the"])
def test_stop_strings_end_where_transformers_ends(prompt: str) -> None:
    model, tokenizer = trained(), trained().tokenizer
    row = tokenizer(prompt, return_tensors="pt").input_ids[0]
    text = tokenizer.decode(run(model, row[None], max_new_tokens=30).sequences[0, len(row) :])
    spans = [text[3:4], text[5:12], text[20:33], text[40:47], text[10:25] + "never", text[8:30]]
    for stops in ([spans[0]], [spans[1]], [spans[2]], [spans[3], spans[4]], [spans[5], "xyz", spans[3]]):
        options = {"max_new_tokens": 30, "stop_strings": stops, "tokenizer": tokenizer}
        got = run(model, row[None], **options).sequences[0, len(row) :]
        assert torch.equal(got, reference(TRAINED_GPT2, row, **options)), stops
        assert len(got) < 30, "each of these texts is there to be found"


def test_a_stop_string_ends_its_own_row_only_and_needs_no_tokenizer_argument() -> None:
    model = trained()
    rows = [torch.tensor(model.tokenizer(text).input_ids) for text in ("The for statement is used to", "Note that the")]
    ids, mask = padded(rows)
    free = run(model, ids, mask, max_new_tokens=20, eos_token_id=-1).sequences[:, ids.shape[1] :]
    stop = model.tokenizer.decode(free[0, 2:5])
    output = run(model, ids, mask, max_new_tokens=20, eos_token_id=-1, stop_strings=stop, pad_token_id=0).sequences
    assert output[0, ids.shape[1] :].tolist() == free[0, :5].tolist() + [0] * (output.shape[1] - ids.shape[1] - 5)
    assert torch.equal(output[1, ids.shape[1] :], free[1])


STOPS = [["é"], ["or"], ["the end", "for"], ["——"], [" is"], ["\n\n", "ё"]]


@cache
def stop_criterion(index: int) -> Any:
    from transformers import StopStringCriteria

    return StopStringCriteria(trained().tokenizer, STOPS[index])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(STOPS) - 1), st.data())
def test_stop_strings_agree_with_transformers_on_any_tokens(index: int, data: st.DataObject) -> None:
    tokenizer, stops = trained().tokenizer, STOPS[index]
    # Tokens that the strings are made of, cut in different ways, and some that are not.
    pieces = {token for stop in stops for text in (stop, stop[1:], " " + stop, "x" + stop, stop + "é") if text
              for token in tokenizer(text).input_ids}  # fmt: skip
    ids = data.draw(st.lists(st.sampled_from(sorted(pieces | {17, 60, 300})), min_size=1, max_size=9))
    want = bool(stop_criterion(index)(torch.tensor([ids]), None)[0])
    assert StopStrings(stops, tokenizer)(ids) == want, tokenizer.convert_ids_to_tokens(ids)


# --- sampling --------------------------------------------------------------------------------------------------------

SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 50, "top_p": 0.9, "max_new_tokens": 6, "eos_token_id": -1}


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from(["left", "right"]), st.integers(0, 2**40))
def test_a_seeded_row_does_not_depend_on_the_batch(lengths: list[int], side: str, seed: int) -> None:
    model, row = ours(random_llama()), prompts([8], seed=1)[0]
    alone = run(model, row[None], seed=seed, **SAMPLED).sequences[0, 8:]
    ids, mask = padded([*prompts(lengths), row], side)
    assert torch.equal(run(model, ids, mask, seed=seed, **SAMPLED).sequences[-1, ids.shape[1] :], alone)


def test_seeds() -> None:
    model, row = ours(random_llama()), prompts([8])[0]
    several = row.repeat(4, 1)
    first = run(model, several, seed=7, **SAMPLED).sequences
    assert torch.equal(first, run(model, several, seed=7, **SAMPLED).sequences)
    assert len({tuple(sequence) for sequence in first.tolist()}) == 4, "copies of a prompt should get different samples"
    assert not torch.equal(first, run(model, several, seed=8, **SAMPLED).sequences)
    torch.manual_seed(3)
    unseeded = run(model, several, **SAMPLED).sequences
    assert not torch.equal(unseeded, run(model, several, **SAMPLED).sequences)
    torch.manual_seed(3)
    assert torch.equal(unseeded, run(model, several, **SAMPLED).sequences)


def test_draws_follow_the_distribution() -> None:
    scores = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([sampling._draw(scores, generator) for _ in range(4000)]).bincount(minlength=5) / 4000
    assert drawn[1] == 0
    torch.testing.assert_close(drawn, scores.exp(), atol=0.03, rtol=0)
    with pytest.raises(ValueError, match="not finite"):
        sampling._draw(torch.full((5,), torch.nan), generator)


def test_nothing_changes_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a while: another thread would see it, and might keep it."""

    def refuse(count: int) -> None:
        raise AssertionError(f"torch.set_num_threads({count})")

    monkeypatch.setattr(torch, "set_num_threads", refuse)
    model = QuickSilverForCausalLM.from_pretrained(random_llama(), precision="int8")
    run(model, prompts()[0][None], seed=1, **SAMPLED)
    model.score(prompts()[0][None])
    monkeypatch.undo()


# --- work ------------------------------------------------------------------------------------------------------------


def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = ours(random_llama()), prompts()
    ids, mask = padded(rows)
    free = run(model, ids, mask, max_new_tokens=8, eos_token_id=-1).sequences[:, ids.shape[1] :]
    eos = [int(free[0, 1]), int(free[2, 4])]
    passes: list[list[int]] = []
    run_batch, leave = model.runner.run, Session.leave

    def spy(plan: Any, batch: Batch, *args: Any) -> torch.Tensor:
        passes.append(batch.sequence)
        return run_batch(plan, batch, *args)

    dropped: list[int] = []
    monkeypatch.setattr(model.runner, "run", spy)
    monkeypatch.setattr(Session, "leave", lambda self, row: (dropped.append(row), leave(self, row)))
    output = run(model, ids, mask, max_new_tokens=8, eos_token_id=eos)
    ends = [next((i for i, t in enumerate(row) if t in eos), 7) for row in free.tolist()]
    assert sorted(passes[0]) == [0] * 7 + [1] * 3 + [2] * 12
    assert passes[1:] == [[row for row in range(3) if ends[row] >= step] for step in range(1, max(ends) + 1)]
    assert output.stats.new_tokens == sum(ends) + 3
    assert set(dropped) == {row for row in range(3) if ends[row] < 7}


def test_stats_add_up() -> None:
    model = ours(random_gpt2())
    ids, mask = padded(prompts())
    output = run(model, ids, mask, max_new_tokens=9, eos_token_id=-1)
    stats = output.stats
    assert (stats.prompt_tokens, stats.new_tokens) == (sum(LENGTHS), 27)
    processed = sum(LENGTHS) + 27 - 3  # each row's last token is never fed back
    assert sum(stats.depth_histogram.values()) == processed
    assert stats.layers_run == stats.layers_full == processed * model.model.spec.num_layers
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0
    assert stats.tokens_per_second == pytest.approx(24 / stats.decode_seconds)  # without the prompts' pass's three
    assert output.trace is None
    one = run(model, ids, mask, max_new_tokens=1).stats
    assert one.decode_seconds == 0 and one.tokens_per_second == 0


def test_return_dict_in_generate_false_gives_the_sequences() -> None:
    row = prompts()[0][None]
    sequences = ours(random_llama()).generate(row, max_new_tokens=3, return_dict_in_generate=False)
    assert isinstance(sequences, torch.Tensor) and sequences.dtype == torch.int64 and sequences.shape == (1, 10)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "max_new_tokens", {"max_new_tokens": -4}),
        (ValueError, "max_new_tokens", {"max_new_tokens": 0}),
        (ValueError, "max_new_tokens", {"max_new_tokens": 1.5}),
        (ValueError, "494 more than", {"max_new_tokens": 1000}),
        (ValueError, "max_length", {"max_length": 7}),
        (ValueError, "min_new_tokens", {"min_new_tokens": -1}),
        (ValueError, "temperature", {"temperature": float("nan")}),
        (ValueError, "temperature", {"temperature": -0.5}),
        (ValueError, "temperature", {"temperature": 0.0, "do_sample": True}),
        (ValueError, "do_sample", {"do_sample": "yes"}),
        (ValueError, "top_k", {"top_k": -1}),
        (ValueError, "top_p", {"top_p": 0.0}),
        (ValueError, "top_p", {"top_p": 1.01}),
        (ValueError, "top_p", {"top_p": float("nan")}),
        (ValueError, "min_p", {"min_p": 2.0, "do_sample": True}),
        (ValueError, "repetition_penalty", {"repetition_penalty": 0.0}),
        (ValueError, "max_time", {"max_time": float("inf")}),
        (ValueError, "eos_token_id", {"eos_token_id": "</s>"}),
        (ValueError, "pad_token_id", {"pad_token_id": -2}),
        (ValueError, "stop_strings", {"stop_strings": ["a", ""]}),
        (ValueError, "seed", {"seed": 0.5, "do_sample": True}),
        (ValueError, "num_beams", {"num_beams": 4}),
        (ValueError, "num_return_sequences", {"num_return_sequences": 2}),
        (ValueError, "output_scores", {"output_scores": True}),
        (ValueError, "guidance_scale", {"guidance_scale": 1.5}),
        (TypeError, "max_tokens", {"max_tokens": 5}),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        ours(random_llama()).generate(prompts()[0][None], **options)


def test_bad_prompts_are_named() -> None:
    model, (ids, mask) = ours(random_llama()), padded(prompts())
    for error, message, bad_ids, bad_mask in (
        (ValueError, "input_ids.*empty", torch.zeros(1, 0, dtype=torch.long), None),
        (ValueError, "input_ids.*empty", torch.zeros(0, 4, dtype=torch.long), None),
        (ValueError, "input_ids.*shape", ids[0], None),
        (TypeError, "input_ids.*integers", ids.float(), None),
        (TypeError, "input_ids.*tensor", ids.tolist(), None),
        (ValueError, "input_ids.*1003", torch.tensor([[5, 1003]]), None),
        (ValueError, "input_ids.*-1", torch.tensor([[5, -1]]), None),
        (ValueError, "88 more than the model's context of 512", torch.ones(1, 600, dtype=torch.long), None),
        (ValueError, "attention_mask.*shape", ids, mask[:, 1:]),
        (ValueError, "attention_mask.*0 and 1", ids, mask * 2),
        (ValueError, "attention_mask.*row 1", ids, mask * torch.tensor([[1], [0], [1]])),
        (ValueError, "hole in row 2", ids, mask.index_fill(1, torch.tensor([5]), 0)),
        (TypeError, "attention_mask", ids, mask.tolist()),
    ):
        for call in (model, model.score, model.generate):
            with pytest.raises(error, match=message):
                call(bad_ids, bad_mask)


def test_the_context_may_be_filled_to_its_last_position() -> None:
    model = ours(random_llama(max_position_embeddings=32))
    row = torch.arange(3, 31)[None]
    full = run(model, row, max_new_tokens=5, eos_token_id=-1).sequences
    assert full.shape[1] == 33, "the last token needs no position"
    assert torch.equal(run(model, row, eos_token_id=-1).sequences, full), "the default asks for what there is room for"
    with pytest.raises(ValueError, match="1 more than"):
        run(model, row, max_new_tokens=6)


def test_padding_may_hold_anything() -> None:
    ids, mask = padded(prompts(), pad=-100)
    clean, _ = padded(prompts())
    model = ours(random_llama())
    assert torch.equal(model(ids, mask).logits, model(clean, mask).logits)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=5), st.data())
def test_pack_keeps_each_rows_tokens(shape: list[tuple[int, int, int]], data: st.DataObject) -> None:
    width = max(sum(row) for row in shape)
    ids, mask, rows = torch.full((len(shape), width), -5), torch.zeros(len(shape), width, dtype=torch.bool), []
    for index, (left, length, _) in enumerate(shape):
        rows.append(torch.tensor(data.draw(st.lists(st.integers(0, 99), min_size=length, max_size=length))))
        ids[index, left : left + length] = rows[-1]
        mask[index, left : left + length] = True
    batch = pack(ids, mask, 100, 6)
    assert torch.equal(batch.ids, torch.cat(rows))
    assert batch.lengths == [len(row) for row in rows]
    assert [part.tolist() for part in batch.positions.split(batch.lengths)] == [list(range(len(row))) for row in rows]
    assert batch.sequence.tolist() == [index for index, row in enumerate(rows) for _ in row]
