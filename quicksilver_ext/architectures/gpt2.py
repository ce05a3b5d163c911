"""GPT-2 checkpoints: learned positions, layer norms, a fused and transposed QKV matrix, biases everywhere."""

from __future__ import annotations

import re

from ..weights.checkpoint import Checkpoint, Fields
from ..weights.model import Layer, Model, Spec
from .base import MAX_LAYERS, Family, Reader

# Hugging Face's names of activations: the tanh form of GELU has three.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
}


class GPT2(Family):
    model_type = "gpt2"
    gguf = "gpt2"
    root = "transformer."
    gguf_tensors = {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
        "attn_norm": "transformer.h.{}.ln_1",
        "attn_qkv": "transformer.h.{}.attn.c_attn",
        "attn_output": "transformer.h.{}.attn.c_proj",
        "ffn_norm": "transformer.h.{}.ln_2",
        "ffn_up": "transformer.h.{}.mlp.c_fc",
        "ffn_down": "transformer.h.{}.mlp.c_proj",
    }
    gguf_keys = {
        "n_layer": "block_count",
        "n_embd": "embedding_length",
        "n_inner": "feed_forward_length",
        "n_head": "attention.head_count",
        "n_positions": "context_length",
        "layer_norm_epsilon": "attention.layer_norm_epsilon",
    }

    def transposes(self, name: str) -> bool:
        return bool(re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name))

    def load(self, checkpoint: Checkpoint, read: Reader) -> Model:
        config = Fields(checkpoint.config, f"{checkpoint.source}, config")
        tied = read.is_tied("transformer.wte.weight", config, default=True)
        spec, eps = self.spec(config, checkpoint.source.stem, tied), config.number("layer_norm_epsilon", 1e-5)
        d, ffn = spec.hidden_size, spec.intermediate_size

        embedding = read.embedding("transformer.wte.weight", spec.vocab_size, d, tied)
        positions = read.table("transformer.wpe.weight", spec.max_positions, d)
        read.begin(spec, embedding, positions, None)
        layers = []
        for index in range(spec.num_layers):

            def layer(name: str = f"transformer.h.{index}") -> Layer:
                q, k, v = (read.conv1d(f"{name}.attn.c_attn", d, d, part, parts=3) for part in range(3))
                return Layer(
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

            layers.append(read.layer(index, layer))
        final_norm = read.norm("layer", "transformer.ln_f", d, eps)
        final_norm, head = read.end(final_norm, "transformer.wte.weight", embedding, tied)
        return Model(
            spec=spec,
            embedding=embedding,
            position_embedding=positions,
            layers=layers,
            final_norm=final_norm,
            head=head,
            rotary_cos=None,
            rotary_sin=None,
            precision=read.precision,
            group_size=read.group_size,
        )

    def spec(self, config: Fields, name: str, tied: bool) -> Spec:
        """The sizes, from Hugging Face's keys."""
        d, heads = config.integer("n_embd"), config.integer("n_head")
        if d % heads:
            raise config.error("n_head", f"a divisor of n_embd, {d}")
        if config.flag("add_cross_attention", False):
            raise config.error("add_cross_attention", "false: this variant of GPT-2 isn't supported")
        activation = config.choice("activation_function", tuple(ACTIVATIONS), "gelu_new")
        starts = config.token_ids("bos_token_id")
        return Spec(
            family=self.model_type,
            name=name,
            hidden_size=d,
            num_layers=config.integer("n_layer", maximum=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=heads,
            head_size=d // heads,
            intermediate_size=config.integer("n_inner", 4 * d),
            vocab_size=config.integer("vocab_size"),
            max_positions=config.integer("n_positions"),
            activation=ACTIVATIONS[activation],
            attention_scale=(d // heads) ** -0.5 if config.flag("scale_attn_weights", True) else 1.0,
            scale_by_layer=config.flag("scale_attn_by_inverse_layer_idx", False),
            tied_head=tied,
            bos_token_id=starts[0] if starts else None,
            eos_token_ids=config.token_ids("eos_token_id"),
            pad_token_id=config.optional_token("pad_token_id"),
        )
