"""Calls of `from_pretrained`, with their errors explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from huggingface_hub import constants, errors

from tn_lens.core.errors import BadInput


def read_from_hub(read: Callable[..., Any], source: str, **options: Any) -> Any:
    """Call a `from_pretrained` method, and explain its errors.

    Raises:
        BadInput: the method raised any exception.
    """
    try:
        return read(source, **{key: value for key, value in options.items() if value is not None})
    except Exception as error:
        raise BadInput(f"cannot load {source!r}: {explain(error, options.get('revision'))}") from error


def explain(error: Exception, revision: str | None) -> str:
    """What an exception of `from_pretrained` means, and what to do about it, as part of an error message."""
    causes: list[BaseException] = [error]  # transformers wraps the hub's exceptions in its own
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    text = " ".join(str(error).split())

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    # the order matters: GatedRepoError is a RepositoryNotFoundError
    if is_any(errors.GatedRepoError) or "gated repo" in text:
        return "access is restricted; accept its licence on the hub and set HF_TOKEN to a token that may read it"
    if is_any(errors.RepositoryNotFoundError) or "is not a valid model identifier" in text:
        return "not found on the hub, or private; check the spelling, set HF_TOKEN, or use a local folder"
    if is_any(errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}; check the branches, tags and commits on the hub"
    if "model.safetensors" in text:
        return "it has no safetensors weights, and pickled weights are not loaded; save it again with save_pretrained"
    if "model type" in text or "trust_remote_code" in text:
        return f"transformers does not support its architecture ({text[:200]})"
    is_offline = is_any(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    if is_offline or "couldn't connect" in text.lower():
        if constants.is_offline_mode():
            return "offline mode is on and the file is not in the cache; unset HF_HUB_OFFLINE, or use a local folder"
        return (
            "the hub cannot be reached and the file is not in the cache; check the spelling ('toy' is the embedded "
            "model), use a local folder, or try again online"
        )
    return f"{type(error).__name__}: {text[:300]}"
