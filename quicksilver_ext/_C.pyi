"""Types of the compiled module. Arguments called *_ptr, and int attributes that stand for arrays, are addresses
(Tensor.data_ptr()); 0 is null. Nothing is checked there: quicksilver_ext.ops is the checked way in."""

from typing import Any, Literal

NormKind = Literal["rms", "layer"]
Activation = Literal["silu_gated", "gelu_tanh", "gelu", "relu"]
KvType = Literal["f32", "f16", "bf16", "i8"]

def isa() -> str: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def start_threads(count: int) -> None: ...

class Counters:
    gemm_macs: int
    attention_pairs: int
    weight_bytes_read: int
    kv_bytes_read: int
    attention_nanoseconds: int
    step_nanoseconds: int
    step_attention_nanoseconds: int

def counters() -> Counters: ...
def reset_counters() -> None: ...
def read_ceiling(address: int, bytes: int) -> float: ...
def int8_ceiling() -> float: ...

class MatryoshkaWeight:
    n: int
    k: int
    group: int
    def __init__(self, hi: int, lo: int, scale: int, offset: int, n: int, k: int, group: int) -> None: ...

class Linear:
    weight: MatryoshkaWeight
    def __init__(self, weight: MatryoshkaWeight, bias: int = 0) -> None: ...

class Norm:
    def __init__(self, kind: NormKind | str, weight: int, bias: int = 0, eps: float = 1e-5) -> None: ...

class Layer:
    d: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    activation: str
    attention_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: Norm  # of kind "rms", over each head before the rotary embedding; weight 0: none
    k_norm: Norm
    mlp_norm: Norm
    gate: Linear
    up: Linear
    down: Linear
    cosine: int
    sine: int
    attention_scale: float

class Rows:
    hidden: int
    rows: int
    active: int
    count: int
    positions: int
    sequence: int
    bits: int
    slots: int

class KvCache:
    key: int
    value: int
    key_scale: int
    value_scale: int
    type: str
    blocks: int
    block_size: int
    kv_heads: int
    head_size: int
    block_table: int
    max_blocks: int
    sequences: int
    lengths: int
    positions: int
    until: int
    blocks_used: int
    free_blocks: int  # int32 [blocks]: the next block is free_blocks[blocks_used]; 0: block i is i
    window: int  # > 0: a new entry is seen by queries at its position and the next window - 1; wants `until`
    overflow: int  # int32 [1]: becomes 1 where a finite key or value left fp16's range in an f16 cache; or 0

class Workspace:
    @property
    def previous(self) -> int: ...
    @property
    def q(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def v(self) -> int: ...
    @property
    def attention(self) -> int: ...
    @property
    def gate(self) -> int: ...
    @property
    def up(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def quantized(self) -> int: ...
    def reserve(self, layer: Layer, count: int) -> None: ...

def attention_input(layer: Layer, rows: Rows, cache: KvCache, work: Workspace) -> bool: ...
def write_kv(layer: Layer, rows: Rows, cache: KvCache, work: Workspace) -> bool: ...
def attention(layer: Layer, rows: Rows, cache: KvCache, work: Workspace, log_sum_exp: int = 0) -> None: ...
def attention_output(layer: Layer, rows: Rows, work: Workspace) -> None: ...
def mlp_input(layer: Layer, rows: Rows, work: Workspace) -> None: ...
def mlp_output(layer: Layer, rows: Rows, work: Workspace) -> None: ...

class DecodeStep:
    """One new token for each of any number of sequences, in one call: for a model, with whatever caches it is given."""

    def __init__(
        self,
        layers: list[Layer],
        embedding: int,
        position_embedding: int,
        final_norm: Norm,
        head: Linear,
    ) -> None: ...
    def set_halting(
        self,
        drift_threshold: float,
        relative: bool,
        entropy_threshold: float | None,
        sink_tokens: int,
        min_layer: int,
    ) -> None: ...
    def set_amq(self, layer: int, threshold: float, full_entropy: float, sink_tokens: int) -> None: ...
    def run(
        self,
        caches: list[KvCache],
        ids: list[int],
        positions: list[int],
        sequence: list[int],
        logits: int,
        log: bool = False,
    ) -> bool:
        """Whether there was room in the caches, one for each layer. ``logits``: fp32 [n, V], written."""
    # Of the last run: layers that each row ran; its bits at the end.
    @property
    def depth(self) -> list[int]: ...
    @property
    def bits(self) -> list[int]: ...
    # With log, [layers][n], else empty; NaN where nothing was measured. drift[l]: over layer l, of the rows that were
    # judged there. entropy[l]: the latent one, in bits, of the state that comes into layer l, where AMQ (at its layer)
    # or halting (after the layer below) asked for it.
    @property
    def drift(self) -> list[list[float]]: ...
    @property
    def entropy(self) -> list[list[float]]: ...

def run_layers(layers: list[Layer], caches: list[KvCache], rows: Rows, work: Workspace) -> int: ...
def lm_head(
    norm: Norm, head: Linear, rows: Rows, d: int, logits_ptr: int, logits_stride: int, work: Workspace
) -> None: ...
def argmax(values_ptr: int, n: int) -> int: ...
def sample(values_ptr: int, n: int, temperature: float, top_k: int, top_p: float, point: float) -> int: ...
def halt(
    hidden_ptr: int,
    stride: int,
    previous_ptr: int,
    previous_stride: int,
    d: int,
    active_ptr: int,
    count: int,
    entropy_ptr: int,
    positions_ptr: int,
    overrides_ptr: int,
    drift_threshold: float,
    entropy_threshold: float,
    relative: bool,
    sink_tokens: int,
    drift_ptr: int,
    halted_ptr: int,
    next_active_ptr: int,
) -> int: ...
def softmax_entropy(values_ptr: int, stride: int, index_ptr: int, count: int, d: int, out_ptr: int) -> None: ...

# Submodules, each where it was built (hasattr tells): the stages on CUDA and on the emulator, with one interface (Work,
# Halting, attention_input, write_kv, attention, attention_output, mlp_input, mlp_output, lm_head), and the emulator's
# own settings, counts and matrix instructions.
cuda: Any
emulated: Any
emulator: Any
