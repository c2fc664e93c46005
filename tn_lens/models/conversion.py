"""Convert Hugging Face checkpoints to HookedTransformers.

`HookedTransformer.from_pretrained` supports a fixed list of names. For the families of the paper's six models this
module converts the Hugging Face configuration instead, so that other checkpoints of these families can be loaded as
well, including fine-tuned and local ones. The weights keep the memory order of the checkpoint.
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
from tn_lens.models.backend import Checkpoint
from tn_lens.models.hooked import assemble, lay_out_weights
from tn_lens.models.tensors import freeze

CONVERTERS: Mapping[str, Callable[..., dict[str, Tensor]]] = {
    "LlamaForCausalLM": convert_llama_weights,
    "Qwen2ForCausalLM": convert_qwen2_weights,
    "MistralForCausalLM": convert_mistral_weights,
    "Olmo2ForCausalLM": convert_olmo2_weights,
}
"""TransformerLens' weight converters by architecture, for models that are loaded from their Hugging Face configuration."""

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_new", "relu": "relu"}
"""TransformerLens' names for activation functions, keyed by Hugging Face's names."""


def load(checkpoint: Checkpoint) -> HookedTransformer:
    """Build a HookedTransformer from a checkpoint, without processing its weights.

    Raises:
        BadInput: an invalid configuration, or an architecture that is not supported.
    """
    name, architecture = checkpoint.name, checkpoint.architecture
    options: dict[str, Any] = {"dtype": checkpoint.dtype, "device": str(checkpoint.device)}
    if architecture not in CONVERTERS:
        # TransformerLens' own loader supports a fixed list of names
        options |= checkpoint.hub
        try:
            return lay_out_weights(freeze(HookedTransformer.from_pretrained_no_processing(name, **options)))
        except (ValueError, NotImplementedError, OSError, KeyError) as error:
            raise BadInput(
                f"the architecture {architecture} of {name!r} is not supported: expected one of {', '.join(CONVERTERS)}, "
                f"or a model that TransformerLens {version('transformer-lens')} lists "
                "(transformer_lens.supported_models); or use backend='bridge'"
            ) from error
    try:
        lens_config = convert_config(checkpoint.config, architecture, name)
    except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
        raise BadInput(f"the config.json of {name!r} cannot be converted: {type(error).__name__}: {error}") from error
    lens_config.dtype, lens_config.device = options["dtype"], options["device"]
    # the Hugging Face model is released when this function returns; the HookedTransformer keeps its weights
    return assemble(lens_config, convert_weights(checkpoint.read(), lens_config, architecture))


def convert_config(config: PretrainedConfig, architecture: str, name: str) -> HookedTransformerConfig:
    """Convert the Hugging Face configuration of a Llama, Qwen2, Mistral or OLMo-2 checkpoint.

    Raises:
        BadInput: an option that HookedTransformer does not support. The message names it.
    """

    def unsupported(feature: str) -> BadInput:
        return BadInput(
            f"{name} uses {feature}, which HookedTransformer does not support for {architecture}; use backend='bridge'"
        )

    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    is_grouped = n_key_value_heads != config.num_attention_heads
    if architecture == "Olmo2ForCausalLM" and (is_grouped or d_head * config.num_attention_heads != config.hidden_size):
        raise unsupported("fewer key/value heads than query heads, or a d_model other than n_heads * d_head")
    if getattr(config, "mlp_bias", False):
        raise unsupported("biases in its gated MLP (mlp_bias)")
    if config.hidden_act not in ACTIVATIONS:
        raise unsupported(f"the activation function {config.hidden_act!r}")
    rope = dict(config.rope_parameters)
    rope_type = rope.get("rope_type", "default")
    options: dict[str, Any] = {}
    if rope_type == "llama3":
        # TransformerLens calls Llama 3's rule NTK by parts
        options = {f"NTK_by_parts_{key}": rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
        options |= {"use_NTK_by_parts_rope": True, "NTK_original_ctx_len": rope["original_max_position_embeddings"]}
    elif rope_type == "linear":
        options = {"rotary_scaling_factor": rope["factor"]}
    elif rope_type != "default":
        raise unsupported(f"the rope scaling {rope_type!r}")
    window = getattr(config, "sliding_window", None)
    # configurations without `layer_types` apply the window to every layer
    layers = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if architecture in ("MistralForCausalLM", "Qwen2ForCausalLM") and window and "sliding_attention" in layers:
        attn_types = ["local" if kind == "sliding_attention" else "global" for kind in layers]
        options |= {"use_local_attn": True, "window_size": window, "attn_types": attn_types}
    # the converters of Qwen2 and Mistral always write `_W_K`, which TransformerLens only has if n_key_value_heads is set
    has_grouped_names = is_grouped or architecture not in ("LlamaForCausalLM", "Olmo2ForCausalLM")
    return HookedTransformerConfig(
        model_name=name,
        original_architecture=architecture,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        d_head=d_head,
        n_key_value_heads=n_key_value_heads if has_grouped_names else None,
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
        tie_word_embeddings=bool(config.tie_word_embeddings),
        **options,
    )


@torch.no_grad()
def convert_weights(hf_model: Any, config: HookedTransformerConfig, architecture: str) -> dict[str, Tensor]:
    """The checkpoint's weights under TransformerLens' names, as views wherever possible.

    Some converters set all attention biases to zero (`attention_bias` in Llama and OLMo-2). The checkpoint's are copied here.
    """
    weights = CONVERTERS[architecture](hf_model, config)
    for index, layer in enumerate(hf_model.model.layers):
        prefix = f"blocks.{index}.attn."
        for projection, bias in (("q_proj", "b_Q"), ("k_proj", "b_K"), ("v_proj", "b_V"), ("o_proj", "b_O")):
            value = getattr(layer.self_attn, projection).bias
            if value is not None:
                # grouped keys and values have names that begin with an underscore
                key = prefix + bias if prefix + bias in weights else f"{prefix}_{bias}"
                weights[key] = value.reshape(weights[key].shape)  # [head * d_head] -> [head, d_head]
    return weights
