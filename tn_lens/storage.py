"""The run folder: a manifest that says what was asked, and files that are either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from .attribution.result import Attribution, Scores
from .errors import BadInput
from .neurons import NeuronSet, NeuronSpace
from .prompts import Prompt, by_question
from .seeds import generator

PROMPTS_PER_SHARD = 64
"""Prompts in one file of scores (a question's prompts stay together): at most this much work is lost."""


RESULT_FILES = (
    "report.html",
    "summary.json",
    "diagnosis.json",
    "evaluation.json",
    "neurons.json",
    "prompts.json",
    "manifest.json",
)
"""What a run writes beside its scores."""


@dataclass(frozen=True)
class RunFolder:
    """A folder whose manifest holds the settings that everything in it was made with."""

    path: Path

    @classmethod
    def open(cls, path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> RunFolder:
        """Create the folder, or go on in one of the same settings.

        Raises:
            BadInput: it holds a run of other settings (the first that differs is named), something else, or cannot be
                written.
        """
        path = Path(path)
        manifest = path / "manifest.json"
        settings = json.loads(json.dumps(settings))
        with _writing(path):
            if path.exists() and not path.is_dir():
                raise BadInput(f"{path} is a file; expected a folder, or a path that does not exist yet")
            is_run, is_empty = manifest.exists(), not path.exists() or not any(path.iterdir())
        if is_run:
            there = _settings_of(manifest)
            if overwrite:
                cls(path).clear()
            else:
                for key in [*settings, *(there.keys() - settings.keys())]:
                    if settings.get(key) != there.get(key):
                        raise BadInput(
                            f"{path} holds a run with {key} = {_short(there.get(key))}, and this one has {key} = "
                            f"{_short(settings.get(key))}; give another folder, or start over with --overwrite"
                        )
        elif not is_empty:
            raise BadInput(f"{path} is not empty and holds no run; give another folder")
        folder = cls(path)
        with _writing(path):
            (path / "scores").mkdir(parents=True, exist_ok=True)
        if overwrite or not is_run:
            folder.write_json("manifest.json", {"fingerprint": fingerprint(settings), "settings": settings})
        return folder

    def noted(self, key: str) -> Any:
        """What was noted in the manifest beside the settings; None where nothing was."""
        return json.loads((self.path / "manifest.json").read_text(encoding="utf-8")).get(key)

    def note(self, key: str, value: Any) -> None:
        """Note something in the manifest that happened on the way and does not make it another run."""
        manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        self.write_json("manifest.json", manifest | {key: value})

    def clear(self) -> None:
        """Remove what a run has written, and nothing else."""
        with _writing(self.path):
            for name in RESULT_FILES:
                (self.path / name).unlink(missing_ok=True)
            for shard in (self.path / "scores").glob("[0-9]*.safetensors"):
                shard.unlink()

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all: under a temporary name, synced, then renamed.

        Raises:
            BadInput: the disk is full, or the folder cannot be written.
        """
        path = self.path / name
        temporary = path.with_name(f".{path.name}.part")
        with _writing(path):
            try:
                with temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise

    def write_json(self, name: str, payload: Any) -> None:
        """Write JSON; NaN becomes null."""
        text = json.dumps(without_nan(payload), indent=1, ensure_ascii=False, allow_nan=False)
        self.write(name, (text + "\n").encode())

    def shard(self, index: int) -> Path:
        """The file of one shard of scores."""
        return self.path / "scores" / f"{index:05d}.safetensors"

    def write_shard(self, index: int, attribution: Attribution) -> None:
        """Store D in half precision, scaled per prompt and site, and what it should sum to."""
        self.write(f"scores/{index:05d}.safetensors", save(_pack(attribution)))

    def read_shard(self, index: int) -> dict[str, Tensor] | None:
        """The tensors of a shard; None where it is missing or damaged."""
        try:
            return load_file(self.shard(index))
        except (OSError, SafetensorError):
            return None


@dataclass(frozen=True)
class StoredScores:
    """D of every prompt of a run, read shard by shard: memory does not grow with the number of prompts."""

    folder: RunFolder
    space: NeuronSpace
    shards: tuple[tuple[Prompt, ...], ...]
    drawn: int | None = None
    """A seed, to count each question by one order drawn at random, as if it had been asked once; None for the mean of all."""

    @classmethod
    def load(cls, path: str | Path) -> StoredScores:
        """The scores of a finished or interrupted run, without its model.

        Raises:
            BadInput: there is no run, or it has not come to its scores.
        """
        path = Path(path)
        if not (path / "manifest.json").is_file():
            raise BadInput(f"{path} holds no run; expected a folder that `tn-lens run --out` wrote")
        _settings_of(path / "manifest.json")
        try:
            held = json.loads((path / "prompts.json").read_text(encoding="utf-8"))
            shards = tuple(
                tuple(
                    Prompt(
                        token_ids=(),
                        label_ids=(),
                        right=prompt["right"],
                        question=prompt["question"],
                        order=tuple(prompt["order"]),
                        category=prompt["category"],
                    )
                    for prompt in shard
                )
                for shard in held["shards"]
            )
            return cls(RunFolder(path), NeuronSpace(**held["space"]), shards)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{path / 'prompts.json'} is missing or damaged; run the same command again, or another version wrote it"
            ) from error

    def save_index(self) -> None:
        """Write prompts.json: which prompt each score belongs to, so that `load` needs no model."""
        shards = [
            [{"question": p.question, "category": p.category, "right": p.right, "order": p.order} for p in shard]
            for shard in self.shards
        ]
        self.folder.write_json("prompts.json", {"space": asdict(self.space), "shards": shards})

    @property
    def categories(self) -> dict[int, str]:
        """Question index -> category."""
        return {prompt.question: prompt.category for shard in self.shards for prompt in shard}

    @property
    def n_orders(self) -> int:
        """In how many orders questions were asked, at most."""
        return max((len(group) for shard in self.shards for _, group in by_question(shard)), default=0)

    def per_question(self, questions: Set[int] | None = None) -> Iterator[tuple[int, Scores]]:
        """D of each question (or of some), averaged over its orders."""
        for index, prompts in enumerate(self.shards):
            tensors: dict[str, Tensor] | None = None
            start = 0
            for question, group in by_question(prompts):
                if questions is None or question in questions:
                    tensors = self._read(index) if tensors is None else tensors
                    rows = range(start, start + len(group))
                    if self.drawn is not None:
                        place = int(generator(self.drawn, question).integers(len(group)))
                        rows = rows[place : place + 1]
                    yield question, {site: _unpack(tensors, site, rows) for site in self.sites(tensors)}
                start += len(group)

    def label_means(
        self, neurons: NeuronSet, questions: Set[int]
    ) -> tuple[Float[np.ndarray, " neuron"], Float[np.ndarray, " neuron"]] | None:
        """Mean Attr_t and Attr_f of some neurons over the prompts of some questions; None where Attr_t was not stored."""
        right, wrong, n_prompts = np.zeros(len(neurons)), np.zeros(len(neurons)), 0
        for index, prompts in enumerate(self.shards):
            tensors = self._read(index)
            if any(f"{site}.right" not in tensors for site in self.sites(tensors)):
                return None
            rows = [row for row, prompt in enumerate(prompts) if prompt.question in questions]
            n_prompts += len(rows)
            for place, n in enumerate(neurons):
                at = (rows, n.layer, self.space.flat(n))
                difference = tensors[n.site][at].double() * tensors[f"{n.site}.scale"][rows]
                attr_t = tensors[f"{n.site}.right"][at].double() * tensors[f"{n.site}.right.scale"][rows]
                right[place] += float(attr_t.sum())
                wrong[place] += float((attr_t - difference).sum())
        return (right / n_prompts, wrong / n_prompts) if n_prompts else None

    def completeness(self) -> dict[str, dict[str, list[float]]]:
        """Per site and layer: mean |gap| and mean |change|, over all prompts."""
        total: dict[str, dict[str, Tensor]] = {}
        count = 0
        for index in range(len(self.shards)):
            tensors = self._read(index)
            for site in self.sites(tensors):
                of_site = total.setdefault(site, {})
                for name in ("gap", "change"):
                    summed = tensors[f"{site}.{name}"].abs().sum(0).double()
                    of_site[name] = of_site.get(name, torch.zeros_like(summed)) + summed
            count += len(self.shards[index])
        return {s: {name: (value / count).tolist() for name, value in of.items()} for s, of in total.items()}

    def _read(self, index: int) -> dict[str, Tensor]:
        tensors = self.folder.read_shard(index)
        if tensors is None:
            raise BadInput(f"{self.folder.shard(index)} is missing or damaged; run again to compute it anew")
        return tensors

    @staticmethod
    def sites(tensors: Mapping[str, Tensor]) -> list[Any]:
        """The sites a shard holds."""
        return [site for site in ("mlp", "attn") if site in tensors]


def cut_shards(prompts: list[Prompt], size: int = PROMPTS_PER_SHARD) -> tuple[tuple[Prompt, ...], ...]:
    """Cut prompts by count, never by workers; a question's prompts stay together."""
    shards: list[list[Prompt]] = []
    for _, group in by_question(prompts):
        if not shards or len(shards[-1]) + len(group) > size:
            shards.append([])
        shards[-1] += group
    return tuple(map(tuple, shards))


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def without_nan(payload: Any) -> Any:
    """The same payload with None for every NaN and infinity, which JSON does not have."""
    match payload:
        case dict():
            return {key: without_nan(value) for key, value in payload.items()}
        case list() | tuple():
            return [without_nan(value) for value in payload]
        case float() if payload != payload or abs(payload) == float("inf"):
            return None
        case _:
            return payload


def _pack(attribution: Attribution) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for site, scores in attribution.difference.items():
        scale = scores.abs().amax((1, 2)).float().clamp(min=torch.finfo(torch.float32).tiny)
        tensors[site] = (scores.float() / scale[:, None, None]).half().contiguous()
        tensors[f"{site}.scale"] = scale
        if attribution.right is not None:
            right = attribution.right[site]
            scale = right.abs().amax((1, 2)).float().clamp(min=torch.finfo(torch.float32).tiny)
            tensors[f"{site}.right"] = (right.float() / scale[:, None, None]).half().contiguous()
            tensors[f"{site}.right.scale"] = scale
        tensors[f"{site}.gap"] = attribution.gap[site].float().contiguous()
        tensors[f"{site}.change"] = attribution.change[site].float().contiguous()
    return tensors


def _unpack(tensors: Mapping[str, Tensor], site: str, rows: range) -> Float[Tensor, "layer neuron"]:
    """The mean of some prompts' scores."""
    total = tensors[site][rows[0]].float() * tensors[f"{site}.scale"][rows[0]]
    for row in rows[1:]:
        total += tensors[site][row].float() * tensors[f"{site}.scale"][row]
    return total / len(rows) if len(rows) > 1 else total


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _settings_of(manifest: Path) -> dict[str, Any]:
    try:
        held = json.loads(manifest.read_text(encoding="utf-8"))
        if isinstance(held["settings"], dict) and held["fingerprint"] == fingerprint(held["settings"]):
            return held["settings"]
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise BadInput(f"{manifest} is damaged or belongs to something else; give another folder, or remove it yourself")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "make room and run again: what was computed is kept" if full else "give another folder"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadInput(f"cannot write {str(path)!r}: {reason}; {todo}") from error
