"""Load a model: a hub id, a local folder, or a Hugging Face model in memory -> a model of either kind.

What is read from the hub or a folder is checked here; `models` makes a model of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from tn_lens.core.errors import BadInput
from tn_lens.models import BackendName, Model, backend_of, choose_backend, make_model, official_name

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


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
        name_or_folder: `"toy"`, a hub id such as `"Qwen/Qwen2.5-3B-Instruct"`, or a folder that
            `save_pretrained` wrote. With `hf_model` it is only the name that results carry.
        dtype: of the weights, as `torch.bfloat16` or `"bfloat16"`. By default float32 on the CPU and the
            checkpoint's own on an accelerator.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`; by default CUDA where there is one.
        revision: branch, tag or commit on the hub.
        hf_model: a Hugging Face model in memory, whose weights are shared, not copied, where dtype and device agree.
        tokenizer: to use instead of the checkpoint's.
        trust_remote_code: let the checkpoint's own Python code run.
        backend: `"hooked"`, TransformerLens' own model of the families that it knows, the default where TransformerLens
            has it (to 3.9); or `"bridge"`, Hugging Face's model with TransformerLens' hook points in it, the only one
            from 4 on. The numbers are the same.

    Returns:
        The model, with its tokenizer and in evaluation mode; weights hold no gradient.

    Raises:
        BadInput: no such model, no access to it, an architecture or a quantisation that is not supported, a device
            that is not there, or too little memory for the weights.
    """
    name, backend = str(name_or_folder), choose_backend(backend)
    device = find_device(device)
    source = str(resources.files("tn_lens.toy").joinpath("model")) if name == "toy" else name
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = hf_model.config if hf_model is not None else read_config(source, **hub)
    architecture = architecture_of(config, hf_model)
    refuse_quantised(config, name)
    weights_dtype = find_dtype(dtype, config, device)
    if tokenizer is None and (hf_model is None or Path(source).is_dir()):
        tokenizer = read_from_hub(AutoTokenizer.from_pretrained, source, **hub)

    def read() -> Any:
        check_memory(config, weights_dtype, device)
        return read_weights(source, name, dtype=weights_dtype, **hub)

    model = make_model(
        backend,
        name,
        architecture,
        config,
        dtype=weights_dtype,
        device=device,
        hf_model=hf_model,
        read=read,
        hub={key: value for key, value in hub.items() if value},
    )
    short = name.rstrip("/").rsplit("/", 1)[-1]
    # a folder called toy is not the embedded model
    backend_of(model).name_and_equip(name if short == "toy" else short, tokenizer)
    if hf_model is None:
        asked = None if dtype is None else str(dtype).removeprefix("torch.")
        loaded_from = {"model": name, "dtype": asked, "revision": revision, "backend": backend}
        vars(model)["loaded_from"] = loaded_from  # a run notes it
    return model


def architecture_of(config: PretrainedConfig, hf_model: Any) -> str:
    """The architecture's name, from the configuration, the model in memory, or the model type."""
    named = getattr(config, "architectures", None)
    if named:
        return named[0]
    return MODEL_TYPES.get(config.model_type, config.model_type) if hf_model is None else type(hf_model).__name__


def find_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, or the best one there is.

    Raises:
        BadInput: it is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]
        raise BadInput(f"device {str(device)!r} is not there; this machine has {', '.join(there)}") from error
    return found


def find_dtype(dtype: torch.dtype | str | None, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype asked for; by default float32 on the CPU and the checkpoint's own elsewhere."""
    if dtype is None:
        own = getattr(config, "dtype", None) or torch.float32
        return torch.float32 if device.type == "cpu" or not isinstance(own, torch.dtype) else own
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise BadInput(f"expected dtype float32, float64, bfloat16 or float16, got {dtype!r}")
    return found


def read_config(source: str, **hub: Any) -> PretrainedConfig:
    """The Hugging Face configuration of a folder or hub id."""
    folder = Path(source)
    if folder.is_dir():
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise BadInput(
                f"{source} holds a LoRA adapter, not a model; merge it into its base model "
                "(peft's merge_and_unload, then save_pretrained) and load the merged folder"
            )
        if not (folder / "config.json").exists():
            raise BadInput(f"{source} has no config.json; expected a folder written by save_pretrained")
    elif not HUB_ID.fullmatch(source):
        raise BadInput(
            f"{source!r} is neither a folder nor a hub id; expected 'toy', a folder, or an id like 'org/name'"
        )
    return read_from_hub(AutoConfig.from_pretrained, official_name(source), **hub)


def read_from_hub(read: Callable[..., Any], source: str, **options: Any) -> Any:
    """Call a `from_pretrained`, and turn the hub's many errors into one sentence each."""
    from huggingface_hub import constants, errors

    try:
        return read(source, **{key: value for key, value in options.items() if value is not None})
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
            causes.append(cause)
        kinds = tuple(type(cause) for cause in causes)
        text = " ".join(str(error).split())

        def any_is(*expected: type) -> bool:
            return any(issubclass(kind, expected) for kind in kinds)

        if any_is(errors.GatedRepoError) or "gated repo" in text:
            said = "accept its licence on the hub and set HF_TOKEN to a token that may read it"
        elif any_is(errors.RepositoryNotFoundError) or "is not a valid model identifier" in text:
            said = (
                "the hub knows no such model (or HF_TOKEN may not see it); check the spelling, or give a local folder"
            )
        elif any_is(errors.RevisionNotFoundError):
            said = f"it has no revision {options.get('revision')!r}"
        elif "model.safetensors" in text:
            said = (
                "it has no weights as safetensors, and pickled ones are not opened; save it anew with save_pretrained"
            )
        elif "model type" in text or "trust_remote_code" in text:
            said = f"transformers does not know its architecture ({text[:200]})"
        elif (
            any_is(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
            or "couldn't connect" in text.lower()
        ):
            said = (
                "the hub cannot be reached and the file is not in the cache; check the spelling ('toy' is the embedded model), "
                "give a local folder, or try again online"
            )
            if constants.is_offline_mode():
                said = (
                    "offline mode is on and the file is not in the cache; unset HF_HUB_OFFLINE, or give a local folder"
                )
        else:
            said = f"{type(error).__name__}: {text[:300]}"
        raise BadInput(f"cannot load {source!r}: {said}") from error


def read_weights(source: str, name: str, **options: Any) -> Any:
    """The checkpoint's weights, every one of them and no others.

    Raises:
        BadInput: some are missing (Hugging Face would make them up), left over, or of another shape.
    """
    model, report = read_from_hub(
        AutoModelForCausalLM.from_pretrained,
        source,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        use_safetensors=True,  # never unpickled
        **options,
    )
    left_over = [key for key in report["unexpected_keys"] if ".layers." in key and "inv_freq" not in key]
    wrong = [key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]]
    for what, keys in (
        ("lacks", report["missing_keys"]),
        ("has the wrong size for", wrong),
        ("has no place for", left_over),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:3])
            raise BadInput(
                f"the checkpoint {name!r} {what} {len(keys)} of the weights that its config.json names ({shown})"
            )
    return model


def refuse_quantised(config: PretrainedConfig, name: str) -> None:
    """Quantised weights are not supported: their gradients are not those of the model's numbers."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        read = quantization.get if isinstance(quantization, dict) else lambda key: getattr(quantization, key, None)
        raise BadInput(
            f"{name} is quantised ({read('quant_method') or 'unknown method'}); load the unquantised checkpoint, "
            "in bfloat16 if memory is short"
        )


def check_memory(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Compare what the weights need with what is free, before anything is read.

    Raises:
        BadInput: with both numbers.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    needed = sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > available:
        raise BadInput(
            f"the weights need {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, and {device} has "
            f"{available / 2**30:.1f} GiB free; take a smaller dtype, another device, or a smaller model"
        )
