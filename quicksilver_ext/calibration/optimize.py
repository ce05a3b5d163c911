"""The 4-bit codes of a model, fitted layer after layer: error compensation, then learned rounding.

A layer's matrices are rounded column after column, each time making up in the columns to come for what that costs
(GPTQ, arXiv 2210.17323), on inputs that the layers before have quantized. From there each value gets a rounding offset
and each group two cuts of its range, and signed gradient descent on both brings the layer's output nearer to that of
the original layer on its own inputs (SignRound, arXiv 2309.05516). The residual to the original weight goes to the
second plane.

Three things are ours.

* Codes of 4 and of 8 bits are to be mixed by token. So each text has bits of its own, all 4 or 4 and 8 at random by
  token, and now and then a matrix runs at 8 for all: errors aren't fitted to cancel those of another matrix, which may
  not be made.
* A row's error counts relative to the size of its row. The first token's activations are in some layers a thousand
  times larger than the others', and would be all that is fitted.
* Half of the texts are the model's own: it goes on with pieces of prose, code, lists and letters. What is fitted to one
  kind of text alone is hardly better on another than what is fitted to none.
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
from ..architectures.fitting import SAME_INPUT, Fitter, held_down
from ..architectures.loading import check_config, load_model
from ..architectures.sample_text import SAMPLES
from ..config import QuickSilverConfig
from ..model import QuickSilverForCausalLM
from ..weights.checkpoint import load_tokenizer, resolve
from ..weights.matryoshka import MatryoshkaWeight, check_group_size, pack_codes, pack_matryoshka
from ..weights.model import Layer, Linear, Spec
from ..weights.packed import is_packed
from .evaluation import evaluate

SINK_TOKENS = 4  # of a text whose tokens differ in bits, the first so many have 8
HELD_OUT = 0.1  # of the text, its end: what the result is judged by
HELD_OUT_TOKENS = 8192  # at most
REPORT = "quicksilver_optimize.json"
UNFINISHED = ".quicksilver_optimize"  # a folder in the output, of the layers that are done
Progress = Callable[[int, int], None]  # layers done, of so many


@dataclass(frozen=True)
class Settings:
    """How long to learn, and on what: ``texts`` pieces of ``length`` tokens, half of them of the model's own, ``batch``
    of them in an iteration."""

    iterations: int = 30
    texts: int = 128
    length: int = 256
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name in ("seed", "iterations") else SINK_TOKENS + 1 if name == "length" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, wanted a whole number of at least {least}")


# Residuals reach from -1 to 7/8 of a step; half of one of their own steps beyond, nothing is lost.
REACH_DOWN, REACH_UP = 1 + 1 / 16, 7 / 8 + 1 / 16
DAMPING = 0.03  # of the mean diagonal


class Rounding:
    """A matrix whose codes are chosen: weight fp32 [N, K]. importance fp32 [K] is what an error in a column counts;
    hessian fp32 [K, K], if given, the sum of its inputs' outer products."""

    def __init__(self, weight: Tensor, group_size: int, importance: Tensor, hessian: Tensor | None = None) -> None:
        self.weight, self.size = weight, group_size
        rows, columns = weight.shape
        self.pad = -columns % group_size
        self.values = F.pad(weight, (0, self.pad)).view(rows, -1, group_size)
        self.gradient: Tensor | None = None
        if hessian is None:
            start = pack_matryoshka(weight, group_size, importance=importance, part=True)
            scale, low = start.groups()
            codes = None
        else:
            codes, scale, low = compensated(weight, group_size, importance, hessian)
        self.low, self.high = low, low + 15 * scale
        self.cut_low, self.cut_high = torch.ones_like(self.low), torch.ones_like(self.low)
        self.offset = torch.zeros_like(self.values)
        if codes is not None:
            # As little as makes a value's code the chosen one.
            _, _, steps, _ = self._steps()
            away = F.pad(codes, (0, self.pad)).view_as(steps) - steps
            self.offset = away.sign() * (away.abs() - 0.499).clamp(min=0)
        self.least, self.most = self.offset - 0.5, self.offset + 0.5

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and offset fp32 [N, G], as fp16 holds them."""
        low, high = self.low * self.cut_low, self.high * self.cut_high
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        return ((high - low) / 15).half().float(), low.half().float()

    def _steps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, start = (each[..., None] for each in self.grid())
        steps = (self.values - start) / scale.clamp(min=2.0**-24)
        return scale, start, steps, (steps + self.offset).round_()

    def quantized(self) -> Tensor:
        """The 4-bit values fp32 [N, K]."""
        scale, start, _, code = self._steps()
        return code.clamp_(0, 15).mul_(scale).add_(start).flatten(1)[:, : self.weight.shape[1]]

    def descend(self, gradient: Tensor, rate: float) -> None:
        """A step against the gradient of `quantized`'s values; through the rounding it goes unchanged."""
        gradient = F.pad(gradient, (0, self.pad)).view_as(self.values)
        _, _, steps, code = self._steps()
        clamped = code.clamp(0, 15)
        inside = clamped == code
        by_scale = (gradient * torch.where(inside, clamped - steps, clamped)).sum(-1)
        by_start = gradient.masked_fill(inside, 0.0).sum(-1)
        self.offset.sub_(gradient.sign_().mul_(inside), alpha=rate)
        torch.clamp(self.offset, self.least, self.most, out=self.offset)
        self.cut_low.sub_(((by_start - by_scale / 15) * self.low).sign_(), alpha=rate).clamp_(0.5, 1.25)
        self.cut_high.sub_((by_scale * self.high).sign_(), alpha=rate).clamp_(0.5, 1.25)

    def packed(self, out: MatryoshkaWeight) -> None:
        scale, start, steps, code = self._steps()
        code = code.clamp_(0, 15)
        residual = ((steps - code) * 8).round_().clamp_(-8, 7) + 8
        columns = self.weight.shape[1]
        code, residual = (each.to(torch.uint8).flatten(1)[:, :columns] for each in (code, residual))
        pack_codes(code, residual, scale.squeeze(-1).half(), start.squeeze(-1).half(), out)


def compensated(weight: Tensor, group_size: int, importance: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes fp32 [N, K], scales and offsets [N, G], column after column: what rounding one costs, those to come make up
    for (GPTQ, arXiv 2210.17323). Grids are those of the original weights, and a code stays so near to one that a
    residual reaches it: INT8 loses nothing."""
    columns = weight.shape[1]
    damped = hessian.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean().clamp(min=1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    inverse = torch.linalg.cholesky(inverse, upper=True).float()
    left, codes = weight.clone(), torch.empty_like(weight)
    scales, offsets = [], []
    for begin in range(0, columns, group_size):
        span = slice(begin, min(begin + group_size, columns))
        block, own = left[:, span].contiguous(), inverse[span, span]
        original = weight[:, span].contiguous()
        grid = pack_matryoshka(original, group_size, importance=importance[span].contiguous(), part=True)
        scale, offset = (each[:, :1] for each in grid.groups())
        step = scale.clamp(min=2.0**-24)
        steps = (original - offset) / step
        lowest, highest = (steps - REACH_UP).ceil(), (steps + REACH_DOWN).floor()
        errors = torch.empty_like(block)
        for i in range(block.shape[1]):
            wanted = ((block[:, i : i + 1] - offset) / step).round_()
            wanted = torch.maximum(torch.minimum(wanted, highest[:, i : i + 1]), lowest[:, i : i + 1]).clamp_(0, 15)
            codes[:, begin + i : begin + i + 1] = wanted
            errors[:, i] = (block[:, i] - (wanted * scale + offset)[:, 0]) / own[i, i]
            block[:, i:] -= errors[:, i : i + 1] * own[i, i:]
        left[:, span.stop :] -= errors @ inverse[span, span.stop :]
        scales.append(scale)
        offsets.append(offset)
    return codes, torch.cat(scales, 1), torch.cat(offsets, 1)


class Quantized(torch.autograd.Function):
    """Rows times a matrix: those of 4 bits times its 4-bit values, the others times the original ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding, values: Tensor, four: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        ctx.rounding, ctx.values, ctx.four, ctx.shape = rounding, values, four, x.shape
        ctx.save_for_backward(rows[four])
        y = rows.new_empty(len(rows), len(values))
        y[four] = rows[four] @ values.T
        if not four.all():
            y[~four] = rows[~four] @ rounding.weight.T
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        four, rounding = ctx.four, ctx.rounding
        (rows,) = ctx.saved_tensors
        gradient = gradient.flatten(0, 1)
        of_four = gradient[four]
        rounding.gradient = of_four.T @ rows
        back = gradient.new_empty(len(gradient), rounding.weight.shape[1])
        back[four] = of_four @ ctx.values
        if not four.all():
            back[~four] = gradient[~four] @ rounding.weight
        return back.view(ctx.shape), None, None, None


def eight_bits(x: Tensor, group_size: int) -> Tensor:
    """Rows as INT8 holds them, for what is made of them; the gradient goes through unchanged."""
    with torch.no_grad():
        columns = x.shape[-1]
        groups = F.pad(x, (0, -columns % group_size)).unflatten(-1, (-1, group_size))
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        rounded = (groups / scale).round_().mul_(scale).flatten(-2)[..., :columns]
    return x + (rounded - x).detach()


def token_bits(texts: int, length: int, seed: int) -> Tensor:
    """bool [texts, length], whether a token has 4 bits: in every second text all of them, in the others a share that is
    drawn for each, the first SINK_TOKENS apart."""
    g = torch.Generator().manual_seed(seed)
    share = torch.rand(texts, 1, generator=g)
    four = torch.rand(texts, length, generator=g) < share
    four[:, :SINK_TOKENS] = False
    four[::2] = True
    return four


class Learned(Fitter):
    """Learns the rounding of each layer's matrices in turn. What is done is kept in ``folder``, layer by layer, and
    taken from there by a run that wants the same."""

    def __init__(self, ids: Tensor, settings: Settings, folder: Path, key: str, progress: Progress) -> None:
        super().__init__(ids)
        self.settings, self.folder, self.key, self.progress = settings, folder, key, progress
        self.losses: list[tuple[float, float]] = []

    @torch.no_grad()
    def begin(
        self, spec: Spec, embedding: Tensor, positions: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> None:
        super().begin(spec, embedding, positions, rotary)
        self.quantized = self.hidden.clone()  # what the layers before make of the texts with their codes
        self.four = token_bits(len(self.ids), self.ids.shape[1], self.settings.seed)

    def pack(
        self,
        index: int,
        layer: Layer,
        importance: dict[str, Tensor],
        targets: Tensor,
        out: dict[str, MatryoshkaWeight],
    ) -> None:
        if not self._restore(index, out):
            hessians = self._hessians(index, layer)
            roundings = {
                name: Rounding(
                    getattr(layer, name).weight, weight.group_size, importance[name], hessians[SAME_INPUT[name]]
                )
                for name, weight in out.items()
            }
            del hessians
            self.losses.append(self._fit(index, layer, roundings, targets))
            for name, rounding in roundings.items():
                rounding.packed(out[name])
            self._keep(index, out)
        views = {name: (weight.dequantize(4), weight.dequantize(8)) for name, weight in out.items()}
        size = next(iter(out.values())).group_size
        done = []
        for part, four in zip(self.quantized.split(8), self.four.split(8)):

            def mixed(name: str, x: Tensor, linear: Linear) -> Tensor:
                x = eight_bits(x, size)
                y = x.new_empty(*x.shape[:-1], linear.out_features)
                for rows, view in zip((four, ~four), views[name]):  # noqa: B023
                    y[rows] = x[rows] @ view.T
                return y if linear.bias is None else y + linear.bias

            done.append(dense.run_layer(self.spec, index, layer, part, self.rotary, mixed))
        self.quantized = torch.cat(done)
        self.progress(index + 1, self.spec.num_layers)

    def _hessians(self, index: int, layer: Layer) -> dict[str, Tensor]:
        """Of each input of the layer, on quantized inputs."""
        sums: dict[str, Tensor] = {}

        def gather(name: str, x: Tensor, linear: Linear) -> Tensor:
            if SAME_INPUT[name] == name:
                rows = held_down(x.flatten(0, 1))
                sums[name] = rows.T @ rows + sums.get(name, 0)
            return dense.plain(name, x, linear)

        self.run(index, layer, self.quantized, gather)
        return sums

    def _fit(self, index: int, layer: Layer, roundings: dict[str, Rounding], targets: Tensor) -> tuple[float, float]:
        """Returns the loss at first and at last: means over a tenth of the iterations."""
        settings, g = self.settings, torch.Generator().manual_seed(self.settings.seed * 1000 + index)
        size = targets.square().mean(-1, keepdim=True)
        weight = 1 / torch.maximum(size, size.median())
        weight = weight / (weight * (targets - self.hidden).square()).mean()
        losses = []
        for iteration in range(settings.iterations):
            chosen = torch.randperm(len(targets), generator=g)[: settings.batch]
            # In every second iteration each matrix has 8 bits for all of some texts.
            apart = torch.rand(len(roundings), len(chosen), generator=g) < (0.5 if iteration % 2 else 0.0)
            masks = {name: (self.four[chosen] & ~apart[i][:, None]).flatten() for i, name in enumerate(roundings)}
            values = {name: rounding.quantized() for name, rounding in roundings.items()}

            def multiply(name: str, x: Tensor, linear: Linear) -> Tensor:
                x = eight_bits(x, roundings[name].size)
                y: Tensor = Quantized.apply(x, roundings[name], values[name], masks[name])  # noqa: B023
                return y if linear.bias is None else y + linear.bias

            with torch.enable_grad():
                x = self.quantized[chosen].requires_grad_()
                got = dense.run_layer(self.spec, index, layer, x, self.rotary, multiply)
                loss = (weight[chosen] * (got - targets[chosen]).square()).mean()
                loss.backward()
            losses.append(loss.item())
            # Rates sum up to half a step. A few large ones would only shake the codes.
            rate = (1 - iteration / settings.iterations) / max(settings.iterations, 20)
            for rounding in roundings.values():
                assert rounding.gradient is not None
                rounding.descend(rounding.gradient, rate)
        some = max(1, len(losses) // 10)
        return (sum(losses[:some]) / some, sum(losses[-some:]) / some) if losses else (0.0, 0.0)

    def _file(self, index: int) -> Path:
        return self.folder / f"{self.key}-{index}.safetensors"

    def _keep(self, index: int, out: dict[str, MatryoshkaWeight]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}.{part}": getattr(weight, part) for name, weight in out.items() for part in PARTS}
        new = self._file(index).with_suffix(f".{os.getpid()}")
        save_file(tensors, new)
        new.replace(self._file(index))

    def _restore(self, index: int, out: dict[str, MatryoshkaWeight]) -> bool:
        try:
            tensors = load_file(self._file(index))
            for name, weight in out.items():
                for part in PARTS:
                    getattr(weight, part).copy_(tensors[f"{name}.{part}"])
        except (OSError, SafetensorError, KeyError, RuntimeError):
            return False  # not there, or not whole: it is made again
        return True


PARTS = ("hi", "lo", "scale", "offset")
START_TOKENS = 32  # of a sample, with which a text of the model's own begins


def own_texts(path: Path, settings: Settings) -> Tensor:
    """int64 [texts / 2, T]: how the model goes on with pieces of the samples, drawn at random by the seed."""
    lm = QuickSilverForCausalLM.from_pretrained(path, precision="int8", requantize=True)
    start = min(START_TOKENS, settings.length // 2)
    g = torch.Generator().manual_seed(settings.seed)
    samples = [torch.tensor(lm.tokenizer(text)["input_ids"]) for text in SAMPLES]
    starts = []
    for i in range(settings.texts // 2):
        sample = samples[i % len(samples)]
        at = int(torch.randint(max(1, len(sample) - start), (1,), generator=g))
        starts.append(sample[at : at + start])
    made = [torch.empty(0, settings.length, dtype=torch.int64)]
    for some in torch.stack(starts).split(32) if starts else ():
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
    texts       what to learn on; the last tenth (8192 tokens at most) is what the result is judged by instead
    group_size  32, 64 or 128
    settings    iterations, texts, length, batch, seed
    progress    is told how many of the layers are done

    A run that was interrupted goes on where it was when it is started again with the same arguments. Beside the packed
    model it needs room for a layer in fp32, its gradients, and the texts' activations twice.

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
        raise ValueError(f"texts: got {len(ids)} tokens, wanted at least {settings.length * 10 // 9 + 20} to learn on")
    # Spread over all of the text.
    at = torch.linspace(0, pieces - 1, min((settings.texts + 1) // 2, pieces)).round().long()
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
    learned = torch.cat((given, own_texts(path, settings)))
    learned = learned[torch.randperm(len(learned), generator=torch.Generator().manual_seed(settings.seed))]
    fitter = Learned(learned, settings, output / UNFINISHED, key, progress)
    model = load_model(path, "int8", group_size, requantize=True, fitter=fitter)
    lm = QuickSilverForCausalLM(model, QuickSilverConfig(), path, None)
    lm.save_pretrained(output)

    def perplexity(model: QuickSilverForCausalLM) -> float:
        return evaluate(model, ids[len(ids) - held :]).perplexity

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
