"""TransformerBridge: Hugging Face's model with TransformerLens' hook points. No method of the model is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from tn_lens.core.errors import BadInput
from tn_lens.models.backend import Backend, Hooks, MLPOutputs, Prefixes, Siblings, TokenRows
from tn_lens.models.bridge_cache import frozen_cache
from tn_lens.models.bridge_joining import join_rows
from tn_lens.models.bridge_weights import base_rows, weight_rows
from tn_lens.models.comparison import probe_tokens, reject_bidirectional
from tn_lens.models.tensors import (
    Packed,
    Replacement,
    at_least_float32,
    block_inputs,
    causal_mask,
    reject_rotated,
    replace_methods,
    rows_of,
    sibling_mask,
)
from tn_lens.models.unembedding import wide_linear
from tn_lens.neurons.neuron import Neuron

SHAREABLE_LAYERS = {"full_attention", "sliding_attention"}
"""The kinds of layers, by Hugging Face's names, whose cached keys and values do not change in later passes."""

TOLERANCE = 0.02
"""Tolerance of sibling rows, relative to the largest logit. Rounding errors of bfloat16 are smaller."""


class Bridge(Backend):
    """Backend of a TransformerBridge."""

    kind = "bridge"
    model: TransformerBridge

    def __init__(self, model: TransformerBridge) -> None:
        super().__init__(model)
        if self.is_half and model not in _NORM_IS_LAST:
            _NORM_IS_LAST[model] = _norm_is_last(model)  # here, since no hooks have been added yet

    @property
    def d_mlp(self) -> int:
        # from the weights, since the d_mlp of some configurations is wrong
        has_mlp = "blocks.0.mlp.out.hook_in" in self.points
        return base_rows(self.model.blocks[0].mlp.out).shape[0] if has_mlp else 0

    @property
    def is_post_norm(self) -> bool:
        # in post-norm models, hook_attn_out is an alias of the hook point at the norm's output
        point = self.points.get("blocks.0.hook_attn_out")
        return point is not None and str(point.name).startswith("blocks.0.ln")

    @property
    def unshareable(self) -> str | None:
        return self.sharing.reason

    @property
    def sharing(self) -> Sharing:
        """How the model can share a prefix. Determined once per model."""
        if self.model not in _SHARING:
            _SHARING[self.model] = self._try_sharing()
        return _SHARING[self.model]

    def _try_sharing(self) -> Sharing:
        config, positions = self.hf_config, self.model.cfg.positional_embedding_type
        # some models have several sets of rope parameters, one per kind of layer
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = {rope_set.get("rope_type") for rope_set in (rope, *rope.values()) if isinstance(rope_set, Mapping)}
        reasons = {
            f"{positions} positions": positions not in ("standard", "rotary"),
            "rope scaling that depends on the prompt's length": bool(kinds & {"dynamic", "longrope"}),
            "layers that cache more than keys and values": not set(layer_types(config)) <= SHAREABLE_LAYERS,
            "local attention whose window is not part of the mask": "local"
            in (getattr(config, "attention_layers", None) or ()),
        }
        reason = next((reason for reason, applies in reasons.items() if applies), None)
        if reason is None:
            for can_join in (True, False):
                if self._siblings_agree(can_join):
                    return Sharing(None, can_join)
        return Sharing(reason or "attention that does not accept a separate mask for every row", False)

    @torch.no_grad()
    def _siblings_agree(self, can_join: bool) -> bool:
        """Whether rows without intervention have the logits of their prompts."""
        tokens = torch.arange(2 * 8, device=self.device).reshape(2, 8) % self.d_vocab
        mask = torch.ones_like(tokens)
        mask[1, :3] = 0  # one of the two prompts is padded
        try:
            siblings = BridgeSiblings(self, tokens, mask, set(), can_join=can_join)
            layers = {self.model.cfg.n_layers // 2, self.model.cfg.n_layers - 1}
            rows = siblings.run(dict.fromkeys(layers, 8), [], {})  # [prompt, row, vocab]
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        error = (rows - siblings.logits[:, None]).abs().max()
        return bool(error <= TOLERANCE * siblings.logits.abs().max())

    def bytes_per_row(self, n_tokens: int, n_rows: int) -> int:
        logits = 4 * self.wide_dtype.itemsize * self.d_vocab
        # the scores between sibling rows are masked, but computed
        return super().bytes_per_row(n_tokens + n_rows, n_rows) + logits

    def check(self) -> None:
        """Reject models in which hook_z and hook_post are not the neurons of the paper.

        Raises:
            BadInput: attention that is not causal, an encoder, a mixture of experts, a layer without separate attention
                and MLP, or processed weights (`enable_compatibility_mode` without `no_processing`).
        """
        if getattr(self.model.original_model.config, "is_encoder_decoder", False):
            raise BadInput(f"{self.name} is an encoder-decoder model; use a decoder-only language model")
        for layer in range(self.model.cfg.n_layers):
            for name, source, role in (
                (f"blocks.{layer}.mlp.hook_post", f"blocks.{layer}.mlp.out.hook_in", "the input of W_out"),
                (f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.attn.o.hook_in", "the input of W_O"),
            ):
                if name not in self.points or self.points[name] is not self.points.get(source):
                    experts = "; it is a mixture of experts" if self.model.cfg.num_experts else ""
                    raise BadInput(f"{name} is not {role} in this model{experts}; use a dense decoder-only transformer")
        if self.model._weights_processed:
            raise BadInput(
                "expected unprocessed weights, but the weights of this bridge were processed, which changes the "
                "meaning of zero activation; load it with load_model, without enable_compatibility_mode, or with "
                "no_processing=True"
            )
        if self.model.cfg.d_head > 2:
            reject_rotated(self.w_o(0))
        super().check()
        if self.model not in CAUSAL:
            with torch.no_grad():
                logits = self.all_logits(probe_tokens(self.model.cfg.d_vocab, self.n_ctx, self.device))
            reject_bidirectional(logits, self.dtype)
            CAUSAL.add(self.model)

    @property
    def hf_config(self) -> Any:
        """Hugging Face's configuration of the decoder."""
        whole: Any = self.model.original_model.config
        return whole.get_text_config(decoder=True)

    @cached_property
    def points(self) -> dict[str, Any]:
        """Hook points by TransformerLens' names, old and new."""
        return self.model.hook_dict

    @contextmanager
    def hooks(self, hooks: Hooks) -> Iterator[Any]:
        added: list[tuple[Any, Any]] = []
        try:
            for name, function in hooks:
                if name not in self.points:
                    raise BadInput(f"this model has no hook point {name!r}; see the keys of model.hook_dict")
                # a hook point can have several names, and the function expects the one given
                point, named = self.points[name], SimpleNamespace(name=name)
                point.add_hook(lambda value, hook, function=function, named=named: function(value, named))
                added.append((point, point.fwd_hooks[-1]))
            yield self.model
        finally:
            # only these hooks are removed; other hooks of the model stay
            for point, handle in added:
                handle.hook.remove()
                point.fwd_hooks.remove(handle)

    def last_logits(
        self, tokens: TokenRows, *, mask: TokenRows | None = None, places: Any = None, cache: Any = None
    ) -> Float[Tensor, "row vocab"]:
        past = {} if cache is None else {"past_key_values": cache}
        padding = {} if mask is None else self._padding_options(mask)
        if places is None:
            places = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
        with self._unembed_only(places[:, None]):
            return self._logits(tokens, use_cache=cache is not None, **past, **padding)[:, 0]  # [row, 1, vocab]

    def packed_logits(self, rows: Packed, ends: Int[Tensor, "end 2"], cache: Any = None) -> Float[Tensor, "end vocab"]:
        past = {} if cache is None else {"past_key_values": cache}
        row, column = ends.T
        with self._unembed_only(column[None], row[None]):
            logits = self._logits(
                rows.tokens,
                attention_mask=self._masks(rows.allowed),
                position_ids=rows.positions,
                use_cache=cache is not None,
                **past,
            )
        return logits.flatten(0, -2)  # [1, end, vocab] -> [end, vocab]

    def all_logits(self, tokens: TokenRows, *, start: int = 0) -> Float[Tensor, "row _ vocab"]:
        if not start:
            return self._logits(tokens, use_cache=False)
        with self._unembed_only(torch.arange(start, tokens.shape[1]).expand(len(tokens), -1)):
            return self._logits(tokens, use_cache=False)

    def empty_cache(self) -> DynamicCache:
        return DynamicCache()

    def run_prefixes(self, tokens: Int[Tensor, "prefix column"]) -> Prefixes:
        cache = self.empty_cache()
        # the logits are not used, so only one position is unembedded
        with self._unembed_only(torch.zeros_like(tokens[:, :1])):
            self._logits(tokens, past_key_values=cache, use_cache=True)
        # [prefix, head, position, d_head] -> [row, head, position, d_head]
        return lambda index: frozen_cache(cache, lambda value: rows_of(value, index))

    def siblings(self, tokens: TokenRows, mask: TokenRows, names: set[str]) -> Siblings:
        return BridgeSiblings(self, tokens, mask, names, can_join=self.sharing.can_join)

    def w_o(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        cfg = self.model.cfg
        # [head * d_head, d_model] -> [head, d_head, d_model]
        return weight_rows(self.model.blocks[layer].attn.o).reshape(cfg.n_heads, cfg.d_head, cfg.d_model)

    def output_row(self, neuron: Neuron) -> tuple[Float[Tensor, " d_model"], Any]:
        block: Any = self.model.blocks[neuron.layer]
        if neuron.head is None:
            row, output = weight_rows(block.mlp.out, slice(neuron.index, neuron.index + 1))[0], "hook_mlp_out"
        else:
            row, output = self.w_o(neuron.layer)[neuron.head, neuron.index], "hook_attn_out"
        # the output's hook point belongs to the norm that follows the weights, if there is one
        owner = str(self.points[f"blocks.{neuron.layer}.{output}"].name).split(".")[2]
        return row, getattr(block, owner) if owner.startswith("ln") else None

    def unembedding(self) -> tuple[Float[Tensor, "d_model vocab"], Any] | None:
        return weight_rows(self.model.unembed), getattr(self.model, "ln_final", None)

    def _padding_options(self, mask: TokenRows) -> dict[str, Any]:
        """Attention masks and positions of rows that are padded on the left."""
        return {
            "attention_mask": self._masks(lambda window: causal_mask(mask.bool(), window)),
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),  # the first token of a row is at position 0
        }

    def _masks(self, keys_in: Callable[[int | None], Bool[Tensor, "row 1 query key"]]) -> Any:
        """The 4D mask that Hugging Face adds to the scores, or one for each kind of layer if there are several.

        Args:
            keys_in: computes the keys that each query attends to from the size of the attention window.
        """
        dtype = self.dtype
        lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)  # the softmax is computed in float32
        masks: dict[str, Tensor] = {}
        for kind in set(layer_types(self.hf_config)):
            allowed = keys_in(self.hf_config.sliding_window if kind == "sliding_attention" else None)
            masks[kind] = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, lowest)
        return masks if len(masks) > 1 else masks.popitem()[1]

    def _logits(self, tokens: TokenRows, **options: Any) -> Float[Tensor, "_ place vocab"]:
        with replace_methods(self._wide_unembedding()):
            return at_least_float32(self.model(tokens, **options))

    def _wide_unembedding(self) -> Iterator[Replacement]:
        """Replacements that compute the final norm and the unembedding in float32 if the weights have 16 bits."""
        unembed = self.model.unembed.original_component
        if not self.is_half or type(unembed) is not nn.Linear or "forward" in vars(unembed):
            return
        yield unembed, "forward", lambda stream: wide_linear(stream, unembed.weight, unembed.bias)
        norm: Any = getattr(self.model, "ln_final", None)
        if norm is not None and _NORM_IS_LAST[self.model]:
            for module in norm.modules():
                wide = {name: p if p is None else p.float() for name, p in module._parameters.items()}
                yield module, "_parameters", wide
            normalize = norm.forward
            yield norm, "forward", lambda stream, **named: normalize(stream.float(), **named)

    @contextmanager
    def _unembed_only(
        self, columns: Int[Tensor, "row place"], rows: Int[Tensor, "row place"] | None = None
    ) -> Iterator[None]:
        """Compute the logits of some columns only: those of each row, or those of `rows`."""

        def pick(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            stream, *others = arguments
            row = torch.arange(len(columns))[:, None] if rows is None else rows
            # [row, column, d_model] -> [row, place, d_model]
            return (stream[row.to(stream.device), columns.to(stream.device)], *others)

        handle = self.model.unembed.register_forward_pre_hook(pick)
        try:
            yield
        finally:
            handle.remove()


class Sharing(NamedTuple):
    """How a model can run a prompt once for all rows that replace its last position."""

    reason: str | None
    """Why the model cannot share a prefix; None if it can."""
    can_join: bool
    """Whether rows can join at the layers where they differ, with a single position running below the lowest one."""


CAUSAL: WeakSet[nn.Module] = WeakSet()
"""Models whose attention was found to be causal."""

_SHARING: WeakKeyDictionary[nn.Module, Sharing] = WeakKeyDictionary()
"""Results of `Bridge.sharing` by model."""

_NORM_IS_LAST: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Results of `_norm_is_last` by model."""


class BridgeSiblings(Siblings):
    """Rows that run as additional positions of one sequence, with the arguments of Hugging Face's forward pass.

    Every row has position T - 1 (`position_ids`) and attends to the prefix (`past_key_values`) and to itself (4D mask).
    A bridge cannot start at a given layer. If rows can join (`can_join`), one position runs up to the first layer that
    differs. A hook before that block and before every later block appends the rows that join there and replaces the
    masks and positions of the block.
    """

    def __init__(self, backend: Bridge, tokens: Tensor, mask: Tensor, names: set[str], *, can_join: bool) -> None:
        self.backend, self.can_join = backend, can_join
        self.last, self.position = tokens[:, -1:], mask.sum(1, keepdim=True) - 1  # both [prompt, 1]
        self.is_token: Bool[Tensor, "prompt prefix"] = mask[:, :-1].bool()
        self.activations = {}
        cache = DynamicCache()
        places = torch.full_like(self.last, tokens.shape[1] - 1)
        hooks: Hooks = [(name, self.keep) for name in names]
        blocks = backend.model.blocks if can_join else []
        with torch.no_grad(), backend.hooks(hooks), backend._unembed_only(places), block_inputs(blocks) as inputs:
            logits = backend._logits(tokens, past_key_values=cache, use_cache=True, **backend._padding_options(mask))
        self.block_inputs, self.logits = inputs, logits[:, 0]  # [prompt, 1, vocab] -> [prompt, vocab]
        # without the last position, [prompt, head, prefix, d_head]: the rows replace it
        self.cache = frozen_cache(cache, lambda value: value[:, :, :-1])

    def run(self, rows_at: Mapping[int, int], hooks: Hooks, mlp_outputs: MLPOutputs) -> Float[Tensor, "prompt row _"]:
        n_rows = sum(rows_at.values())
        n_below = 1 if self.can_join else n_rows  # number of positions that enter the model at layer 0
        masks, blocks = self._masks(n_below), self.backend.model.blocks
        with self.backend.hooks(hooks), join_rows(rows_at, self.block_inputs, blocks, masks, self._masks):
            logits = self.backend._logits(
                self.last.expand(-1, n_below),
                attention_mask=masks,
                position_ids=self.position.expand(-1, n_below),
                past_key_values=self.cache,
                use_cache=True,
            )
        # logits already, since some models apply more than W_U to the stream;
        # GPT-2 restores the shape of its input and so returns [prompt * row, 1, vocab] if one position entered
        return logits.reshape(len(self.last), n_rows, -1)

    def _masks(self, n_rows: int) -> Any:
        return self.backend._masks(lambda window: sibling_mask(self.is_token, n_rows, window))


@torch.no_grad()
def _norm_is_last(model: TransformerBridge) -> bool:
    """Whether the output of the final norm is unembedded unchanged."""
    passed: list[Tensor] = []
    if not hasattr(model, "ln_final"):
        return False
    handles = [
        model.ln_final.register_forward_hook(lambda _, __, output: passed.append(output)),
        model.unembed.register_forward_pre_hook(lambda _, arguments: passed.append(arguments[0])),
    ]
    try:
        model(torch.zeros(1, 1, dtype=torch.long, device=str(model.cfg.device)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return len(passed) == 2 and torch.equal(passed[0], passed[1])


def layer_types(config: Any) -> list[str]:
    """The kind of attention of each layer, by Hugging Face's names."""
    named = getattr(config, "layer_types", None)
    if named:
        return list(named)
    is_windowed = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if is_windowed else "full_attention"] * config.num_hidden_layers
