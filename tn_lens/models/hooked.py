"""HookedTransformer: TransformerLens' own implementation of a model, which it has to 3.9. The only importer of the class."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig, TransformerLensKeyValueCache
from transformer_lens.utilities.activation_functions import apply_softcap

from tn_lens.core.errors import BadInput
from tn_lens.models.backend import Backend, Hooks, Prefix, Siblings, entering, near_of, refuse_rotated
from tn_lens.models.hooked_attention import SharedAttention, keys_of, norms_once, replaced
from tn_lens.neurons.neuron import Neuron, NeuronSpace


def build_model(config: HookedTransformerConfig | dict[str, Any], seed: int = 0) -> HookedTransformer:
    """A model with random weights, frozen, in evaluation mode: for fixtures and benchmarks."""
    config = HookedTransformerConfig.from_dict(config) if isinstance(config, dict) else config
    config.seed = seed
    torch.manual_seed(seed)
    return freeze(HookedTransformer(config, move_to_device=config.device is not None))


def assemble(config: HookedTransformerConfig, weights: dict[str, Tensor]) -> HookedTransformer:
    """A model around converted weights, which are taken over as they are: nothing is copied that fits.

    Raises:
        BadInput: a weight is missing or unknown, or has another shape than the configuration says.
    """
    config.init_weights = False
    model = HookedTransformer(config, move_to_device=False)
    owned = {name: w.detach().to(device=config.device, dtype=config.dtype) for name, w in weights.items()}
    try:
        missing, unknown = model.load_state_dict(owned, assign=True, strict=False)
    except RuntimeError as error:
        raise BadInput(
            f"the checkpoint's weights do not fit its config.json: {' '.join(str(error).split())}"
        ) from error
    missing = [name for name in missing if name in dict(model.named_parameters())]
    if missing or unknown:
        raise BadInput(
            f"the checkpoint does not fit its config.json: missing {missing[:3]}, unknown {list(unknown)[:3]}"
        )
    model.to(str(config.device), print_details=False)
    return freeze(model)


def load_from_transformer_lens(name: str, **options: Any) -> HookedTransformer:
    """A model that TransformerLens knows by name, without weight processing, laid out for speed."""
    return lay_out_weights(freeze(HookedTransformer.from_pretrained_no_processing(name, **options)))


def freeze(model: HookedTransformer) -> HookedTransformer:
    """No parameter gradients, no dropout: the only leaves of a gradient are interpolated activations."""
    model.requires_grad_(False)
    model.eval()
    return model


@torch.no_grad()
def lay_out_weights(model: HookedTransformer) -> HookedTransformer:
    """Put the weights in the order the forward pass reads them; values and shapes stay.

    HookedTransformer transposes nearly every weight in every forward pass. Those transposes copy nothing where the
    storage already has that order, as it has in Hugging Face's checkpoints. In place, one weight at a time.
    """

    def reorder(module: nn.Module, name: str, order: tuple[int, ...]) -> None:
        parameter = module._parameters.get(name)
        if isinstance(parameter, nn.Parameter) and parameter.ndim == len(order) and parameter.is_floating_point():
            inverse = tuple(order.index(axis) for axis in range(len(order)))
            parameter.data = parameter.data.permute(order).contiguous().permute(inverse)

    for block in model.blocks:
        for name in ("W_Q", "W_K", "W_V", "_W_K", "_W_V"):
            reorder(block.attn, name, (0, 2, 1))
        reorder(block.attn, "W_O", (2, 0, 1))
        if model.cfg.gated_mlp and not model.cfg.attn_only:
            for name in ("W_in", "W_gate", "W_out"):
                reorder(block.mlp, name, (1, 0))
    reorder(model.unembed, "W_U", (1, 0))
    return model


class Hooked(Backend):
    """A HookedTransformer."""

    kind = "hooked"
    model: HookedTransformer

    @property
    def architecture(self) -> str | None:
        return self.model.cfg.original_architecture

    @property
    def d_vocab(self) -> int:
        return self.model.cfg.d_vocab_out

    @property
    def space(self) -> NeuronSpace:
        cfg = self.model.cfg
        d_mlp = 0 if cfg.attn_only or cfg.d_mlp is None else cfg.d_mlp
        return NeuronSpace(
            n_layers=cfg.n_layers, d_mlp=d_mlp, n_heads=cfg.n_heads, d_head=cfg.d_head, d_model=cfg.d_model
        )

    @property
    def is_post_norm(self) -> bool:
        post = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
        return self.architecture in post or self.model.cfg.use_normalization_before_and_after

    @property
    def unshareable(self) -> str | None:
        cfg = self.model.cfg
        reasons = {
            f"{cfg.positional_embedding_type} positions": cfg.positional_embedding_type not in ("standard", "rotary"),
            "log-n attention scaling": cfg.use_logn_attn,
            "dynamic NTK rope scaling": cfg.use_dynamic_ntk_rope,
            "bidirectional attention": cfg.attention_dir != "causal",
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def check(self) -> None:
        """Refuse, or warn about, models in which hook_z and hook_post are not what the paper calls neurons.

        Raises:
            BadInput: mixture of experts, or `refactor_factored_attn_matrices`, which rotates the basis of z.
        """
        cfg = self.model.cfg
        if cfg.num_experts:
            raise BadInput(
                "this is a mixture of experts, whose hook_post is not one neuron a column; take a dense model"
            )
        if cfg.d_head > 2 and not cfg.load_in_4bit:
            refuse_rotated(self.written(0))
        never_biased = cfg.original_architecture == "GPTNeoForCausalLM"  # has an output bias and no value bias
        blocks = self.model.blocks
        if not never_biased and not any(b.attn.b_V.any() for b in blocks) and any(b.attn.b_O.any() for b in blocks):
            warnings.warn(
                "the value biases of this model look folded into b_O (fold_value_biases, TransformerLens' default): "
                "hook_z then lacks b_V, and zero means something else than in the paper; "
                "load it with load_model or from_pretrained_no_processing",
                stacklevel=4,
            )

    def hooks(self, hooks: Hooks) -> AbstractContextManager[Any]:
        return self.model.hooks(fwd_hooks=list(hooks))

    @property
    def n_layers(self) -> int:
        """Of the model."""
        return self.model.cfg.n_layers

    def unembed(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of a final residual stream, in at least float32."""
        if self.model.cfg.normalization_type is not None:
            residual = self.model.ln_final(residual)
        logits = self.model.unembed(residual)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return apply_softcap(logits, self.model.cfg.output_logits_soft_cap)

    def last_logits(
        self,
        tokens: Int[Tensor, "row column"],
        *,
        mask: Int[Tensor, "row column"] | None = None,
        places: Int[Tensor, " row"] | None = None,
        prefix: Prefix | None = None,
    ) -> Float[Tensor, "row vocab"]:
        residual = self.model(
            tokens,
            attention_mask=torch.ones_like(tokens) if mask is None else mask,
            past_kv_cache=prefix.expand(len(tokens)) if isinstance(prefix, HookedPrefix) else None,
            stop_at_layer=self.n_layers,
        )
        if places is None:
            last = residual[:, -1]
        else:
            last = residual[torch.arange(len(residual), device=residual.device), places.to(residual.device)]
        return self.unembed(last[:, None])[:, 0]

    def all_logits(self, tokens: Int[Tensor, "row column"]) -> Float[Tensor, "row column vocab"]:
        logits = self.model(tokens, attention_mask=torch.ones_like(tokens))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def run_prefix(self, tokens: Int[Tensor, "1 column"]) -> Prefix:
        cfg = self.model.cfg
        cache = TransformerLensKeyValueCache.init_cache(cfg, cfg.device, 1)
        self.model(tokens, attention_mask=torch.ones_like(tokens), past_kv_cache=cache, stop_at_layer=self.n_layers)
        return HookedPrefix(cache)

    def siblings(
        self, tokens: Int[Tensor, "prompt position"], mask: Int[Tensor, "prompt position"], names: set[str]
    ) -> Siblings:
        return HookedSiblings(self, tokens, mask, names)

    def written(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        return self.model.blocks[layer].attn.W_O

    def output_row(self, neuron: Neuron) -> tuple[Float[Tensor, " d_model"], Any]:
        block: Any = self.model.blocks[neuron.layer]
        if neuron.head is None:
            return block.mlp.W_out[neuron.index], self.norm_behind("ln2", neuron.layer)
        return block.attn.W_O[neuron.head, neuron.index], self.norm_behind("ln1", neuron.layer)

    def norm_behind(self, name: Literal["ln1", "ln2"], layer: int) -> Any:
        """The norm behind W_O (ln1) or W_out (ln2); None where there is none."""
        name_behind = f"{name}_post" if self.model.cfg.use_normalization_before_and_after else name
        return getattr(self.model.blocks[layer], name_behind) if self.is_post_norm else None

    def is_free_above_w_out(self, layer: int) -> bool:
        """Whether nothing but W_out's bias and norm stands between a layer's MLP neurons and the residual stream behind it."""
        block: Any = self.model.blocks[layer]
        norm = self.norm_behind("ln2", layer)
        hooked = [block.hook_mlp_out, block.hook_resid_post, *([] if norm is None else norm.modules())]
        return not self.model.cfg.load_in_4bit and not any(getattr(point, "fwd_hooks", None) for point in hooked)

    def unembedding(self) -> tuple[Float[Tensor, "d_model vocab"], Any] | None:
        cfg = self.model.cfg
        if cfg.load_in_4bit:
            return None
        return self.model.unembed.W_U, None if cfg.normalization_type is None else self.model.ln_final


class HookedPrefix(Prefix):
    """TransformerLens' cache of one row."""

    def __init__(self, cache: TransformerLensKeyValueCache) -> None:
        self.cache = cache

    def expand(self, n_rows: int) -> TransformerLensKeyValueCache:
        """The same frozen keys and values for every row; nothing is copied."""
        expanded = TransformerLensKeyValueCache(
            entries=[
                type(entry)(entry.past_keys.expand(n_rows, -1, -1, -1), entry.past_values.expand(n_rows, -1, -1, -1))
                for entry in self.cache.entries
            ],
            previous_attention_mask=self.cache.previous_attention_mask.expand(n_rows, -1),
        )
        expanded.freeze()
        return expanded


class HookedSiblings(Siblings):
    """Rows side by side as positions of one sequence, which copies no keys or values, each entered at its own layer.

    Rows that differ in MLP neurons are entered right above their layer: there they differ by what W_out and its norm make of
    the neurons, and the layer itself need not be run.
    """

    def __init__(self, backend: Hooked, tokens: Tensor, mask: Tensor, names: set[str]) -> None:
        self.backend = backend
        model, cfg = backend.model, backend.model.cfg
        self.kept = {}
        self.joinable = {
            layer
            for layer in range(cfg.n_layers)
            if f"blocks.{layer}.mlp.hook_post" in names and backend.is_free_above_w_out(layer)
        }

        def only_last(value: Tensor, hook: Any) -> Tensor:
            return value[:, -1:]

        wanted = names | {f"blocks.{layer}.hook_mlp_out" for layer in self.joinable}
        last = [f"blocks.{cfg.n_layers - 1}.{point}" for point in ("attn.hook_z", "hook_resid_mid")]
        hooks: Hooks = [(name, self.keep) for name in wanted]
        hooks += [(name, only_last) for name in last if name in model.hook_dict]  # nothing else is read behind them
        seen = mask[:, :-1].bool()
        allowed = {
            kind: keys_of(near_of(seen, window)) for kind, window in (("global", None), ("local", cfg.window_size))
        }
        self.attentions = [SharedAttention(block.attn, allowed[block.attn.attn_type]) for block in model.blocks]
        noting = [*norms_once(model.blocks), *(one for attention in self.attentions for one in attention.noting())]
        with torch.no_grad(), backend.hooks(hooks), replaced(noting), entering(model.blocks) as self.entering:
            stream = model(tokens, attention_mask=mask, stop_at_layer=cfg.n_layers)
            self.logits = backend.unembed(stream[:, -1])
        position = seen.sum(1)
        for attention in self.attentions:
            attention.take_place(position)
        self.entering.append(stream[:, -1:].clone())
        self.beside = {
            layer: self.entering[layer + 1].to(backend.wide_dtype) - self.kept[f"blocks.{layer}.hook_mlp_out"]
            for layer in self.joinable
        }

    def w_out(self, layer: int) -> Float[Tensor, "neuron d_model"] | None:
        return self.backend.model.blocks[layer].mlp.W_out if layer in self.joinable else None

    def run(
        self, of_layer: Mapping[int, int], hooks: Hooks, written: Mapping[int, Float[Tensor, "prompt _ d_model"]]
    ) -> Float[Tensor, "prompt row d_model"]:
        blocks = self.backend.model.blocks
        first = min([*of_layer, *(layer + 1 for layer in written)])
        residual = self.entering[first][:, :0]
        standing_in = (one for attention in self.attentions[first:] for one in attention.standing_in())
        with replaced([*norms_once(blocks[first:]), *standing_in]), self.backend.hooks(hooks):
            for layer in range(first, len(blocks) + 1):
                joining = [self._above(layer - 1, written[layer - 1])] if layer - 1 in written else []
                if layer in of_layer:
                    joining.append(self.entering[layer].expand(-1, of_layer[layer], -1))
                residual = torch.cat([residual, *joining], dim=1) if joining else residual
                if layer < len(blocks):
                    residual = blocks[layer](residual)
        return residual

    def logits_of(self, final: Float[Tensor, "prompt row d_model"]) -> Float[Tensor, "prompt row vocab"]:
        return self.backend.unembed(final)

    def _above(self, layer: int, written: Float[Tensor, "prompt row d_model"]) -> Float[Tensor, "prompt row d_model"]:
        """The residual stream behind a layer whose MLP neurons are others."""
        beside, norm = self.beside[layer], self.backend.norm_behind("ln2", layer)
        block: Any = self.backend.model.blocks[layer]
        written = written.to(self.backend.dtype) + block.mlp.b_out
        return (beside + (written if norm is None else norm(written))).to(self.backend.dtype)
