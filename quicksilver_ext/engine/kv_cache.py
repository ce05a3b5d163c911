"""The KV cache of a batch: per layer and per sequence, paged, append-only, with no entry for a token that skipped.

Storage alone. Blocks come from a free list and go back to it. What a mechanism must remember of a cache's tokens beside
keys and values lies in its ``memories``; both are rolled back together by :meth:`KVCache.truncate`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.native import native_cache
from ..mechanisms.base import Memory
from ..weights.model import Spec

BLOCK_SIZE = 64
NEVER = torch.iinfo(torch.int32).max
# Expired entries are squeezed out once a layer has so many, and as many as it would keep: moving entries costs more
# than skipping a few.
RECLAIM_AFTER = 32
KV_CACHE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


def check_kv_cache_dtype(name: str | None) -> None:
    """ValueError for a name that isn't one of ``KV_CACHE_DTYPES``; None leaves the choice to the weights."""
    if name is not None and name not in KV_CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}; got {name!r}")


class LayerCache:
    """Keys and values of one layer: [blocks, kv_heads, BLOCK_SIZE, head_size], blocks handed out on demand.

    INT8 ones are codes; ``key_scale`` and ``value_scale`` [blocks, kv_heads, BLOCK_SIZE] fp32 go with them, one number
    for each vector (one head of one entry). Memory is reserved for the worst case and touched only where entries are
    written. An entry is visible to queries at positions ``positions[slot] <= p < until[slot]``; ``until`` is None where
    entries never expire. Where entries merge, ``owner`` is the position of the (last) token that left an entry and
    ``weight`` its weight in the next merge. The tables are views of the whole cache's.
    """

    def __init__(self, spec: Spec, blocks: int, dtype: torch.dtype, window: int, tables: Mapping[str, Tensor]) -> None:
        self.lengths, self.block_table = tables["lengths"], tables["block_table"]
        device = self.lengths.device
        shape = (blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_size)
        self.key = torch.empty(shape, dtype=dtype, device=device)
        self.value = torch.empty(shape, dtype=dtype, device=device)
        self.key_scale = self.value_scale = None
        if dtype == torch.int8:
            self.key_scale = torch.empty(shape[:3], dtype=torch.float32, device=device)
            self.value_scale = torch.empty(shape[:3], dtype=torch.float32, device=device)
        self.positions, self.free_blocks = tables["positions"][:blocks], tables["free_blocks"][:blocks]
        self.until = tables["until"][:blocks] if "until" in tables else None
        if "owner" in tables:
            self.owner, self.weight = tables["owner"][:blocks], tables["weight"][:blocks]
        self.blocks_used, self.overflow = tables["blocks_used"], tables.get("overflow")
        self.window = window
        self.native = native_cache(self)  # the kernels' view of the above

    def arrays(self) -> list[Tensor]:
        """What holds the entries: [blocks, kv_heads, BLOCK_SIZE, ...] each."""
        return [t for t in (self.key, self.value, self.key_scale, self.value_scale) if t is not None]

    def allocate(self, sequence: Tensor, positions: Tensor, owner: Tensor | None = None) -> Tensor:
        """Slots [n] int64 for entries of ``sequence`` [n] visible from ``positions`` [n], in that order. ``owner`` [n]:
        the tokens' positions where those differ; an entry leaves a window by its token's."""
        slots = ops.kv_allocate(
            sequence,
            positions,
            self.lengths,
            self.block_table,
            self.positions,
            self.until,
            self.blocks_used,
            self.free_blocks,
            self.window,
        )
        if owner is not None and self.owner is not None:
            self.owner.view(-1)[slots] = owner
            if self.window and self.until is not None:
                self.until.view(-1)[slots] = (owner.long() + self.window).clamp_max(NEVER).int()
        return slots

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Keys and values [n, kv_heads, head_size] fp32 to slots [n] int64."""
        ops.kv_scatter(key, value, slots, self.key, self.value, self.key_scale, self.value_scale)

    def keys(self, slots: Tensor) -> Tensor:
        """The keys [n, kv_heads, head_size] fp32 at slots [n] int64, as attention sees them."""
        block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        keys = self.key.transpose(1, 2)[block, offset].float()
        return keys if self.key_scale is None else keys * self.key_scale.transpose(1, 2)[block, offset, :, None]

    def slots(self, sequence: int) -> Tensor:
        """The slots [n] of a sequence's entries, oldest first."""
        entries = torch.arange(int(self.lengths[sequence]), dtype=torch.int64, device=self.lengths.device)
        return self.block_table[sequence, entries // BLOCK_SIZE].long() * BLOCK_SIZE + entries % BLOCK_SIZE

    def last_slot(self, sequence: int) -> int | None:
        """The slot of a sequence's latest entry."""
        last = int(self.lengths[sequence]) - 1
        if last < 0:
            return None
        return int(self.block_table[sequence, last // BLOCK_SIZE]) * BLOCK_SIZE + last % BLOCK_SIZE

    def release(self, sequence: int) -> None:
        """Gives back the blocks behind a sequence's last entry."""
        first = -(-int(self.lengths[sequence]) // BLOCK_SIZE)
        row = self.block_table[sequence, first:]
        blocks = row[row >= 0]
        if len(blocks):
            used = int(self.blocks_used)
            self.free_blocks[used - len(blocks) : used] = blocks
            self.blocks_used -= len(blocks)
            row.fill_(-1)

    def reclaim(self, sequence: int, position: int) -> None:
        """Squeezes out the entries that no query at ``position`` or later sees, where that pays. Order is kept, so
        attention's sums are the same to the bit."""
        assert self.until is not None
        length = int(self.lengths[sequence])
        if length < RECLAIM_AFTER:
            return
        slots = self.slots(sequence)
        alive = self.until.view(-1)[slots] > position
        dead = length - int(alive.sum())
        if dead < RECLAIM_AFTER or (self.window and dead < length // 2):
            return
        first = int((~alive).nonzero()[0])
        source = slots[first:][alive[first:]]
        target = slots[first : first + len(source)]
        for array in self.arrays():
            flat = array.transpose(1, 2)  # [blocks, BLOCK_SIZE, kv_heads, ...]
            flat[target // BLOCK_SIZE, target % BLOCK_SIZE] = flat[source // BLOCK_SIZE, source % BLOCK_SIZE]
        for name in ("positions", "until", "owner", "weight"):
            table = getattr(self, name, None)
            if table is not None:
                table.view(-1)[target] = table.view(-1)[source]
        self.lengths[sequence] = first + len(source)
        self.release(sequence)


class KVCache:
    """All layers' caches of ``sequences`` sequences of at most ``capacity`` tokens each. A user can hold one: see
    ``QuickSilverForCausalLM.new_cache``.

    ``tokens``: the token ids that each sequence holds. ``keeps``: whether entries that have expired stay, so that
    :meth:`truncate` can go back to any position; without it they make room, and only :meth:`drop` is allowed.
    """

    def __init__(
        self,
        spec: Spec,
        sequences: int,
        capacity: int,
        dtype: torch.dtype,
        *,
        merging_from: int | None = None,
        memories: Mapping[str, Memory] | None = None,
        keeps: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, number in (("sequences", sequences), ("capacity", capacity)):
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < 2**31 // BLOCK_SIZE:
                raise ValueError(f"{name} must be a whole number of at least 1; got {number!r}")
        self.sequences, self.capacity, self.keeps = sequences, capacity, keeps
        self.spec, self.dtype, self.merging_from = spec, dtype, merging_from
        self.memories = dict(memories or {})
        self.tokens: list[list[int]] = [[] for _ in range(sequences)]
        layers, columns = spec.num_layers, -(-capacity // BLOCK_SIZE)
        blocks = [sequences * columns] * layers
        if merging_from is not None:  # an entry of its own and a merged one for each token
            columns = -(-2 * capacity // BLOCK_SIZE)
            blocks[merging_from:] = [sequences * columns] * (layers - merging_from)
        windows = [spec.window_of(index) for index in range(layers)]

        def ints(*shape: int, value: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full((layers, *shape), value, dtype=dtype, device=device)

        most = max(blocks)
        self.lengths, self.block_table = ints(sequences), ints(sequences, columns, value=-1)
        self.positions, self.blocks_used = ints(most, BLOCK_SIZE), ints(1)
        self.free_blocks = torch.arange(most, dtype=torch.int32, device=device).repeat(layers, 1)
        self.until = self.owner = self.weight = self._overflow = None
        tables = {
            name: getattr(self, name) for name in ("lengths", "block_table", "positions", "blocks_used", "free_blocks")
        }
        if merging_from is not None or any(windows):
            self.until = tables["until"] = ints(most, BLOCK_SIZE, value=NEVER)
        if merging_from is not None:
            self.owner = tables["owner"] = ints(most, BLOCK_SIZE)
            self.weight = tables["weight"] = ints(most, BLOCK_SIZE, dtype=torch.float64)
        if dtype == torch.float16:
            self._overflow = torch.zeros(1, dtype=torch.int32, device=device)
        self.layers = []
        for index in range(layers):
            mine = {name: table[index] for name, table in tables.items()}
            if self._overflow is not None:
                mine["overflow"] = self._overflow
            if not windows[index] and (merging_from is None or index < merging_from):
                mine.pop("until", None)
            self.layers.append(LayerCache(spec, blocks[index], dtype, windows[index] or 0, mine))
        self.native = [layer.native for layer in self.layers]
        # Read at every step: through PyTorch that would take longer than all that follows from it.
        self._flag = None
        if self._overflow is not None and self._overflow.device.type == "cpu":
            self._flag = ctypes.c_int32.from_address(self._overflow.data_ptr())
        self.graphs: dict[Any, Any] = {}  # captured steps on this cache's memory

    @property
    def next_position(self) -> list[int]:
        """Where each sequence goes on."""
        return [len(tokens) for tokens in self.tokens]

    def overflowed(self) -> bool:
        """Whether a finite key or value has left fp16's range since the last call. Waits for a GPU."""
        if self._overflow is None:
            return False
        raised = bool(self._flag.value if self._flag is not None else self._overflow)
        if raised:
            self._overflow.zero_()
        return raised

    def common_prefix(self, sequence: int, ids: Sequence[int]) -> int:
        """How many of the first tokens of ``ids`` a sequence holds."""
        held = self.tokens[sequence]
        most = min(len(held), len(ids))
        return next((i for i in range(most) if held[i] != ids[i]), most)

    def truncate(self, sequence: int, position: int) -> None:
        """Takes back the tokens of a sequence from ``position`` on: the cache is as if they had never run, to the bit,
        under every mechanism. (Fusion in scope ``prompt`` looks at a prompt as a whole: what it merged across
        ``position`` is lost with the later token.) IndexError, ValueError for places that don't exist."""
        for name, number in (("sequence", sequence), ("position", position)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name} must be a whole number; got {number!r}")
        if not 0 <= sequence < self.sequences:
            raise IndexError(f"sequence must be from 0 to {self.sequences - 1}; got {sequence}")
        if position < 0:
            raise IndexError(f"position must be at least 0; got {position}")
        if position >= len(self.tokens[sequence]):
            return
        if position and not self.keeps:
            raise ValueError("this cache keeps no entries that have expired, so only whole sequences can be taken back")
        self._cut(sequence, position)
        del self.tokens[sequence][position:]
        for memory in self.memories.values():
            memory.truncate(sequence, position)

    def _cut(self, sequence: int, position: int) -> None:
        length = self.lengths[:, sequence]
        longest = int(length.max())
        if not longest:
            return
        entry = torch.arange(longest, dtype=torch.int64, device=length.device)
        block = self.block_table[:, sequence, entry // BLOCK_SIZE].long().clamp_min(0)
        slots = block * BLOCK_SIZE + entry % BLOCK_SIZE  # [layers, longest]

        def of_slots(table: Tensor) -> Tensor:
            return table.flatten(1).gather(1, slots)

        visible = of_slots(self.positions)
        owner = visible
        if self.owner is not None:
            merging = torch.arange(len(length), dtype=torch.int64, device=length.device) >= (self.merging_from or 0)
            owner = torch.where(merging[:, None], of_slots(self.owner), visible)
        keep = (entry < length[:, None]) & (owner < position)
        kept = keep.sum(1).int()
        if self.until is not None:
            # What a later token expired is as it was made.
            for index, layer in enumerate(self.layers):
                if layer.until is None:
                    continue
                mine = slots[index][keep[index]]
                until, made = layer.until.view(-1), owner[index][keep[index]].long()
                original = (made + layer.window).clamp_max(NEVER) if layer.window else torch.full_like(made, NEVER)
                until[mine] = torch.where(until[mine] > position, original.int(), until[mine])
        length.copy_(kept)
        for layer in self.layers:
            layer.release(sequence)

    def drop(self, sequence: int) -> None:
        """Forgets a sequence, whose number may then be used anew."""
        self.truncate(sequence, 0)

    def reclaim(self) -> None:
        """Squeezes out entries that no later token can see, unless the cache keeps them."""
        if self.until is None or self.keeps:
            return
        for layer in self.layers:
            if layer.until is not None:
                for sequence, tokens in enumerate(self.tokens):
                    layer.reclaim(sequence, len(tokens))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values (and their scales) of the entries that are present."""
        return sum(int(layer.lengths.sum()) * sum(a[0, :, 0].nbytes for a in layer.arrays()) for layer in self.layers)

    @property
    def reserved_nbytes(self) -> int:
        """Bytes that keys and values (and their scales) would take if the cache were full."""
        return sum(array.nbytes for layer in self.layers for array in layer.arrays())
