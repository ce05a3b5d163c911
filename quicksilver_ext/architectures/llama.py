"""Llama checkpoints: rotary embeddings, RMS norms, grouped-query heads, a gated MLP. Other families vary this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ..weights.checkpoint import Checkpoint, Fields
from ..weights.gguf import GgufFile
from ..weights.model import Layer, Linear, Model, Norm, Spec
from . import rotary
from .base import MAX_LAYERS, Family, Reader

MAX_POSITIONS = 1 << 22  # the longest context that a Llama was published with; the rotary tables have a row for each


class Llama(Family):
    model_type = "llama"
    gguf: ClassVar[str | None] = "llama"
    root = "model."
    gguf_tensors = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "model.layers.{}.input_layernorm",
        "attn_q": "model.layers.{}.self_attn.q_proj",
        "attn_k": "model.layers.{}.self_attn.k_proj",
        "attn_v": "model.layers.{}.self_attn.v_proj",
        "attn_output": "model.layers.{}.self_attn.o_proj",
        "ffn_norm": "model.layers.{}.post_attention_layernorm",
        "ffn_gate": "model.layers.{}.mlp.gate_proj",
        "ffn_up": "model.layers.{}.mlp.up_proj",
        "ffn_down": "model.layers.{}.mlp.down_proj",
    }
    gguf_keys = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }
    gguf_interleaved = {".q_proj.": "num_attention_heads", ".k_proj.": "num_key_value_heads"}

    # --- what other families vary -------------------------------------------------------------------------------------

    def kv_heads(self, config: Fields, heads: int) -> int:
        return config.integer("num_key_value_heads", heads)

    def head_size(self, config: Fields, d: int, heads: int) -> int:
        if config.values.get("head_dim") is None and d % heads:
            raise config.error("num_attention_heads", f"a divisor of hidden_size, {d}")
        return config.integer("head_dim", max(1, d // heads), maximum=1 << 16)

    def biases(self, config: Fields) -> set[str]:
        """The matrices of a layer that have biases."""
        attention = {"q", "k", "v", "o"} if config.flag("attention_bias", False) else set()
        return attention | ({"gate", "up", "down"} if config.flag("mlp_bias", False) else set())

    def windows(self, config: Fields, layers: int) -> list[int | None] | None:
        """How many positions a query of each layer sees; None: all of them, in all layers."""
        return None

    def head_norms(self, read: Reader, name: str, size: int, eps: float) -> dict[str, Norm]:
        """Norms of each head's queries and keys, by their fields of a layer."""
        return {}

    # ------------------------------------------------------------------------------------------------------------------

    def spec(self, config: Fields, name: str, tied: bool) -> Spec:
        """The sizes, from Hugging Face's keys."""
        d, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
        kv_heads = self.kv_heads(config, heads)
        if heads % kv_heads:
            raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
        config.choice("hidden_act", ("silu", "swish"), "silu")
        starts = config.token_ids("bos_token_id")
        head_size, layers = self.head_size(config, d, heads), config.integer("num_hidden_layers", maximum=MAX_LAYERS)
        return Spec(
            family=self.model_type,
            name=name,
            hidden_size=d,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            intermediate_size=config.integer("intermediate_size"),
            vocab_size=config.integer("vocab_size"),
            max_positions=config.integer("max_position_embeddings", 2048, maximum=MAX_POSITIONS),
            activation="silu_gated",
            attention_scale=head_size**-0.5,
            tied_head=tied,
            bos_token_id=starts[0] if starts else None,
            eos_token_ids=config.token_ids("eos_token_id"),
            pad_token_id=config.optional_token("pad_token_id"),
            windows=self.windows(config, layers),
        )

    def load(self, checkpoint: Checkpoint, read: Reader) -> Model:
        config = Fields(checkpoint.config, f"{checkpoint.source}, config")
        tied = read.is_tied("model.embed_tokens.weight", config, default=False)
        spec, eps = self.spec(config, checkpoint.source.stem, tied), config.number("rms_norm_eps", 1e-6)
        biases = self.biases(config)
        rope = rotary.from_config(config, spec.head_size, spec.max_positions)
        shapes, d = spec.linear_shapes(), spec.hidden_size

        embedding = read.embedding("model.embed_tokens.weight", spec.vocab_size, d, tied)
        tables = rope.tables(spec.max_positions, read.device)
        read.begin(spec, embedding, None, tables)
        layers = []
        for index in range(spec.num_layers):
            name = f"model.layers.{index}"

            def linear(part: str, name: str = name) -> Linear:
                block = "self_attn" if part in ("q", "k", "v", "o") else "mlp"
                return read.linear(f"{name}.{block}.{part}_proj", *shapes[part], part in biases)

            def layer(linear: Callable[[str], Linear] = linear, name: str = name) -> Layer:
                return Layer(
                    attention_norm=read.norm("rms", f"{name}.input_layernorm", d, eps),
                    q=linear("q"),
                    k=linear("k"),
                    v=linear("v"),
                    o=linear("o"),
                    mlp_norm=read.norm("rms", f"{name}.post_attention_layernorm", d, eps),
                    gate=linear("gate"),
                    up=linear("up"),
                    down=linear("down"),
                    **self.head_norms(read, name, spec.head_size, eps),
                )

            layers.append(read.layer(index, layer))
        final_norm = read.norm("rms", "model.norm", d, eps)
        final_norm, head = read.end(final_norm, "model.embed_tokens.weight", embedding, tied)
        return Model(
            spec=spec,
            embedding=embedding,
            position_embedding=None,
            layers=layers,
            final_norm=final_norm,
            head=head,
            rotary_cos=tables[0],
            rotary_sin=tables[1],
            precision=read.precision,
            group_size=read.group_size,
        )

    # --- GGUF ---------------------------------------------------------------------------------------------------------

    def gguf_config(self, file: GgufFile, names: Mapping[str, str]) -> dict[str, Any]:
        metadata, own = file.metadata, self.gguf
        if metadata.get(f"{own}.expert_count"):
            raise ValueError("is a mixture of experts; only dense models can be read")
        window = metadata.get(f"{own}.attention.sliding_window")
        return {
            "num_key_value_heads": metadata.get(f"{own}.attention.head_count_kv"),
            "head_dim": metadata.get(f"{own}.attention.key_length"),
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in names,
            # Mistral's files come as Llama's.
            **({"model_type": "mistral", "sliding_window": window} if window and own == "llama" else {}),
            "rope_parameters": self._gguf_rope(file),
        }

    def _gguf_rope(self, file: GgufFile) -> dict[str, Any]:
        metadata, own = file.metadata, self.gguf
        scaling = {
            "rope_type": metadata.get(f"{own}.rope.scaling.type", "none"),
            "factor": metadata.get(f"{own}.rope.scaling.factor", metadata.get(f"{own}.rope.scale_linear")),
            "original_max_position_embeddings": metadata.get(f"{own}.rope.scaling.original_context_length"),
        }
        if scaling["rope_type"] == "none":
            scaling["rope_type"] = "linear" if scaling["factor"] else "default"
        # Llama 3's scaling and LongRoPE are stored as what they come to: a divisor for each frequency.
        for key, name in {
            "frequency_factors": "rope_freqs",
            "short_factor": "rope_factors_short",
            "long_factor": "rope_factors_long",
        }.items():
            if f"{name}.weight" in file.tensors:
                scaling[key] = file.read(f"{name}.weight").flatten().tolist()
        if "long_factor" in scaling:
            scaling["rope_type"] = "longrope"
            scaling["attention_factor"] = metadata.get(f"{own}.rope.scaling.attn_factor")
        return {
            "rope_theta": metadata.get(f"{own}.rope.freq_base", 10000.0),
            "rotary_dim": metadata.get(f"{own}.rope.dimension_count"),
            **{key: value for key, value in scaling.items() if value is not None},
        }
