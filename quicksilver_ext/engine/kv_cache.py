"""The KV cache of a batch: per layer and per sequence, paged, append-only, with no entry for a token that skipped.

What outlives a forward pass beside keys and values is here too: tokens that halted and whose deeper entries are still
owed (``recompute``), and the open group of each sequence (fusion in scope ``cache``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import FusionConfig
from ..kernels import ops
from ..weights.model import Spec

BLOCK_SIZE = 64
NEVER = torch.iinfo(torch.int32).max
# Expired entries are squeezed out once a layer has so many: moving entries costs more than skipping a few.
RECLAIM_AFTER = 32
KV_CACHE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


def check_kv_cache_dtype(name: str | None) -> None:
    """ValueError for a name that isn't one of ``KV_CACHE_DTYPES``; None leaves the choice to the decoder."""
    if name is not None and name not in KV_CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}; got {name!r}")


class LayerCache:
    """Keys and values of one layer: [blocks, kv_heads, BLOCK_SIZE, head_size], blocks handed out on demand.

    INT8 ones are codes; ``key_scale`` and ``value_scale`` [blocks, kv_heads, BLOCK_SIZE] fp32 go with them, one number
    for each vector (one head of one entry). Memory is reserved for the worst case and touched only where entries are
    written. An entry is visible to queries at positions ``positions[slot] <= p < until[slot]``; ``until`` is None where
    entries never expire.
    """

    def __init__(self, spec: Spec, entries: int, dtype: torch.dtype, expiring: bool, lengths: torch.Tensor) -> None:
        sequences, device = len(lengths), lengths.device
        per_sequence = -(-entries // BLOCK_SIZE)
        blocks = sequences * per_sequence
        shape = (blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_size)
        self.key = torch.empty(shape, dtype=dtype, device=device)
        self.value = torch.empty(shape, dtype=dtype, device=device)
        self.key_scale = self.value_scale = None
        if dtype == torch.int8:
            self.key_scale = torch.empty(shape[:3], device=device)
            self.value_scale = torch.empty(shape[:3], device=device)
        self.positions = torch.zeros(blocks, BLOCK_SIZE, dtype=torch.int32, device=device)
        self.until = torch.full_like(self.positions, NEVER) if expiring else None
        self.block_table = torch.full((sequences, per_sequence), -1, dtype=torch.int32, device=device)
        self.lengths = lengths
        self.blocks_used = torch.zeros(1, dtype=torch.int32, device=device)
        self.native: Any = None  # the kernels' view of the above, made when first wanted

    def arrays(self) -> list[torch.Tensor]:
        """What holds the entries: [blocks, kv_heads, BLOCK_SIZE, ...] each."""
        return [t for t in (self.key, self.value, self.key_scale, self.value_scale) if t is not None]

    def allocate(self, sequence: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Slots [n] int64 for entries of ``sequence`` [n] visible from ``positions`` [n], in that order."""
        return ops.kv_allocate(
            sequence, positions, self.lengths, self.block_table, self.positions, self.until, self.blocks_used
        )

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Keys and values [n, kv_heads, head_size] fp32 to slots [n] int64."""
        ops.kv_scatter(key, value, slots, self.key, self.value, self.key_scale, self.value_scale)

    def keys(self, slots: torch.Tensor) -> torch.Tensor:
        """The keys [n, kv_heads, head_size] fp32 at slots [n] int64, as attention sees them."""
        block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        keys = self.key.transpose(1, 2)[block, offset].float()
        return keys if self.key_scale is None else keys * self.key_scale.transpose(1, 2)[block, offset, :, None]

    def slots(self, sequence: int) -> torch.Tensor:
        """The slots [n] of a sequence's entries, oldest first."""
        entries = torch.arange(int(self.lengths[sequence]), device=self.lengths.device)
        return self.block_table[sequence, entries // BLOCK_SIZE].long() * BLOCK_SIZE + entries % BLOCK_SIZE

    def reclaim(self, sequence: int, position: int) -> dict[int, int]:
        """Squeezes out the entries that no query at ``position`` or later sees; returns old slot -> new slot of those
        that moved. Order is kept, so attention's sums are the same to the bit."""
        assert self.until is not None
        slots = self.slots(sequence)
        alive = self.until.view(-1)[slots] > position
        if len(slots) - int(alive.sum()) < RECLAIM_AFTER:
            return {}
        first = int((~alive).nonzero()[0])
        source = slots[first:][alive[first:]]
        target = slots[first : first + len(source)]
        for array in self.arrays():
            flat = array.transpose(1, 2)  # [blocks, BLOCK_SIZE, kv_heads, ...]
            flat[target // BLOCK_SIZE, target % BLOCK_SIZE] = flat[source // BLOCK_SIZE, source % BLOCK_SIZE]
        for table in (self.positions, self.until):
            table.view(-1)[target] = table.view(-1)[source]
        self.lengths[sequence] = first + len(source)
        return dict(zip(source.tolist(), target.tolist(), strict=True))


@dataclass
class OwedRows:
    """Halted tokens whose deeper layers wait for a later token to need them: state [n, d] at the input of ``layer``."""

    hidden: torch.Tensor
    positions: torch.Tensor
    sequence: torch.Tensor
    layer: torch.Tensor
    bits: torch.Tensor


@dataclass
class OpenGroup:
    """The latest fusion group of a sequence: the states of its members at the fusion layer, and its number."""

    hidden: torch.Tensor
    positions: torch.Tensor
    number: int


@dataclass
class Tail:
    """The latest entry of a sequence in one layer, into which a member of the same group would merge."""

    slot: int
    position: int
    group: int
    weight: float


@dataclass
class FusionState:
    """What fusion in scope ``cache`` remembers between passes: open groups, and each layer's latest entries."""

    groups: dict[int, OpenGroup] = field(default_factory=dict)  # by sequence
    tails: dict[tuple[int, int], Tail] = field(default_factory=dict)  # by (layer, sequence)
    next_group: int = 0

    def number(
        self, config: FusionConfig, sequence: int, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        """Group numbers [n] of a sequence's new rows (hidden [n, d]), going on with its open group, and how many rows
        joined a group that had a member."""
        opened = self.groups.get(sequence)
        carried = 0
        if opened is not None:
            carried = len(opened.positions)
            hidden = torch.cat((opened.hidden, hidden))
            positions = torch.cat((opened.positions, positions))
        label, _ = ops.fusion_groups(
            hidden,
            positions,
            torch.full_like(positions, sequence),
            torch.ones(len(positions), dtype=torch.bool),
            config.threshold,
            config.norm == "relative",
            config.max_group,
        )
        number = label.long() + self.next_group
        self.next_group += len(label)
        if opened is not None:
            number[label == label[0]] = opened.number
        joined = int((label[1:] == label[:-1])[max(carried - 1, 0) :].sum())
        latest = label == label[-1]
        self.groups[sequence] = OpenGroup(hidden[latest], positions[latest], int(number[-1]))
        return number[carried:], joined

    def joins(self, layer: int, sequence: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Which new entries [n] of a layer merge with the one before them in their sequence: bool [n]."""
        latest = {s: tail.group for (at, s), tail in self.tails.items() if at == layer}
        result = []
        for s, number in zip(sequence.tolist(), group.tolist(), strict=True):
            result.append(latest.get(s) == number)
            latest[s] = number
        return torch.tensor(result, dtype=torch.bool)

    def merge(
        self,
        layer: int,
        cache: LayerCache,
        slots: torch.Tensor,
        merged: dict[int, int],
        sequence: torch.Tensor,
        positions: torch.Tensor,
        group: torch.Tensor,
        weight: torch.Tensor,
        cosine: torch.Tensor | None,
        sine: torch.Tensor | None,
    ) -> None:
        """Merges new entries [n] with their predecessors where :meth:`joins` said so: entry i at slots[i] into slot
        merged[i]. The parts expire at the position from which the merged entry is seen."""
        assert cache.until is not None
        until = cache.until.view(-1)
        items = []
        columns = (slots, sequence, positions, group, weight)
        for i, (slot, s, position, number, mass) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            if i not in merged:
                self.tails[layer, s] = Tail(slot, position, number, mass)
                continue
            tail = self.tails[layer, s]
            items.append((merged[i], tail.slot, slot, tail.weight, mass, position - tail.position))
            until[[tail.slot, slot]] = position + 1
            self.tails[layer, s] = Tail(merged[i], position, number, tail.weight + mass)
        if items:
            target, first, second, weight_first, weight_second, distance = zip(*items, strict=True)
            ops.kv_merge(
                cache.key,
                cache.value,
                torch.tensor(target),
                torch.tensor(first),
                torch.tensor(second),
                torch.tensor(weight_first),
                torch.tensor(weight_second),
                torch.tensor(distance, dtype=torch.int32),
                cosine,
                sine,
                cache.key_scale,
                cache.value_scale,
            )


class KVCache:
    """All layers' caches of ``sequences`` sequences of at most ``capacity`` tokens each."""

    def __init__(
        self,
        spec: Spec,
        sequences: int,
        capacity: int,
        dtype: torch.dtype,
        merging_from: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if sequences < 1 or capacity < 1:
            raise ValueError(f"a cache needs at least one sequence and one token; got {sequences} and {capacity}")
        self.sequences = sequences
        self.capacity = capacity
        self.lengths = torch.zeros(spec.num_layers, sequences, dtype=torch.int32, device=device)
        self.layers = []
        for index in range(spec.num_layers):
            merging = merging_from is not None and index >= merging_from
            entries = capacity * (2 if merging else 1)
            self.layers.append(LayerCache(spec, entries, dtype, merging, self.lengths[index]))
        self.next_position = [0] * sequences
        self.owed: OwedRows | None = None
        self.fusion = FusionState()
        self.steps: dict[int, Any] = {}  # captured decode steps by their number of rows

    def drop(self, sequence: int) -> None:
        """Forgets a sequence, whose number may then be used anew."""
        self.lengths[:, sequence] = 0
        self.next_position[sequence] = 0
        if self.owed is not None:
            keep = self.owed.sequence != sequence
            self.owed = OwedRows(**{name: tensor[keep] for name, tensor in vars(self.owed).items()})
        self.fusion.groups.pop(sequence, None)
        for index in range(len(self.layers)):
            self.fusion.tails.pop((index, sequence), None)

    def reclaim(self) -> None:
        """Squeezes expired entries out of every layer that merges."""
        for index, layer in enumerate(self.layers):
            if layer.until is None:
                continue
            for sequence, position in enumerate(self.next_position):
                moved = layer.reclaim(sequence, position)
                tail = self.fusion.tails.get((index, sequence))
                if tail is not None:
                    tail.slot = moved.get(tail.slot, tail.slot)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values (and their scales) of the entries that are present."""
        return sum(int(layer.lengths.sum()) * sum(a[0, :, 0].nbytes for a in layer.arrays()) for layer in self.layers)
