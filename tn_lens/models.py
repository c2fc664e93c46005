"""What the stages need of a model. The only module that imports HookedTransformer."""

from __future__ import annotations

import warnings
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig

from .errors import BadInput
from .neurons import NeuronSpace

Model: TypeAlias = HookedTransformer
"""The kind of model that every stage takes."""


def build_model(config: HookedTransformerConfig | dict[str, Any], seed: int = 0) -> Model:
    """A model with random weights, frozen, in evaluation mode: for fixtures and benchmarks."""
    config = HookedTransformerConfig.from_dict(config) if isinstance(config, dict) else config
    config.seed = seed
    torch.manual_seed(seed)
    return freeze(HookedTransformer(config, move_to_device=config.device is not None))


def assemble(config: HookedTransformerConfig, weights: dict[str, Tensor]) -> Model:
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


def load_from_transformer_lens(name: str, **options: Any) -> Model:
    """A model that TransformerLens knows by name, without weight processing, laid out for speed."""
    return lay_out_weights(freeze(HookedTransformer.from_pretrained_no_processing(name, **options)))


def freeze(model: Model) -> Model:
    """No parameter gradients, no dropout: the only leaves of a gradient are interpolated activations."""
    model.requires_grad_(False)
    model.eval()
    return model


@torch.no_grad()
def lay_out_weights(model: Model) -> Model:
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


def neuron_space(model: Model) -> NeuronSpace:
    """The sizes of a model's neuron space."""
    cfg = model.cfg
    d_mlp = 0 if cfg.attn_only or cfg.d_mlp is None else cfg.d_mlp
    return NeuronSpace(n_layers=cfg.n_layers, d_mlp=d_mlp, n_heads=cfg.n_heads, d_head=cfg.d_head, d_model=cfg.d_model)


def is_post_norm(model: Model) -> bool:
    """Whether a norm follows W_O and W_out (OLMo-2, OLMo-3, Gemma-2 and -3), so that z and post have no scale.

    There f(alpha z) hardly depends on alpha > 0, and a Riemann sum from a zero baseline misses completeness.
    """
    post = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
    return model.cfg.original_architecture in post or model.cfg.use_normalization_before_and_after


def check_model(model: object) -> None:
    """Refuse, or warn about, models in which hook_z and hook_post are not what the paper calls neurons.

    Raises:
        BadInput: mixture of experts, encoders, or `refactor_factored_attn_matrices`, which rotates the basis of z.
    """
    if not isinstance(model, HookedTransformer):
        raise BadInput(f"expected a HookedTransformer, got {type(model).__name__}; load the model with load_model(...)")
    cfg = model.cfg
    if cfg.num_experts:
        raise BadInput("this is a mixture of experts, whose hook_post is not one neuron a column; take a dense model")
    attention = model.blocks[0].attn
    if cfg.d_head > 2 and not cfg.load_in_4bit:
        gram = torch.einsum("him,hjm->hij", attention.W_O.float(), attention.W_O.float())
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        if gram.abs().sum() > 0 and (gram - diagonal.diag_embed()).abs().max() < 1e-4 * diagonal.abs().max():
            raise BadInput(
                "W_O's rows are orthogonal, as refactor_factored_attn_matrices leaves them: hook_z is in a rotated "
                "basis; load the model without that option"
            )
    never_biased = cfg.original_architecture == "GPTNeoForCausalLM"  # has an output bias and no value bias
    if (
        not never_biased
        and not any(b.attn.b_V.any() for b in model.blocks)
        and any(b.attn.b_O.any() for b in model.blocks)
    ):
        warnings.warn(
            "the value biases of this model look folded into b_O (fold_value_biases, TransformerLens' default): "
            "hook_z then lacks b_V, and zero means something else than in the paper; "
            "load it with load_model or from_pretrained_no_processing",
            stacklevel=3,
        )


def unembed(model: Model, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
    """Logits of a final residual stream, in at least float32."""
    if model.cfg.normalization_type is not None:
        residual = model.ln_final(residual)
    logits = model.unembed(residual)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cap = model.cfg.output_logits_soft_cap
    return cap * (logits / cap).tanh() if cap > 0 else logits


def last_logits(
    model: Model, tokens: Int[Tensor, "batch position"], attention_mask: Int[Tensor, "batch position"] | None = None
) -> Float[Tensor, "batch vocab"]:
    """Logits at the last position only, in at least float32; rows may be padded on the left."""
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
    residual = model(tokens, attention_mask=mask, stop_at_layer=model.cfg.n_layers)
    return unembed(model, residual[:, -1:])[:, 0]
