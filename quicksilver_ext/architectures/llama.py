"""Llama checkpoints: rotary embeddings, RMS norms, grouped-query heads, a gated MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..weights.checkpoint import Checkpoint, Fields
from ..weights.model import Layer, Linear, Model, Spec
from . import rotary

if TYPE_CHECKING:
    from .loading import Reader

MAX_POSITIONS = 1 << 22  # the longest context that a Llama was published with; the rotary tables have a row for each


def load(checkpoint: Checkpoint, read: Reader) -> Model:
    """Reads the whole model. Raises CheckpointError."""
    config = Fields(checkpoint.config, f"{checkpoint.source}, config")
    spec, eps = read_spec(config, checkpoint.source.stem), config.number("rms_norm_eps", 1e-6)
    attention_bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    rope = rotary.from_config(config, spec.head_size, spec.max_positions)
    shapes, d = spec.linear_shapes(), spec.hidden_size

    embedding = read.embedding("model.embed_tokens.weight", spec.vocab_size, d)
    head = read.head("model.embed_tokens.weight" if spec.tied_head else "lm_head.weight", embedding, spec.tied_head)
    layers = []
    for index in range(spec.num_layers):
        name = f"model.layers.{index}"

        def attention(part: str, name: str = name) -> Linear:
            return read.linear(f"{name}.self_attn.{part}_proj", *shapes[part], attention_bias)

        def mlp(part: str, name: str = name) -> Linear:
            return read.linear(f"{name}.mlp.{part}_proj", *shapes[part], mlp_bias)

        layers.append(
            Layer(
                attention_norm=read.norm("rms", f"{name}.input_layernorm", d, eps),
                q=attention("q"),
                k=attention("k"),
                v=attention("v"),
                o=attention("o"),
                mlp_norm=read.norm("rms", f"{name}.post_attention_layernorm", d, eps),
                gate=mlp("gate"),
                up=mlp("up"),
                down=mlp("down"),
            )
        )
    cosines, sines = rope.tables(spec.max_positions, read.device)
    return Model(
        spec=spec,
        embedding=embedding,
        position_embedding=None,
        layers=layers,
        final_norm=read.norm("rms", "model.norm", d, eps),
        head=head,
        rotary_cos=cosines,
        rotary_sin=sines,
        precision=read.precision,
        group_size=read.group_size,
    )


def read_spec(config: Fields, name: str) -> Spec:
    """The sizes, from Hugging Face's keys."""
    d, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if config.values.get("head_dim") is None and d % heads:
        raise config.error("num_attention_heads", f"a divisor of hidden_size, {d}")
    config.choice("hidden_act", ("silu", "swish"), "silu")
    starts = config.token_ids("bos_token_id")
    head_size = config.integer("head_dim", max(1, d // heads), maximum=1 << 16)
    return Spec(
        family="llama",
        name=name,
        hidden_size=d,
        num_layers=config.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("max_position_embeddings", 2048, maximum=MAX_POSITIONS),
        activation="silu_gated",
        attention_scale=head_size**-0.5,
        tied_head=config.flag("tie_word_embeddings", False),
        bos_token_id=starts[0] if starts else None,
        eos_token_ids=config.token_ids("eos_token_id"),
    )
