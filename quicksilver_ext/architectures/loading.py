"""From a source to a `Model`: weights go from disk into their final form one tensor at a time."""

from __future__ import annotations

import re
import reprlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..weights.arena import Arena
from ..weights.checkpoint import Checkpoint, CheckpointError, FolderCheckpoint, load_tokenizer, read_json, resolve
from ..weights.gptq import QuantizedFolder, scheme_of
from ..weights.matryoshka import check_group_size
from ..weights.model import PRECISIONS, Model
from ..weights.packed import is_packed, load_packed, saved_as
from .base import Family, Reader
from .fitting import Fitter
from .gpt2 import GPT2
from .llama import Llama
from .mistral import Mistral
from .qwen2 import Qwen2
from .qwen3 import Qwen3
from .sample_text import SAMPLES

GROUP_SIZE = 64  # by default
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")  # files of one
SAMPLE_TOKENS = 224  # of each sample: none is shorter in any of the usual vocabularies
FAMILIES: tuple[Family, ...] = (GPT2(), Llama(), Mistral(), Qwen2(), Qwen3())
BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}
BY_GGUF = {family.gguf: family for family in FAMILIES if family.gguf is not None}


def load_model(
    source: str | Path,
    precision: str | None = None,
    group_size: int | None = None,
    requantize: bool = False,
    statistics: bool = True,
    fitter: Fitter | None = None,
) -> Model:
    """Loads a Hugging Face folder, hub id, .gguf file, "demo", or a folder that `save_packed` wrote.

    Matrices that a .gguf file or a folder by GPTQ or AWQ stores in 4 bits keep their codes and their values, in the
    source's groups (GGUF's are of 32), and the default precision is "int4" then; "int8" and "adaptive" have a second
    plane of nothing. With ``requantize`` they are put on our grid like others, and so are, with a warning, GPTQ's in
    act-order and those of a GPT-2. By default "int8", in groups of 64.

    Weights that are packed here are fitted (fitting.py) to what a short text does to them, unless ``statistics`` is
    False, or as ``fitter`` does it.

    Beside the model itself it needs room for the largest tensor, as fp32 at most; with statistics for a layer, and the
    text's activations. The config and the names and shapes of all tensors are checked before the first weight is read.

    Raises ValueError for a wrong precision or group size (of a source with codes of its own, other than its), and
    CheckpointError, a ValueError too, for a source that is missing, damaged or of another architecture.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    if group_size is not None:
        check_group_size(group_size)
    path = resolve(source, check_config)
    if is_packed(path):
        stored, packed_in = saved_as(path)
        return load_packed(path, precision or stored, packed_in if group_size is None else group_size)
    checkpoint = open_checkpoint(path)
    own = not requantize and any(checkpoint.four_bits(name) for name in checkpoint.names())
    precision = precision or ("int4" if own else "int8")
    packed = precision not in ("fp32", "bf16")
    own = own and packed
    if own and group_size not in (None, checkpoint.own_group):
        raise ValueError(
            f"group_size: got {group_size}, but {checkpoint.source} has 4-bit codes of its own, in groups of "
            f"{checkpoint.own_group}; leave it out, or put the weights on another grid with requantize"
        )
    group_size = group_size or (checkpoint.own_group if own else GROUP_SIZE)
    if packed and not requantize and (count := len(checkpoint.without_codes)):
        warnings.warn(
            f"{path.name}: {count} of its 4-bit matrices can't keep their codes (act-order, or GPT-2's layout): they "
            f"are put on our grid, {'with 8 bits' if own else f'at precision {precision}'}",
            stacklevel=3,  # from_pretrained's caller
        )
    family = family_of(checkpoint.config, str(checkpoint.source))
    _C.start_threads(torch.get_num_threads())  # packing's own
    arena = Arena()
    family.load(checkpoint, Reader(checkpoint, family.root, precision, group_size, arena, own, device="meta"))
    arena.reserve()
    if not packed or own:
        fitter = None
    elif fitter is None and statistics:
        fitter = Fitter(sample_ids(path, checkpoint))
    return family.load(checkpoint, Reader(checkpoint, family.root, precision, group_size, arena, own, fitter))


def sample_ids(path: Path, checkpoint: Checkpoint) -> Tensor:
    """int64 [texts, T]: the samples as the model's tokenizer cuts them; random ids, the same each time, where it has
    none."""
    vocabulary = int(checkpoint.config["vocab_size"])
    longest = min(SAMPLE_TOKENS, *(int(checkpoint.config.get(key) or SAMPLE_TOKENS)
                                   for key in ("max_position_embeddings", "n_positions")))  # fmt: skip
    try:
        if path.is_dir() and not any((path / name).is_file() for name in TOKENIZERS):
            raise CheckpointError(f"{path}: has no tokenizer")  # known without a second of imports
        tokenizer = load_tokenizer(path)
        texts = [tokenizer(text).input_ids[:longest] for text in SAMPLES]
        ids = torch.tensor([text for text in texts if len(text) == longest], dtype=torch.int64, device="cpu")
        if len(ids) and int(ids.max()) < vocabulary:
            return ids
    except CheckpointError:
        pass
    g = torch.Generator(device="cpu").manual_seed(0)
    return torch.randint(vocabulary, (1, longest), generator=g, dtype=torch.int64, device="cpu")


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a config. CheckpointError for one that isn't known."""
    kind = config.get("model_type")
    family = BY_MODEL_TYPE.get(kind) if isinstance(kind, str) else None
    if family is None:
        known = ", ".join(sorted(BY_MODEL_TYPE))
        raise CheckpointError(f"{where}: its model_type is {reprlib.repr(kind)}; can be read: {known}")
    return family


def check_config(path: Path) -> None:
    """CheckpointError for the config.json of a model that couldn't be loaded: said before its weights are fetched."""
    config = read_json(path)
    family_of(config, str(path))
    scheme_of(config, str(path))


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens what `resolve` gave. Reads the config and the tensors' shapes, and of tensors only GPTQ's g_idx."""
    if path.is_dir():
        config = read_json(path / "config.json")
        if scheme_of(config, str(path)) is None:
            return FolderCheckpoint(path)
        return QuantizedFolder(path, family_of(config, str(path)).transposes)
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error})") from error
    if magic != b"GGUF":
        raise CheckpointError(f"{path}: is neither a folder nor a GGUF file; for safetensors, pass the folder")
    return GgufCheckpoint(path)


class GgufCheckpoint(Checkpoint):
    """A .gguf file (or the parts of a split one) of a family that the registry knows, under Hugging Face's names."""

    def __init__(self, path: Path):
        from ..weights.gguf import GgufFile  # the gguf package takes a quarter of a second to import

        self.source = path
        try:
            self._file = GgufFile(path)
        except (OSError, ValueError) as error:
            raise self.error(str(error)) from error
        name = str(self._file.metadata.get("general.architecture"))
        if name not in BY_GGUF:
            raise self.error(f"its architecture is {name!r}; can be read: {', '.join(sorted(BY_GGUF))}")
        self._family, self._name = BY_GGUF[name], name
        self._originals = dict(self._renamed())
        self.config = self._config()

    def _renamed(self) -> Iterator[tuple[str, str]]:
        for original in self._file.tensors:
            match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", original)
            name = self._family.gguf_tensors.get(match[2]) if match else None
            if match and name:
                yield f"{name.format(match[1])}.{match[3]}", original

    def _config(self) -> dict[str, Any]:
        from ..weights.tokenizer import turn_ends

        metadata = self._file.metadata
        config: dict[str, Any] = {
            "model_type": self._family.model_type,
            "tie_word_embeddings": "lm_head.weight" not in self._originals,
        }
        for key, suffix in self._family.gguf_keys.items():
            if (original := f"{self._name}.{suffix}") not in metadata:
                raise self.error(f"its metadata lacks {original}")
            config[key] = metadata[original]
        embedding = self._file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise self.error("has no matrix token_embd.weight, the embedding")
        config["vocab_size"] = embedding.shape[0]
        config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
        config["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id")
        config["eos_token_id"] = turn_ends(metadata)
        try:
            config |= self._family.gguf_config(self._file, self._originals)
        except ValueError as error:
            raise self.error(str(error)) from error
        return config

    def names(self) -> Iterator[str]:
        return iter(self._originals)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._file.tensors[self._originals[name]].shape
        return shape[::-1] if self._family.transposes(name) else shape

    def tensor(self, name: str) -> Tensor:
        try:
            tensor = self._file.read(self._originals[name])
        except (OSError, ValueError) as error:
            raise self.error(str(error)) from error
        return tensor.t() if self._family.transposes(name) else self._in_halves(name, tensor)

    def _in_halves(self, name: str, tensor: Tensor) -> Tensor:
        """Some families' rows interleave the two halves of each head's rotary pairs; Hugging Face keeps them apart."""
        key = self._interleaved(name)
        if key is None:
            return tensor
        heads = self.config[key] or self.config["num_attention_heads"]
        return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    def parts(self, name: str) -> Iterator[Tensor]:
        if self._family.transposes(name) or self._interleaved(name):
            yield self.tensor(name)
            return
        try:
            yield from self._file.parts(self._originals[name])
        except (OSError, ValueError) as error:
            raise self.error(str(error)) from error

    def four_bits(self, name: str) -> Iterator[tuple[Tensor, Tensor, Tensor]] | None:
        if self._family.transposes(name) or (original := self._originals.get(name)) is None:
            return None
        parts = self._file.four_bits(original)
        return None if parts is None else self._four_bits(name, parts)

    def _four_bits(
        self, name: str, parts: Iterator[tuple[Tensor, Tensor, Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        try:
            if self._interleaved(name):
                codes, scale, offset = (self._in_halves(name, torch.cat(part)) for part in zip(*parts))
                yield codes, scale, offset
            else:
                yield from parts
        except (OSError, ValueError) as error:
            raise self.error(str(error)) from error

    def _interleaved(self, name: str) -> str | None:
        return next((key for part, key in self._family.gguf_interleaved.items() if part in name), None)
