"""Saved models: the planes of a `Model` as they are in memory, and a JSON file that says what they are.

A folder holds tensors named by their place in the dataclasses ("layers.0.q.hi") in a .safetensors file, and
quicksilver_model.json, which names that file and is written last: it stands for the new model or for the one before,
whole. Planes and scales have the storage order of ``csrc/include/quicksilver/matryoshka.h``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .arena import Arena
from .checkpoint import CheckpointError, Fields, Safetensors, read_json
from .matryoshka import GROUP_SIZES, STORED, MatryoshkaWeight
from .model import ACTIVATIONS, PRECISIONS, Layer, Linear, Model, Norm, Spec

FORMAT = "quicksilver-model"
VERSION = 4
SPEC_FILE = "quicksilver_model.json"
WEIGHTS_NAME = "quicksilver_model"
BOTH_PLANES = ("int8", "adaptive")
DENSE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def is_packed(path: Path) -> bool:
    return (path / SPEC_FILE).is_file()


def save_packed(model: Model, folder: str | Path) -> None:
    """Writes ``model`` to ``folder``, from which `load_model` gives back the same bits.

    A model that the folder held, even one that is in use, stays whole until the new one is; then its tensors' file
    goes. Raises OSError where the folder can't be written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "precision": model.precision,
        "group_size": model.group_size,
        "norm": {"kind": model.final_norm.kind, "eps": model.final_norm.eps},
        "spec": dataclasses.asdict(model.spec),
        "weights": f"{WEIGHTS_NAME}-{secrets.token_hex(4)}.safetensors",
    }
    final = folder / str(description["weights"])
    weights, spec = (folder / f".{name}.{os.getpid()}" for name in (final.name, SPEC_FILE))
    try:
        save_file(_tensors(model), weights)
        spec.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        weights.chmod(spec.stat().st_mode & 0o777)  # save_file lets only the owner read it
        weights.replace(final)
        spec.replace(folder / SPEC_FILE)
        for other in folder.glob(f"{WEIGHTS_NAME}*.safetensors"):
            if other != final:
                other.unlink(missing_ok=True)
    finally:
        weights.unlink(missing_ok=True)
        spec.unlink(missing_ok=True)


def _tensors(model: Model) -> dict[str, Tensor]:
    """All tensors by name, without a dense head that is the embedding itself."""
    named: dict[str, Tensor | None] = {
        "embedding": model.embedding,
        "position_embedding": model.position_embedding,
        "rotary_cos": model.rotary_cos,
        "rotary_sin": model.rotary_sin,
    }

    def add(name: str, part: Norm | Linear) -> None:
        weight = part.weight
        if isinstance(weight, MatryoshkaWeight):
            named.update({f"{name}.{field}": getattr(weight, field) for field in STORED})
        elif weight is not model.embedding:
            named[f"{name}.weight"] = weight
        named[f"{name}.bias"] = part.bias

    for index, layer in enumerate(model.layers):
        for field in dataclasses.fields(Layer):
            if (part := getattr(layer, field.name)) is not None:
                add(f"layers.{index}.{field.name}", part)
    add("final_norm", model.final_norm)
    add("head", model.head)
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def saved_as(folder: Path) -> tuple[str, int]:
    """The precision and the group size of a saved model. CheckpointError where its description is damaged."""
    fields = _description(folder)
    return fields.choice("precision", PRECISIONS), fields.integer("group_size")


def _description(folder: Path) -> Fields:
    fields = Fields(read_json(folder / SPEC_FILE), str(folder / SPEC_FILE))
    fields.choice("format", (FORMAT,))
    if (version := fields.integer("version", maximum=VERSION)) != VERSION:
        raise CheckpointError(
            f"{folder}: was packed in an earlier format (version {version}, wanted {VERSION}); load the model that it "
            "was made from and call save_pretrained again"
        )
    if fields.integer("group_size") not in GROUP_SIZES:
        raise fields.error("group_size", f"one of {', '.join(map(str, GROUP_SIZES))}")
    return fields


def load_packed(folder: Path, precision: str, group_size: int) -> Model:
    """Loads what `save_packed` wrote, without packing anything again. A model saved with both planes also serves
    "int4", and its low planes aren't read.

    Raises CheckpointError for a damaged folder, and for a precision or group size that it can't give.
    """
    fields = _description(folder)
    stored, packed_in = fields.choice("precision", PRECISIONS), fields.integer("group_size")
    serves = (*BOTH_PLANES, "int4") if stored in BOTH_PLANES else (stored,)
    if precision not in serves:
        raise CheckpointError(f"{folder}: was saved at precision {stored}; load it as {' or '.join(serves)}")
    if precision not in DENSE and packed_in != group_size:
        raise CheckpointError(f"{folder}: was packed in groups of {packed_in}; pass that as group_size")
    weights = str(fields.values.get("weights"))
    if not weights.startswith(WEIGHTS_NAME) or Path(weights).name != weights:
        raise fields.error("weights", f"the name of a file, {WEIGHTS_NAME}-....safetensors")
    spec, norm = _spec(fields), Fields(_object(fields, "norm"), f"{fields.where}, norm")
    reader = _Reader(folder / weights, spec, norm, precision, group_size)
    reader.load("meta")
    reader.arena.reserve()
    return reader.load("cpu")


def _object(fields: Fields, key: str) -> dict[str, Any]:
    value = fields.values.get(key)
    if not isinstance(value, dict):
        raise fields.error(key, "an object")
    return value


def _spec(fields: Fields) -> Spec:
    spec = Fields(_object(fields, "spec"), f"{fields.where}, spec")
    starts = spec.token_ids("bos_token_id")
    return Spec(
        family=str(spec.values.get("family")),
        name=str(spec.values.get("name")),
        hidden_size=spec.integer("hidden_size"),
        num_layers=spec.integer("num_layers"),
        num_heads=spec.integer("num_heads"),
        num_kv_heads=spec.integer("num_kv_heads"),
        head_size=spec.integer("head_size"),
        intermediate_size=spec.integer("intermediate_size"),
        vocab_size=spec.integer("vocab_size"),
        max_positions=spec.integer("max_positions"),
        activation=spec.choice("activation", ACTIVATIONS),
        attention_scale=spec.number("attention_scale"),
        tied_head=spec.flag("tied_head", False),
        bos_token_id=starts[0] if starts else None,
        eos_token_ids=spec.token_ids("eos_token_ids"),
        pad_token_id=spec.optional_token("pad_token_id"),
        windows=_windows(spec),
        scale_by_layer=spec.flag("scale_by_layer", False),
    )


def _windows(spec: Fields) -> list[int | None] | None:
    windows = spec.values.get("windows")
    if windows is None:
        return None
    if not isinstance(windows, list) or len(windows) != spec.integer("num_layers"):
        raise spec.error("windows", "a list with an integer or null for each layer")
    return [None if each is None else Fields({"windows": each}, spec.where).integer("windows") for each in windows]


class _Reader:
    """Takes a model's parts from the file. On the device "meta" that is a rehearsal: all is checked, nothing read."""

    def __init__(self, weights: Path, spec: Spec, norm: Fields, precision: str, group_size: int):
        self.file, self.arena, self.device = Safetensors(weights), Arena(), "cpu"
        self.spec, self.precision, self.group_size = spec, precision, group_size
        self.kind, self.eps = norm.choice("kind", ("rms", "layer")), norm.number("eps")
        self.dense = DENSE.get(precision)
        stored = {name.removesuffix(".hi"): f"{name[:-2]}lo" in self.file.shapes
                  for name in self.file.shapes if name.endswith(".hi")}  # fmt: skip
        self.low = {name for name, low in stored.items() if low}
        self.own = any(not low for low in stored.values())  # a file's own 4-bit codes have no low plane

    def load(self, device: str) -> Model:
        self.device, spec = device, self.spec
        d, positions = spec.hidden_size, spec.max_positions
        learned = "position_embedding" in self.file.shapes
        table = None if learned else (positions, spec.head_size // 2)
        embedding = self.tensor("embedding", (spec.vocab_size, d), self.dense or torch.float16)
        layers = []
        for index in range(spec.num_layers):
            name = f"layers.{index}"
            parts: dict[str, Any] = {"gate": None}
            for part in ("attention_norm", "mlp_norm"):
                parts[part] = self.norm(f"{name}.{part}", d)
            for part in ("q_norm", "k_norm"):
                if f"{name}.{part}.weight" in self.file.shapes:
                    parts[part] = self.norm(f"{name}.{part}", spec.head_size)
            for part, shape in spec.linear_shapes().items():
                # Beside matrices with 4-bit codes of their own, those that have none keep 8 bits.
                keep_low = f"{name}.{part}" in self.low and (self.own or self.precision != "int4")
                parts[part] = self.linear(f"{name}.{part}", shape, keep_low)
            layers.append(Layer(**parts))
        if self.dense and spec.tied_head:
            head = Linear(embedding)
        else:
            head = self.linear("head", (spec.vocab_size, d), keep_low=True)
        return Model(
            spec=spec,
            embedding=embedding,
            position_embedding=self.tensor("position_embedding", (positions, d)) if learned else None,
            layers=layers,
            final_norm=self.norm("final_norm", d),
            head=head,
            rotary_cos=self.tensor("rotary_cos", table) if table else None,
            rotary_sin=self.tensor("rotary_sin", table) if table else None,
            precision=self.precision,
            group_size=self.group_size,
        )

    def norm(self, name: str, size: int) -> Norm:
        bias = self.tensor(f"{name}.bias", (size,)) if self.kind == "layer" else None
        return Norm(self.kind, self.tensor(f"{name}.weight", (size,)), bias, self.eps)

    def linear(self, name: str, shape: tuple[int, int], keep_low: bool) -> Linear:
        weight: MatryoshkaWeight | Tensor
        if self.dense:
            weight = self.tensor(f"{name}.weight", shape, self.dense)
        else:
            weight = self.arena.weight(*shape, self.group_size, keep_low)
            for part in STORED:
                view: Tensor | None = getattr(weight, part)
                if view is None:
                    continue
                view.copy_(self.stored(f"{name}.{part}", tuple(view.shape), view.dtype))
        has_bias = f"{name}.bias" in self.file.shapes
        return Linear(weight, self.tensor(f"{name}.bias", shape[:1]) if has_bias else None)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return self.stored(name, shape, dtype).clone()

    def stored(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found = self.file.shapes.get(name)
        if found is None:
            raise CheckpointError(f"{self.file.path}: has no tensor {name}; the folder is incomplete, so save it again")
        if found != shape:
            raise CheckpointError(
                f"{self.file.path}: tensor {name} has shape {list(found)}, but {SPEC_FILE} makes it {list(shape)}"
            )
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        tensor = self.file.tensor(name)
        if tensor.dtype != dtype:
            raise CheckpointError(f"{self.file.path}: tensor {name} is {tensor.dtype}, wanted {dtype}")
        return tensor
