"""QuickSilverForCausalLM: a checkpoint, ready to score and to generate, with transformers' names."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _C
from .architectures.loading import check_config, load_model
from .config import CONFIG_FILE, QuickSilverConfig
from .engine.batch import Batch
from .engine.kv_cache import KVCache, check_kv_cache_dtype
from .engine.observer import Observer
from .engine.plan import Plan
from .engine.runner import Runner
from .generation.loop import Prompts, Session, generate, pack
from .generation.sampling import NOT_A_NUMBER, Processor, resolve
from .stats import GenerationStats
from .weights import checkpoint
from .weights.matryoshka import check_group_size
from .weights.model import PRECISIONS, Model
from .weights.packed import is_packed, save_packed, saved_as

# Tokens of a pass that makes logits for all of them: a long text's, over a large vocabulary, would fill gigabytes.
LOGITS_TOKENS = 256
KEPT_PLANS = 8
GENERATION_FILE = "generation_config.json"


# A cache that no call is using is kept for the next one, with the CUDA graphs captured on it, up to this size.
IDLE_BYTES = 2 << 30
CAPACITY_STEP = 256  # of caches that calls make for themselves, so that the next one fits too


@cache
def _output_classes() -> tuple[type, type]:
    """GenerationOutput and CausalLMOutput. transformers, whose ModelOutput they are, takes long to import."""
    from transformers.utils import ModelOutput

    @dataclass
    class GenerationOutput(ModelOutput):
        """``sequences`` [B, W + new]: the prompts as they came, then the new tokens, padded after a sequence's end.
        ``stats``: GenerationStats. ``trace``: a record per token processed where the config asks for it, else None."""

        sequences: Tensor | None = None
        stats: GenerationStats | None = None
        trace: list[dict[str, Any]] | None = None

    @dataclass
    class CausalLMOutput(ModelOutput):
        """``logits`` [B, T, V] fp32: at each token, the scores of the next one. Zeros under padding."""

        logits: Tensor | None = None

    return GenerationOutput, CausalLMOutput


def choose_precision(precision: str | None, config: QuickSilverConfig) -> str:
    """``precision``, or if that is None what the config asks for: ``adaptive`` with AMQ, else ``int8``.

    ValueError for an unknown one, and for one that leaves AMQ no bits to choose.
    """
    if precision is None:
        return "int8" if config.amq is None else "adaptive"
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if config.amq is not None and precision != "adaptive":
        raise ValueError(
            f"precision {precision!r} leaves amq no bits to choose; use precision 'adaptive', or a config without amq"
        )
    return precision


def _device(device: str | torch.device) -> torch.device:
    """ValueError for one that this build or this machine doesn't have."""
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be 'cpu' or 'cuda'; got {str(device)!r}") from None
    if place.type == "cuda":
        if not hasattr(_C, "cuda"):
            raise ValueError(
                f"device {str(device)!r} needs CUDA kernels, which this build has none of; put nvcc on the PATH and "
                "install again, or use device 'cpu'"
            )
        if not torch.cuda.is_available():
            raise ValueError(
                f"device {str(device)!r} is not there: PyTorch finds no GPU (is it a CUDA build, is there a driver?); "
                "use device 'cpu'"
            )
        return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
    if place.type != "cpu":
        raise ValueError(f"device must be 'cpu' or 'cuda'; got {str(device)!r}")
    return place


def _places(prompts: Prompts, cells: int) -> Tensor:
    """Where each packed token lies in its batch [B, T], laid flat."""
    if prompts.mask is None:
        return torch.arange(cells, dtype=torch.int64, device="cpu")
    return prompts.mask.view(-1).nonzero().squeeze(1)


def _check_numbers(values: Tensor) -> None:
    """ValueError where a result holds NaN: better no answer than a wrong one."""
    if bool(values.isnan().any()):
        raise ValueError(NOT_A_NUMBER)


def _inferred_mask(input_ids: Tensor, pad_token_id: Any, eos_token_id: Any) -> Tensor | None:
    """The mask that transformers infers from padding: where the pad token is there and ends no text."""
    ends = eos_token_id.reshape(-1).tolist() if isinstance(eos_token_id, Tensor) else eos_token_id
    ends = ends if isinstance(ends, list | tuple) else [ends]
    if not isinstance(pad_token_id, int) or pad_token_id in ends:
        return None
    mask = input_ids != pad_token_id
    return None if bool(mask.all()) else mask.long()


def _check_room(cache: KVCache, rows: int, tokens: int) -> None:
    """ValueError for a cache that a call can't work in."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be one that new_cache made; got {type(cache).__name__}")
    if cache.sequences < rows or cache.capacity < tokens:
        raise ValueError(
            f"cache has room for {cache.sequences} sequences of {cache.capacity} tokens; wanted {rows} of {tokens}. "
            "Make a larger one by new_cache"
        )


class QuickSilverForCausalLM:
    """A frozen GPT-2 or Llama model under a :class:`QuickSilverConfig`. Make one by :meth:`from_pretrained`.

    Sequences are independent: neither padding nor the rest of a batch changes what a row gets, to the bit on packed
    weights. Several threads may use one model; their passes take turns.
    """

    def __init__(
        self,
        model: Model,
        config: QuickSilverConfig,
        source: Path | None = None,
        kv_cache_dtype: str | None = None,
    ) -> None:
        """``source``: where the tokenizer is; ``kv_cache_dtype`` as in :meth:`from_pretrained`. ValueError where the
        config doesn't fit the model."""
        self.model = model
        self.runner = Runner(model, kv_cache_dtype)
        self.plan = Plan(model, config)
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._idle: list[KVCache] = []
        self._source = source
        self._tokenizer: Any = None
        self._pad_token_id = model.spec.pad_token_id

    def with_config(self, quicksilver_config: QuickSilverConfig) -> QuickSilverForCausalLM:
        """The same weights under another config; costs milliseconds. ValueError where it doesn't fit the model."""
        other = copy.copy(self)
        other.plan = Plan(self.model, quicksilver_config)
        other._plans, other._idle = OrderedDict(), []
        return other

    def _plan(self, config: QuickSilverConfig | None) -> Plan:
        """The plan of a call's own config, the last few of which are kept; by default the model's."""
        if config is None or config is self.plan.config:
            return self.plan
        if not isinstance(config, QuickSilverConfig):
            raise TypeError(f"quicksilver_config must be a QuickSilverConfig; got {type(config).__name__}")
        plan = self._plans.get(id(config))
        if plan is None:
            plan = self._plans[id(config)] = Plan(self.model, config)  # it holds the config, so its id stays taken
            if len(self._plans) > KEPT_PLANS:
                self._plans.popitem(last=False)
        return plan

    def new_cache(
        self, sequences: int = 1, capacity: int | None = None, quicksilver_config: QuickSilverConfig | None = None
    ) -> KVCache:
        """An empty KV cache to hand to :meth:`generate`: for so many sequences of at most ``capacity`` tokens each (by
        default the model's context), under the model's config or another one. What it holds of a text isn't computed
        again, and ``cache.truncate(sequence, position)`` takes tokens back. ValueError for sizes that make no sense."""
        capacity = self.model.spec.max_positions if capacity is None else capacity
        return self.runner.new_cache(self._plan(quicksilver_config), sequences, capacity)

    @contextmanager
    def _own_cache(self, plan: Plan, sequences: int, capacity: int) -> Iterator[KVCache]:
        """A cache for the time of a call: the one that was left over, or a new one."""
        found = None
        while self._idle and found is None:
            found = self._idle.pop()
            fits = found.sequences >= sequences and capacity <= found.capacity <= 4 * max(capacity, CAPACITY_STEP)
            if not fits or not plan.fits(found):
                found = None
        if found is None:
            rounded = min(-(-capacity // CAPACITY_STEP) * CAPACITY_STEP, self.model.spec.max_positions)
            found = self.runner.new_cache(plan, sequences, max(capacity, rounded), keeps=False)
        yield found  # where a call fails, its cache isn't kept
        for sequence in range(found.sequences):
            found.drop(sequence)
        if found.reserved_nbytes <= IDLE_BYTES:
            self._idle[:] = [found]

    # What transformers' users type.

    @property
    def device(self) -> torch.device:
        """Where weights, caches and work are."""
        return self.runner.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding table. Logits are float32 always."""
        return self.model.embedding.dtype

    @property
    def config(self) -> Any:
        """Sizes and special tokens under the names of transformers' configs, as its PretrainedConfig."""
        from transformers import PretrainedConfig

        spec = self.model.spec
        return PretrainedConfig.from_dict(
            {
                "model_type": spec.family,
                "vocab_size": spec.vocab_size,
                "hidden_size": spec.hidden_size,
                "intermediate_size": spec.intermediate_size,
                "num_hidden_layers": spec.num_layers,
                "num_attention_heads": spec.num_heads,
                "num_key_value_heads": spec.num_kv_heads,
                "head_dim": spec.head_size,
                "max_position_embeddings": spec.max_positions,
                "tie_word_embeddings": spec.tied_head,
                **self._special_tokens(),
            }
        )

    @property
    def generation_config(self) -> Any:
        """The special tokens that :meth:`generate` ends and pads with, as transformers' GenerationConfig."""
        from transformers import GenerationConfig

        return GenerationConfig(**self._special_tokens())

    def _special_tokens(self) -> dict[str, Any]:
        spec = self.model.spec
        ends: Any = spec.eos_token_ids
        return {
            "bos_token_id": spec.bos_token_id,
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": self._pad_token_id,
        }

    def num_parameters(self) -> int:
        """Weights of the model, a tied head's once."""
        model, spec = self.model, self.model.spec
        linears = [linear for layer in model.layers for linear in layer.linears()]
        norms = [norm for layer in model.layers for norm in layer.norms()] + [model.final_norm]
        biases = sum(linear.bias.numel() for linear in linears if linear.bias is not None)
        vectors = sum(norm.weight.numel() + (0 if norm.bias is None else norm.bias.numel()) for norm in norms)
        tables = model.embedding.numel()
        tables += 0 if model.position_embedding is None else model.position_embedding.numel()
        tables += 0 if spec.tied_head else model.head.macs
        return sum(linear.macs for linear in linears) + biases + vectors + tables

    @staticmethod
    def from_pretrained(
        source: str | Path,
        device: str | torch.device = "cpu",
        precision: str | None = None,
        group_size: int | None = None,
        quicksilver_config: QuickSilverConfig | None = None,
        kv_cache_dtype: str | None = None,
        requantize: bool = False,
        statistics: bool = True,
    ) -> QuickSilverForCausalLM:
        """Loads a Hugging Face folder, a hub id, a ``.gguf`` file, ``demo``, or what :meth:`save_pretrained` wrote.

        device              ``cpu``, ``cuda`` or ``cuda:1``: where the weights, the cache and the work are
        precision           ``fp32``, ``bf16``, ``int8``, ``int4`` or ``adaptive`` (8 or 4 bits per token, by AMQ);
                            ``adaptive`` by default where the config has AMQ on, else ``int8``, or ``int4`` where
                            the source has 4-bit codes of its own (GGUF's Q4_0, Q4_1 and Q4_K, GPTQ, AWQ)
        group_size          weights that share a scale: 32, 64 (the default) or 128; of such codes always the source's
        quicksilver_config  the mechanisms; by default those that the folder was saved with, else none
        kv_cache_dtype      keys and values in ``fp32``, ``fp16``, ``bf16`` or ``int8`` (a scale for each vector, about
                            half the bytes of fp16); by default ``fp16``, with fp32 and bf16 weights those. Not saved
        requantize          puts such weights on our grid, where 8 and 4 bits differ, like others; else their values are
                            kept
        statistics          runs a short text through the model while its weights are packed, and fits them to what it
                            sees: takes as long as a prompt of 900 tokens in fp32. Without, 4 bits are much worse

        Raises ValueError for an argument that makes no sense, before anything is loaded, and for a config that doesn't
        fit the model; CheckpointError, a ValueError too, for a source that is missing, damaged or of another family.
        """
        place = _device(device)
        check_kv_cache_dtype(kv_cache_dtype)
        if group_size is not None:
            check_group_size(group_size)
        if quicksilver_config is not None:
            choose_precision(precision, quicksilver_config)
        path = checkpoint.resolve(source, check_config)
        if quicksilver_config is None:
            saved = path.is_dir() and (path / CONFIG_FILE).is_file()
            quicksilver_config = QuickSilverConfig.from_pretrained(path) if saved else QuickSilverConfig()
        if is_packed(path) and precision is None:
            # A saved model's weights have a precision already; the default is what they can serve.
            stored, _ = saved_as(path)
            precision = stored if stored not in ("int8", "adaptive") else choose_precision(None, quicksilver_config)
        if precision is not None or quicksilver_config.amq is not None:
            precision = choose_precision(precision, quicksilver_config)
        model = load_model(path, precision, group_size, requantize, statistics).to(place)
        if model.has_own_codes and not is_packed(path):
            warnings.warn(
                f"{path.name} has 4-bit weights, which have no more to give: precision {model.precision} is the same "
                "as int4; requantize=True (--requantize) puts them on a grid where 8 and 4 bits differ",
                stacklevel=2,
            )
        return QuickSilverForCausalLM(model, quicksilver_config, path, kv_cache_dtype)

    @property
    def quicksilver_config(self) -> QuickSilverConfig:
        """The mechanisms in use."""
        return self.plan.config

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded when it is first asked for. CheckpointError where there is none."""
        if self._tokenizer is None:
            if self._source is None:
                raise checkpoint.CheckpointError("this model was made without a source, so it has no tokenizer")
            self._tokenizer = checkpoint.load_tokenizer(self._source)
        return self._tokenizer

    def chat_prompt(self, message: str) -> list[int]:
        """Token ids of a conversation of one user message, ready for the answer. ValueError without a chat template,
        and where it refuses such a conversation or is broken."""
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise ValueError("this model has no chat template; give it a plain prompt")
        turns = [{"role": "user", "content": message}]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            if not text:
                raise ValueError("it comes to an empty text")
        except Exception as error:  # Jinja's, and whatever a template's own code comes to
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"the chat template of {self._source} can't make a prompt of one user message ({reason}); give a plain "
                "prompt, or mend the template (tokenizer.chat_template)"
            ) from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _pack(self, input_ids: Tensor, attention_mask: Tensor | None) -> Prompts:
        spec = self.model.spec
        return pack(input_ids, attention_mask, spec.vocab_size, spec.max_positions)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        quicksilver_config: QuickSilverConfig | None = None,
        observer: Observer | None = None,
    ) -> Any:
        """Logits of every token, each with the cache that decoding up to it would have held: ``.logits`` [B, T, V].

        input_ids [B, T] integers; attention_mask [B, T] of 0 and 1, padding on either side; quicksilver_config: for
        this call, in place of the model's own; observer: hears of every pass. ValueError/TypeError naming the argument,
        as in :func:`~quicksilver_ext.generation.loop.pack`.
        """
        prompts = self._pack(input_ids, attention_mask)
        rows, width = input_ids.shape
        logits = torch.zeros(rows * width, self.model.spec.vocab_size, dtype=torch.float32, device="cpu")
        places = _places(prompts, rows * width)
        for part, values in self._passes(prompts, quicksilver_config, observer):
            logits[places[part]] = values.cpu()
        _check_numbers(logits)
        return _output_classes()[1](logits=logits.view(rows, width, -1).to(input_ids.device))

    __call__ = forward

    @torch.no_grad()
    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        quicksilver_config: QuickSilverConfig | None = None,
    ) -> Tensor:
        """Log-probability (natural) of each next token, [B, T - 1] fp32: column j is that of token j + 1, as a decode
        step at token j would give it. Zeros where either is padding. Arguments and errors as in :meth:`forward`."""
        prompts = self._pack(input_ids, attention_mask)
        rows, width = input_ids.shape
        places = _places(prompts, rows * width)
        has_next = torch.zeros(len(prompts.ids), dtype=torch.bool, device="cpu")
        has_next[:-1] = prompts.sequence[1:] == prompts.sequence[:-1]
        following = prompts.ids.roll(-1)
        scores = torch.zeros(rows * width, dtype=torch.float32, device="cpu")
        for part, logits in self._passes(prompts, quicksilver_config):
            chosen = logits.gather(1, following[part, None].to(logits.device)).squeeze(1)
            found = (chosen - logits.logsumexp(1)).cpu()
            scores[places[part]] = found.where(has_next[part], found.new_zeros(()))
        _check_numbers(scores)
        return scores.view(rows, width)[:, :-1].to(input_ids.device)

    def _passes(
        self, prompts: Prompts, config: QuickSilverConfig | None, observer: Observer | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Logits [n, V] of all prompts, a slice of their tokens at a time."""
        plan = self._plan(config)
        with self._own_cache(plan, len(prompts.lengths), max(prompts.lengths)) as kv_cache:
            for start in range(0, len(prompts.ids), LOGITS_TOKENS):
                part = slice(start, start + LOGITS_TOKENS)
                batch = Batch(*(column[part].tolist() for column in (prompts.ids, prompts.positions, prompts.sequence)))
                yield part, self.runner.run(plan, batch, kv_cache, observer)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Callable[..., Any]] | None = None,
        streamer: Any = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | list[int] | None = None,
        stop_strings: str | list[str] | None = None,
        tokenizer: Any = None,
        seed: int | None = None,
        return_dict_in_generate: bool = True,
        quicksilver_config: QuickSilverConfig | None = None,
        cache: KVCache | None = None,
        observer: Observer | None = None,
        **options: Any,
    ) -> Any:
        """Continues each row of ``input_ids`` [B, T] (integers; padding, which the mask says, on either side).

        Names and meanings are transformers'; an argument that is None takes ``generation_config``'s value, then the
        default. ``options`` are further fields of transformers' GenerationConfig (``min_new_tokens``, ``max_length``,
        ``pad_token_id``, ``no_repeat_ngram_size``, ...).

        max_new_tokens      64 by default, or what the context still holds
        do_sample           False by default: the most likely token each time
        temperature, top_k, top_p   1, off, off by default (a GenerationConfig without top_k means 50, as it always did)
        eos_token_id        the checkpoint's by default; -1 or [] never stops
        stop_strings        end a sequence with the token that completes one of them, in the new text
        tokenizer           for stop_strings; the checkpoint's own by default
        seed                makes sampling repeatable: a row's tokens come from the seed and its prompt, not the batch
        logits_processor, stopping_criteria   called with all rows, padded on the left, finished ones too
        return_dict_in_generate   False: the sequences alone
        quicksilver_config  for this call, in place of the model's own
        cache               from :meth:`new_cache`; row i is its sequence i. ``input_ids`` is the whole text still: what
                            the cache holds of its beginning isn't computed again, what it holds beyond that is taken
                            back, and all but the last new token stay in it. ``stats.prompt_tokens``: what was computed
        observer            hears of every pass: see engine.observer.Observer

        Without a mask, padding is found as transformers finds it: where there is a ``pad_token_id`` that is no end.
        Returns a ModelOutput of transformers: ``sequences`` [B, T + new] int64 (prompts as given, new tokens padded
        after a sequence's end), ``stats`` (GenerationStats) and ``trace``. Of the folder's generation_config.json only
        special tokens count. Raises ValueError or TypeError naming the argument, before anything is computed.
        """
        plan, spec = self._plan(quicksilver_config), self.model.spec
        if attention_mask is None and isinstance(input_ids, Tensor):
            given = {"pad_token_id": options.get("pad_token_id"), "eos_token_id": eos_token_id}
            for name, own in (("pad_token_id", self._pad_token_id), ("eos_token_id", spec.eos_token_ids)):
                if given[name] is None:
                    given[name] = getattr(generation_config, name, None)
                if given[name] is None:
                    given[name] = own
            attention_mask = _inferred_mask(input_ids, **given)
        prompts = self._pack(input_ids, attention_mask)
        named = {
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "eos_token_id": eos_token_id,
            "stop_strings": stop_strings,
        }
        request = resolve(
            named | options,
            generation_config,
            width=input_ids.shape[1],
            longest=max(prompts.lengths),
            max_positions=spec.max_positions,
            eos_token_ids=spec.eos_token_ids,
            pad_token_id=self._pad_token_id,
        )
        if request.stop_strings and tokenizer is None and self._source is not None:
            tokenizer = self.tokenizer
        rows, capacity = len(prompts.lengths), max(prompts.lengths) + request.max_new_tokens - 1
        if cache is not None:
            _check_room(cache, rows, capacity)
        holder = self._own_cache(plan, rows, capacity) if cache is None else nullcontext(cache)
        with holder as kv_cache:
            session = Session(self.runner, plan, kv_cache, observer=observer)
            sequences = generate(
                session,
                input_ids,
                prompts,
                request,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                streamer=streamer,
                tokenizer=tokenizer,
                seed=seed,
                keep=cache is not None,
            )
        if not return_dict_in_generate:
            return sequences
        trace = session.stats.trace if plan.config.trace else None
        return _output_classes()[0](sequences=sequences, stats=session.stats, trace=trace)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the weights as they are in memory, ``quicksilver_config.json`` and the tokenizer if there is one, for
        :meth:`from_pretrained`. OSError where the folder can't be written to."""
        folder = Path(folder)
        save_packed(self.model, folder)
        self.quicksilver_config.save_pretrained(folder)
        self._save_generation_config(folder)
        try:
            tokenizer = self.tokenizer
        except checkpoint.CheckpointError:
            return
        tokenizer.save_pretrained(folder)

    def _save_generation_config(self, folder: Path) -> None:
        """The source's generation_config.json, or what is known of it."""
        values = {name: value for name, value in self._special_tokens().items() if value is not None}
        if self._source is not None and (self._source / GENERATION_FILE).is_file():
            values = checkpoint.read_json(self._source / GENERATION_FILE)
        part = folder / f".{GENERATION_FILE}.{os.getpid()}"
        part.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        part.replace(folder / GENERATION_FILE)
