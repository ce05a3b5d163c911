"""A model's JSON files, each field damaged in every way: a clear error that names the file, or a model that runs."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_llama, random_model

from quicksilver_ext import QuickSilverForCausalLM
from quicksilver_ext.architectures.loading import load_model
from quicksilver_ext.weights.checkpoint import CheckpointError
from quicksilver_ext.weights.packed import save_packed

NUMBERS = [0, -1, 1.5, 2**31 - 1, 2**31, 2**63, 10**400, 1e308, 1e-320, float("nan"), float("inf")]
WRONG: list[Any] = [None, True, "", "x" * 3000, [], [1], {}, *NUMBERS]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 2.0,
    "original_max_position_embeddings": 256,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
    "attention_factor": 1.0,
}


def damaged(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field, and each field of a field, with each wrong value."""
    for key, value in values.items():
        for wrong in WRONG:
            yield key, {**values, key: wrong}
        for inner, changed in damaged(value) if isinstance(value, dict) else ():
            yield f"{key}.{inner}", {**values, key: changed}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: random_model("gpt2", n_layer=1), "config.json"),
        (lambda: random_llama(rope_parameters=YARN, num_hidden_layers=1), "config.json"),
        (lambda: random_model("llama3", num_hidden_layers=1), "config.json"),
        (lambda: random_model("mistral", num_hidden_layers=1), "config.json"),
        (lambda: random_model("qwen2-window"), "config.json"),
        (lambda: random_model("qwen3", num_hidden_layers=1), "config.json"),
        (lambda: random_model("qwen3", num_hidden_layers=1), "generation_config.json"),
        (lambda: random_model("llama", num_hidden_layers=1), "quicksilver_model.json"),
    ],
)
def test_a_damaged_field_is_refused_with_the_name_of_its_file(
    make: Callable[[], Path], name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    if name == "quicksilver_model.json":
        save_packed(load_model(make(), "int4"), folder)
    else:
        shutil.copytree(make(), folder)
    file, refused = folder / name, Counter[str]()
    for field, values in damaged(json.loads(file.read_text())):
        file.write_text(json.dumps(values))
        try:
            model = QuickSilverForCausalLM.from_pretrained(folder, precision="int4")
        except CheckpointError as error:
            assert str(folder) in str(error) and len(str(error)) < 600, (field, error)
            refused[field] += 1
            continue
        ids = torch.tensor([[5, 6, 7]], dtype=torch.int64, device="cpu")
        try:
            model.generate(ids, max_new_tokens=2)  # nothing overflows on its way to a kernel
        except ValueError as error:
            assert "not numbers" in str(error) or "beyond 65504" in str(error), field  # an epsilon of 1e308, say
    needed = {"eos_token_id"} if name == "generation_config.json" else {"vocab_size", "hidden_size"}
    named = {field.rpartition(".")[2].replace("eos_token_ids", "eos_token_id").replace("n_embd", "hidden_size")
             for field in refused}  # fmt: skip
    assert needed <= named
    for contents in (b"", b"{", b"[]", b"null", b'"x"', b"[" * 100_000, b"\xff\xfe{}", b'{"a": ' + 5000 * b"9" + b"}"):
        file.write_bytes(contents)
        with pytest.raises(CheckpointError, match=name):
            QuickSilverForCausalLM.from_pretrained(folder, precision="int4")
