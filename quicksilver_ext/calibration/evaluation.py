"""Quality and cost of a config on a text: perplexity and KL divergence against the same model at full depth.

FLOPs are multiply-adds executed in GEMMs and attention, times two, as :class:`~quicksilver_ext.stats.GenerationStats`
counts them; ``flop_reduction`` is what of the full depth's was saved, for the same tokens. Bits are reported beside it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import QuickSilverConfig
from ..engine.batch import Batch
from ..engine.plan import Plan
from ..engine.runner import Runner
from ..model import LOGITS_TOKENS, QuickSilverForCausalLM
from ..stats import GenerationStats

PYDOC = "builtin:pydoc"


@dataclass(frozen=True)
class Evaluation:
    """``tokens`` scored; ``kl_mean`` in nats per token, of full depth's distribution from this config's; ``mean_bits``
    of the weights over the layers run; ``mean_depth`` of the layers, 0 to 1; ``tokens_fused``: those that joined a
    neighbour, of all that ran; seconds in the runner; ``protocol``."""

    tokens: int
    perplexity: float
    baseline_perplexity: float
    kl_mean: float
    flop_reduction: float
    mean_bits: float | None
    mean_depth: float
    tokens_fused: int
    seconds: float
    baseline_seconds: float
    protocol: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def read_text(source: str) -> str:
    """The text of a UTF-8 file, or of ``builtin:pydoc``: the standard library's help topics in the order of their
    names, two newlines between them. ValueError or OSError where there is none."""
    if source == PYDOC:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    if source.startswith("builtin:"):
        raise ValueError(f"text {source!r} is unknown; the only built-in one is {PYDOC}")
    try:
        return Path(source).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"text {source!r} is no file; give a text file, or {PYDOC}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"text {source!r} is not UTF-8 ({error.reason} at byte {error.start})") from None


def windows(total: int, window: int, stride: int, context: int = 0) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first) of each window of a text of ``total`` tokens: begin..end-1 are its tokens, first..end-1 those
    that it scores. No token is scored twice, and a window's first token, which nothing predicts, and the others of its
    ``context`` not at all."""
    scored = 0
    for begin in range(0, total, stride):
        end = min(begin + window, total)
        first = max(scored, begin + max(context, 1))
        if first < end:
            yield begin, end, first
        scored = end
        if end == total:
            return


def check_windows(window: int, stride: int | None, max_tokens: int | None, context: int | None) -> None:
    """ValueError naming the argument that makes no sense. None: left to the default."""
    sizes = (("window", window, 2), ("stride", stride, 1), ("max_tokens", max_tokens, 2), ("context", context, 0))
    for name, value, least in sizes:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
    context = context or 0
    if context >= window:
        raise ValueError(f"context must be below window ({window}), or no token is left to score; got {context}")
    if stride is not None and stride > window - context:
        what = "window less context" if context else "window"
        raise ValueError(
            f"stride must be at most {what} ({window - context}), or tokens between windows are lost; got {stride}"
        )


def _defaults(config: QuickSilverConfig, window: int, stride: int | None, context: int | None) -> tuple[int, int]:
    """Stride and context. Prompt fusion merges tokens that nobody scores: where windows had none, it would do nothing,
    and its figures say nothing of it."""
    if context is None:
        fuses = config.fusion is not None and config.fusion.scope == "prompt"
        context = window // 2 if fuses and stride is None else 0
    return window - context if stride is None else stride, context


class _Run:
    """One plan's passes over the text, and what they cost."""

    def __init__(self, runner: Runner, plan: Plan) -> None:
        self.runner, self.plan = runner, plan
        self.stats = GenerationStats()
        self.seconds = 0.0
        self.loss = 0.0

    def log_probabilities(self, ids: Tensor, asked: int) -> Iterator[Tensor]:
        """log P [n, V] of what follows each of ids[asked:], some rows at a time. Nobody asks logits of the rows before,
        the context, so fusion in scope ``prompt`` may merge them: as in ``generate``, all but the one that the first
        prediction comes from."""
        cache = self.runner.new_cache(self.plan, 1, len(ids), keeps=False)
        cuts = [0, *range(asked + LOGITS_TOKENS, len(ids), LOGITS_TOKENS), len(ids)]
        for start, end in itertools.pairwise(cuts):
            asks = [row >= asked for row in range(start, end)]
            batch = Batch(ids[start:end].tolist(), list(range(start, end)), [0] * (end - start), asks)
            began = time.perf_counter()
            logits = self.runner.run(self.plan, batch, cache, stats=self.stats)
            self.seconds += time.perf_counter() - began
            yield logits.cpu().log_softmax(1)

    def add_loss(self, log_p: Tensor, following: Tensor) -> None:
        self.loss -= float(log_p.gather(1, following[:, None]).sum(dtype=torch.float64))


@torch.no_grad()
def evaluate(
    model: QuickSilverForCausalLM,
    text: str | Tensor,
    *,
    window: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    context: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of ``text`` (or token ids [N] int64) under the model's config, against full depth.

    The first ``max_tokens`` tokens are cut into windows that begin every ``stride`` tokens (default: ``window`` less
    ``context``) and know nothing of each other. Each token is scored once, but for the first ``context`` of the text
    (default: 0; half of the window where the config fuses prompts and no stride is given): all others with at least so
    many tokens before them, from the second window on ``window - stride``, which nobody scores there and which prompt
    fusion may merge. ``progress(done, total)`` hears of windows. ValueError for sizes that make no sense, a window
    longer than the model's context, and a text that leaves no token to score.
    """
    check_windows(window, stride, max_tokens, context)
    stride, context = _defaults(model.quicksilver_config, window, stride, context)
    longest = model.model.spec.max_positions
    if window > longest:
        raise ValueError(f"window must be at most the model's context of {longest} tokens; got {window}")
    ids = text.to("cpu") if isinstance(text, Tensor) else _encode(model, text)
    ids = ids[:max_tokens]
    if len(ids) <= max(context, 1):
        raise ValueError(f"text has {len(ids)} tokens; at least {max(context, 1) + 1} are needed to score one")

    mechanisms_off = QuickSilverConfig()
    run = _Run(model.runner, model.plan)
    # Full depth against itself would only cost the time of a second pass.
    baseline = run
    if model.quicksilver_config != mechanisms_off:
        baseline = _Run(model.runner, Plan(model.model, mechanisms_off))
    parts = list(windows(len(ids), window, stride, context))
    divergence, tokens = 0.0, 0
    for done, (begin, end, first) in enumerate(parts):
        if progress is not None:
            progress(done, len(parts))
        inputs, asked = ids[begin : end - 1], first - 1 - begin
        following = ids[first:end].split(LOGITS_TOKENS)
        tokens += end - first
        if baseline is run:
            for log_q, next_ids in zip(run.log_probabilities(inputs, asked), following):
                run.add_loss(log_q, next_ids)
            continue
        # They take turns at going first, so that neither always finds the processor's caches as the other left them.
        turn = (run, baseline) if done % 2 == 0 else (baseline, run)
        for *both, next_ids in zip(*(each.log_probabilities(inputs, asked) for each in turn), following):
            log_q, log_p = both if turn[0] is run else reversed(both)
            run.add_loss(log_q, next_ids)
            baseline.add_loss(log_p, next_ids)
            divergence += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    if progress is not None:
        progress(len(parts), len(parts))
    return Evaluation(
        tokens=tokens,
        perplexity=_exp(run.loss / tokens),
        baseline_perplexity=_exp(baseline.loss / tokens),
        kl_mean=divergence / tokens,
        flop_reduction=1 - run.stats.flops / run.stats.flops_full,
        mean_bits=run.stats.mean_bits,
        mean_depth=run.stats.mean_depth,
        tokens_fused=run.stats.tokens_fused,
        seconds=run.seconds,
        baseline_seconds=baseline.seconds,
        protocol={
            "model": model.model.spec.name,
            "precision": model.model.precision,
            "group_size": model.model.group_size,
            "kv_cache_dtype": model.runner.kv_cache_dtype,
            "config": model.quicksilver_config.to_dict(),
            "window": window,
            "stride": stride,
            "context": context,
            "max_tokens": max_tokens,
            "text_tokens": len(ids),
            "windows": len(parts),
            "scored": _scored(window, stride, context),
            "baseline": "the same weights at the same precision (adaptive: all 8 bits) and kind of KV cache, full "
            "depth, every mechanism off"
            + ("; this run is that already, so it was made once" if baseline is run else ""),
            "seconds": "wall clock inside the runner, logits included, softmax and loss excluded",
            "threads": torch.get_num_threads(),
        },
    )


def _encode(model: QuickSilverForCausalLM, text: str) -> Tensor:
    return torch.tensor(model.tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64, device="cpu")


def _scored(window: int, stride: int, context: int) -> str:
    text = f"windows of {window} tokens, each from an empty cache, one every {stride}; in each all tokens but the first"
    text += f" {context}" if context > 1 else ""
    overlap = stride < window - max(context, 1)
    return f"{text} that no earlier window scored, given the tokens before them" if overlap else text


def _exp(mean_loss: float) -> float:
    return math.exp(mean_loss) if mean_loss < 700 else math.inf
