"""What ``generate`` was asked for, and the choice of each next token.

Names and meanings are transformers', and so are the processors that change scores: its own classes, in its own order,
each sequence having its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .. import _C

DEFAULT_NEW_TOKENS = 64
NOT_A_NUMBER = (
    "the model's logits are not numbers: its values leave the range of what holds them; use kv_cache_dtype 'fp32' or "
    "'bf16', then precision 'fp32'"
)
NOT_FINITE = "the scores to sample from are not finite; check the logits_processor list and the model"

# Fields of GenerationConfig that ask for something else than one plain sequence per prompt, with the values that don't.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "prompt_lookup_num_tokens": (0,),
    "assistant_early_exit": (),
    "use_mtp": (False,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "token_healing": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
}

# Fields that say how transformers should compute, or that mean nothing without what is unsupported.
WITHOUT_EFFECT = {
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
    *("prefill_chunk_size", "low_memory", "early_stopping", "length_penalty", "bos_token_id", "decoder_start_token_id"),
    "return_dict_in_generate",
}

_LENGTHS = {"max_length", "max_new_tokens", "min_length", "min_new_tokens"}
_ENDINGS = {"eos_token_id", "pad_token_id", "stop_strings", "max_time"}
_SAMPLING = {
    "do_sample",
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
}
_PENALTIES = {"repetition_penalty", "no_repeat_ngram_size", "sequence_bias", "exponential_decay_length_penalty"}
_TOKENS = {"bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"}
_SCORES = {"remove_invalid_values", "renormalize_logits", "watermarking_config"}
SUPPORTED = _LENGTHS | _ENDINGS | _SAMPLING | _PENALTIES | _TOKENS | _SCORES


def _real(name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """ValueError unless low <= value <= high (low < value if ``above``); NaN is neither."""
    fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not (low < value if above else low <= value) or value > high:
        least = f"above {low:g}" if above else f"of at least {low:g}"
        most = "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{name} must be a number {least}{most}; got {value!r}")


def _whole(name: str, value: Any, low: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}; got {value!r}")


def _token_list(name: str, value: Any) -> list[int]:
    values = value.reshape(-1).tolist() if isinstance(value, Tensor) else value
    values = [values] if isinstance(values, Integral) else values
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a token id or a list of them; got {value!r}")
    values = list(values)
    if not all(isinstance(v, Integral) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{name} must be a token id or a list of them; got {value!r}")
    return [int(v) for v in values]


@dataclass(frozen=True)
class Settings:
    """One request, checked. ``eos`` empty: only the count ends a sequence. ``options``: what processors are made of."""

    max_new_tokens: int
    min_new_tokens: int = 0
    eos: tuple[int, ...] = ()
    pad: int = 0
    do_sample: bool = False
    stop_strings: tuple[str, ...] = ()
    max_time: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


def resolve(
    arguments: dict[str, Any],
    generation_config: Any = None,
    *,
    width: int,
    longest: int,
    max_positions: int,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int | None = None,
) -> Settings:
    """Resolves ``generate``'s arguments: those that are not None, then ``generation_config``'s, then the defaults.

    width: columns of the prompt with its padding, which transformers' ``max_length`` and ``min_length`` count; longest:
    tokens of the longest prompt. The last two are the model's own special tokens. An ``eos_token_id`` of -1 (any
    negative one) or an empty list never stops. Raises TypeError for an argument that doesn't exist, ValueError naming
    the argument for a value that makes no sense, what isn't supported, and a context longer than the model's.
    """
    for name in arguments:
        if name not in SUPPORTED and name not in UNSUPPORTED and name not in WITHOUT_EFFECT:
            raise TypeError(f"generate has no argument {name!r}")
    given = {} if generation_config is None else dict(vars(generation_config))
    if generation_config is not None and given.get("top_k") is None:
        given["top_k"] = 50  # transformers' default, which a GenerationConfig keeps unset until it is used
    given.update((name, value) for name, value in arguments.items() if value is not None)
    asked = {name: value for name, value in given.items() if value is not None}
    for name, neutral in UNSUPPORTED.items():
        if name in asked and asked[name] not in neutral:
            instead = f"leave it at {neutral[0]}" if neutral else "leave it out"
            raise ValueError(
                f"{name}={asked[name]!r} is not supported (one sequence per prompt, by argmax or sampling); {instead}"
            )
    for name, low in (("max_length", 1), ("max_new_tokens", 1), ("min_length", 0), ("min_new_tokens", 0), ("top_k", 0)):
        if name in asked:
            _whole(name, asked[name], low)
    do_sample = asked.get("do_sample", False)
    if not isinstance(do_sample, bool):
        raise ValueError(f"do_sample must be True or False; got {do_sample!r}")
    if "temperature" in asked:
        _real("temperature", asked["temperature"], 0, above=do_sample)
    if "top_p" in asked:
        _real("top_p", asked["top_p"], 0, 1, above=True)
    if "repetition_penalty" in asked:
        _real("repetition_penalty", asked["repetition_penalty"], 0, above=True)
    if "max_time" in asked:
        _real("max_time", asked["max_time"], 0)

    # The last token is never fed back, so it needs no position.
    room = max_positions - longest + 1
    if "max_new_tokens" in asked:
        new = int(asked["max_new_tokens"])
    elif "max_length" in asked:
        new = int(asked["max_length"]) - width
        if new < 1:
            raise ValueError(f"max_length is {asked['max_length']}, which the prompt's {width} tokens already fill")
    else:
        new = min(DEFAULT_NEW_TOKENS, room)
    if new > room:
        raise ValueError(
            f"max_new_tokens: {longest} prompt tokens and {new} new ones are {new - room} more than the model's "
            f"context of {max_positions} holds; ask for at most {room}"
        )
    least = max(int(asked.get("min_new_tokens", 0)), int(asked.get("min_length", 0)) - width)
    eos = [token for token in _token_list("eos_token_id", asked.get("eos_token_id", list(eos_token_ids))) if token >= 0]
    pad = asked.get("pad_token_id", pad_token_id)
    if pad is None:
        pad = next(iter([*eos, *(token for token in eos_token_ids if token >= 0)]), 0)
    _whole("pad_token_id", pad, 0)
    stops = asked.get("stop_strings", ())
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"stop_strings must be a string or a list of them, none empty; got {asked['stop_strings']!r}")
    return Settings(new, max(least, 0), tuple(eos), int(pad), do_sample, stops, asked.get("max_time"), asked)


# --- choosing tokens -------------------------------------------------------------------------------------------------

Processor = Callable[[Tensor, Tensor], Tensor]


def _make(name: str, *arguments: Any) -> Processor:
    """One of transformers' processors, by its class's name: importing it takes a second that plain greedy decoding
    shouldn't pay, and an older release may lack the one that nobody asked for."""
    import transformers

    processor: Processor = getattr(transformers, name)(*arguments)
    return processor


def _processors(request: Settings, prompt_length: int) -> list[Processor]:
    """What comes before a user's own processors, for one sequence, in transformers' order. ValueError, from their
    constructors, for a value out of range."""
    options, eos, made = request.options, list(request.eos), []
    if "sequence_bias" in options:
        made.append(_make("SequenceBiasLogitsProcessor", options["sequence_bias"]))
    if options.get("repetition_penalty", 1) != 1:
        made.append(_make("RepetitionPenaltyLogitsProcessor", float(options["repetition_penalty"])))
    if options.get("no_repeat_ngram_size", 0) != 0:
        made.append(_make("NoRepeatNGramLogitsProcessor", options["no_repeat_ngram_size"]))
    if "bad_words_ids" in options:
        made.append(_make("NoBadWordsLogitsProcessor", options["bad_words_ids"], eos or None))
    if request.min_new_tokens and eos:
        made.append(_make("MinNewTokensLengthLogitsProcessor", prompt_length, request.min_new_tokens, eos))
    if "forced_bos_token_id" in options:
        made.append(_make("ForcedBOSTokenLogitsProcessor", options["forced_bos_token_id"]))
    if "forced_eos_token_id" in options:
        total = prompt_length + request.max_new_tokens
        made.append(_make("ForcedEOSTokenLogitsProcessor", total, options["forced_eos_token_id"]))
    if options.get("remove_invalid_values"):
        made.append(_make("InfNanRemoveLogitsProcessor"))
    if "exponential_decay_length_penalty" in options and eos:
        decay = options["exponential_decay_length_penalty"]
        made.append(_make("ExponentialDecayLengthPenalty", decay, eos, prompt_length))
    if "suppress_tokens" in options:
        made.append(_make("SuppressTokensLogitsProcessor", options["suppress_tokens"]))
    if "begin_suppress_tokens" in options:
        made.append(_make("SuppressTokensAtBeginLogitsProcessor", options["begin_suppress_tokens"], prompt_length))
    return made


def _warpers(request: Settings, vocab_size: int) -> list[Processor]:
    """What comes after a user's own processors, in transformers' order."""
    options, made = request.options, []
    if request.do_sample:
        if options.get("temperature", 1) != 1:
            made.append(_make("TemperatureLogitsWarper", float(options["temperature"])))
        if "top_h" in options:
            made.append(_make("TopHLogitsWarper", options["top_h"]))
        if options.get("top_k", 0) != 0:
            made.append(_make("TopKLogitsWarper", int(options["top_k"])))
        if options.get("top_p", 1) < 1:
            made.append(_make("TopPLogitsWarper", float(options["top_p"])))
        if "min_p" in options:
            made.append(_make("MinPLogitsWarper", options["min_p"]))
        if options.get("typical_p", 1) < 1:
            made.append(_make("TypicalLogitsWarper", options["typical_p"]))
        if 0 < options.get("epsilon_cutoff", 0) < 1:
            made.append(_make("EpsilonLogitsWarper", options["epsilon_cutoff"]))
        if 0 < options.get("eta_cutoff", 0) < 1:
            made.append(_make("EtaLogitsWarper", options["eta_cutoff"]))
    if "watermarking_config" in options:
        made.append(options["watermarking_config"].construct_processor(vocab_size, "cpu"))
    if options.get("renormalize_logits"):
        made.append(_make("LogitNormalization"))
    return made


def _streams(prompts: Sequence[Tensor], seed: int | None) -> list[torch.Generator]:
    """A generator per prompt that depends on the seed, the prompt and how many equal prompts came before: not on its
    row, nor on the other prompts, while copies of one prompt still get different samples. ValueError for a bad seed."""
    if seed is not None and (not isinstance(seed, Integral) or isinstance(seed, bool)):
        raise ValueError(f"seed must be a whole number; got {seed!r}")
    if seed is None:
        seed = int(
            torch.randint(2**62, (), dtype=torch.int64, device="cpu")
        )  # repeatable by torch.manual_seed, as in transformers
    copies: dict[bytes, int] = {}
    generators = []
    for prompt in prompts:
        key = prompt.numpy().tobytes()
        copy = copies[key] = copies.get(key, -1) + 1
        digest = hashlib.blake2b(f"{seed} {copy} ".encode() + key, digest_size=8).digest()
        generators.append(torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little", signed=True)))
    return generators


def _kernel_options(request: Settings, warpers: Sequence[Processor]) -> tuple[float, int, float] | None:
    """Temperature, top_k and top_p where ``warpers`` are these alone: the kernel draws in a tenth of the time that
    PyTorch's operators take on a vocabulary, whose threads wait for each other."""
    names = {type(warper).__name__ for warper in warpers}
    if not names <= {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"}:
        return None
    options = request.options
    return float(options.get("temperature", 1)), int(options.get("top_k", 0)), float(options.get("top_p", 1))


def _draw_by_kernel(scores: Tensor, options: tuple[float, int, float], generator: torch.Generator) -> int:
    """As `_draw`, of scores [V] fp32 that are still to be warped."""
    point = float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu"))
    token = _C.sample(scores.data_ptr(), len(scores), *options, point)
    if token < 0:
        raise ValueError(NOT_FINITE)
    return token


def _draw(scores: Tensor, generator: torch.Generator) -> int:
    """One token of softmax(scores [V]), by inverting the cumulative distribution: a single random number per token,
    where torch.multinomial draws V of them."""
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[-1]
    if not torch.isfinite(total):
        raise ValueError(NOT_FINITE)
    point = torch.rand((), generator=generator, dtype=torch.float64, device="cpu") * total
    token = int(torch.searchsorted(cumulative, point, right=True))
    return min(token, int(torch.searchsorted(cumulative, total)))  # the product may round up to the total


class Sampler:
    """Picks the next token of every active row, from what is the row's alone: the batch can't matter."""

    def __init__(
        self,
        request: Settings,
        prompts: Sequence[Tensor],
        custom: Sequence[Processor],
        seed: int | None,
        vocab_size: int,
    ) -> None:
        self.custom = list(custom)
        own = {type(processor) for processor in self.custom}
        self.before, self.after = [], []
        for prompt in prompts:
            # As in transformers, a user's processor takes the place of one that an argument would make.
            self.before.append([p for p in _processors(request, len(prompt)) if type(p) not in own])
            self.after.append(_warpers(request, vocab_size))
        self.generators = _streams(prompts, seed) if request.do_sample else None
        self.kernel = _kernel_options(request, self.after[0]) if request.do_sample else None
        self.plain = not self.generators and not self.custom and not self.before[0] and not self.after[0]

    def __call__(self, logits: Tensor, ids: Tensor, starts: Sequence[int], active: Sequence[int]) -> list[int]:
        """logits [n, V] fp32 of the active rows; ids [B, L], all rows so far, tokens of row r from column starts[r]."""
        if self.plain and logits.device.type != "cpu":
            best = logits.max(-1)
            if bool(best.values.isnan().any()):
                raise ValueError(NOT_A_NUMBER)
            return [int(token) for token in best.indices.tolist()]
        logits = logits.cpu()
        # The largest is NaN where there is one, so it alone need be looked at.
        address, stride = logits.data_ptr(), logits.stride(0) * logits.element_size()
        tokens = [_C.argmax(address + row * stride, logits.shape[1]) for row in range(len(logits))]
        for row, token in enumerate(tokens):
            largest = ctypes.c_float.from_address(address + row * stride + 4 * token).value
            if largest != largest:
                raise ValueError(NOT_A_NUMBER)
        if self.plain:
            return tokens
        # Row by row and without padding, so that a row's scores are those it would have alone.
        own = [ids[row : row + 1, starts[row] :] for row in active]
        scores = [_apply(self.before[r], own[i], logits[i : i + 1].clone()) for i, r in enumerate(active)]
        if self.custom:
            # A user's processor may keep state per row of the batch, so it sees all of them, finished ones too.
            everyone = torch.zeros(len(ids), logits.shape[1], dtype=torch.float32, device="cpu")
            everyone[active] = torch.cat(scores)
            everyone = _apply(self.custom, ids, everyone)
            scores = [everyone[row : row + 1] for row in active]
        if self.generators and self.kernel:
            rows = [row[0].contiguous() for row in scores]
            return [_draw_by_kernel(row, self.kernel, self.generators[r]) for row, r in zip(rows, active, strict=True)]
        scores = [_apply(self.after[r], own[i], scores[i])[0] for i, r in enumerate(active)]
        if self.generators:
            return [_draw(row, self.generators[r]) for row, r in zip(scores, active, strict=True)]
        return [int(row.argmax()) for row in scores]


def _apply(processors: Iterable[Processor], ids: Tensor, scores: Tensor) -> Tensor:
    for processor in processors:
        scores = processor(ids, scores)
    return scores
