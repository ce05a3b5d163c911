"""What the benchmark times: QuickSilver's models, llama.cpp's and transformers', behind one small interface."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import _C
from ..architectures.loading import open_checkpoint
from ..model import QuickSilverForCausalLM
from ..weights.matryoshka import MatryoshkaWeight
from ..weights.model import Layer, Linear, Model

LLAMA_FTYPES = {"Q8_0": 7, "Q4_0": 2}
LLAMA_KINDS = {"int8": "Q8_0", "int4": "Q4_0"}  # what stands beside our precisions
PACKED = ("int8", "int4", "adaptive")
CHECK_NEW = 8
_KEPT: list[Any] = []  # what C code calls back


class WrongAnswer(RuntimeError):
    """A system's answer that differs from what it has to be."""


class Timing(NamedTuple):
    """Seconds of the prompts' pass and of the decode steps after it; of the steps, the share that went by outside of
    kernels and the bytes of keys and values that attention read per second, where those are known."""

    prefill_seconds: float
    decode_seconds: float
    host_share: float | None = None
    attention_rate: float | None = None


class System(Protocol):
    """What is timed. ``bytes_per_token``: weights and visible cache entries read in a decode step, over its tokens."""

    name: str
    batch: int
    bytes_per_token: float

    def run(self, prompts: Tensor, new: int) -> Timing:
        """One pass over prompts [batch, T], then ``new`` decode steps, each a token further for every prompt."""
        ...

    def logits(self, ids: Tensor) -> Tensor:
        """The last token's logits [V] fp32, of a prompt ids [T]."""
        ...


class Ours:
    """A QuickSilver model at one precision, one config and one batch size."""

    def __init__(self, name: str, lm: QuickSilverForCausalLM, batch: int, prompts: Tensor, new: int) -> None:
        self.name, self.lm, self.batch = name, lm, batch
        self._prompts, self._new = prompts, new
        self.bytes_per_token, self._kv_bytes = 0.0, 0

    def count_bytes(self) -> None:
        """Sets ``bytes_per_token`` by the kernels' counters; also the warm-up."""
        prefill, whole = (self._bytes(steps) for steps in (0, self._new))
        self._kv_bytes = whole[1] - prefill[1]
        self.bytes_per_token = (whole[0] - prefill[0] + self._kv_bytes) / (self._new * self.batch)

    def _bytes(self, steps: int) -> tuple[int, int]:
        """Of weights and of the cache."""
        before = _C.counters().kv_bytes_read
        stats = self._generate(self._prompts, steps).stats
        return stats.weight_bytes_read, _C.counters().kv_bytes_read - before

    def _generate(self, prompts: Tensor, steps: int) -> Any:
        # The prompts' pass makes the first new token, so that `steps` decode steps end with one token more.
        return self.lm.generate(prompts, max_new_tokens=steps + 1, eos_token_id=-1)

    def run(self, prompts: Tensor, new: int) -> Timing:
        before = _C.counters()
        stats = self._generate(prompts, new).stats
        now = _C.counters()
        step = (now.step_nanoseconds - before.step_nanoseconds) / 1e9
        if not step:  # the steps weren't one call each
            return Timing(stats.prefill_seconds, stats.decode_seconds)
        attention = (now.step_attention_nanoseconds - before.step_attention_nanoseconds) / 1e9
        return Timing(
            stats.prefill_seconds, stats.decode_seconds, 1 - step / stats.decode_seconds, self._kv_bytes / attention
        )

    def logits(self, ids: Tensor) -> Tensor:
        return self.lm(ids[None]).logits[0, -1]

    def check(self, prompts: Tensor) -> None:
        """WrongAnswer where logits aren't finite, or decoding gives other tokens than one pass over its own output."""
        config, packed = self.lm.quicksilver_config, self.lm.model.precision in PACKED
        if config.fusion is not None and config.fusion.scope == "prompt":
            packed = False  # such fusion looks at a prompt as a whole
        ids = self._generate(prompts, CHECK_NEW - 1).sequences
        logits = self.lm(ids[:, :-1]).logits[:, prompts.shape[1] - 1 :]
        if not bool(logits.isfinite().all()):
            raise WrongAnswer(f"{self.name}: logits aren't finite")
        if packed and not torch.equal(logits.argmax(-1), ids[:, prompts.shape[1] :]):
            raise WrongAnswer(f"{self.name}: decoding gives other tokens than one pass over the same text")


class LlamaCpp:
    """llama.cpp on a .gguf file, by llama-cpp-python."""

    batch = 1

    def __init__(self, name: str, path: Path, threads: int, prompt: int, new: int) -> None:
        from llama_cpp import Llama

        self.name = name
        size = max(512, prompt)  # the prompt in one batch
        self._llama = Llama(
            str(path),
            n_ctx=max(256, prompt + new + 1),
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=size,
            n_ubatch=size,
            verbose=False,
        )
        cache = _kv_bytes(open_checkpoint(path).config, prompt + (new + 1) / 2, 2)  # fp16
        self.bytes_per_token = gguf_bytes_per_token(path) + cache

    def run(self, prompts: Tensor, new: int) -> Timing:
        self._llama.reset()
        began = time.perf_counter()
        self._llama.eval(prompts[0].tolist())
        prefilled = time.perf_counter()
        for step in range(new):
            self._llama.eval([int(prompts[0, step % prompts.shape[1]])])
        return Timing(prefilled - began, time.perf_counter() - prefilled)

    def logits(self, ids: Tensor) -> Tensor:
        import llama_cpp

        self._llama.reset()
        self._llama.eval(ids.tolist())
        last = llama_cpp.llama_get_logits_ith(self._llama._ctx.ctx, -1)
        size = self._llama.n_vocab()
        values = (ctypes.c_float * size).from_address(ctypes.addressof(last.contents))
        return torch.frombuffer(values, dtype=torch.float32).clone()


class Transformers:
    """transformers' model, its own attention and cache, without a loop of generate() around it."""

    batch = 1

    def __init__(self, name: str, model: Any, prompt: int, new: int) -> None:
        self.name, self._model = name, model
        size = model.dtype.itemsize
        tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        head = model.get_output_embeddings().weight
        looked_up = {id(table.weight) for table in tables} - {id(head)}
        weights = sum(each.numel() for each in model.parameters() if id(each) not in looked_up) * size
        self.bytes_per_token = weights + _kv_bytes(model.config.to_dict(), prompt + (new + 1) / 2, size)

    @torch.inference_mode()
    def run(self, prompts: Tensor, new: int) -> Timing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # past_key_values gets another name in later releases
            began = time.perf_counter()
            past = self._model(prompts[:1], use_cache=True, logits_to_keep=1).past_key_values
            prefilled = time.perf_counter()
            for step in range(new):
                token = prompts[:1, step % prompts.shape[1], None]
                past = self._model(token, past_key_values=past, use_cache=True).past_key_values
            return Timing(prefilled - began, time.perf_counter() - prefilled)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._model(ids[None], logits_to_keep=1).logits[0, -1]
        return logits.float()


def _kv_bytes(config: dict[str, Any], entries: float, itemsize: int) -> float:
    """Bytes of keys and values that a step reads which sees ``entries`` positions."""
    gpt2 = config["model_type"] == "gpt2"
    layers, d, heads = (
        config[key]
        for key in (
            ("n_layer", "n_embd", "n_head") if gpt2 else ("num_hidden_layers", "hidden_size", "num_attention_heads")
        )
    )
    kv_heads = heads if gpt2 else config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or d // heads
    return 2 * layers * kv_heads * head_size * itemsize * entries


def gguf_bytes_per_token(path: Path) -> int:
    """Bytes of the tensors that a decode step reads all of: not of tables that it looks a row up in."""
    from gguf import GGML_QUANT_SIZES

    from ..weights.gguf import GgufFile

    tensors = GgufFile(path).tensors
    tables = ["position_embd.weight", *(["token_embd.weight"] if "output.weight" in tensors else [])]
    blocks = {name: GGML_QUANT_SIZES[tensor.type] for name, tensor in tensors.items() if name not in tables}
    return sum(math.prod(tensors[name].shape) // values * size for name, (values, size) in blocks.items())


def as_precision(model: Model, precision: str) -> Model:
    """The same planes, in the same memory, at another packed precision. ``model`` has both planes."""
    if precision != "int4":
        return dataclasses.replace(model, precision=precision)

    def without_low(linear: Linear) -> Linear:
        assert isinstance(linear.weight, MatryoshkaWeight)
        return Linear(dataclasses.replace(linear.weight, lo=None), linear.bias)

    def high(layer: Layer) -> Layer:
        parts = {name: getattr(layer, name) for name in model.spec.linear_shapes()}
        low: dict[str, Any] = {name: without_low(part) for name, part in parts.items()}
        return dataclasses.replace(layer, **low)

    return dataclasses.replace(model, precision=precision, layers=[high(layer) for layer in model.layers])


def silence_llama_cpp() -> None:
    """Its progress doesn't belong on our stderr; what goes wrong is raised."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    _KEPT.append(quiet)


def llama_file(source: Path, kind: str, folder: Path, threads: int) -> Path:
    """``source`` with its matrices in ``kind``: itself where they are, else made in ``folder`` by llama.cpp."""
    import llama_cpp

    from ..weights.gguf import GgufFile

    if {tensor.type.name for tensor in GgufFile(source).tensors.values()} <= {kind, "F32"}:
        return source
    path = folder / f"{source.stem.removesuffix('-Q8_0')}-{kind}.gguf"
    if not path.is_file():
        part = path.with_name(f".{path.name}")
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = LLAMA_FTYPES[kind], True, threads
        if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(params)):
            part.unlink(missing_ok=True)
            raise ValueError(f"{source}: llama.cpp could not make {kind} of it")
        part.replace(path)
    return path


def load_transformers(path: Path) -> Any:
    """The checkpoint as transformers' model in fp32, from our reader where it is a .gguf file."""
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    checkpoint = open_checkpoint(path)
    config = AutoConfig.for_model(**{key: value for key, value in checkpoint.config.items() if value is not None})
    state = {name: checkpoint.tensor(name).float().contiguous() for name in checkpoint.names()}
    family: Any = GPT2LMHeadModel if checkpoint.config["model_type"] == "gpt2" else LlamaForCausalLM
    return family.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()
