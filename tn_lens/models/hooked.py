"""HookedTransformer: TransformerLens' own model class, available up to version 3.9."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig, TransformerLensKeyValueCache
from transformer_lens.utilities.activation_functions import apply_softcap

from tn_lens.core.errors import BadInput
from tn_lens.models.backend import Backend, Hooks, MLPOutputs, Prefixes, Siblings, TokenRows
from tn_lens.models.comparison import NOT_CAUSAL
from tn_lens.models.hooked_attention import SharedAttention, cached_norms, key_mask, packed_attention
from tn_lens.models.tensors import (
    Packed,
    Replacement,
    block_inputs,
    freeze,
    ordinary,
    reject_rotated,
    replace_methods,
    rows_of,
    visible_prefix,
)
from tn_lens.models.unembedding import wide_linear
from tn_lens.neurons.neuron import Neuron


def build_model(config: HookedTransformerConfig | dict[str, Any], seed: int = 0) -> HookedTransformer:
    """Build a model with random weights, frozen and in evaluation mode, for fixtures and benchmarks."""
    config = HookedTransformerConfig.from_dict(config) if isinstance(config, dict) else config
    config.seed = seed
    torch.manual_seed(seed)
    return freeze(HookedTransformer(config, move_to_device=config.device is not None))


def assemble(config: HookedTransformerConfig, weights: dict[str, Tensor]) -> HookedTransformer:
    """Build a model from converted weights. Weights of the right dtype and device are not copied.

    Raises:
        BadInput: a weight is missing or unknown, or its shape differs from the configuration.
    """
    config.init_weights = False
    model = HookedTransformer(config, move_to_device=False)
    state = {name: ordinary(w).to(device=config.device, dtype=config.dtype) for name, w in weights.items()}
    try:
        missing, unknown = model.load_state_dict(state, assign=True, strict=False)
    except RuntimeError as error:
        raise BadInput(
            f"the checkpoint's weights do not fit its config.json; use the one saved with it ({' '.join(str(error).split())})"
        ) from error
    # buffers (masks, rotary tables) are not part of a checkpoint
    missing = [name for name in missing if name in dict(model.named_parameters())]
    if missing or unknown:
        raise BadInput(
            f"the checkpoint's weights do not fit its config.json: missing {missing[:3]}, unknown {list(unknown)[:3]}"
        )
    model.to(str(config.device), print_details=False)
    return freeze(model)


@torch.no_grad()
def lay_out_weights(model: HookedTransformer) -> HookedTransformer:
    """Store the weights in the memory order in which the forward pass reads them. Values and shapes do not change.

    HookedTransformer transposes nearly every weight in every forward pass. The transposes copy nothing if the memory
    already has that order, as in Hugging Face's checkpoints. Works in place, one weight at a time.
    """

    def reorder(module: nn.Module, name: str, order: tuple[int, ...]) -> None:
        parameter = module._parameters.get(name)
        if isinstance(parameter, nn.Parameter) and parameter.ndim == len(order) and parameter.is_floating_point():
            inverse = tuple(order.index(axis) for axis in range(len(order)))
            parameter.data = parameter.data.permute(order).contiguous().permute(inverse)

    for block in model.blocks:
        for name in ("W_Q", "W_K", "W_V", "_W_K", "_W_V"):  # [head, d_model, d_head]
            reorder(block.attn, name, (0, 2, 1))
        reorder(block.attn, "W_O", (2, 0, 1))  # [head, d_head, d_model]
        if model.cfg.gated_mlp and not model.cfg.attn_only:
            for name in ("W_in", "W_gate", "W_out"):
                reorder(block.mlp, name, (1, 0))
    reorder(model.unembed, "W_U", (1, 0))  # [d_model, vocab]
    return model


class Hooked(Backend):
    """Backend of a HookedTransformer."""

    kind = "hooked"
    model: HookedTransformer

    @property
    def d_mlp(self) -> int:
        cfg = self.model.cfg
        return 0 if cfg.attn_only or cfg.d_mlp is None else cfg.d_mlp

    @property
    def is_post_norm(self) -> bool:
        post_norm = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
        return self.architecture in post_norm or self.model.cfg.use_normalization_before_and_after

    @property
    def unshareable(self) -> str | None:
        cfg = self.model.cfg
        reasons = {
            f"{cfg.positional_embedding_type} positions": cfg.positional_embedding_type not in ("standard", "rotary"),
            "log-n attention scaling": cfg.use_logn_attn,
            "dynamic NTK rope scaling": cfg.use_dynamic_ntk_rope,
            "bidirectional attention": cfg.attention_dir != "causal",
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def check(self) -> None:
        """Reject, or warn about, models in which hook_z and hook_post are not the neurons of the paper.

        Raises:
            BadInput: attention that is not causal, a mixture of experts, or `refactor_factored_attn_matrices`, which
                rotates the basis of z.
        """
        super().check()
        cfg = self.model.cfg
        if cfg.attention_dir != "causal":
            raise BadInput(NOT_CAUSAL)
        if cfg.num_experts:
            raise BadInput(
                "expected one neuron per column of hook_post, but this model is a mixture of experts; use a dense model"
            )
        if cfg.d_head > 2 and not cfg.load_in_4bit:
            reject_rotated(self.w_o(0))
        is_gpt_neo = cfg.original_architecture == "GPTNeoForCausalLM"  # has an output bias, but never a value bias
        blocks = self.model.blocks
        if not is_gpt_neo and not any(b.attn.b_V.any() for b in blocks) and any(b.attn.b_O.any() for b in blocks):
            warnings.warn(
                "the value biases of this model appear to be folded into b_O (fold_value_biases, TransformerLens' "
                "default): hook_z does not contain b_V, so zero-ablation and the zero baseline differ from the "
                "paper's; load the model with load_model or from_pretrained_no_processing",
                stacklevel=4,
            )

    def hooks(self, hooks: Hooks) -> AbstractContextManager[Any]:
        return self.model.hooks(fwd_hooks=list(hooks))

    def unembed(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of the final residual stream, in at least float32."""
        with replace_methods(self._wide_unembedding()):
            if self.model.cfg.normalization_type is not None:
                residual = self.model.ln_final(residual)
            return apply_softcap(self.model.unembed(residual), self.model.cfg.output_logits_soft_cap)

    def _wide_unembedding(self) -> Iterator[Replacement]:
        """Replacements that compute the final norm and the unembedding in float32 if the weights have 16 bits."""
        model: Any = self.model
        if not self.is_half:
            return
        unembed = model.unembed
        if self.model.cfg.normalization_type is not None:
            norm, wide_cfg = model.ln_final, copy.copy(model.ln_final.cfg)
            wide_cfg.dtype = torch.float32  # the dtype of the norm's output
            normalize = norm.forward
            yield norm, "cfg", wide_cfg
            yield norm, "forward", lambda stream: normalize(stream.float())
        yield (
            unembed,
            "forward",
            lambda stream: unembed.hook_out(wide_linear(unembed.hook_in(stream), unembed.W_U.T, unembed.b_U)),
        )

    def last_logits(
        self, tokens: TokenRows, *, mask: TokenRows | None = None, places: Any = None, cache: Any = None
    ) -> Float[Tensor, "row vocab"]:
        residual = self.model(
            tokens,
            # always passed, since TransformerLens otherwise infers padding from the tokens
            attention_mask=torch.ones_like(tokens) if mask is None else mask,
            past_kv_cache=cache,
            stop_at_layer=self.model.cfg.n_layers,
        )
        # [row, column, d_model] -> [row, d_model]; only this position is unembedded
        rows = torch.arange(len(residual), device=residual.device)
        last = residual[:, -1] if places is None else residual[rows, places.to(residual.device)]
        return self.unembed(last[:, None])[:, 0]

    def packed_logits(self, rows: Packed, ends: Int[Tensor, "end 2"], cache: Any = None) -> Float[Tensor, "end vocab"]:
        model, cfg = self.model, self.model.cfg
        windows = {"global": None, "local": cfg.window_size}
        allowed = {kind: rows.allowed(windows[kind]) for kind in {block.attn.attn_type for block in model.blocks}}
        replacements, key_positions = [*cached_norms(model.blocks)], rows.key_positions
        for block in model.blocks:
            replacements += packed_attention(block.attn, allowed[block.attn.attn_type], key_positions)
        if cfg.positional_embedding_type == "standard":
            replacements.append((model.pos_embed, "forward", lambda *_, **__: model.pos_embed.W_pos[rows.positions]))
        with replace_methods(replacements):
            residual = model(
                rows.tokens,
                attention_mask=torch.ones_like(rows.tokens),
                past_kv_cache=cache,
                stop_at_layer=cfg.n_layers,
            )
        row, column = ends.to(residual.device).T
        return self.unembed(residual[row, column][:, None])[:, 0]

    def all_logits(self, tokens: TokenRows, *, start: int = 0) -> Float[Tensor, "row _ vocab"]:
        mask, n_layers = torch.ones_like(tokens), self.model.cfg.n_layers
        return self.unembed(self.model(tokens, attention_mask=mask, stop_at_layer=n_layers)[:, start:])

    def empty_cache(self, n_rows: int = 1) -> TransformerLensKeyValueCache:
        return TransformerLensKeyValueCache.init_cache(self.model.cfg, self.model.cfg.device, n_rows)

    def run_prefixes(self, tokens: Int[Tensor, "prefix column"]) -> Prefixes:
        cfg, cache = self.model.cfg, self.empty_cache(len(tokens))
        self.model(tokens, attention_mask=torch.ones_like(tokens), past_kv_cache=cache, stop_at_layer=cfg.n_layers)

        def continued(index: Int[Tensor, " row"]) -> TransformerLensKeyValueCache:
            kept = TransformerLensKeyValueCache(
                entries=[
                    # [prefix, position, head, d_head] -> [row, position, head, d_head]
                    type(entry)(rows_of(entry.past_keys, index), rows_of(entry.past_values, index))
                    for entry in cache.entries
                ],
                previous_attention_mask=rows_of(cache.previous_attention_mask, index),
            )
            kept.freeze()
            return kept

        return continued

    def siblings(self, tokens: TokenRows, mask: TokenRows, names: set[str]) -> Siblings:
        return HookedSiblings(self, tokens, mask, names)

    def w_o(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        return self.model.blocks[layer].attn.W_O

    def output_row(self, neuron: Neuron) -> tuple[Float[Tensor, " d_model"], Any]:
        block: Any = self.model.blocks[neuron.layer]
        if neuron.head is None:
            return block.mlp.W_out[neuron.index], self.output_norm("ln2", neuron.layer)
        return block.attn.W_O[neuron.head, neuron.index], self.output_norm("ln1", neuron.layer)

    def output_norm(self, name: Literal["ln1", "ln2"], layer: int) -> Any:
        """The norm after W_O (ln1) or W_out (ln2); None if there is none."""
        # Gemma has norms before and after; in OLMo, ln1 and ln2 themselves follow the weights
        full_name = f"{name}_post" if self.model.cfg.use_normalization_before_and_after else name
        return getattr(self.model.blocks[layer], full_name) if self.is_post_norm else None

    def can_join_above(self, layer: int) -> bool:
        """Whether rows that differ in a layer's MLP neurons may join above the layer.

        They may if only W_out, its bias and its norm lie between the neurons and the residual stream above the layer,
        and none of them has a hook.
        """
        block: Any = self.model.blocks[layer]
        norm = self.output_norm("ln2", layer)
        points = [block.hook_mlp_out, block.hook_resid_post, *([] if norm is None else norm.modules())]
        return not self.model.cfg.load_in_4bit and not any(getattr(point, "fwd_hooks", None) for point in points)

    def unembedding(self) -> tuple[Float[Tensor, "d_model vocab"], Any] | None:
        cfg = self.model.cfg
        if cfg.load_in_4bit:
            return None
        return self.model.unembed.W_U, None if cfg.normalization_type is None else self.model.ln_final


class HookedSiblings(Siblings):
    """Rows that run as positions of one sequence, without copies of keys or values, each starting at its own layer.

    Rows that differ in MLP neurons start right above their layer: there they differ by the neurons' W_out projection
    and its norm, so the layer itself does not have to run.
    """

    def __init__(self, backend: Hooked, tokens: Tensor, mask: Tensor, names: set[str]) -> None:
        self.backend = backend
        model, cfg = backend.model, backend.model.cfg
        self.activations = {}
        self.joinable = {
            layer
            for layer in range(cfg.n_layers)
            if f"blocks.{layer}.mlp.hook_post" in names and backend.can_join_above(layer)
        }

        def only_last(value: Tensor, hook: Any) -> Tensor:
            return value[:, -1:]  # [prompt, position, ...] -> [prompt, 1, ...]

        stored = names | {f"blocks.{layer}.hook_mlp_out" for layer in self.joinable}
        hooks: Hooks = [(name, self.keep) for name in stored]
        # in the last layer, only the last position is needed from these hook points on
        last = [f"blocks.{cfg.n_layers - 1}.{point}" for point in ("attn.hook_z", "hook_resid_mid")]
        hooks += [(name, only_last) for name in last if name in model.hook_dict]
        is_token = mask[:, :-1].bool()  # [prompt, prefix]
        windows = {"global": None, "local": cfg.window_size}
        allowed = {kind: key_mask(visible_prefix(is_token, window)) for kind, window in windows.items()}
        self.attentions = [SharedAttention(block.attn, allowed[block.attn.attn_type]) for block in model.blocks]
        recording = (replacement for attention in self.attentions for replacement in attention.recording())
        replacements = [*cached_norms(model.blocks), *recording]
        with torch.no_grad(), backend.hooks(hooks), replace_methods(replacements), block_inputs(model.blocks) as inputs:
            stream = model(tokens, attention_mask=mask, stop_at_layer=cfg.n_layers)
            self.logits = backend.unembed(stream[:, -1])
        positions = is_token.sum(1)
        for attention in self.attentions:
            attention.set_positions(positions)
        self.block_inputs = [*inputs, stream[:, -1:].clone()]  # the last entry is the final stream
        self.stream_without_mlp = {
            layer: self.block_inputs[layer + 1].to(backend.wide_dtype)
            - self.activations[f"blocks.{layer}.hook_mlp_out"]
            for layer in self.joinable
        }

    def w_out(self, layer: int) -> Float[Tensor, "neuron d_model"] | None:
        return self.backend.model.blocks[layer].mlp.W_out if layer in self.joinable else None

    def run(self, rows_at: Mapping[int, int], hooks: Hooks, mlp_outputs: MLPOutputs) -> Float[Tensor, "prompt row _"]:
        blocks = self.backend.model.blocks
        first = min([*rows_at, *(layer + 1 for layer in mlp_outputs)])
        residual = self.block_inputs[first][:, :0]  # no rows yet: [prompt, 0, d_model]
        running = (replacement for attention in self.attentions[first:] for replacement in attention.running())
        with replace_methods([*cached_norms(blocks[first:]), *running]), self.backend.hooks(hooks):
            for layer in range(first, len(blocks) + 1):
                # rows that differ in the MLP below come first, since rows are ordered by layer
                new = [self._stream_above(layer - 1, mlp_outputs[layer - 1])] if layer - 1 in mlp_outputs else []
                if layer in rows_at:
                    new.append(self.block_inputs[layer].expand(-1, rows_at[layer], -1))
                residual = torch.cat([residual, *new], dim=1) if new else residual  # more rows
                if layer < len(blocks):
                    residual = blocks[layer](residual)
        return residual

    def logits_of(self, final: Float[Tensor, "prompt row d_model"]) -> Float[Tensor, "prompt row vocab"]:
        return self.backend.unembed(final)

    def _stream_above(
        self, layer: int, output: Float[Tensor, "prompt row d_model"]
    ) -> Float[Tensor, "prompt row d_model"]:
        """The residual stream above a layer, with the MLP output replaced."""
        without_mlp, norm = self.stream_without_mlp[layer], self.backend.output_norm("ln2", layer)
        block: Any = self.backend.model.blocks[layer]
        output = output.to(self.backend.dtype) + block.mlp.b_out
        # added in the wide dtype, since `without_mlp` is a difference
        return (without_mlp + (output if norm is None else norm(output))).to(self.backend.dtype)
