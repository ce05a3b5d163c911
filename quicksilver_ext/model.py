"""QuickSilverForCausalLM: a checkpoint, ready to score and to generate, with transformers' names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _C
from .architectures.loading import load_model
from .config import CONFIG_FILE, QuickSilverConfig
from .engine.decoder import Decoder
from .engine.kv_cache import check_kv_cache_dtype
from .generation.loop import Batch, GenerationOutput, generate, pack
from .generation.sampling import Processor, resolve
from .weights import checkpoint
from .weights.model import PRECISIONS, Model
from .weights.packed import SPEC_FILE, is_packed, save_packed

GROUP_SIZE = 64

# Tokens of a pass that makes logits for all of them: a long text's, over a large vocabulary, would fill gigabytes.
LOGITS_TOKENS = 256


@dataclass
class CausalLMOutput:
    """``logits`` [B, T, V] fp32: at each token, the scores of the next one. Zeros under padding."""

    logits: Tensor


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


def _pad_token_id(source: Path) -> int | None:
    """The one that a folder names, if it does."""
    for name in ("generation_config.json", "config.json"):
        if (source / name).is_file():
            token = checkpoint.read_json(source / name).get("pad_token_id")
            if isinstance(token, int) and token >= 0:
                return token
    return None


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
        self.decoder = Decoder(model, config, kv_cache_dtype)
        self._source = source
        self._tokenizer: Any = None
        self._pad_token_id = None if source is None else _pad_token_id(source)

    @staticmethod
    def from_pretrained(
        source: str | Path,
        device: str | torch.device = "cpu",
        precision: str | None = None,
        group_size: int | None = None,
        quicksilver_config: QuickSilverConfig | None = None,
        kv_cache_dtype: str | None = None,
    ) -> QuickSilverForCausalLM:
        """Loads a Hugging Face folder, a hub id, a ``.gguf`` file, ``demo``, or what :meth:`save_pretrained` wrote.

        device              ``cpu``, ``cuda`` or ``cuda:1``: where the weights, the cache and the work are
        precision           ``fp32``, ``bf16``, ``int8``, ``int4`` or ``adaptive`` (8 or 4 bits per token, by AMQ);
                            ``adaptive`` by default where the config has AMQ on, else ``int8``
        group_size          weights that share a scale: 32, 64 (the default) or 128
        quicksilver_config  the mechanisms; by default those that the folder was saved with, else none
        kv_cache_dtype      keys and values in ``fp32``, ``fp16``, ``bf16`` or ``int8`` (a scale for each vector, about
                            half the bytes of fp16); by default ``fp16``, with fp32 and bf16 weights those. Not saved

        Raises ValueError for an argument that makes no sense, before anything is loaded, and for a config that doesn't
        fit the model; CheckpointError, a ValueError too, for a source that is missing, damaged or of another family.
        """
        place = _device(device)
        check_kv_cache_dtype(kv_cache_dtype)
        if quicksilver_config is not None:
            choose_precision(precision, quicksilver_config)
        path = checkpoint.resolve(source)
        if quicksilver_config is None:
            saved = path.is_dir() and (path / CONFIG_FILE).is_file()
            quicksilver_config = QuickSilverConfig.from_pretrained(path) if saved else QuickSilverConfig()
        if is_packed(path):
            # A saved model's weights have a precision already; the default is what they can serve.
            saved_as = checkpoint.read_json(path / SPEC_FILE)
            group_size = group_size or saved_as.get("group_size")
            if precision is None and saved_as.get("precision") not in ("int8", "adaptive"):
                precision = saved_as.get("precision")
        precision = choose_precision(precision, quicksilver_config)
        model = load_model(path, precision, group_size or GROUP_SIZE).to(place)
        return QuickSilverForCausalLM(model, quicksilver_config, path, kv_cache_dtype)

    @property
    def quicksilver_config(self) -> QuickSilverConfig:
        """The mechanisms in use."""
        return self.decoder.config

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded when it is first asked for. CheckpointError where there is none."""
        if self._tokenizer is None:
            if self._source is None:
                raise checkpoint.CheckpointError("this model was made without a source, so it has no tokenizer")
            self._tokenizer = checkpoint.load_tokenizer(self._source)
        return self._tokenizer

    def chat_prompt(self, message: str) -> list[int]:
        """Token ids of a conversation of one user message, ready for the answer. ValueError without a chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("this model has no chat template; give it a plain prompt")
        turns = [{"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _pack(self, input_ids: Tensor, attention_mask: Tensor | None) -> Batch:
        spec = self.model.spec
        return pack(input_ids, attention_mask, spec.vocab_size, spec.max_positions)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        """Logits of every token, each with the cache that decoding up to it would have held.

        input_ids [B, T] integers; attention_mask [B, T] of 0 and 1, padding on either side. ValueError/TypeError naming
        the argument, as in :func:`~quicksilver_ext.generation.pack`.
        """
        batch = self._pack(input_ids, attention_mask)
        rows, width = input_ids.shape
        logits = torch.zeros(rows * width, self.model.spec.vocab_size)
        places = torch.arange(rows * width) if batch.mask is None else batch.mask.view(-1).nonzero().squeeze(1)
        for part, values in self._passes(batch):
            logits[places[part]] = values.cpu()
        return CausalLMOutput(logits.view(rows, width, -1).to(input_ids.device))

    __call__ = forward

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Log-probability (natural) of each next token, [B, T - 1] fp32: column j is that of token j + 1, as a decode
        step at token j would give it. Zeros where either is padding. Arguments and errors as in :meth:`forward`."""
        batch = self._pack(input_ids, attention_mask)
        rows, width = input_ids.shape
        places = torch.arange(rows * width) if batch.mask is None else batch.mask.view(-1).nonzero().squeeze(1)
        has_next = torch.zeros(len(batch.ids), dtype=torch.bool)
        has_next[:-1] = batch.sequence[1:] == batch.sequence[:-1]
        following = batch.ids.roll(-1)
        scores = torch.zeros(rows * width)
        for part, logits in self._passes(batch):
            chosen = logits.gather(1, following[part, None].to(logits.device)).squeeze(1)
            scores[places[part]] = torch.where(has_next[part], (chosen - logits.logsumexp(1)).cpu(), 0.0)
        return scores.view(rows, width)[:, :-1].to(input_ids.device)

    def _passes(self, batch: Batch) -> Iterator[tuple[slice, Tensor]]:
        """Logits [n, V] of the whole batch, a slice of its tokens at a time."""
        cache = self.decoder.new_cache(len(batch.lengths), max(batch.lengths))
        for start in range(0, len(batch.ids), LOGITS_TOKENS):
            part = slice(start, start + LOGITS_TOKENS)
            yield part, self.decoder.forward(batch.ids[part], batch.positions[part], batch.sequence[part], cache)

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
        **options: Any,
    ) -> GenerationOutput | Tensor:
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

        Returns sequences [B, T + new] int64 (prompts as given, new tokens padded after a sequence's end), stats and
        trace. Of the folder's generation_config.json only special tokens count. Raises ValueError or TypeError naming
        the argument, before anything is computed.
        """
        batch = self._pack(input_ids, attention_mask)
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
        spec = self.model.spec
        request = resolve(
            named | options,
            generation_config,
            width=input_ids.shape[1],
            longest=max(batch.lengths),
            max_positions=spec.max_positions,
            eos_token_ids=spec.eos_token_ids,
            pad_token_id=self._pad_token_id,
        )
        if request.stop_strings and tokenizer is None and self._source is not None:
            tokenizer = self.tokenizer
        output = generate(
            self.decoder,
            input_ids,
            batch,
            request,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            tokenizer=tokenizer,
            seed=seed,
        )
        return output if return_dict_in_generate else output.sequences

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the weights as they are in memory, ``quicksilver_config.json`` and the tokenizer if there is one, for
        :meth:`from_pretrained`. OSError where the folder can't be written to."""
        folder = Path(folder)
        save_packed(self.model, folder)
        self.quicksilver_config.save_pretrained(folder)
        try:
            tokenizer = self.tokenizer
        except checkpoint.CheckpointError:
            return
        tokenizer.save_pretrained(folder)
