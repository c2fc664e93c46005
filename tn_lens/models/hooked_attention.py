"""HookedTransformer's attention where single positions stand side by side behind one prefix.

For the length of a pass some methods of TransformerLens' modules are replaced, so that its own forward runs, with every hook
point, and does only what differs between the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.utilities.activation_functions import apply_softcap

Replacement = tuple[nn.Module, str, Callable[..., Any]]
"""A module, the name of its method, and what stands in for it."""


@contextmanager
def replaced(replacements: Iterable[Replacement]) -> Iterator[None]:
    """Methods of single modules replaced inside a `with`, and put back on leaving."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module, name, method in replacements:
            before.append((vars(module), name, vars(module).get(name)))
            vars(module)[name] = method
        yield
    finally:
        for own, name, method in reversed(before):
            if method is None:
                del own[name]
            else:
                own[name] = method


def norms_once(blocks: Iterable[Any]) -> Iterator[Replacement]:
    """TransformerLens normalises the same stream for queries, for keys and for values; once is enough."""

    def once(real: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        last: list[Tensor] = []

        def forward(stream: Tensor) -> Tensor:
            if not last or last[0] is not stream:
                last[:] = [stream, real(stream)]
            return last[1]

        return forward

    for block in blocks:
        yield block.ln1, "forward", once(block.ln1.forward)


def keys_of(near: Bool[Tensor, "prompt prefix"]) -> Bool[Tensor, "prompt 1 1 key"] | None:
    """Which keys rows see, of what their position sees of the prefix: that and each itself; None for all."""
    return None if near.all() else torch.cat([near, near.new_ones(len(near), 1)], dim=1)[:, None, None]


class SharedAttention:
    """The attention of one layer: what the prompts' last queries met, and rows that meet the same and each itself.

    Every row stands at position T - 1 of its prompt. Its keys and values of the earlier positions are those of the prompt,
    already rotated; of the other rows it sees nothing, so nothing of them is computed.

    Args:
        attention: TransformerLens' module.
        allowed: which keys rows see, the own one last; None for all.
    """

    keys: Float[Tensor, "prompt key_head d_head prefix"]
    values: Float[Tensor, "prompt key_head prefix d_head"]

    def __init__(self, attention: Any, allowed: Bool[Tensor, "prompt 1 1 key"] | None) -> None:
        self.attention, self.allowed = attention, allowed
        self.turn: tuple[Tensor, Tensor] | None = None

    def noting(self) -> Iterator[Replacement]:
        """While the prompts run: keep the keys and values that their queries met."""

        def calculate_attention_scores(q: Tensor, k: Tensor) -> Tensor:
            self.keys = k[:, :-1].permute(0, 2, 3, 1).contiguous()
            return of_class.calculate_attention_scores(self.attention, q, k)

        def calculate_z_scores(v: Tensor, pattern: Tensor) -> Tensor:
            self.values = v[:, :-1].transpose(1, 2).contiguous()
            return of_class.calculate_z_scores(self.attention, v, pattern)

        of_class = type(self.attention)
        yield self.attention, "calculate_attention_scores", calculate_attention_scores
        yield self.attention, "calculate_z_scores", calculate_z_scores

    def take_place(self, position: Int[Tensor, " prompt"]) -> None:
        """Where all rows of a prompt stand."""
        if self.attention.cfg.positional_embedding_type == "rotary":
            angles = self.attention.rotary_cos, self.attention.rotary_sin
            self.turn = angles[0][position][:, None, None], angles[1][position][:, None, None]

    def standing_in(self) -> Iterator[Replacement]:
        """While rows run."""
        yield self.attention, "apply_rotary", self._rotate
        yield self.attention, "calculate_attention_scores", self._scores
        yield self.attention, "apply_causal_mask", self._mask
        yield self.attention, "calculate_z_scores", self._z

    def _rotate(
        self, x: Float[Tensor, "prompt row head d_head"], *_: object, **__: object
    ) -> Float[Tensor, "prompt row head d_head"]:
        assert self.turn is not None
        cos, sin = self.turn
        turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
        if self.attention.cfg.rotary_adjacent_pairs:
            first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
            across = torch.stack([-second, first], dim=-1).flatten(-2)
        else:
            first, second = turned.chunk(2, dim=-1)
            across = torch.cat([-second, first], dim=-1)
        turned = turned * cos + across * sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    def _scores(
        self, q: Float[Tensor, "prompt row head d_head"], k: Float[Tensor, "prompt row key_head d_head"]
    ) -> Float[Tensor, "prompt head row key"]:
        grouped = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # prompt, key head, head of it, row, d_head
        before = grouped.flatten(2, 3) @ self.keys
        wide = torch.promote_types(q.dtype, torch.float32)  # in which a matrix product adds up, too
        itself = (grouped.to(wide) * k.to(wide).transpose(1, 2)[:, :, None]).sum(-1, keepdim=True).to(q.dtype)
        scores = torch.cat([before.reshape(*itself.shape[:-1], -1), itself], dim=-1).flatten(1, 2)
        return apply_softcap(scores / self.attention.attn_scale, self.attention.cfg.attn_scores_soft_cap)

    def _mask(
        self, scores: Float[Tensor, "prompt head row key"], *_: object, **__: object
    ) -> Float[Tensor, "prompt head row key"]:
        return scores if self.allowed is None else torch.where(self.allowed, scores, self.attention.IGNORE)

    def _z(
        self, v: Float[Tensor, "prompt row key_head d_head"], pattern: Float[Tensor, "prompt head row key"]
    ) -> Float[Tensor, "prompt row head d_head"]:
        grouped = pattern.unflatten(1, (v.shape[2], -1))
        before, itself = grouped.split([pattern.shape[-1] - 1, 1], dim=-1)
        z = (before.flatten(2, 3) @ self.values).unflatten(2, grouped.shape[2:4])
        z = z + itself * v.transpose(1, 2)[:, :, None]
        return self.attention.hook_z(z.permute(0, 3, 1, 2, 4).flatten(2, 3))
