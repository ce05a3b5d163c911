"""GPT-2 checkpoints: learned positions, layer norms, a fused and transposed QKV matrix, biases everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..weights.checkpoint import Checkpoint, Fields
from ..weights.model import Layer, Model, Spec

if TYPE_CHECKING:
    from .loading import Reader

GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of one function


def load(checkpoint: Checkpoint, read: Reader) -> Model:
    """Reads the whole model. Raises CheckpointError."""
    config = Fields(checkpoint.config, f"{checkpoint.source}, config")
    spec, eps = read_spec(config, checkpoint.source.stem), config.number("layer_norm_epsilon", 1e-5)
    d, ffn = spec.hidden_size, spec.intermediate_size
    # The files of the bare model, without its head, leave this out.
    root = "transformer." if "transformer.wte.weight" in checkpoint.names() else ""

    embedding = read.embedding(f"{root}wte.weight", spec.vocab_size, d)
    head = read.head(f"{root}wte.weight" if spec.tied_head else "lm_head.weight", embedding, spec.tied_head)
    positions = read.table(f"{root}wpe.weight", spec.max_positions, d)
    layers = []
    for index in range(spec.num_layers):
        name = f"{root}h.{index}"
        q, k, v = (read.conv1d(f"{name}.attn.c_attn", d, d, part, parts=3) for part in range(3))
        layers.append(
            Layer(
                attention_norm=read.norm("layer", f"{name}.ln_1", d, eps),
                q=q,
                k=k,
                v=v,
                o=read.conv1d(f"{name}.attn.c_proj", d, d),
                mlp_norm=read.norm("layer", f"{name}.ln_2", d, eps),
                gate=None,
                up=read.conv1d(f"{name}.mlp.c_fc", ffn, d),
                down=read.conv1d(f"{name}.mlp.c_proj", d, ffn),
            )
        )
    return Model(
        spec=spec,
        embedding=embedding,
        position_embedding=positions,
        layers=layers,
        final_norm=read.norm("layer", f"{root}ln_f", d, eps),
        head=head,
        rotary_cos=None,
        rotary_sin=None,
        precision=read.precision,
        group_size=read.group_size,
    )


def read_spec(config: Fields, name: str) -> Spec:
    """The sizes, from Hugging Face's keys."""
    d, heads = config.integer("n_embd"), config.integer("n_head")
    if d % heads:
        raise config.error("n_head", f"a divisor of n_embd, {d}")
    config.choice("activation_function", GELU_TANH, "gelu_new")
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.flag(key, False):
            raise config.error(key, "false: this variant of GPT-2 isn't supported")
    starts = config.token_ids("bos_token_id")
    return Spec(
        family="gpt2",
        name=name,
        hidden_size=d,
        num_layers=config.integer("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_size=d // heads,
        intermediate_size=config.integer("n_inner", 4 * d),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("n_positions"),
        activation="gelu_tanh",
        attention_scale=(d // heads) ** -0.5 if config.flag("scale_attn_weights", True) else 1.0,
        tied_head=config.flag("tie_word_embeddings", True),
        bos_token_id=starts[0] if starts else None,
        eos_token_ids=config.token_ids("eos_token_id"),
    )
