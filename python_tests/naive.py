"""An oracle for the decoder: one token at a time, lists instead of caches, dense weights, no cleverness.

Follows the definitions in docs/mechanisms.md word by word, in fp32 and plain PyTorch, for halting with every KV policy,
resuming, and fusion in scope ``cache``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from models import INNER

from quicksilver_ext.config import QuickSilverConfig
from quicksilver_ext.weights.model import Layer, Model, Norm

FOREVER = 10**9


@dataclass
class Entry:
    key: torch.Tensor  # [kv_heads, D] before the rotary embedding
    value: torch.Tensor
    position: int
    visible: int
    until: int = FOREVER
    group: int = -1
    weight: float = 1.0


@dataclass
class Token:
    position: int
    states: list[torch.Tensor] = field(default_factory=list)  # input of each layer, as far as it ran
    depth: int = 0
    halted_at: int | None = None


class NaiveDecoder:
    """Decodes one sequence; ``feed`` returns the logits of the token it was given."""

    def __init__(self, model: Model, config: QuickSilverConfig) -> None:
        self.model, self.config, self.spec = model, config, model.spec
        self.entries: list[list[Entry]] = [[] for _ in range(self.spec.num_layers)]
        self.tokens: list[Token] = []
        self.group_members: list[torch.Tensor] = []
        self.group = 0
        self.fused = 0

    def _norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        if norm.kind == "rms":
            return x / (x.square().mean() + norm.eps).sqrt() * norm.weight
        y = (x - x.mean()) / ((x - x.mean()).square().mean() + norm.eps).sqrt()
        return y * norm.weight + norm.bias

    @staticmethod
    def _linear(x: torch.Tensor, linear) -> torch.Tensor:
        y = linear.weight.float() @ x
        return y if linear.bias is None else y + linear.bias

    def _turn(self, x: torch.Tensor, position: int) -> torch.Tensor:
        if self.model.rotary_cos is None:
            return x
        half = x.shape[-1] // 2
        c, s = self.model.rotary_cos[position], self.model.rotary_sin[position]
        a, b = x[:, :half], x[:, half:]
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    def _key_value(self, layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self._norm(x, layer.attention_norm)
        shape = (self.spec.num_kv_heads, self.spec.head_size)
        key, value = self._linear(normed, layer.k).view(shape), self._linear(normed, layer.v).view(shape)
        return self._head_norm(key, layer.k_norm), value

    def _head_norm(self, heads: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        return heads if norm is None else torch.stack([self._norm(head, norm) for head in heads])

    def _leave(self, index: int, x: torch.Tensor, token: Token, group: int, zero: bool = False) -> None:
        key, value = self._key_value(self.model.layers[index], x)
        entries, at = self.entries[index], token.position
        if zero:
            key, value = torch.zeros_like(key), torch.zeros_like(value)
        before = entries[-1] if entries else None
        entries.append(Entry(key, value, at, at, group=group))
        fusion = self.config.fusion
        if fusion is None or fusion.scope != "cache" or index < fusion.layer or group < 0:
            return
        own = entries[-1]
        if before is not None and before.group == group:
            total = before.weight + own.weight
            merged = [
                (before.weight * a + own.weight * b) / total for a, b in ((before.key, key), (before.value, value))
            ]
            entries.append(Entry(*merged, position=at, visible=at + 1, group=group, weight=total))
            before.until = own.until = at + 1

    def _run_layer(self, index: int, x: torch.Tensor, position: int) -> torch.Tensor:
        layer, spec = self.model.layers[index], self.spec
        query = self._linear(self._norm(x, layer.attention_norm), layer.q).view(spec.num_heads, spec.head_size)
        query = self._turn(self._head_norm(query, layer.q_norm), position)
        window = (spec.windows[index] if spec.windows else None) or FOREVER
        seen = [e for e in self.entries[index] if e.visible <= position < min(e.until, e.position + window)]
        repeat = spec.num_heads // spec.num_kv_heads
        keys = torch.stack([self._turn(e.key, e.position) for e in seen]).repeat_interleave(repeat, 1)
        values = torch.stack([e.value for e in seen]).repeat_interleave(repeat, 1)
        scale = spec.attention_scale / (index + 1 if spec.scale_by_layer else 1)
        p = torch.softmax(torch.einsum("hd,ehd->he", query, keys) * scale, -1)
        x = x + self._linear(torch.einsum("he,ehd->hd", p, values).flatten(), layer.o)
        normed = self._norm(x, layer.mlp_norm)
        up = self._linear(normed, layer.up)
        inner = INNER[spec.activation](up)
        if layer.gate is not None:
            inner = F.silu(self._linear(normed, layer.gate)) * inner
        return x + self._linear(inner, layer.down)

    def _halts(self, token: Token, before: torch.Tensor, after: torch.Tensor, done: int) -> bool:
        halting = self.config.halting
        if halting is None or token.halted_at is not None or token.position < halting.sink_tokens:
            return False
        if not halting.min_layer <= done < (halting.resume_layer or self.spec.num_layers):
            return False
        drift = (after - before).norm()
        if halting.drift_norm == "relative":
            drift = drift / before.norm()
        if not drift < halting.drift_threshold:
            return False
        if halting.entropy_threshold is None:
            return True
        if halting.entropy_source == "head":
            logits = self._linear(self._norm(after, self.model.final_norm), self.model.head)
        else:
            logits = after
        p = torch.softmax(logits, -1)
        return bool(-(p * p.clamp_min(1e-45).log2()).sum() < halting.entropy_threshold)

    def _number(self, x: torch.Tensor) -> int:
        """The fusion group of a token whose state at the fusion layer is x: its neighbour's, or a new one."""
        fusion = self.config.fusion
        assert fusion is not None
        if self.group_members and self.joinable:
            last = self.group_members[-1]
            distance = (x - last).norm() / (last.norm() if fusion.norm == "relative" else 1.0)
            if distance < fusion.threshold and len(self.group_members) < fusion.max_group:
                self.group_members.append(x)
                self.fused += 1
                return self.group
        self.group += 1
        self.group_members = [x]
        return self.group

    def feed(self, token_id: int) -> torch.Tensor:
        config, layers = self.config, self.spec.num_layers
        halting, fusion = config.halting, config.fusion
        token = Token(len(self.tokens))
        x = self.model.embedding[token_id].float()
        if self.model.position_embedding is not None:
            x = x + self.model.position_embedding[token.position].float()
        self.tokens.append(token)
        group, reached, running, final = -1, False, True, None
        for index in range(layers):
            if halting is not None and index == halting.resume_layer:
                running = True
            if not running:
                if halting.kv_policy == "zero":
                    self._leave(index, x, token, group, zero=True)
                elif halting.kv_policy == "propagate":
                    self._leave(index, x, token, group)
                elif halting.kv_policy == "recompute":  # exact keys and values, whoever needs them
                    self._leave(index, x, token, group)
                    x = self._run_layer(index, x, token.position)
                continue
            if fusion is not None and index == fusion.layer:
                group, reached = self._number(x), True
            self._leave(index, x, token, group)
            before, x = x, self._run_layer(index, x, token.position)
            token.depth += 1
            if self._halts(token, before, x, index + 1):
                token.halted_at, running, final = index + 1, False, x
        self.joinable = reached  # adjacency is between neighbours that both came to the fusion layer
        if running or final is None:
            final = x
        return self._linear(self._norm(final, self.model.final_norm), self.model.head)
