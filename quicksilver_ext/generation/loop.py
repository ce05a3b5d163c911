"""Decoding: a batch of prompts in, tokens out, one pass of the decoder per step.

Names and meanings are transformers'; its LogitsProcessor, StoppingCriteria, BaseStreamer and GenerationConfig objects
work as they are. Padding is removed at the door (:func:`pack`) and a sequence that has finished leaves the batch, so
neither costs work, and neither can change what another sequence gets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.batch import Batch
from ..engine.kv_cache import KVCache
from ..engine.observer import Observer
from ..engine.plan import Plan
from ..engine.runner import Runner
from ..stats import GenerationStats
from .sampling import Processor, Sampler, Settings


class Prompts(NamedTuple):
    """Prompts without their padding, packed row after row, T tokens in all."""

    ids: Tensor  # [T] int64
    positions: Tensor  # [T] int32, from 0 in each row
    sequence: Tensor  # [T] int32, the row that a token belongs to
    starts: list[int]  # first real column of each row
    lengths: list[int]  # real tokens of each row
    mask: Tensor | None  # [B, W] bool, where the tokens came from; None where there was no padding


def pack(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int, max_positions: int) -> Prompts:
    """Takes the padding out of a batch.

    input_ids       [B, W], any integer dtype, on any device
    attention_mask  [B, W] of 0 and 1: a row's ones are one run, so padding is on the left, the right or both

    Raises TypeError or ValueError naming the argument: wrong type or shape, a row without a token, a mask with a hole,
    a token id outside the vocabulary (padding isn't looked at), a row longer than ``max_positions``.
    """
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor of token ids [batch, tokens]; got {type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"input_ids must hold integers; got {input_ids.dtype}")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have shape [batch, tokens]; got {list(input_ids.shape)}")
    input_ids = input_ids.cpu()
    rows, width = input_ids.shape
    if rows == 0 or width == 0:
        raise ValueError(f"input_ids is empty (shape {[rows, width]}); give at least one token to go on from")
    mask = None if attention_mask is None else _run_mask(attention_mask, rows, width)
    if mask is None or bool(mask.all()):
        mask = None
        starts, lengths = [0] * rows, [width] * rows
        ids = input_ids.reshape(-1).long()
        sequence = torch.arange(rows, dtype=torch.int32, device="cpu").repeat_interleave(width)
        positions = torch.arange(width, dtype=torch.int32, device="cpu").repeat(rows)
    else:
        starts, lengths = mask.int().argmax(1).tolist(), mask.sum(1).tolist()
        ids = input_ids[mask].long()
        sequence = mask.nonzero()[:, 0].int()
        positions = torch.cat([torch.arange(length, dtype=torch.int32, device="cpu") for length in lengths])
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"input_ids holds token id {wrong}; this model's vocabulary has ids 0 to {vocab_size - 1}")
    longest = max(lengths)
    if longest > max_positions:
        raise ValueError(
            f"input_ids has a row of {longest} tokens, {longest - max_positions} more than the model's context of "
            f"{max_positions}; shorten it by that many"
        )
    return Prompts(ids, positions, sequence, starts, lengths, mask)


def _run_mask(attention_mask: Tensor, rows: int, width: int) -> Tensor:
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor; got {type(attention_mask).__name__}")
    if tuple(attention_mask.shape) != (rows, width):
        raise ValueError(f"attention_mask must have input_ids' shape {[rows, width]}; got {list(attention_mask.shape)}")
    mask = attention_mask.to(device="cpu", dtype=torch.bool)
    if not torch.equal(mask.to(attention_mask.dtype), attention_mask.cpu()):
        raise ValueError("attention_mask must hold only 0 and 1")
    runs = mask[:, 0].int() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    for row in range(rows):
        if runs[row] == 0:
            raise ValueError(f"attention_mask leaves no token of row {row}; give every row at least one")
        if runs[row] > 1:
            raise ValueError(f"attention_mask has a hole in row {row}; a row's tokens must be next to each other")
    return mask


# --- stopping --------------------------------------------------------------------------------------------------------


class StopStrings:
    """Whether the latest token completed one of some strings, however many tokens it took."""

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        if tokenizer is None:
            raise ValueError("stop_strings need the model's tokenizer; pass tokenizer=")
        self.strings = strings
        self.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # A token stands for at least one byte. One more, since some tokenizers drop a space at the start of a text.
        self.window = max(len(string.encode()) for string in strings) + 1

    def __call__(self, ids: list[int]) -> bool:
        """ids: a sequence, or as much of its end as ``window`` tokens."""
        ids = ids[-self.window :]
        text = self.decode(ids)
        found = [string for string in self.strings if string in text]
        if not found:
            return False
        # The string must end in what is new. A character may need several tokens and reads otherwise until the last
        # one came, so what is old is where both texts agree.
        before = self.decode(ids[:-1])
        old = next((i for i, (a, b) in enumerate(zip(text, before)) if a != b), min(len(text), len(before)))
        return any(text.rfind(string) + len(string) > old for string in found)


class Stopper:
    """Says which active rows have just finished."""

    def __init__(self, request: Settings, criteria: Sequence[Callable[..., Any]], tokenizer: Any) -> None:
        self.eos = frozenset(request.eos)
        self.strings = StopStrings(request.stop_strings, tokenizer) if request.stop_strings else None
        self.criteria = list(criteria)
        self.deadline = None if request.max_time is None else time.perf_counter() + request.max_time

    def __call__(self, ids: Tensor, starts: Sequence[int], active: Sequence[int], tokens: Sequence[int]) -> set[int]:
        """ids [B, L] with the new tokens in the last column."""
        if self.deadline is not None and time.perf_counter() > self.deadline:
            return set(active)
        done = {row for row, token in zip(active, tokens, strict=True) if token in self.eos}
        if self.strings:
            for row in active:
                start = max(starts[row], ids.shape[1] - self.strings.window)
                if self.strings(ids[row, start:].tolist()):
                    done.add(row)
        for criterion in self.criteria:
            verdict = torch.as_tensor(criterion(ids, None), dtype=torch.bool, device="cpu").reshape(-1).expand(len(ids))
            done.update(row for row in active if verdict[row])
        return done


# --- the loop --------------------------------------------------------------------------------------------------------


class Session:
    """Sequences of one cache that are decoded together. They join and leave between steps; each is fed as many tokens
    as there are for it (a prompt, the token chosen last, a few candidates), and one step runs them all.

    ``observer`` hears of every pass; ``stats`` counts them.
    """

    def __init__(
        self,
        runner: Runner,
        plan: Plan,
        cache: KVCache,
        stats: GenerationStats | None = None,
        observer: Observer | None = None,
    ) -> None:
        plan.check_cache(cache)
        self.runner, self.plan, self.cache, self.observer = runner, plan, cache, observer
        self.stats = GenerationStats() if stats is None else stats
        self._fed: dict[int, tuple[list[int], bool]] = {}

    def admit(self, sequence: int, ids: list[int]) -> int:
        """Feeds a sequence its whole text [n], of which the cache may hold a beginning: what it holds beyond that is
        taken back, and only the rest will run (at least the last token, whose logits are asked). Returns how many."""
        held = min(self.cache.common_prefix(sequence, ids), len(ids) - 1)
        if not self.cache.keeps and held < len(self.cache.tokens[sequence]):
            held = 0
        self.cache.truncate(sequence, held)
        self.feed(sequence, ids[held:])
        return len(ids) - held

    def feed(self, sequence: int, ids: list[int], every: bool = False) -> None:
        """Tokens that follow what the cache holds of a sequence; logits of the last one, or of ``every`` one."""
        if sequence in self._fed:
            raise ValueError(f"sequence {sequence} is fed already; step first")
        self._fed[sequence] = (ids, every)

    def leave(self, sequence: int) -> None:
        """Forgets a sequence; its number may be used anew."""
        self._fed.pop(sequence, None)
        self.cache.drop(sequence)

    def step(self) -> Tensor:
        """Runs what was fed: logits [n, V] fp32 of the tokens asked for, sequence by sequence in the order of feeding.
        They hold until the next step. ValueError, IndexError as of Runner.run."""
        ids: list[int] = []
        positions: list[int] = []
        sequence: list[int] = []
        asked: list[bool] = []
        for s, (tokens, every) in self._fed.items():
            first = len(self.cache.tokens[s])
            ids += tokens
            positions += range(first, first + len(tokens))
            sequence += [s] * len(tokens)
            asked += [every] * (len(tokens) - 1) + [True]
        self._fed = {}
        batch = Batch(ids, positions, sequence, None if all(asked) else asked)
        return self.runner.run(self.plan, batch, self.cache, self.observer, self.stats)


def _left_padded(input_ids: Tensor, prompts: Prompts, columns: int, pad: int) -> tuple[Tensor, list[int]]:
    """[B, W + columns] with every prompt ending at column W, as transformers' objects expect, and each row's start."""
    rows, width = input_ids.shape
    ids = torch.full((rows, width + columns), pad, dtype=torch.int64, device="cpu")
    ends = [start + length for start, length in zip(prompts.starts, prompts.lengths, strict=True)]
    for row, end in enumerate(ends):
        ids[row, :width] = input_ids[row].roll(width - end)
    return ids, [width - length for length in prompts.lengths]


@torch.no_grad()
def generate(
    session: Session,
    input_ids: Tensor,
    prompts: Prompts,
    request: Settings,
    *,
    logits_processor: Sequence[Processor] | None = None,
    stopping_criteria: Sequence[Callable[..., Any]] | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    seed: int | None = None,
    keep: bool = False,
) -> Tensor:
    """Decodes ``prompts`` = pack(input_ids, ...), row i in sequence i of the session's cache, as ``request`` says;
    ``keep`` leaves them there at the end. Returns [B, W + new] int64: the prompts as they came, then the new tokens,
    padded after a sequence's end.

    Of the session's stats, ``prefill_seconds`` is the prompts' pass and the choice of each first token,
    ``decode_seconds`` all the rest. Raises ValueError for stop strings without a tokenizer and for a seed that is no
    whole number.
    """
    device, input_ids, stats = input_ids.device, input_ids.cpu(), session.stats
    rows, width = input_ids.shape
    vocab_size = session.plan.model.spec.vocab_size
    texts = prompts.ids.split(prompts.lengths)
    sampler = Sampler(request, texts, logits_processor or (), seed, vocab_size)
    ids, starts = _left_padded(input_ids, prompts, request.max_new_tokens, request.pad)
    cells = ids.numpy()  # shares memory; writing one cell through torch takes microseconds
    stopper = Stopper(request, stopping_criteria or (), tokenizer)
    if streamer is not None:
        streamer.put(input_ids)

    began = time.perf_counter()
    stats.prompt_tokens = sum(session.admit(row, text.tolist()) for row, text in enumerate(texts))
    logits = session.step()
    active = list(range(rows))
    filled = width
    prefilled = None
    while True:
        tokens = sampler(logits, ids[:, :filled], starts, active)
        for row, token in zip(active, tokens, strict=True):
            cells[row, filled] = token
        filled += 1
        stats.new_tokens += len(active)
        if prefilled is None:
            prefilled, stats.first_tokens = time.perf_counter(), len(active)
        if streamer is not None:
            streamer.put(ids[:, filled - 1].clone())
        finished = stopper(ids[:, :filled], starts, active, tokens)
        if finished:
            if not keep:
                for row in finished:
                    session.leave(row)
            tokens = [token for row, token in zip(active, tokens, strict=True) if row not in finished]
            active = [row for row in active if row not in finished]
        if not active or filled == ids.shape[1]:
            break
        for row, token in zip(active, tokens, strict=True):
            session.feed(row, [token])
        logits = session.step()
    stats.prefill_seconds = prefilled - began
    if filled > width + 1:
        stats.decode_seconds = time.perf_counter() - prefilled
    if streamer is not None:
        streamer.end()
    return torch.cat([input_ids.long(), ids[:, width:filled]], dim=1).to(device)
