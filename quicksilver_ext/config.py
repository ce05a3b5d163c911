"""What a user may switch: one dataclass per mechanism, checked when it is made."""

from __future__ import annotations

import json
import math
import os
import reprlib
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

CONFIG_FILE = "quicksilver_config.json"
TENSORS_FILE = "quicksilver_config.safetensors"

DRIFT_NORMS = ("relative", "absolute")
ENTROPY_SOURCES = ("latent", "head", "probe")
HALTED_STATES = ("frozen", "translated")
KV_POLICIES = ("skip", "zero", "propagate", "recompute")
FUSION_WEIGHTS = ("uniform", "attention", "norm")
FUSION_SCOPES = ("prompt", "cache")

LARGEST = 2**31 - 1  # the kernels count in 32 bits


def _shown(value: Any) -> str:
    """A value for a message: never longer than a line's worth."""
    try:
        return reprlib.repr(value)
    except Exception:  # an integer of more digits than Python prints, or a value whose own repr fails
        return f"a value of type {type(value).__name__}"


def parse_json(text: str | bytes, name: str) -> Any:
    """ValueError, with the name of what it is, where the text is no JSON in UTF-8, or nests deeper than Python goes."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (from byte {error.start} on)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} can't be read as safetensors ({error}); it is damaged, so make it again") from error


# These check a config's field, by the name that its user wrote.


def _choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name.rpartition(".")[2])
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {_shown(value)}")


def _plain(config: Any, name: str, kinds: tuple[type, ...], wanted: str) -> Any:
    """The field as a value of Python's own kinds, which it becomes: NumPy's and tensors' scalars are welcome too."""
    field = name.rpartition(".")[2]
    value = given = getattr(config, field)
    if isinstance(given, np.generic | np.ndarray | torch.Tensor) and given.ndim == 0:
        value = given.item()
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{name} must be {wanted}; got {_shown(given)}")
    if value is not given:
        object.__setattr__(config, field, value)
    return value


def _number(config: Any, name: str, low: float) -> None:
    value = _plain(config, name, (int, float), f"a number of at least {low:g}")
    try:
        number = float(value)  # of integers too, which may be longer than a float goes
    except OverflowError:
        number = math.nan
    if not number >= low:
        raise ValueError(f"{name} must be a number of at least {low:g} that fits a float; got {_shown(value)}")
    object.__setattr__(config, name.rpartition(".")[2], number)


def _integer(config: Any, name: str, low: int) -> None:
    value = _plain(config, name, (int,), f"a whole number from {low} to {LARGEST}")
    if not low <= value <= LARGEST:
        raise ValueError(f"{name} must be a whole number from {low} to {LARGEST}; got {_shown(value)}")


@dataclass(frozen=True)
class HaltingConfig:
    """Dynamic Token Halting.

    After each layer from ``min_layer`` on (layers counted as run, so 1 is the first chance), a token halts where its
    drift is under ``drift_threshold`` and, if ``entropy_threshold`` (bits) is set, its entropy is under that too.
    drift = ||h_l - h_(l-1)|| / ||h_(l-1)|| (``relative``) or the norm of the difference (``absolute``, the paper's).
    Positions under ``sink_tokens`` never halt. A halted token's state is ``frozen`` or ``translated`` by the affine map
    of the layer it halted at, to the final state or, with ``resume_layer``, to the input of that layer (counted from
    0), where the token rejoins. ``kv_policy`` says what a halted token leaves in the caches of the layers it doesn't
    run: nothing (``skip``), zeros (``zero``), keys and values of its halted state (``propagate``), or exact ones,
    computed when a later token of its sequence goes deeper (``recompute``).
    """

    drift_threshold: float
    drift_norm: str = "relative"
    entropy_threshold: float | None = None
    entropy_source: str = "latent"
    min_layer: int = 1
    sink_tokens: int = 4
    state: str = "frozen"
    resume_layer: int | None = None
    kv_policy: str = "skip"

    def __post_init__(self) -> None:
        _number(self, "halting.drift_threshold", 0)
        _choice(self, "halting.drift_norm", DRIFT_NORMS)
        if self.entropy_threshold is not None:
            _number(self, "halting.entropy_threshold", 0)
        _choice(self, "halting.entropy_source", ENTROPY_SOURCES)
        _integer(self, "halting.min_layer", 1)
        _integer(self, "halting.sink_tokens", 0)
        _choice(self, "halting.state", HALTED_STATES)
        _choice(self, "halting.kv_policy", KV_POLICIES)
        if self.resume_layer is not None:
            _integer(self, "halting.resume_layer", 1)
            if self.resume_layer <= self.min_layer:
                raise ValueError(
                    f"halting.resume_layer must be above halting.min_layer ({self.min_layer}); got {self.resume_layer}"
                )
            if self.kv_policy == "recompute":
                raise ValueError(
                    "halting.kv_policy 'recompute' runs a halted token's own layers later and has no use for "
                    "halting.resume_layer; set one of them"
                )


@dataclass(frozen=True)
class FusionConfig:
    """Contextual Token Fusion from ``layer`` on (counted from 0: the state that comes into it is compared).

    Adjacent tokens whose states are closer than ``threshold`` (``relative``: to the earlier one's norm) merge by a mean
    with ``weights`` (uniform; the attention mass that each received from queries up to the moment of merging; the
    state's norm), at most ``max_group`` to a group. Scope ``prompt``: tokens whose logits nobody asked for go on as one
    super-token. Scope ``cache``: entries of past tokens merge in the KV cache.
    """

    layer: int
    threshold: float
    norm: str = "relative"
    weights: str = "uniform"
    scope: str = "prompt"
    max_group: int = 4

    def __post_init__(self) -> None:
        _integer(self, "fusion.layer", 0)
        _number(self, "fusion.threshold", 0)
        _choice(self, "fusion.norm", DRIFT_NORMS)
        _choice(self, "fusion.weights", FUSION_WEIGHTS)
        _choice(self, "fusion.scope", FUSION_SCOPES)
        _integer(self, "fusion.max_group", 2)
        if self.weights == "attention" and self.layer == 0:
            raise ValueError(
                "fusion.weights 'attention' reads the layer before fusion.layer; set fusion.layer to 1 or more"
            )


@dataclass(frozen=True)
class AMQConfig:
    """Adaptive Matryoshka Quantization: 8 bits for tokens whose entropy, over its maximum, is at least
    ``entropy_threshold`` (0 to 1) in the state that comes into ``layer`` (counted from 0), else 4, from there on. The
    first ``sink_tokens`` positions of a sequence always have 8."""

    layer: int
    entropy_threshold: float
    entropy_source: str = "latent"
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        _integer(self, "amq.layer", 0)
        # Above 1 means 4 bits for all: a bound that no entropy reaches is a useful setting, so no upper limit.
        _number(self, "amq.entropy_threshold", 0)
        _choice(self, "amq.entropy_source", ENTROPY_SOURCES)
        _integer(self, "amq.sink_tokens", 0)


_MECHANISMS = {"halting": HaltingConfig, "fusion": FusionConfig, "amq": AMQConfig}


def _mechanism(name: str, value: Any) -> Any:
    cls = _MECHANISMS[name]
    if value is None or isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be null or an object; got {_shown(value)}")
    known = {f.name for f in fields(cls)}
    for key in value:
        if key not in known:
            raise ValueError(f"{name}.{key} is unknown; known are {', '.join(sorted(known))}")
    for f in fields(cls):
        if f.default is MISSING and f.name not in value:
            raise ValueError(f"{name}.{f.name} is missing; without it there is no {name}")
    return cls(**value)


@dataclass(frozen=True)
class QuickSilverConfig:
    """Which mechanisms are on, and how. ``None`` is off. ValueError on anything out of range.

    ``tensors`` holds what calibration fits: ``translator.{layer}.weight`` [d, d] and ``.bias`` [d] map the state after
    ``layer`` layers (``weight @ h + bias``); ``probe.{layer}.weight`` [d] and ``.bias`` [] give the entropy in bits as
    ``weight . h / rms(h) + bias``. It travels in a safetensors file beside the JSON.
    """

    halting: HaltingConfig | None = None
    fusion: FusionConfig | None = None
    amq: AMQConfig | None = None
    trace: bool = False
    tensors: dict[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in _MECHANISMS:
            object.__setattr__(self, name, _mechanism(name, getattr(self, name)))
        _plain(self, "trace", (bool,), "true or false")
        if not isinstance(self.tensors, dict) or not all(isinstance(t, torch.Tensor) for t in self.tensors.values()):
            raise ValueError(f"tensors must be a dict of names and tensors; got {_shown(self.tensors)}")
        if self.halting and self.fusion and self.fusion.scope == "cache" and self.halting.kv_policy == "recompute":
            raise ValueError(
                "halting.kv_policy 'recompute' fills in entries after later ones were merged; with fusion.scope "
                "'cache' use 'skip', 'zero' or 'propagate'"
            )

    @staticmethod
    def preset(name: str) -> QuickSilverConfig:
        """``off`` (full depth) or ``paper`` (the constants that arXiv 2506.22396 states: drift 0.045 and entropy 1.15
        bits for halting, fusion from layer 12, bit choice at layer 15, KV skipped). The paper gives no fusion threshold
        and no bit threshold; 0.1 relative and 0.5 normalised stand in for them. ValueError for another name."""
        if name == "off":
            return QuickSilverConfig()
        if name == "paper":
            return QuickSilverConfig(
                halting=HaltingConfig(
                    drift_threshold=0.045,
                    drift_norm="absolute",
                    entropy_threshold=1.15,
                    entropy_source="latent",
                    min_layer=1,
                    sink_tokens=0,
                ),
                fusion=FusionConfig(layer=12, threshold=0.1),
                amq=AMQConfig(layer=15, entropy_threshold=0.5),
            )
        raise ValueError(f"preset must be one of off, paper; got {name!r}")

    @staticmethod
    def from_dict(values: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> QuickSilverConfig:
        """The inverse of :meth:`to_dict`; a mechanism that is missing is off. ValueError on an unknown key."""
        if not isinstance(values, dict):
            raise ValueError(f"a QuickSilver config must be an object; got {_shown(values)}")
        known = [*_MECHANISMS, "trace"]
        for key in values:
            if key not in known:
                raise ValueError(f"{key} is unknown in a QuickSilver config; known are {', '.join(known)}")
        return QuickSilverConfig(**values, tensors=tensors or {})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without ``tensors``."""
        result: dict[str, Any] = {
            name: asdict(value) if (value := getattr(self, name)) else None for name in _MECHANISMS
        }
        return {**result, "trace": self.trace}

    @staticmethod
    def from_pretrained(folder: str | Path) -> QuickSilverConfig:
        """Reads ``quicksilver_config.json`` (and the tensors beside it) from a folder, or the JSON file itself.
        ValueError where it is missing or damaged, naming the file."""
        path = Path(folder)
        try:
            path = path if path.is_file() else path / CONFIG_FILE
            if not path.is_file():
                raise ValueError(
                    f"no {CONFIG_FILE} in {_shown(str(folder))}; give a folder that save_pretrained wrote, or the file"
                )
            values = parse_json(path.read_bytes(), str(path))
        except OSError as error:
            raise ValueError(f"{_shown(str(folder))} can't be read ({error.strerror})") from error
        tensors = {}
        if (path.parent / TENSORS_FILE).is_file():
            tensors = _load_tensors(path.parent / TENSORS_FILE)
        try:
            return QuickSilverConfig.from_dict(values, tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what :meth:`from_pretrained` reads; makes the folder. Whoever reads meanwhile finds whole files."""
        from safetensors.torch import save

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        part = path / f".{CONFIG_FILE}.{os.getpid()}"
        try:
            if self.tensors:
                part.write_bytes(save({name: t.contiguous() for name, t in self.tensors.items()}))
                part.replace(path / TENSORS_FILE)
            part.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            part.replace(path / CONFIG_FILE)
        finally:
            part.unlink(missing_ok=True)
        if not self.tensors:
            (path / TENSORS_FILE).unlink(missing_ok=True)

    def check_model(self, num_layers: int, hidden_size: int) -> None:
        """ValueError where this config can't run on a model of that shape."""
        layers = {
            "halting.min_layer": self.halting.min_layer if self.halting else None,
            "halting.resume_layer": self.halting.resume_layer if self.halting else None,
            "fusion.layer": self.fusion.layer if self.fusion else None,
            "amq.layer": self.amq.layer if self.amq else None,
        }
        for name, value in layers.items():
            if value is not None and value >= num_layers:
                raise ValueError(f"{name} is {value}, but the model has {num_layers} layers; set it below that")
        if self.halting and self.halting.state == "translated":
            last = self.halting.resume_layer or num_layers
            for layer in range(self.halting.min_layer, last):
                self._need(f"translator.{layer}.weight", (hidden_size, hidden_size), "halting.state 'translated'")
                self._need(f"translator.{layer}.bias", (hidden_size,), "halting.state 'translated'")
        if self.halting and self.halting.entropy_threshold is not None and self.halting.entropy_source == "probe":
            for layer in range(self.halting.min_layer, self.halting.resume_layer or num_layers):
                self._need(f"probe.{layer}.weight", (hidden_size,), "halting.entropy_source 'probe'")
                self._need(f"probe.{layer}.bias", (), "halting.entropy_source 'probe'")
        if self.amq and self.amq.entropy_source == "probe":
            self._need(f"probe.{self.amq.layer}.weight", (hidden_size,), "amq.entropy_source 'probe'")
            self._need(f"probe.{self.amq.layer}.bias", (), "amq.entropy_source 'probe'")

    def _need(self, name: str, shape: tuple[int, ...], why: str) -> None:
        if name not in self.tensors:
            raise ValueError(f"{why} needs the fitted tensor {name}, which this config lacks; load a calibrated config")
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}; got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must hold floating-point numbers; got {tensor.dtype}")
