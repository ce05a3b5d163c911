"""The emulator's models of the matrix instructions, against tinygrad's emulation of the same instructions."""

import random
import struct
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from quicksilver_ext import _C

emulator = getattr(_C, "emulator", None)
if emulator is None:
    pytest.skip("this build has no emulator", allow_module_level=True)

LANES = range(32)


class Op:
    """An operation of tinygrad's intermediate language, as much of it as its Python emulator looks at."""

    def __init__(self, op, dtype, src=(), arg=None, count=1, addrspace=None):
        self.op, self.dtype, self.src, self.addrspace = op, dtype, tuple(src), addrspace
        self.arg = self.val = arg
        self.count = count

    def max_numel(self):
        return self.count

    def __getattr__(self, name):
        if name == "_shape":
            return ()
        raise AttributeError(name)


def tinygrad_mma(depth, a, b, c):
    """One warp's mma.m16n8k<depth>, run by tinygrad. a, b, c: [32][elements of a lane], numbers."""
    python = pytest.importorskip("tinygrad.runtime.ops_python")
    from tinygrad.dtype import AddrSpace, dtypes
    from tinygrad.uop.ops import Ops

    lane = Op(Ops.SPECIAL, dtypes.int, arg="lidx0")
    ops = [lane]

    def add(*args, **kwargs):
        ops.append(Op(*args, **kwargs))
        return ops[-1]

    def buffer(count):
        return add(Ops.PARAM, dtypes.float, count=32 * count, addrspace=AddrSpace.GLOBAL)

    def own(memory, count):
        each = add(Ops.CONST, dtypes.int, arg=count)
        return add(Ops.INDEX, dtypes.float, [memory, add(Ops.MUL, dtypes.int, [lane, each])])

    counts = [len(x[0]) for x in (a, b, c)]
    memories = [buffer(count) for count in counts]
    loads = [
        add(Ops.LOAD, dtypes.float, [own(memory, count)], count=count)
        for memory, count in zip(memories, counts, strict=True)
    ]
    product = add(Ops.WMMA, dtypes.float, loads, ((8, 16, depth), dtypes.float, "CUDA", 32), count=counts[2])
    add(Ops.STORE, dtypes.void, [own(memories[2], counts[2]), product], count=counts[2])
    program = SimpleNamespace(uops=ops, uop_to_index={u: i for i, u in enumerate(ops)}, loop_ends={})
    contents = [bytearray(struct.pack(f"{32 * len(x[0])}f", *chain.from_iterable(x))) for x in (a, b, c)]
    python.PythonProgram.__call__(program, *map(memoryview, contents), local_size=(32, 1, 1))
    result = struct.unpack(f"{32 * counts[2]}f", contents[2])
    return [list(result[counts[2] * lane : counts[2] * (lane + 1)]) for lane in LANES]


def whole_numbers(count, low, high):
    return [[random.randint(low, high) for _ in range(count)] for _ in LANES]


def registers(values, to_bits, bits):
    """Elements of each lane, packed from the low end into registers of 32 bits."""
    per = 32 // bits
    return [
        [
            sum((to_bits(v) & (2**bits - 1)) << bits * i for i, v in enumerate(lane[at : at + per]))
            for at in range(0, len(lane), per)
        ]
        for lane in values
    ]


def test_integer_product():
    a, b, c = whole_numbers(16, 0, 255), whole_numbers(8, -128, 127), whole_numbers(4, -(2**20), 2**20)
    assert emulator.mma_u8s8(registers(a, int, 8), registers(b, int, 8), c) == tinygrad_mma(32, a, b, c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floating_point_product(dtype):
    # Small whole numbers: every sum is exact, in whatever order.
    a, b, c = whole_numbers(8, -100, 100), whole_numbers(4, -100, 100), whole_numbers(4, -1000, 1000)

    def to_bits(value):
        return torch.tensor(value, dtype=dtype).view(torch.int16).item()

    mma = emulator.mma_f16 if dtype == torch.float16 else emulator.mma_bf16
    assert mma(registers(a, to_bits, 16), registers(b, to_bits, 16), c) == tinygrad_mma(16, a, b, c)


@pytest.mark.parametrize("matrices", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(matrices, transposed):
    rows = random.sample(range(64), 32)
    shared = torch.randint(0, 2**15, (64, 8), dtype=torch.int16)
    got = emulator.ldmatrix(shared.numpy().tobytes(), [16 * row for row in rows], matrices, transposed)
    tiles = shared[rows].view(4, 8, 8)
    if transposed:
        tiles = tiles.transpose(1, 2)
    want = tiles[:matrices].contiguous().view(torch.int32).view(matrices, 32).T  # two elements a register, 4 a row
    assert got == want.tolist()


def test_a_broken_rule_is_an_error():
    with pytest.raises(RuntimeError, match=r"kernel ldmatrix, block \(0, 0, 0\).*outside of the 64 bytes"):
        emulator.ldmatrix(bytes(64), [16 * row for row in LANES], 4, False)
    with pytest.raises(RuntimeError, match="isn't a multiple"):
        emulator.ldmatrix(bytes(1024), [8 * row for row in LANES], 4, False)


def test_settings():
    settings = emulator.settings
    before = settings.schedule, settings.seed, settings.workers, settings.counts
    try:
        for schedule in ("forward", "backward", "random"):
            settings.schedule = schedule
            assert settings.schedule == schedule
            test_ldmatrix(4, True)
        with pytest.raises(ValueError, match="schedule must be one of"):
            settings.schedule = "sideways"
        with pytest.raises(ValueError, match="workers must be at least 1"):
            settings.workers = 0
        settings.counts = True
        emulator.take_counts()
        zeros = [[0] * 4 for _ in LANES]
        for _ in range(2):
            emulator.mma_u8s8(zeros, [[0] * 2 for _ in LANES], zeros)
        emulator.ldmatrix(bytes(4096), [128 * row for row in LANES], 4, False)
        product, rows = emulator.take_counts()
        assert (product["name"], product["launches"], product["threads"], product["mma_u8s8"]) == ("mma", 2, 64, 2)
        assert (rows["name"], rows["shared_requests"], rows["shared_conflicts"]) == ("ldmatrix", 1, 28)
        assert emulator.take_counts() == []
    finally:
        settings.schedule, settings.seed, settings.workers, settings.counts = before
