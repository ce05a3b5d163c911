"""_C.DecodeStep: one object for a model, whatever the caches and the number of rows."""

import math

import pytest
import torch

from quicksilver_ext import _C, quantize

D, HEADS, KV_HEADS, SIZE, FFN, VOCAB, LAYERS = 64, 3, 1, 24, 96, 50, 3


class Cache:
    """One layer's cache of a few sequences, in fp32."""

    def __init__(self, sequences: int, blocks: int = 4, dtype: torch.dtype = torch.float32) -> None:
        self.arrays = torch.full((2, sequences * blocks, KV_HEADS, 4, SIZE), math.nan, dtype=dtype)
        self.table = torch.full((sequences, blocks), -1, dtype=torch.int32)
        self.lengths, self.used, self.overflow = (torch.zeros(n, dtype=torch.int32) for n in (sequences, 1, 1))
        self.positions = torch.zeros(sequences * blocks, 4, dtype=torch.int32)
        self.until = torch.zeros_like(self.positions)
        self.free = torch.randperm(sequences * blocks).to(torch.int32)

    def native(self, window: int = 0) -> _C.KvCache:
        native = _C.KvCache()
        native.key, native.value = self.arrays[0].data_ptr(), self.arrays[1].data_ptr()
        native.type = {torch.float32: "f32", torch.float16: "f16"}[self.arrays.dtype]
        native.blocks, native.kv_heads, native.block_size, native.head_size = self.arrays.shape[1:]
        native.block_table, (native.sequences, native.max_blocks) = self.table.data_ptr(), self.table.shape
        native.lengths, native.positions = self.lengths.data_ptr(), self.positions.data_ptr()
        native.blocks_used, native.overflow = self.used.data_ptr(), self.overflow.data_ptr()
        native.free_blocks, native.until, native.window = self.free.data_ptr(), self.until.data_ptr(), window
        return native


class Model:
    """A random one, and the tensors that it points at."""

    def __init__(self, largest_key: float = 0.0) -> None:
        g = torch.Generator().manual_seed(0)
        self.owned: list[object] = []

        def own(tensor: torch.Tensor) -> int:
            self.owned.append(tensor)
            return tensor.data_ptr()

        def linear(n: int, k: int, bias: torch.Tensor | None = None) -> _C.Linear:
            packed = quantize.pack_matryoshka(torch.randn(n, k, generator=g), 32)
            assert packed.lo is not None
            planes = (own(each) for each in (packed.hi, packed.lo, packed.scale, packed.offset))
            weight = _C.MatryoshkaWeight(*planes, n, k, 32)
            return _C.Linear(weight, 0 if bias is None else own(bias))

        self.norm = _C.Norm("rms", own(torch.ones(D)))
        self.layers = []
        for _ in range(LAYERS):
            layer = _C.Layer()
            layer.d, layer.heads, layer.kv_heads, layer.head_size, layer.ffn = D, HEADS, KV_HEADS, SIZE, FFN
            layer.attention_norm = layer.mlp_norm = self.norm
            layer.q, layer.v = linear(HEADS * SIZE, D), linear(KV_HEADS * SIZE, D)
            layer.k = linear(KV_HEADS * SIZE, D, torch.full((KV_HEADS * SIZE,), largest_key))
            layer.o, layer.up, layer.down = linear(D, HEADS * SIZE), linear(FFN, D), linear(D, FFN)
            layer.activation, layer.attention_scale = "gelu", SIZE**-0.5
            layer.q_norm = _C.Norm("rms", own(torch.rand(SIZE, generator=g) + 0.5))
            self.layers.append(layer)
        self.head, self.embedding = linear(VOCAB, D), torch.randn(VOCAB, D, generator=g).half()

    def step(self) -> _C.DecodeStep:
        return _C.DecodeStep(self.layers, self.embedding.data_ptr(), 0, self.norm, self.head)


def run(step: _C.DecodeStep, caches: list[Cache], rows: list[tuple[int, int, int]], **options: bool) -> torch.Tensor:
    """Logits of rows (id, position, sequence)."""
    logits = torch.full((len(rows) + 1, VOCAB), math.nan)
    ids, positions, sequence = (list(column) for column in zip(*rows, strict=True))
    natives = [cache.native() for cache in caches]
    assert step.run(natives, ids, positions, sequence, logits.data_ptr(), **options)
    assert logits[-1].isnan().all() and not logits[:-1].isnan().any()
    return logits[:-1]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def test_one_step_serves_any_caches_and_number_of_rows(model: Model, kernels: str) -> None:
    step = model.step()
    few, many = [Cache(2) for _ in range(LAYERS)], [Cache(64) for _ in range(LAYERS)]
    first = run(step, few, [(7, 0, 1)])
    at_once = run(step, many, [((s * 7) % VOCAB, 0, s) for s in range(64)])
    second = run(step, few, [(3, 1, 1), (9, 0, 0)])
    assert step.depth == [LAYERS] * 2 and step.bits == [8] * 2
    for s in (0, 1, 37, 63):
        alone = [Cache(1) for _ in range(LAYERS)]
        assert torch.equal(run(model.step(), alone, [((s * 7) % VOCAB, 0, 0)])[0], at_once[s])
    alone = [Cache(1) for _ in range(LAYERS)]
    assert torch.equal(run(model.step(), alone, [(7, 0, 0)]), first)
    assert torch.equal(run(model.step(), alone, [(3, 1, 0)])[0], second[0])


def test_what_a_step_notes(model: Model, kernels: str) -> None:
    rows = [(5, 0, 0), (6, 9, 1), (7, 9, 2)]
    step, plain = model.step(), run(model.step(), [Cache(3) for _ in range(LAYERS)], rows)
    assert (step.drift, step.entropy) == ([], [])
    step.set_halting(drift_threshold=0.0, relative=True, entropy_threshold=-1.0, sink_tokens=1, min_layer=2)
    step.set_amq(layer=1, threshold=0.0, full_entropy=math.log2(D), sink_tokens=0)
    assert torch.equal(run(step, [Cache(3) for _ in range(LAYERS)], rows, log=True), plain)
    drift, entropy = torch.tensor(step.drift), torch.tensor(step.entropy)
    assert drift.shape == entropy.shape == (LAYERS, 3)
    assert drift.isnan().tolist() == [[True] * 3, [False] * 3, [True] * 3]
    assert entropy.isnan().tolist() == [[True] * 3, [False] * 3, [False] * 3]
    assert (drift[1] > 0).all() and (entropy[1:] > 0).all() and (entropy[1:] <= math.log2(D)).all()
    # The second row alone halts: it is noted where it was judged, and nowhere above.
    limit = float(drift[1, 1:].mean())
    step = model.step()
    step.set_halting(drift_threshold=limit, relative=True, entropy_threshold=None, sink_tokens=1, min_layer=1)
    run(step, [Cache(3) for _ in range(LAYERS)], rows, log=True)
    noted = (~torch.tensor(step.drift).isnan()).sum(0)
    assert noted.tolist() == [min(depth, LAYERS - 1) for depth in step.depth] and step.depth[0] == LAYERS
    run(step, [Cache(3) for _ in range(LAYERS)], rows)
    assert (step.drift, step.entropy) == ([], [])


def test_a_step_tells_of_a_full_cache_and_of_numbers_beyond_fp16(model: Model, kernels: str) -> None:
    full, logits = [Cache(1, blocks=1) for _ in range(LAYERS)], torch.empty(1, VOCAB)
    natives, step = [cache.native() for cache in full], model.step()
    told = [step.run(natives, [1], [at], [0], logits.data_ptr()) for at in range(5)]
    assert told == [True] * 4 + [False]
    # What comes above an infinite key is NaN, which didn't leave the range there.
    for largest, want in ((0.0, [0, 0, 0]), (1e5, [1, 0, 0])):
        half = [Cache(1, dtype=torch.float16) for _ in range(LAYERS)]
        of_this_key = Model(largest)
        step = of_this_key.step()
        step.run([cache.native() for cache in half], [1], [0], [0], logits.data_ptr())
        assert [int(cache.overflow) for cache in half] == want


def test_a_windowed_step_forgets(model: Model, kernels: str) -> None:
    """With a window of 2, the third token sees what it would see if the first had never been."""
    first, second = [Cache(1) for _ in range(LAYERS)], [Cache(1) for _ in range(LAYERS)]
    step, logits = model.step(), torch.empty(2, VOCAB)
    for at, token in enumerate((4, 8, 2)):
        step.run([cache.native(window=2) for cache in first], [token], [at], [0], logits[0].data_ptr())
    assert [cache.until.view(-1)[int(cache.free[0]) * 4 :][:3].tolist() for cache in first] == [[2, 3, 4]] * LAYERS
    step.run([cache.native() for cache in second], [4], [0], [0], logits[1].data_ptr())
    step.run([cache.native() for cache in second], [8], [1], [0], logits[1].data_ptr())
    for cache in second:
        cache.until.view(-1)[int(cache.free[0]) * 4] = 2
    step.run([cache.native() for cache in second], [2], [2], [0], logits[1].data_ptr())
    assert torch.equal(logits[0], logits[1])


def test_bad_calls_are_named(model: Model) -> None:
    step, caches, logits = model.step(), [Cache(1).native() for _ in range(LAYERS)], torch.empty(1, VOCAB).data_ptr()
    with pytest.raises(ValueError, match="caches must be as many as layers"):
        step.run(caches[1:], [1], [0], [0], logits)
    with pytest.raises(ValueError, match="caches must not hold None"):
        step.run([None, *caches[1:]], [1], [0], [0], logits)
    with pytest.raises(ValueError, match="ids, positions and sequence must be of one length"):
        step.run(caches, [1, 2], [0], [0], logits)
    with pytest.raises(ValueError, match="logits must not be null"):
        step.run(caches, [1], [0], [0], 0)
    with pytest.raises((TypeError, RuntimeError), match=r"cast|incompatible"):
        step.run([1, 2, 3], [1], [0], [0], logits)
    with pytest.raises(ValueError, match="layers must not be empty"):
        _C.DecodeStep([], 64, 0, model.norm, model.head)
    layer = _C.Layer()
    with pytest.raises(ValueError, match="q_norm must be of kind 'rms'"):
        layer.q_norm = _C.Norm("layer", 64)
