"""The entries of a manifest that describe the model and the machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tn_lens.attribution.attribute import BATCH_SIZE
from tn_lens.core.errors import BadInput
from tn_lens.core.settings import Settings
from tn_lens.evaluation.text import Text
from tn_lens.models import Model, backend_of
from tn_lens.questions.question import QuestionSet
from tn_lens.runs.seals import read_manifest

PACKAGES: Mapping[str, str] = {
    "tn_lens": "truth-neurons",
    "torch": "torch",
    "transformer-lens": "transformer-lens",
    "transformers": "transformers",
}
"""Name in a manifest -> name of the distribution."""


def describe(
    model: Model, questions: QuestionSet, settings: Settings, example: str, texts: Sequence[Text] | None
) -> dict[str, Any]:
    """The settings of a manifest: everything that the numbers depend on, and one rendered prompt."""
    own_texts = {} if texts is None else {"texts_sha256": hashlib.sha256(repr(list(texts)).encode()).hexdigest()}
    return {
        **asdict(settings),
        **describe_model(model),
        "weight_processing": "none",
        "internal_batch_size": BATCH_SIZE,
        "questions": questions.name,
        "questions_sha256": questions.digest,
        **own_texts,
        "rendered_prompt": example,
    }


def describe_model(model: Model) -> dict[str, Any]:
    """The model, and how this process runs it."""
    backend = backend_of(model)
    quantisation = vars(model).get("quantisation")
    return {
        "model": backend.name,
        "backend": backend.kind,
        "architecture": backend.architecture,
        "weights_sha256": weights_digest(model),
        "dtype": str(backend.dtype).removeprefix("torch."),
        **({} if quantisation is None else {"quantisation": quantisation}),
        "device": backend.device.type,
        "n_threads": torch.get_num_threads(),
        "versions": {name: version(package) for name, package in PACKAGES.items()},
    }


@torch.no_grad()
def weights_digest(model: Model) -> str:
    """SHA-256 over the sum and norm of every weight, which distinguishes a model from an edited copy."""
    weights = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        # in float64, and printed with nine digits: devices add up in different orders
        total, size = parameter.sum(dtype=torch.float64), torch.linalg.vector_norm(parameter, dtype=torch.float64)
        weights.update(f"{name} {tuple(parameter.shape)} {float(total):.9g} {float(size):.9g};".encode())
    return weights.hexdigest()


def threads_of(out: str | Path | None) -> int:
    """Number of threads for a run: that of its folder if it was started before, otherwise torch's own."""
    manifest = Path(out) / "manifest.json" if out is not None else None
    try:
        stored = read_manifest(manifest)["settings"].get("n_threads") if manifest and manifest.is_file() else None
    except (BadInput, OSError, ValueError):
        stored = None
    return stored if type(stored) is int and stored > 0 else torch.get_num_threads()


@contextmanager
def fixed_threads(n: int) -> Iterator[None]:
    """Context manager that sets torch's number of threads, since it affects the last bits of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
