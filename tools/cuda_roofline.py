"""Bytes and operations of Llama-2-7B's stages, by formula, and the time that they take at a GPU's peak rates.

The formulas are those of csrc/profiler/work.cpp, which counts the same for any shape: every byte of weights, cache and
activations once, and the multiply-adds of products and attention. A test holds the two against each other.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cuda_table import KIB, markdown


@dataclass(frozen=True)
class Gpu:
    """Peak rates by the maker's data sheet, dense. The clock is the one at which tensor cores reach them."""

    name: str
    bytes_per_second: float
    int8_operations: float  # a multiply-add is two
    fp16_operations: float
    arch: int
    sms: int
    clock: float  # Hz

    @property
    def issue_slots(self) -> float:
        """Warp instructions per second: one for each of an SM's four schedulers."""
        return self.sms * 4 * self.clock


GPUS = (
    Gpu("A100 80GB", 2.0e12, 624e12, 312e12, 80, 108, 1.41e9),
    Gpu("L40S", 0.864e12, 733e12, 362e12, 89, 142, 2.52e9),
    Gpu("H100 SXM", 3.35e12, 1979e12, 989e12, 90, 132, 1.83e9),
    Gpu("B200", 8.0e12, 4500e12, 2250e12, 100, 148, 1.85e9),
)


@dataclass(frozen=True)
class Shape:
    layers: int = 32
    d: int = 4096
    heads: int = 32
    kv_heads: int = 32
    head_size: int = 128
    ffn: int = 11008
    vocab: int = 32000
    group: int = 64
    gated: bool = True


@dataclass(frozen=True)
class Batch:
    """rows tokens, the last of `sequences` sequences that hold `context` entries before them."""

    rows: int
    sequences: int
    context: int
    bits: int = 8
    kv_bytes: int = 2


@dataclass(frozen=True)
class Work:
    bytes: float
    multiply_adds: float
    mma_operations: float  # on tensor cores
    int8: bool = True


def _weight_bytes(n: int, k: int, group: int, bits: int) -> int:
    planes = 2 if bits == 8 else 1
    return n * (k // 8) * 4 * planes + n * -(-k // group) * 4


def stage_work(stage: str, shape: Shape, batch: Batch) -> Work:
    s, rows = shape, batch.rows
    query, key = s.heads * s.head_size, s.kv_heads * s.head_size
    if stage == "attention":
        each = rows // batch.sequences
        entries = batch.context + each
        pairs = batch.sequences * sum(batch.context + i + 1 for i in range(each))
        multiply_adds = pairs * s.heads * 2 * s.head_size
        moved = rows * 2 * query * 4 + batch.sequences * entries * (2 * key * batch.kv_bytes + 4)
        return Work(moved, multiply_adds, 2 * multiply_adds, int8=False)
    products, activations = {
        "attention_input": ([(query + 2 * key, s.d)], (2 * s.d + query + 2 * key) * 4 + 2 * key * batch.kv_bytes),
        "attention_output": ([(s.d, query)], (query + 2 * s.d) * 4),
        "mlp_input": ([(s.ffn * (2 if s.gated else 1), s.d)], (s.d + s.ffn) * 4),
        "mlp_output": ([(s.d, s.ffn)], (s.ffn + 2 * s.d) * 4),
        "lm_head": ([(s.vocab, s.d)], (s.d + s.vocab) * 4),
    }[stage]
    bits = 8 if stage == "lm_head" else batch.bits
    moved = sum(_weight_bytes(n, k, s.group, bits) for n, k in products) + rows * activations
    multiply_adds = rows * sum(n * k for n, k in products)
    return Work(moved, multiply_adds, 2 * multiply_adds)


def seconds(work: Work, gpu: Gpu) -> tuple[float, str]:
    """The longer of the two times, and what it is spent on."""
    memory = work.bytes / gpu.bytes_per_second
    compute = work.mma_operations / (gpu.int8_operations if work.int8 else gpu.fp16_operations)
    return max(memory, compute), "memory" if memory >= compute else "tensor cores"


CASES = {
    **{f"decode, batch {n}": Batch(n, n, 1023) for n in (1, 8, 32)},
    "prefill 512": Batch(512, 1, 0),
}
NOTE = (
    "Peak rates: "
    + "; ".join(
        f"{g.name} {g.bytes_per_second / 1e12:g} TB/s, {g.int8_operations / 1e12:g} INT8 and "
        f"{g.fp16_operations / 1e12:g} fp16 TOPS, dense"
        for g in GPUS
    )
    + ". Decoding sees 1024 entries of an fp16 cache per sequence. A stage takes the longer of bytes over bandwidth "
    "and operations over their peak; 'step' is 32 layers and the head (in a prefill, for its last row). It is what a "
    "kernel that wasted nothing would take: none does."
)


ISSUE_NOTE = (
    "Warp instructions of each innermost loop that multiplies, and what they leave: 'at most' is the share of the peak "
    "that a kernel reaches if every scheduler issues in every cycle. It is a share of the bandwidth where the loop "
    "reads weights itself, else of the tensor cores' rate."
)


def issue_bound(gpu: Gpu, slots_per_mma: float, integer: bool, slots_per_kib: float | None) -> tuple[float, str]:
    """The share of a peak rate that issuing leaves within reach, and of which."""
    if slots_per_kib is not None:
        return min(1.0, gpu.issue_slots / slots_per_kib * KIB / gpu.bytes_per_second), "bandwidth"
    # m16n8k32 of integers, m16n8k16 of fp16
    operations, peak = (8192, gpu.int8_operations) if integer else (4096, gpu.fp16_operations)
    return min(1.0, gpu.issue_slots / slots_per_mma * operations / peak), "tensor cores"


def roofline(shape: Shape | None = None) -> list[dict[str, Any]]:
    shape = shape or Shape()
    rows: list[dict[str, Any]] = []
    for case, batch in CASES.items():
        for bits in (8, 4):
            of = Batch(batch.rows, batch.sequences, batch.context, bits)
            totals = dict.fromkeys((gpu.name for gpu in GPUS), 0.0)
            total_bytes = 0.0
            for stage in ("attention_input", "attention", "attention_output", "mlp_input", "mlp_output", "lm_head"):
                head = stage == "lm_head"
                work = stage_work(stage, shape, Batch(1, 1, 0) if head and "prefill" in case else of)
                row = {"case": case, "bits": bits, "stage": stage, **asdict(work)}
                total_bytes += work.bytes * (1 if head else shape.layers)
                for gpu in GPUS:
                    time, bound = seconds(work, gpu)
                    totals[gpu.name] += time * (1 if head else shape.layers)
                    row[gpu.name] = {"us": time * 1e6, "bound": bound}
                rows.append(row)
            step = {"case": case, "bits": bits, "stage": "step", "bytes": total_bytes}
            rows.append(step | {name: {"us": time * 1e6, "bound": ""} for name, time in totals.items()})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    header = ["case", "bits", "stage", "MB", "G multiply-adds"]
    for gpu in GPUS:
        header += [f"{gpu.name}, us", "bound by"]
    lines = []
    for row in rows:
        adds = row.get("multiply_adds")
        line = [row["case"], row["bits"], row["stage"], row["bytes"] / 1e6, None if adds is None else adds / 1e9]
        for gpu in GPUS:
            line += [row[gpu.name]["us"], row[gpu.name]["bound"]]
        lines.append(line)
    return markdown(header, lines)
