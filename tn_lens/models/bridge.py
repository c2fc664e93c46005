"""TransformerBridge: Hugging Face's own model with TransformerLens' hook points in it. Nothing of it is replaced here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import DynamicCache

from tn_lens.core.errors import BadInput
from tn_lens.models.backend import Backend, Hooks, Prefix, Siblings, entering, refuse_rotated, visible, visible_whole
from tn_lens.models.bridge_cache import BridgePrefix, frozen, held
from tn_lens.models.bridge_joining import joining
from tn_lens.neurons.neuron import Neuron, NeuronSpace

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
"""The kinds of layers whose keys and values stay what they were, by Hugging Face's names."""


def load(
    name: str,
    architecture: str,
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    hf_model: Any,
    read: Callable[[], Any],
    hub: Mapping[str, Any],
) -> TransformerBridge:
    """A frozen bridge around a checkpoint's Hugging Face model.

    Attention is Hugging Face's eager implementation, the one that takes a mask of its own for every row.

    Args:
        config: not needed, since the Hugging Face model has it.
        hf_model: the model, if it is in memory; it stays as it was, and shares its weights where they fit.
        read: reads it, if it is not.
        hub: not needed, since everything is read.

    Raises:
        BadInput: TransformerLens has no bridge to this architecture.
    """
    hf_model = read() if hf_model is None else hf_model
    shared = {
        id(p): nn.Parameter(p.detach().to(device=device, dtype=dtype), requires_grad=False)
        for p in hf_model.parameters()
    }
    own = copy.deepcopy(hf_model, shared).to(device).eval()
    try:
        own.set_attn_implementation("eager")
        expected = _probe(own)
        model = build_bridge_from_module(own, architecture, hf_config=own.config, model_name=name)
    except (ValueError, NotImplementedError, AttributeError, KeyError) as error:
        raise BadInput(
            f"the architecture {architecture} of {name!r} is not supported: TransformerLens has no bridge to it "
            f"({' '.join(str(error).split())[:200]})"
        ) from error
    if (_probe(model) - expected).abs().max() > TOLERANCE * expected.abs().max():
        raise BadInput(
            f"TransformerLens' bridge to {architecture} gives other logits than Hugging Face's model itself; take another "
            "release of transformer-lens, or backend='hooked' where it knows this model"
        )
    model.requires_grad_(False)
    return model.eval()


TOLERANCE = 0.02
"""By which logits may differ that should be the same, of the largest: bfloat16's own differences are smaller."""


@torch.no_grad()
def _probe(model: Any) -> Float[Tensor, "1 position vocab"]:
    """Logits of some tokens."""
    device = next(model.parameters()).device
    found = model(torch.arange(8, device=device)[None], use_cache=False)
    return (found if isinstance(found, Tensor) else found.logits).float()


class Bridge(Backend):
    """A TransformerBridge."""

    kind = "bridge"
    model: TransformerBridge

    @property
    def architecture(self) -> str | None:
        return self.model.cfg.architecture

    @property
    def d_vocab(self) -> int:
        return self.model.cfg.d_vocab_out

    @property
    def space(self) -> NeuronSpace:
        cfg = self.model.cfg
        has_one = "blocks.0.mlp.out.hook_in" in self.points
        d_mlp = len(_rows(self.model.blocks[0].mlp.out)) if has_one else 0  # some configurations give another number
        return NeuronSpace(
            n_layers=cfg.n_layers, d_mlp=d_mlp, n_heads=cfg.n_heads, d_head=cfg.d_head, d_model=cfg.d_model
        )

    @property
    def is_post_norm(self) -> bool:
        point = self.points.get("blocks.0.hook_attn_out")
        return point is not None and str(point.name).startswith("blocks.0.ln")

    @property
    def unshareable(self) -> str | None:
        return self.sharing.reason

    @property
    def sharing(self) -> Sharing:
        """What this model can share, tried once."""
        if self.model not in _SHARING:
            _SHARING[self.model] = self._try_sharing()
        return _SHARING[self.model]

    def _try_sharing(self) -> Sharing:
        config = self.hf_config
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = {of.get("rope_type") for of in (rope, *rope.values()) if isinstance(of, Mapping)}
        reasons = {
            f"{self.model.cfg.positional_embedding_type} positions": self.model.cfg.positional_embedding_type
            not in ("standard", "rotary"),
            "rope scaling that depends on the prompt's length": bool(kinds & {"dynamic", "longrope"}),
            "layers that keep more than keys and values": not set(layer_types(config)) <= KNOWN_LAYERS,
            "a local window that its attention keeps to itself": "local"
            in (getattr(config, "attention_layers", None) or ()),
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        if reason is None:
            for widens in (True, False):
                if self._siblings_agree(widens):
                    return Sharing(None, widens)
        return Sharing(reason or "attention that takes no mask of its own for every row", False)

    @torch.no_grad()
    def _siblings_agree(self, widens: bool) -> bool:
        """Whether untouched siblings get the logits of the prompts that they stand in."""
        tokens = torch.arange(2 * 8, device=self.device).reshape(2, 8) % self.d_vocab
        mask = torch.ones_like(tokens)
        mask[1, :3] = 0
        try:
            siblings = BridgeSiblings(self, tokens, mask, set(), widens=widens)
            layers = {self.model.cfg.n_layers // 2, self.model.cfg.n_layers - 1}
            rows = siblings.run(dict.fromkeys(layers, 8), [], {})
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        off = (rows - siblings.logits[:, None]).abs().max()
        return bool(off <= TOLERANCE * siblings.logits.abs().max())

    def kept_by_row(self, n_tokens: int, n_rows: int) -> int:
        logits = 4 * self.wide_dtype.itemsize * self.d_vocab
        return super().kept_by_row(n_tokens + n_rows, n_rows) + logits  # siblings are masked, not left out

    def check(self) -> None:
        """Refuse models in which hook_z and hook_post are not what the paper calls neurons.

        Raises:
            BadInput: mixture of experts, layers without attention or without an MLP of their own, weights that were
                processed (`enable_compatibility_mode` without `no_processing`).
        """
        for layer in range(self.model.cfg.n_layers):
            for name, read, what in (
                (f"blocks.{layer}.mlp.hook_post", f"blocks.{layer}.mlp.out.hook_in", "what W_out reads"),
                (f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.attn.o.hook_in", "what W_O reads"),
            ):
                if name not in self.points or self.points[name] is not self.points.get(read):
                    experts = "; it is a mixture of experts" if self.model.cfg.num_experts else ""
                    raise BadInput(
                        f"{name} is not {what} in this model{experts}; take a dense decoder-only transformer"
                    )
        if self.model._weights_processed:
            raise BadInput(
                "the weights of this bridge were processed, and zero means something else than in the paper; load it with "
                "load_model, or leave enable_compatibility_mode out, or give it no_processing=True"
            )
        if self.model.cfg.d_head > 2:
            refuse_rotated(self.written(0))

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
                    raise BadInput(f"this model has no hook point {name!r}")
                point, named = self.points[name], SimpleNamespace(name=name)
                point.add_hook(lambda value, hook, function=function, named=named: function(value, named))
                added.append((point, point.fwd_hooks[-1]))
            yield self.model
        finally:
            for point, handle in added:
                handle.hook.remove()
                point.fwd_hooks.remove(handle)

    def last_logits(
        self,
        tokens: Int[Tensor, "row column"],
        *,
        mask: Int[Tensor, "row column"] | None = None,
        places: Int[Tensor, " row"] | None = None,
        prefix: Prefix | None = None,
    ) -> Float[Tensor, "row vocab"]:
        past = {} if prefix is None else {"past_key_values": prefix.expand(len(tokens))}
        padded = {} if mask is None else self._padded(mask)
        at = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device) if places is None else places
        with self._reading(at[:, None]):
            return self._logits(tokens, use_cache=prefix is not None, **past, **padded)[:, 0]

    def all_logits(self, tokens: Int[Tensor, "row column"]) -> Float[Tensor, "row column vocab"]:
        return self._logits(tokens, use_cache=False)

    def run_prefix(self, tokens: Int[Tensor, "1 column"]) -> Prefix:
        cache = DynamicCache()
        with self._reading(torch.zeros_like(tokens[:, :1])):
            self._logits(tokens, past_key_values=cache, use_cache=True)
        return BridgePrefix(cache)

    def siblings(
        self, tokens: Int[Tensor, "prompt position"], mask: Int[Tensor, "prompt position"], names: set[str]
    ) -> Siblings:
        return BridgeSiblings(self, tokens, mask, names, widens=self.sharing.widens)

    def written(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        cfg = self.model.cfg
        return _rows(self.model.blocks[layer].attn.o).reshape(cfg.n_heads, cfg.d_head, cfg.d_model)

    def output_row(self, neuron: Neuron) -> tuple[Float[Tensor, " d_model"], Any]:
        block: Any = self.model.blocks[neuron.layer]
        if neuron.head is None:
            row, added = _rows(block.mlp.out)[neuron.index], "hook_mlp_out"
        else:
            row, added = self.written(neuron.layer)[neuron.head, neuron.index], "hook_attn_out"
        behind = str(self.points[f"blocks.{neuron.layer}.{added}"].name).split(".")[2]
        return row, getattr(block, behind) if behind.startswith("ln") else None

    def unembedding(self) -> tuple[Float[Tensor, "d_model vocab"], Any] | None:
        return _rows(self.model.unembed), getattr(self.model, "ln_final", None)

    def _padded(self, mask: Int[Tensor, "row column"]) -> dict[str, Any]:
        """Masks and positions of rows that are padded on the left."""
        return {
            "attention_mask": self._masks(lambda window: visible_whole(mask.bool(), window)),
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }

    def _masks(self, allowed: Callable[[int | None], Bool[Tensor, "row 1 query key"]]) -> Any:
        """What Hugging Face adds to the scores: one 4D mask, or one for each kind of layer where a model has several."""
        dtype = self.dtype
        least = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)  # the softmax is in float32
        masks: dict[str, Tensor] = {}
        for kind in set(layer_types(self.hf_config)):
            may = allowed(self.hf_config.sliding_window if kind == "sliding_attention" else None)
            masks[kind] = torch.zeros(may.shape, dtype=dtype, device=may.device).masked_fill(~may, least)
        return masks if len(masks) > 1 else masks.popitem()[1]

    def _logits(self, tokens: Int[Tensor, "row column"], **options: Any) -> Float[Tensor, "_ place vocab"]:
        logits = self.model(tokens, **options)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @contextmanager
    def _reading(self, places: Int[Tensor, "row place"]) -> Iterator[None]:
        """Let only some positions go on to the unembedding."""

        def pick(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            rows = torch.arange(len(places), device=given[0].device)[:, None]
            return (given[0][rows, places.to(given[0].device)], *given[1:])

        handle = self.model.unembed.register_forward_pre_hook(pick)
        try:
            yield
        finally:
            handle.remove()


class Sharing(NamedTuple):
    """How far a model can run a prompt once for all that stands in its last position's place."""

    reason: str | None
    """Why not at all; None where it can."""
    widens: bool
    """Whether siblings may join at their layers, one position running below the first of them."""


_SHARING: WeakKeyDictionary[nn.Module, Sharing] = WeakKeyDictionary()
"""Found once per model."""


class BridgeSiblings(Siblings):
    """Rows side by side as positions of one sequence, by Hugging Face's own means.

    Every row stands at position T - 1 (`position_ids`), sees the prefix (`past_key_values`) and itself (a 4D mask).
    A bridge cannot be entered at a layer. Where the model widens, one position runs up to the first layer that differs, and a
    hook before that and every later block puts the rows that join there beside those that are there, and hands the block their
    masks and positions.
    """

    def __init__(self, backend: Bridge, tokens: Tensor, mask: Tensor, names: set[str], *, widens: bool) -> None:
        self.backend, self.widens = backend, widens
        self.last, self.position = tokens[:, -1:], mask.sum(1, keepdim=True) - 1
        self.seen: Bool[Tensor, "prompt prefix"] = mask[:, :-1].bool()
        self.kept = {}
        cache = DynamicCache()
        at = torch.full_like(self.last, tokens.shape[1] - 1)
        hooks: Hooks = [(name, self.keep) for name in names]
        blocks = backend.model.blocks if widens else []
        with torch.no_grad(), backend.hooks(hooks), backend._reading(at), entering(blocks) as self.entering:
            logits = backend._logits(tokens, past_key_values=cache, use_cache=True, **backend._padded(mask))
        self.logits = logits[:, 0]
        self.cache = frozen([(keys[:, :, :-1], values[:, :, :-1]) for keys, values in held(cache)])

    def run(
        self, of_layer: Mapping[int, int], hooks: Hooks, written: Mapping[int, Float[Tensor, "prompt _ d_model"]]
    ) -> Float[Tensor, "prompt row vocab"]:
        n_rows = sum(of_layer.values())
        n_below = 1 if self.widens else n_rows
        masks = self._masks(n_below)
        with self.backend.hooks(hooks), joining(of_layer, self.entering, self.backend.model.blocks, masks, self._masks):
            logits = self.backend._logits(
                self.last.expand(-1, n_below),
                attention_mask=masks,
                position_ids=self.position.expand(-1, n_below),
                past_key_values=self.cache,
                use_cache=True,
            )
        return logits.reshape(len(self.last), n_rows, -1)  # GPT-2 takes rows for prompts where only one went in

    def logits_of(self, final: Float[Tensor, "prompt row vocab"]) -> Float[Tensor, "prompt row vocab"]:
        return final  # some models do more to them than W_U does

    def _masks(self, n_rows: int) -> Any:
        return self.backend._masks(lambda window: visible(self.seen, n_rows, window))


def _rows(linear: Any) -> Float[Tensor, "read written"]:
    """The weights of a linear layer, one row for each number that it reads."""
    original = linear.original_component
    return original.weight.T if isinstance(original, nn.Linear) else original.weight


def layer_types(config: Any) -> list[str]:
    """Which layers have a window, by Hugging Face's names."""
    named = getattr(config, "layer_types", None)
    if named:
        return list(named)
    windowed = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers
