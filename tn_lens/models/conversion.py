"""Hugging Face's checkpoints as HookedTransformers.

`HookedTransformer.from_pretrained` knows a fixed list of names. For the families of the paper's six models this module
reads the Hugging Face configuration instead, so that every checkpoint of the family loads, fine-tuned and local ones
too, and hands the weights over in the order in which they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import (
    convert_llama_weights,
    convert_mistral_weights,
    convert_olmo2_weights,
    convert_qwen2_weights,
)
from transformers import PretrainedConfig

from tn_lens.core.errors import BadInput
from tn_lens.models.hooked import assemble, load_from_transformer_lens

CONVERTERS: Mapping[str, Callable[..., dict[str, Tensor]]] = {
    "LlamaForCausalLM": convert_llama_weights,
    "Qwen2ForCausalLM": convert_qwen2_weights,
    "MistralForCausalLM": convert_mistral_weights,
    "Olmo2ForCausalLM": convert_olmo2_weights,
}
"""The families that load from their Hugging Face configuration, whatever the checkpoint is called."""

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_new", "relu": "relu"}


def load(
    name: str,
    architecture: str,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    hf_model: Any,
    read: Callable[[], Any],
    hub: Mapping[str, Any],
) -> HookedTransformer:
    """A HookedTransformer of a checkpoint.

    Args:
        hf_model: its Hugging Face model, if it is in memory.
        read: reads it, if it is not.
        hub: options for TransformerLens' own loader.

    Raises:
        BadInput: a configuration that cannot be used, or an architecture that is not supported.
    """
    if architecture not in CONVERTERS:
        return load_by_name(name, architecture, dtype=dtype, device=str(device), hf_model=hf_model, **hub)
    try:
        lens_config = convert_config(config, architecture, name)
    except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
        raise BadInput(f"the config.json of {name!r} cannot be used: {type(error).__name__}: {error}") from error
    lens_config.dtype, lens_config.device = dtype, str(device)
    hf_model = read() if hf_model is None else hf_model
    return assemble(lens_config, convert_weights(hf_model, lens_config, architecture))


def convert_config(config: PretrainedConfig, architecture: str, name: str) -> HookedTransformerConfig:
    """TransformerLens' configuration of a Llama, Qwen2, Mistral or OLMo-2 checkpoint.

    Raises:
        BadInput: an option that HookedTransformer cannot express; it is named.
    """

    def refuse(what: str) -> BadInput:
        return BadInput(f"{name} uses {what}, which HookedTransformer cannot express for {architecture}")

    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    grouped = n_key_value_heads != config.num_attention_heads
    if architecture == "Olmo2ForCausalLM" and (grouped or d_head * config.num_attention_heads != config.hidden_size):
        raise refuse("fewer key/value heads than query heads, or heads that do not add up to d_model")
    if getattr(config, "mlp_bias", False):
        raise refuse("biases in its gated MLP (mlp_bias)")
    if config.hidden_act not in ACTIVATIONS:
        raise refuse(f"the activation function {config.hidden_act!r}")
    rope = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    options: dict[str, Any] = {}
    if kind == "llama3":
        options = {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": rope["factor"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    elif kind == "linear":
        options = {"rotary_scaling_factor": rope["factor"]}
    elif kind != "default":
        raise refuse(f"the rope scaling {kind!r}")
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if architecture in ("MistralForCausalLM", "Qwen2ForCausalLM") and window and "sliding_attention" in types:
        local = ["local" if kind == "sliding_attention" else "global" for kind in types]
        options |= {"use_local_attn": True, "window_size": window, "attn_types": local}
    return HookedTransformerConfig(
        model_name=name,
        original_architecture=architecture,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        d_head=d_head,
        # Grouped families whose converter always writes `_W_K` need the number even where it equals n_heads.
        n_key_value_heads=None
        if architecture in ("LlamaForCausalLM", "Olmo2ForCausalLM") and not grouped
        else n_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        act_fn=ACTIVATIONS[config.hidden_act],
        eps=config.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_base=rope["rope_theta"],
        rotary_dim=int(d_head * rope.get("partial_rotary_factor", 1.0)),
        rotary_adjacent_pairs=False,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        **options,
    )


@torch.no_grad()
def convert_weights(hf_model: Any, config: HookedTransformerConfig, architecture: str) -> dict[str, Tensor]:
    """TransformerLens' names for the checkpoint's weights; views wherever possible.

    Adds the attention biases that some converters leave at zero (`attention_bias` in Llama and OLMo-2).
    """
    weights = CONVERTERS[architecture](hf_model, config)
    for index, layer in enumerate(hf_model.model.layers):
        prefix = f"blocks.{index}.attn."
        for projection, bias in (("q_proj", "b_Q"), ("k_proj", "b_K"), ("v_proj", "b_V"), ("o_proj", "b_O")):
            value = getattr(layer.self_attn, projection).bias
            if value is not None:
                key = prefix + bias if prefix + bias in weights else f"{prefix}_{bias}"
                weights[key] = value.reshape(weights[key].shape)
    return weights


def load_by_name(name: str, architecture: str, **options: Any) -> HookedTransformer:
    """Everything else: what TransformerLens supports under that name.

    Raises:
        BadInput: it does not.
    """
    try:
        return load_from_transformer_lens(name, **options)
    except (ValueError, NotImplementedError, OSError, KeyError) as error:
        raise BadInput(
            f"the architecture {architecture} of {name!r} is not supported: expected one of {', '.join(CONVERTERS)}, or a "
            f"model that TransformerLens {version('transformer-lens')} lists (transformer_lens.supported_models); "
            "or load it with backend='bridge'"
        ) from error
