"""The codes of a model, fitted layer after layer to texts.

A matrix is rounded column after column, each time making up in the columns to come for what that costs (GPTQ, arXiv
2210.17323), those of the largest inputs first: errors cancel for the inputs that there are, row by row of the weight.
Then each column is looked at again, all others being what they are, a few times (coordinate descent, as in CDQuant,
arXiv 2406.17542). The residual to the original weight goes to the second plane, and is looked at again in the same way.

* Errors cancel within one row of one matrix. So codes of 4 and of 8 bits can be mixed by token and by matrix as one
  likes. (What learns the rounding of a whole layer lets matrices cancel each other's errors; then a mixture may be
  worse than all at 4 bits.)
* Rows of inputs that stand out, the first token's in some layers by a factor of a thousand, are held down: they would
  be all that is fitted.
* Two thirds of the texts are the model's own: it goes on with pieces of prose, code, lists and letters. What is fitted
  to one kind of text alone is hardly better on another than what is fitted to none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import __version__
from ..architectures import dense
from ..architectures.fitting import SAME_INPUT, Fitter, Inputs, held_down
from ..architectures.loading import check_config, load_model
from ..architectures.sample_text import SAMPLES
from ..config import QuickSilverConfig
from ..model import QuickSilverForCausalLM
from ..weights.checkpoint import load_tokenizer, resolve
from ..weights.matryoshka import (
    STORED,
    MatryoshkaWeight,
    check_group_size,
    pack_codes,
    pack_matryoshka,
    pack_plane,
    unpack_plane,
)
from ..weights.model import Layer, Linear, Norm, Spec
from ..weights.packed import is_packed
from .evaluation import evaluate

HELD_OUT = 0.1  # of the text, its end: what the result is judged by
HELD_OUT_TOKENS = 8192  # at most
REPORT = "quicksilver_optimize.json"
UNFINISHED = ".quicksilver_optimize"  # a folder in the output, of the layers that are done
Progress = Callable[[int, int], None]  # layers done, of so many


@dataclass(frozen=True)
class Settings:
    """What weights are fitted to: ``texts`` pieces of ``length`` tokens, two thirds of them of the model's own."""

    texts: int = 128
    length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = {"texts": 3, "length": 8, "seed": 0}[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, wanted a whole number of at least {least}")


# Residuals reach from -1 to 7/8 of a step; half of one of their own steps beyond, nothing is lost.
REACH_DOWN, REACH_UP = 1 + 1 / 16, 7 / 8 + 1 / 16
DAMPING = 0.03  # of the mean diagonal
INT8_SUFFERS = 1.5  # times the squared error on the grid of the original weights
SMALLEST_STEP = 2.0**-24  # of fp16
SECOND_LOOKS = 3  # more of them gain next to nothing


def residuals_of(steps: Tensor, codes: Tensor) -> Tensor:
    """What is left of values in steps, in eighths of one, as far as nibbles reach."""
    return ((steps - codes) * 8).round_().clamp_(-8, 7)


def eight_bit_error(weight: Tensor, scale: Tensor, offset: Tensor, importance: Tensor) -> Tensor:
    """What INT8 loses of a group's weights [N, n] on a grid [N, 1]: [N, 1]."""
    steps = (weight - offset) / scale.clamp(min=SMALLEST_STEP)
    code = steps.round().clamp(0, 15)
    return (((steps - code - residuals_of(steps, code) / 8) * scale).square() * importance).sum(1, keepdim=True)


def order_of(hessian: Tensor, size: int) -> Tensor:
    """int64 [K], columns from the one of the largest inputs to that of the smallest, groups staying together. What is
    rounded first has the most columns left to make up for it."""
    large = hessian.diagonal()
    groups = torch.arange(len(hessian), dtype=torch.int64, device="cpu").split(size)
    groups = tuple(group[large[group].argsort(descending=True, stable=True)] for group in groups)
    whole = len(hessian) // size  # a last group that isn't full stays last: others begin at multiples of the size
    return torch.cat(sorted(groups[:whole], key=lambda group: -large[group].sum().item()) + list(groups[whole:]))


class Codes:
    """The codes of a weight's columns, each a row here: fp32 [K, N]. scale, offset: [G, N]."""

    def __init__(self, weight: Tensor, size: int) -> None:
        self.weight, self.size = weight, size
        self.code, self.residual = torch.empty_like(weight), torch.empty_like(weight)  # residual: as stored, 0..15
        self.lowest, self.highest = torch.empty_like(weight), torch.empty_like(weight)  # that a residual reaches from
        columns, rows = weight.shape
        self.scale, self.offset = (
            weight.new_empty(-(-columns // size), rows),
            weight.new_empty(-(-columns // size), rows),
        )

    def begin_group(self, group: int, scale: Tensor, offset: Tensor) -> None:
        span = slice(group * self.size, (group + 1) * self.size)
        self.scale[group], self.offset[group] = scale, offset
        steps = (self.weight[span] - offset) / scale.clamp(min=SMALLEST_STEP)
        self.lowest[span] = (steps - REACH_UP).ceil().clamp(0, 15)
        self.highest[span] = (steps + REACH_DOWN).floor().clamp(0, 15)

    def grid(self, column: int) -> tuple[Tensor, Tensor]:
        return self.scale[column // self.size], self.offset[column // self.size]

    def round(self, column: int, wanted: Tensor) -> Tensor:
        """Takes the codes that are nearest to the values that are wanted of a column [N]; returns their values."""
        scale, offset = self.grid(column)
        code = ((wanted - offset) / scale.clamp(min=SMALLEST_STEP)).round_()
        self.code[column] = torch.maximum(torch.minimum(code, self.highest[column]), self.lowest[column])
        return self.code[column] * scale + offset

    def round_residual(self, column: int, wanted: Tensor) -> Tensor:
        """The same for 8 bits, the codes of 4 being there."""
        scale, offset = self.grid(column)
        steps = (wanted - offset) / scale.clamp(min=SMALLEST_STEP)
        self.residual[column] = residuals_of(steps, self.code[column]) + 8
        return (self.code[column] + (self.residual[column] - 8) / 8) * scale + offset


def look_again(codes: Codes, values: Tensor, round_column: Callable[[int, Tensor], Tensor], hessian: Tensor) -> None:
    """Takes for each column in turn what is best, all others being what they are: coordinate descent on the error of
    the outputs. values fp32 [K, N]: what the codes are worth; hessian fp32 [K, K]."""
    error = codes.weight - values
    slope = hessian @ error
    for begin in range(0, len(hessian), codes.size):
        span = slice(begin, begin + codes.size)
        own, slopes, before = hessian[span, span], slope[span], error[span].clone()
        for i, column in enumerate(range(begin, begin + len(own))):
            values[column] = round_column(column, values[column] + slopes[i] / own[i, i])
            new = codes.weight[column] - values[column]
            slopes[i:].addr_(own[i, i:], new - error[column])
            error[column] = new
        slope[span.stop :] += hessian[span.stop :, span] @ (error[span] - before)


def choose_residuals(codes: Codes, hessian: Tensor) -> None:
    """Those of all columns, the codes being there."""
    values = torch.empty_like(codes.weight)
    for column, weight in enumerate(codes.weight):
        values[column] = codes.round_residual(column, weight)
    for _ in range(SECOND_LOOKS):
        look_again(codes, values, codes.round_residual, hessian)


def damped(hessian: Tensor) -> Tensor:
    """A copy with a diagonal that is larger by a share of its mean."""
    hessian = hessian.clone()
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean().clamp(min=1e-12))
    return hessian


def compensate(weight: Tensor, importance: Tensor, hessian: Tensor, out: MatryoshkaWeight, name: str) -> None:
    """Fills ``out`` from weight fp32 [N, K]. importance fp32 [K] is what an error in a column counts, hessian fp32
    [K, K] the sum of its inputs' outer products. A group's grid is found when its turn comes, unless INT8 would suffer,
    and a code stays so near to the original weight that a residual reaches it."""
    columns, size = weight.shape[1], out.group_size
    order = order_of(hessian, size)
    hessian, importance = damped(hessian[order][:, order]), importance[order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    inverse = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight.T[order]
    codes, values = Codes(left.clone(), size), torch.empty_like(left)
    for group, begin in enumerate(range(0, columns, size)):
        span = slice(begin, min(begin + size, columns))
        original, counts = codes.weight[span].T.contiguous(), importance[span]
        old, new = (
            pack_matryoshka(each, size, importance=counts, part=True).groups()
            for each in (original, left[span].T.contiguous())
        )
        suffers = eight_bit_error(original, *new, counts) > INT8_SUFFERS * eight_bit_error(original, *old, counts)
        codes.begin_group(group, *(torch.where(suffers, *pair)[:, 0] for pair in zip(old, new)))
        block, own, errors = left[span], inverse[span, span], torch.empty_like(left[span])
        for i, column in enumerate(range(span.start, span.stop)):
            values[column] = codes.round(column, block[i])
            errors[i] = (block[i] - values[column]) / own[i, i]
            block[i:].addr_(own[i, i:], errors[i], alpha=-1)
        left[span.stop :] -= inverse[span, span.stop :].T @ errors
    for _ in range(SECOND_LOOKS):
        look_again(codes, values, codes.round, hessian)
    choose_residuals(codes, hessian)
    back = order.argsort()
    code, residual = (each[back].T.to(torch.uint8).contiguous() for each in (codes.code, codes.residual))
    # Groups stayed together, so where a group's first column went is where the group went.
    where = back[::size] // size
    scale, offset = (each[where].T.half().contiguous() for each in (codes.scale, codes.offset))
    pack_codes(code, residual, scale, offset, out, name=name)


class SecondMoments(Inputs):
    """Of each input of a layer the sum of its rows' outer products, fp32 [K, K]."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor) -> None:
        rows = held_down(x.flatten(0, -2))
        self.sums[name] = rows.T @ rows + self.sums.get(name, 0)


class Compensated(Fitter):
    """Chooses the codes of each layer's matrices in turn. What is done is kept in ``folder``, layer by layer, and taken
    from there by a run that wants the same."""

    def __init__(self, ids: Tensor, folder: Path, key: str, progress: Progress) -> None:
        super().__init__(ids)
        self.folder, self.key, self.progress = folder, key, progress

    @torch.no_grad()
    def begin(
        self, spec: Spec, embedding: Tensor, positions: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> None:
        super().begin(spec, embedding, positions, rotary)
        self.quantized = self.hidden.clone()  # what the layers before make of the texts with 4 bits

    def pack(
        self,
        index: int,
        layer: Layer,
        importance: dict[str, Tensor],
        out: dict[str, MatryoshkaWeight],
    ) -> None:
        if not self._restore(index, out):
            moments = SecondMoments()
            self.run(index, layer, self.quantized, moments)
            for name, weight in out.items():
                source = getattr(layer, name).weight
                compensate(source, importance[name], moments.sums[SAME_INPUT[name]], weight, name)
            self._keep(index, out)
        values = {name: weight.dequantize(4) for name, weight in out.items()}

        def four_bits(name: str, x: Tensor, linear: Linear) -> Tensor:
            return F.linear(x, values[name], linear.bias)

        self.quantized = self.run(index, layer, self.quantized, four_bits)
        self.progress(index + 1, self.spec.num_layers)

    @torch.no_grad()
    def end(self, norm: Norm, columns: Tensor) -> tuple[Norm, Tensor | None]:
        norm, by = super().end(norm, columns)
        moments = SecondMoments()
        moments.add("head", dense.normalize(self.hidden, norm))
        self.head_hessian = None if by is None else damped(moments.sums["head"])
        return norm, by

    def pack_head(self, rows: Tensor, out: MatryoshkaWeight, name: str) -> None:
        super().pack_head(rows, out, name)
        if self.head_hessian is None:
            return
        assert out.lo is not None
        codes = Codes(rows.T.contiguous(), out.group_size)
        codes.code = unpack_plane(out.hi, out.in_features).T.float().contiguous()
        codes.scale, codes.offset = (of.T.contiguous() for of in out.groups())
        choose_residuals(codes, self.head_hessian)
        out.lo.copy_(pack_plane(codes.residual.T.to(torch.uint8).contiguous()))

    def _file(self, index: int) -> Path:
        return self.folder / f"{self.key}-{index}.safetensors"

    def _keep(self, index: int, out: dict[str, MatryoshkaWeight]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}.{part}": getattr(weight, part) for name, weight in out.items() for part in STORED}
        new = self._file(index).with_suffix(f".{os.getpid()}")
        save_file(tensors, new)
        new.replace(self._file(index))

    def _restore(self, index: int, out: dict[str, MatryoshkaWeight]) -> bool:
        try:
            tensors = load_file(self._file(index))
            for name, weight in out.items():
                for part in STORED:
                    getattr(weight, part).copy_(tensors[f"{name}.{part}"])
        except (OSError, SafetensorError, KeyError, RuntimeError):
            return False  # not there, or not whole: it is made again
        return True


START_TOKENS = 32  # of a sample, with which a text of the model's own begins


def own_texts(path: Path, settings: Settings) -> Tensor:
    """int64 [texts, T]: how the model goes on with pieces of the samples, drawn at random by the seed."""
    lm = QuickSilverForCausalLM.from_pretrained(path, precision="int8", requantize=True)
    start = min(START_TOKENS, settings.length // 2)
    g = torch.Generator(device="cpu").manual_seed(settings.seed)
    samples = [torch.tensor(lm.tokenizer(text)["input_ids"], dtype=torch.int64, device="cpu") for text in SAMPLES]
    starts = []
    for i in range(settings.texts - settings.texts // 3):
        sample = samples[i % len(samples)]
        at = int(torch.randint(max(1, len(sample) - start), (1,), generator=g, dtype=torch.int64, device="cpu"))
        starts.append(sample[at : at + start])
    made = []
    for some in torch.stack(starts).split(32):
        new = settings.length - start
        made.append(
            lm.generate(
                some, max_new_tokens=new, do_sample=True, top_p=0.95, seed=settings.seed, eos_token_id=-1
            ).sequences
        )
    return torch.cat(made)


def optimize(
    source: str | Path,
    texts: str | Sequence[str],
    output: str | Path,
    *,
    group_size: int = 64,
    settings: Settings | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Fits a model's codes of 4 and 8 bits to texts and saves it to ``output``, a folder that loads as any other.

    source      a model in full precision: folder, hub id, .gguf file or "demo". 4-bit codes of its own are given up
    texts       what to fit to; the last tenth (8192 tokens at most) is what the result is judged by instead
    group_size  32, 64 or 128
    settings    texts, length, seed
    progress    is told how many of the layers are done

    A run that was interrupted goes on where it was when it is started again with the same arguments. Beside the packed
    model it needs room for a layer in fp32, its inputs' second moments, and the texts' activations twice.

    Returns perplexity_before (of the source in fp32), perplexity_int8, perplexity_int4, tokens (of each), seconds and
    provenance: what ``output`` was made of, which quicksilver_optimize.json there holds too.
    Raises ValueError for wrong arguments, CheckpointError for a source that can't be read or has no tokenizer, OSError
    where the folder can't be written to.
    """
    begin, settings, output = time.monotonic(), settings or Settings(), Path(output)
    check_group_size(group_size)
    text = texts if isinstance(texts, str) else "\n\n".join(texts)
    path = resolve(source, check_config)
    if is_packed(path):
        raise ValueError(f"source: {path} is packed already; wanted the model that it was made from")
    tokenizer = load_tokenizer(path)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64, device="cpu")
    held = min(int(len(ids) * HELD_OUT), HELD_OUT_TOKENS)
    pieces = (len(ids) - held) // settings.length
    if pieces < 1 or held < 2:
        raise ValueError(f"texts: got {len(ids)} tokens, wanted at least {settings.length * 10 // 9 + 20}")
    # Spread over all of the text.
    count = min(settings.texts // 3, pieces)
    at = torch.linspace(0, pieces - 1, count, dtype=torch.float64, device="cpu").round().long()
    given = ids[: pieces * settings.length].view(pieces, settings.length)[at]
    provenance = {
        "source": path.name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "text_tokens": len(ids),
        "group_size": group_size,
        "settings": dataclasses.asdict(settings),
        "quicksilver": __version__,
        "torch": torch.__version__,
    }
    output.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(json.dumps([str(path.resolve()), provenance], sort_keys=True).encode()).hexdigest()[:16]
    fitter = Compensated(torch.cat((given, own_texts(path, settings))), output / UNFINISHED, key, progress)
    model = load_model(path, "int8", group_size, requantize=True, fitter=fitter)
    lm = QuickSilverForCausalLM(model, QuickSilverConfig(), path, None)
    lm.save_pretrained(output)

    def perplexity(model: QuickSilverForCausalLM) -> float:
        longest = model.model.spec.max_positions
        return evaluate(model, ids[len(ids) - held :], window=min(512, longest)).perplexity

    results: dict[str, Any] = {"perplexity_int8": perplexity(lm)}
    del lm, model
    results["perplexity_int4"] = perplexity(QuickSilverForCausalLM.from_pretrained(output, precision="int4"))
    results["perplexity_before"] = perplexity(QuickSilverForCausalLM.from_pretrained(path, precision="fp32"))
    results |= {"tokens": held, "seconds": time.monotonic() - begin, "provenance": provenance}
    (output / REPORT).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for file in fitter.folder.glob("*"):
        file.unlink()
    if fitter.folder.is_dir():
        fitter.folder.rmdir()
    return results
