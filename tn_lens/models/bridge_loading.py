"""Build a TransformerBridge from a checkpoint."""

from __future__ import annotations

import copy
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PretrainedConfig

from tn_lens.core.errors import BadInput
from tn_lens.models.backend import Checkpoint
from tn_lens.models.bridge import CAUSAL, SHAREABLE_LAYERS, layer_types
from tn_lens.models.comparison import reference_logits, reject_different
from tn_lens.models.tensors import at_least_float32, freeze, ordinary


def load(checkpoint: Checkpoint) -> TransformerBridge:
    """Build a frozen bridge around a checkpoint's Hugging Face model.

    Attention uses Hugging Face's eager implementation, which accepts a separate mask for every row. The Hugging Face
    model is not modified, and weights of the same dtype and device are shared.

    Raises:
        BadInput: TransformerLens has no bridge for this architecture, or its logits differ from Hugging Face's.
    """
    hf_model, architecture, device = checkpoint.read(), checkpoint.architecture, checkpoint.device
    shared = {id(p): nn.Parameter(ordinary(p).to(device, checkpoint.dtype), False) for p in hf_model.parameters()}
    # `shared` as the memo of deepcopy: the modules are copied, the weights are not
    private = copy.deepcopy(hf_model, shared).to(device).eval()
    private.set_attn_implementation("eager")
    tokens, expected = reference_logits(private)
    for module in private.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_hook(_in_dtype_of_stream)
    try:
        model = build_bridge_from_module(private, architecture, hf_config=private.config, model_name=checkpoint.name)
        freeze(model)
        with torch.no_grad():
            logits = at_least_float32(model(tokens, use_cache=False))
    except Exception as error:  # a bridge that does not fit the model fails with errors of any kind
        raise BadInput(
            f"the architecture {architecture} of {checkpoint.name!r} is not supported: TransformerLens "
            f"{version('transformer-lens')} has no bridge that fits it ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); use another model, or another release of transformer-lens"
        ) from error
    reject_different(
        logits,
        private,
        expected,
        checkpoint.dtype,
        "merge adapters into their base model (peft's merge_and_unload), remove forward hooks and replaced modules, or "
        "use another release of transformer-lens",
    )
    CAUSAL.add(model)  # like Hugging Face's model
    return model


def _in_dtype_of_stream(_: nn.Module, arguments: tuple[Any, ...], tables: Any) -> Any:
    """Cosines and sines in the dtype of the stream: OLMo-2's are float32, which bridges in half precision reject."""
    return tuple(table.to(arguments[0].dtype) for table in tables) if isinstance(tables, tuple) else tables


def supports(architecture: str, config: PretrainedConfig) -> bool:
    """Whether TransformerLens has a bridge for a decoder with one attention and one dense MLP per layer."""
    text = config.get_text_config(decoder=True)
    has_experts = any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    return (
        architecture in SUPPORTED_ARCHITECTURES
        and not getattr(config, "is_encoder_decoder", False)
        and getattr(text, "num_attention_heads", None) is not None
        and set(layer_types(text)) <= SHAREABLE_LAYERS
        and not has_experts
    )
