"""A decoder layer in plain PyTorch, of whatever family: what weights are fitted with.

The engine has its own ways to run a model; this one takes batches of whole texts and lets its caller see and replace
each product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights.model import Layer, Linear, Norm, Spec

# How a layer multiplies: the matrix's name in `Layer`, the rows fp32 [B, T, K], the matrix.
Multiply = Callable[[str, Tensor, Linear], Tensor]
UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def plain(name: str, x: Tensor, linear: Linear) -> Tensor:
    """x W^T + bias."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return F.linear(x, weight.float(), linear.bias)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """RMS or layer norm over the last dimension."""
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x [..., D] by cosine, sine [..., D / 2], which are broadcast; pairs are
    (i, i + D / 2)."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


def embed(embedding: Tensor, positions: Tensor | None, ids: Tensor) -> Tensor:
    """fp32 [B, T, d] of ids [B, T], which begin at position 0."""
    hidden = embedding[ids].float()
    return hidden if positions is None else hidden + positions[: ids.shape[1]]


def run_layer(
    spec: Spec,
    index: int,
    layer: Layer,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    multiply: Multiply = plain,
) -> Tensor:
    """The layer's output for whole texts hidden fp32 [B, T, d] from position 0 on. ``rotary``: cosines and sines
    [positions, head_size / 2]; ``multiply`` makes its products."""
    batch, length, _ = hidden.shape
    normed = normalize(hidden, layer.attention_norm)

    def heads(name: str, count: int, norm: Norm | None) -> Tensor:
        x = multiply(name, normed, getattr(layer, name)).view(batch, length, count, spec.head_size)
        x = (x if norm is None else normalize(x, norm)).transpose(1, 2)
        return x if rotary is None or name == "v" else rotate(x, rotary[0][:length], rotary[1][:length])

    query, key, value = (
        heads("q", spec.num_heads, layer.q_norm),
        heads("k", spec.num_kv_heads, layer.k_norm),
        heads("v", spec.num_kv_heads, None),
    )
    window = spec.window_of(index)
    mask = None
    if window is not None and window < length:
        at = torch.arange(length, dtype=torch.int64, device=hidden.device)
        apart = at[:, None] - at
        mask = (apart >= 0) & (apart < window)
    mixed = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=spec.attention_scale_of(index),
        enable_gqa=spec.num_heads != spec.num_kv_heads,
    )
    hidden = hidden + multiply("o", mixed.transpose(1, 2).flatten(2), layer.o)

    normed = normalize(hidden, layer.mlp_norm)
    inner = multiply("up", normed, layer.up)
    if layer.gate is None:
        inner = UNGATED[spec.activation](inner)
    else:
        inner = F.silu(multiply("gate", normed, layer.gate)) * inner
    return hidden + multiply("down", inner, layer.down)
