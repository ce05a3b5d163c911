"""Models of a known shape with random weights, as .gguf files: what speed depends on, without a download.

Matrices are Q8_0 (blocks of 32 INT8 codes and an fp16 scale) with codes spread evenly, scaled so that a matrix keeps
the length of what it multiplies; there is no vocabulary. Written row blocks at a time, so memory stays small.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BLOCK = 32  # values of a Q8_0 block
BLOCK_BYTES = BLOCK + 2
CODE_SPREAD = 74.0  # the standard deviation of codes spread evenly over -127 to 127


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. ``family`` is "gpt2" (tied head, biases) or "llama" (a head of its own)."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    context: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """(GGUF name, shape, kind) in the order of the file; kind: "matrix", "table" (fp32), "norm" or "bias"."""
        d = self.hidden
        yield "token_embd.weight", (self.vocab, d), "matrix"
        if self.family == "gpt2":
            yield "position_embd.weight", (self.context, d), "table"
            matrices = {
                "attn_qkv": (3 * d, d),
                "attn_output": (d, d),
                "ffn_up": (self.ffn, d),
                "ffn_down": (d, self.ffn),
            }
        else:
            matrices = {f"attn_{name}": (d, d) for name in ("q", "k", "v", "output")}
            matrices |= {"ffn_gate": (self.ffn, d), "ffn_up": (self.ffn, d), "ffn_down": (d, self.ffn)}
        norms = [f"blk.{index}.{name}" for index in range(self.layers) for name in ("attn_norm", "ffn_norm")]
        for name in (*norms, "output_norm"):
            yield f"{name}.weight", (d,), "norm"
            if self.family == "gpt2":
                yield f"{name}.bias", (d,), "bias"
        for index in range(self.layers):
            for name, shape in matrices.items():
                yield f"blk.{index}.{name}.weight", shape, "matrix"
                if self.family == "gpt2":
                    yield f"blk.{index}.{name}.bias", shape[:1], "bias"
        if self.family == "llama":
            yield "output.weight", (self.vocab, d), "matrix"

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape, _ in self.tensors())


SHAPES = {
    "gpt2-large": Shape("gpt2-large", "gpt2", 36, 1280, 20, 5120, 50257, 1024),
    "llama-2-7b": Shape("llama-2-7b", "llama", 32, 4096, 32, 11008, 32000, 4096),
}


def write_shape(shape: Shape, folder: Path, seed: int = 0, extra_bytes: int = 0) -> Path:
    """The .gguf file of a shape in ``folder``; one that is there already is taken as it is.

    ``extra_bytes``: what the caller will write there besides. ValueError where the disk is too full for both.
    """
    path = folder / f"{shape.name}-{shape.layers}-layers-seed-{seed}-Q8_0.gguf"
    size = sum(_nbytes(dimensions, kind) for _, dimensions, kind in shape.tensors())
    needed = extra_bytes + (0 if path.is_file() else size)
    free = shutil.disk_usage(folder).free
    if needed * 1.02 > free:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free and {shape.name} needs {needed / 1e9:.1f} GB; "
            "name a folder on a larger disk by --folder, or fewer layers by --layers"
        )
    if not path.is_file():
        part = folder / f".{path.name}.{os.getpid()}"
        try:
            _write(shape, part, seed)
            part.replace(path)  # a file under its own name is whole
        finally:
            part.unlink(missing_ok=True)
    return path


def _nbytes(dimensions: tuple[int, ...], kind: str) -> int:
    count = math.prod(dimensions)
    return count // BLOCK * BLOCK_BYTES if kind == "matrix" else 4 * count


def _write(shape: Shape, path: Path, seed: int) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter  # a quarter of a second to import

    writer = GGUFWriter(str(path), shape.family)
    writer.add_name(shape.name)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_file_type(7)  # mostly Q8_0
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    if shape.family == "llama":
        writer.add_head_count_kv(shape.heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(shape.hidden // shape.heads)
        writer.add_rope_freq_base(10000.0)
    else:
        writer.add_layer_norm_eps(1e-5)
    for name, dimensions, kind in shape.tensors():
        nbytes = _nbytes(dimensions, kind)
        if kind == "matrix":
            stored = (dimensions[0], nbytes // dimensions[0])
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), nbytes, GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor_info(name, dimensions, np.dtype(np.float32), nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        random = np.random.default_rng(seed)
        for _, dimensions, kind in shape.tensors():
            writer.write_tensor_data(_values(random, dimensions, kind))
    finally:
        writer.close()


def _values(random: np.random.Generator, dimensions: tuple[int, ...], kind: str) -> NDArray[np.generic]:
    if kind == "matrix":
        return _q8_0(random, *dimensions)
    noise = random.standard_normal(dimensions, dtype=np.float32)
    if kind == "table":
        noise /= math.sqrt(dimensions[1])
        return noise
    noise *= 0.05
    return noise + np.float32(1) if kind == "norm" else noise


def _q8_0(random: np.random.Generator, rows: int, columns: int) -> NDArray[np.uint8]:
    """Bytes [rows, columns / 32 * 34] of a matrix whose values have the standard deviation 1 / sqrt(columns)."""
    blocks = np.empty((rows, columns // BLOCK, BLOCK_BYTES), dtype=np.uint8)
    scale = random.uniform(0.8, 1.2, (rows, columns // BLOCK)) / (CODE_SPREAD * math.sqrt(columns))
    blocks[..., :2] = scale.astype("<f2")[..., None].view(np.uint8)
    blocks[..., 2:] = random.integers(-127, 128, (rows, columns // BLOCK, BLOCK), dtype=np.int8).view(np.uint8)
    return blocks.reshape(rows, -1)
