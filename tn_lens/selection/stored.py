"""The scores of a run: D of every prompt in shards on disk, read one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from tn_lens.attribution.result import Attribution, PassSize, Scores
from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.neurons.neuron import NeuronSet, NeuronSpace
from tn_lens.prompts import Prompt, by_question
from tn_lens.runs.folder import SCORES, RunFolder
from tn_lens.runs.seals import is_sealed, read_manifest, sealed

BACKED_OFF = "backed_off"
"""Of a shard during which memory ran out: prompts and rows in a pass that fitted. Also the manifest's name for it."""


@dataclass(frozen=True)
class StoredScores:
    """D of every prompt of a run, read shard by shard: memory does not grow with the number of prompts."""

    folder: RunFolder
    space: NeuronSpace
    shards: tuple[tuple[Prompt, ...], ...]
    drawn: int | None = None
    """A seed, to count each question by one order drawn at random, as if it had been asked once; None for the mean of all."""
    keys: tuple[str, ...] = ()
    """Of the shards, so that no other file passes for one; empty where they are not known."""

    @classmethod
    def load(cls, path: str | Path) -> StoredScores:
        """The scores of a finished or interrupted run, without its model.

        Raises:
            BadInput: there is no run, or it has not come to its scores.
        """
        path = Path(path)
        if not (path / "manifest.json").is_file():
            raise BadInput(f"{path} holds no run; expected a folder that `tn-lens run --out` wrote")
        manifest = read_manifest(path / "manifest.json")
        try:
            held = json.loads((path / "prompts.json").read_text(encoding="utf-8"))
            if not is_sealed(held):
                raise ValueError("the checksum does not fit")
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
            if held["run"] != manifest["fingerprint"]:
                raise ValueError("it belongs to another run")
            return cls(RunFolder(path), NeuronSpace(**held["space"]), shards, keys=tuple(held["keys"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(
                f"{path / 'prompts.json'} is missing or damaged; run the same command again, or another version wrote it"
            ) from error

    def save_index(self) -> None:
        """Write prompts.json: which prompt each score belongs to, so that `load` needs no model."""
        shards = [
            [{"question": p.question, "category": p.category, "right": p.right, "order": p.order} for p in shard]
            for shard in self.shards
        ]
        index = {
            "run": self.folder.noted("fingerprint"),
            "space": asdict(self.space),
            "keys": self.keys,
            "shards": shards,
        }
        self.folder.write_json("prompts.json", sealed(json.loads(json.dumps(index))))

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

    def backed_off(self) -> PassSize | None:
        """The smallest pass of any shard during which memory ran out; None where it sufficed."""
        sizes = []
        for index in range(len(self.shards)):
            with safe_open(self.folder.unit(SCORES, index), "pt") as shard:
                if BACKED_OFF in shard.keys():  # noqa: SIM118 (it is no mapping)
                    sizes.append(PassSize(*shard.get_tensor(BACKED_OFF).tolist()))
        return min(sizes, default=None)

    def _read(self, index: int) -> dict[str, Tensor]:
        held = self.folder.read_unit(SCORES, index)
        if held is None or (self.keys and held[0] != self.keys[index]):
            raise BadInput(f"{self.folder.unit(SCORES, index)} is missing or damaged; run again to compute it anew")
        return held[1]

    @staticmethod
    def sites(tensors: Mapping[str, Tensor]) -> list[Any]:
        """The sites a shard holds."""
        return [site for site in ("mlp", "attn") if site in tensors]


def pack_scores(attribution: Attribution, backed_off: PassSize | None = None) -> dict[str, Tensor]:
    """D in half precision, scaled per prompt and site, what it should sum to, and the pass that fitted where memory ran out."""
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
    if backed_off is not None:
        tensors[BACKED_OFF] = torch.tensor(backed_off)
    return tensors


def _unpack(tensors: Mapping[str, Tensor], site: str, rows: range) -> Float[Tensor, "layer neuron"]:
    """The mean of some prompts' scores."""
    total = tensors[site][rows[0]].float() * tensors[f"{site}.scale"][rows[0]]
    for row in rows[1:]:
        total += tensors[site][row].float() * tensors[f"{site}.scale"][row]
    return total / len(rows) if len(rows) > 1 else total
