"""Decoding: a batch of prompts in, tokens out, one pass of the decoder per step.

Names and meanings are transformers'; its LogitsProcessor, StoppingCriteria, BaseStreamer and GenerationConfig objects
work as they are. Padding is removed at the door (:func:`pack`) and a sequence that has finished leaves the batch, so
neither costs work, and neither can change what another sequence gets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.decoder import Decoder
from ..stats import GenerationStats
from .sampling import Processor, Sampler, Settings


class Batch(NamedTuple):
    """Prompts without their padding, packed row after row, T tokens in all."""

    ids: Tensor  # [T] int64
    positions: Tensor  # [T] int32, from 0 in each row
    sequence: Tensor  # [T] int32, the row that a token belongs to
    starts: list[int]  # first real column of each row
    lengths: list[int]  # real tokens of each row
    mask: Tensor | None  # [B, W] bool, where the tokens came from; None where there was no padding


def pack(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int, max_positions: int) -> Batch:
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
        sequence = torch.arange(rows, dtype=torch.int32).repeat_interleave(width)
        positions = torch.arange(width, dtype=torch.int32).repeat(rows)
    else:
        starts, lengths = mask.int().argmax(1).tolist(), mask.sum(1).tolist()
        ids = input_ids[mask].long()
        sequence = mask.nonzero()[:, 0].int()
        positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
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
    return Batch(ids, positions, sequence, starts, lengths, mask)


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
            verdict = torch.as_tensor(criterion(ids, None), dtype=torch.bool).reshape(-1).expand(len(ids))
            done.update(row for row in active if verdict[row])
        return done


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass
class GenerationOutput:
    """``sequences`` [B, W + new]: the prompts as they came, then the new tokens, padded after a sequence's end.
    ``trace``: a record per token processed where the config asks for it, else None."""

    sequences: Tensor
    stats: GenerationStats
    trace: list[dict[str, Any]] | None = None


def _left_padded(input_ids: Tensor, batch: Batch, columns: int, pad: int) -> tuple[Tensor, list[int]]:
    """[B, W + columns] with every prompt ending at column W, as transformers' objects expect, and each row's start."""
    rows, width = input_ids.shape
    ids = torch.full((rows, width + columns), pad, dtype=torch.int64)
    ends = [start + length for start, length in zip(batch.starts, batch.lengths, strict=True)]
    for row, end in enumerate(ends):
        ids[row, :width] = input_ids[row].roll(width - end)
    return ids, [width - length for length in batch.lengths]


@torch.no_grad()
def generate(
    decoder: Decoder,
    input_ids: Tensor,
    batch: Batch,
    request: Settings,
    *,
    logits_processor: Sequence[Processor] | None = None,
    stopping_criteria: Sequence[Callable[..., Any]] | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    seed: int | None = None,
) -> GenerationOutput:
    """Decodes ``batch`` = pack(input_ids, ...) as ``request`` says.

    ``stats.prefill_seconds`` is the prompts' pass and the choice of each first token, ``stats.decode_seconds`` all the
    rest. Raises ValueError for stop strings without a tokenizer and for a seed that is no whole number.
    """
    device, input_ids = input_ids.device, input_ids.cpu()
    rows, width = input_ids.shape
    vocab_size = decoder.model.spec.vocab_size
    sampler = Sampler(request, batch.ids.split(batch.lengths), logits_processor or (), seed, vocab_size)
    ids, starts = _left_padded(input_ids, batch, request.max_new_tokens, request.pad)
    cells = ids.numpy()  # shares memory; writing one cell through torch takes microseconds
    cache = decoder.new_cache(rows, max(batch.lengths) + request.max_new_tokens)
    stats = GenerationStats(prompt_tokens=len(batch.ids))
    stopper = Stopper(request, stopping_criteria or (), tokenizer)
    if streamer is not None:
        streamer.put(input_ids)

    began = time.perf_counter()
    asked = torch.zeros(len(batch.ids), dtype=torch.bool)
    asked[torch.tensor(batch.lengths).cumsum(0) - 1] = True
    logits = decoder.forward(batch.ids, batch.positions, batch.sequence, cache, logits=asked, stats=stats)
    active = list(range(rows))
    filled = width
    prefilled = None
    while True:
        tokens = sampler(logits, ids[:, :filled], starts, active)
        for row, token in zip(active, tokens, strict=True):
            cells[row, filled] = token
        filled += 1
        stats.new_tokens += len(active)
        prefilled = prefilled or time.perf_counter()
        if streamer is not None:
            streamer.put(ids[:, filled - 1].clone())
        finished = stopper(ids[:, :filled], starts, active, tokens)
        if finished:
            for row in finished:
                cache.drop(row)
            tokens = [token for row, token in zip(active, tokens, strict=True) if row not in finished]
            active = [row for row in active if row not in finished]
        if not active or filled == ids.shape[1]:
            break
        logits = decoder.step(tokens, [filled - 1 - starts[row] for row in active], active, cache, stats)
    stats.prefill_seconds = prefilled - began
    if filled > width + 1:
        stats.decode_seconds = time.perf_counter() - prefilled
    if streamer is not None:
        streamer.end()
    sequences = torch.cat([input_ids.long(), ids[:, width:filled]], dim=1).to(device)
    return GenerationOutput(sequences, stats, stats.trace if decoder.config.trace else None)
