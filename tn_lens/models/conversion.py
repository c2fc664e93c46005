"""Convert Hugging Face checkpoints to HookedTransformers.

`HookedTransformer.from_pretrained` supports a fixed list of names. For the families of the paper's six models this
module converts the Hugging Face configuration instead, so that other checkpoints of these families can be loaded as
well, including fine-tuned and local ones. The weights keep the memory order of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import einops
import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.loading_from_pretrained import get_official_model_name, get_pretrained_model_config
from transformer_lens.pretrained.weight_conversions import (
    convert_llama_weights,
    convert_mistral_weights,
    convert_olmo2_weights,
    convert_qwen2_weights,
)
from transformers import PretrainedConfig

from tn_lens.core.errors import BadInput
from tn_lens.core.sentences import count
from tn_lens.models.backend import Checkpoint
from tn_lens.models.bridge_loading import supports
from tn_lens.models.comparison import reference_logits, reject_different
from tn_lens.models.hooked import Hooked, assemble, lay_out_weights
from tn_lens.models.hub import explain
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
        BadInput: an invalid configuration, an architecture that is not supported, or logits that differ from those of
            the Hugging Face model.
    """
    name, architecture = checkpoint.name, checkpoint.architecture
    lens_config = _lens_config(checkpoint)
    lens_config.dtype, lens_config.device = checkpoint.dtype, str(checkpoint.device)
    # the Hugging Face model is released when this function returns; the HookedTransformer keeps its weights
    hf_model = checkpoint.read()
    tokens, expected = reference_logits(hf_model)
    otherwise = "; or use backend='bridge'" if supports(architecture, checkpoint.config) else ""
    advice = (
        "use a plain checkpoint: merge adapters into their base model (peft's merge_and_unload), and remove forward "
        f"hooks and replaced modules{otherwise}"
    )
    try:
        if architecture in CONVERTERS:
            weights = convert_weights(hf_model, lens_config, architecture)
            reject_unused(hf_model, weights, name, advice)
            model = assemble(lens_config, weights)
        else:
            trainable = [p for p in hf_model.parameters() if p.requires_grad]
            options: dict[str, Any] = {"dtype": checkpoint.dtype, "device": str(checkpoint.device), **checkpoint.hub}
            model = HookedTransformer.from_pretrained_no_processing(name, hf_model=hf_model, **options)
            model = lay_out_weights(freeze(model))
            for parameter in trainable:  # TransformerLens freezes the Hugging Face model
                parameter.requires_grad = True
    except (AttributeError, TypeError, IndexError, einops.EinopsError) as error:
        raise BadInput(
            f"the modules of {name!r} are not those of {architecture} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); {advice}"
        ) from error
    with torch.no_grad():
        logits = Hooked(model).all_logits(tokens.to(checkpoint.device))
    reject_different(logits, hf_model, expected, checkpoint.dtype, advice)
    return model


def _lens_config(checkpoint: Checkpoint) -> HookedTransformerConfig:
    """TransformerLens' configuration of a checkpoint.

    Raises:
        BadInput: an invalid configuration, or an architecture that is not supported.
    """
    name, architecture = checkpoint.name, checkpoint.architecture
    if architecture in CONVERTERS:
        try:
            return convert_config(checkpoint.config, architecture, name)
        except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
            raise BadInput(
                f"the config.json of {name!r} cannot be converted: {type(error).__name__}: {error}"
            ) from error
    try:
        # TransformerLens' own loader supports a fixed list of names
        return get_pretrained_model_config(get_official_model_name(name), **checkpoint.hub)
    except (ValueError, NotImplementedError, KeyError, AttributeError) as error:
        can_bridge = supports(architecture, checkpoint.config)
        raise BadInput(
            f"the architecture {architecture} of {name!r} is not supported: expected one of {', '.join(CONVERTERS)}, "
            f"or a model that TransformerLens {version('transformer-lens')} lists "
            f"(transformer_lens.supported_models){'; or use backend=' + repr('bridge') if can_bridge else ''}"
        ) from error
    except OSError as error:
        raise BadInput(f"cannot load {name!r}: {explain(error, checkpoint.hub.get('revision'))}") from error


def convert_config(config: PretrainedConfig, architecture: str, name: str) -> HookedTransformerConfig:
    """Convert the Hugging Face configuration of a Llama, Qwen2, Mistral or OLMo-2 checkpoint.

    Raises:
        BadInput: an option that HookedTransformer does not support. The message names it.
    """

    def unsupported(feature: str) -> BadInput:
        return BadInput(
            f"{name} uses {feature}, which HookedTransformer does not support for {architecture}; use "
            + ("backend='bridge'" if supports(architecture, config) else "another model")
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

    The converters set some biases to zero: those of attention (`attention_bias` in Llama and OLMo-2), and those that a
    user added to W_out or W_U. They are copied here.
    """
    weights = CONVERTERS[architecture](hf_model, config)

    def copy_bias(linear: Any, key: str) -> None:
        if linear.bias is not None:
            weights[key] = linear.bias.reshape(weights[key].shape)  # [head * d_head] -> [head, d_head]

    for index, layer in enumerate(hf_model.model.layers):
        prefix = f"blocks.{index}."
        for projection, bias in (("q_proj", "b_Q"), ("k_proj", "b_K"), ("v_proj", "b_V"), ("o_proj", "b_O")):
            key = f"{prefix}attn.{bias}"
            # grouped keys and values have names that begin with an underscore
            copy_bias(getattr(layer.self_attn, projection), key if key in weights else f"{prefix}attn._{bias}")
        copy_bias(layer.mlp.down_proj, f"{prefix}mlp.b_out")
    copy_bias(hf_model.lm_head, "unembed.b_U")
    return weights


def reject_unused(hf_model: Any, weights: Mapping[str, Tensor], name: str, advice: str) -> None:
    """Reject a model with parameters that are not among the converted weights, such as those of an adapter.

    Raises:
        BadInput: the message names the parameters.
    """
    used = {weight.untyped_storage().data_ptr() for weight in weights.values()}
    unused = [key for key, p in hf_model.named_parameters() if p.untyped_storage().data_ptr() not in used]
    if unused:
        shown = ", ".join(unused[:3])
        raise BadInput(f"{name} has {count(len(unused), 'parameter')} that HookedTransformer lacks ({shown}); {advice}")
