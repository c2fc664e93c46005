"""The scores of a run: D of every prompt in chunks on disk, read one by one."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from tn_lens.attribution.result import Attribution, Convergence, Gaps, OfOrders, PassSize, ScoreSource, at_neurons
from tn_lens.core.errors import BadInput
from tn_lens.neurons import Neuron, NeuronSpace
from tn_lens.questions.prompts import PromptSet
from tn_lens.runs.folder import SCORES, RunFolder
from tn_lens.runs.seals import is_sealed, read_manifest, sealed

BACKED_OFF = "backed_off"
"""Key of the pass size that fitted after memory ran out, in chunks and in the manifest."""
TOLERANCE = "tolerance"
"""Key of the tolerance of the stored errors in chunks."""


@dataclass(frozen=True)
class StoredScores(ScoreSource):
    """D of every prompt of a run, read chunk by chunk: memory does not grow with the number of prompts."""

    folder: RunFolder
    space: NeuronSpace
    chunks: tuple[PromptSet, ...]
    keys: tuple[str, ...]
    """Expected keys of the chunks; files with other keys are rejected."""

    @classmethod
    def load(cls, path: str | Path) -> StoredScores:
        """Load the scores of a finished or interrupted run, without its model.

        Raises:
            BadInput: there is no run, or its attribution has not finished.
        """
        path = Path(path)
        if not (path / "manifest.json").is_file():
            raise BadInput(f"{path} does not contain a run; expected a folder written by `tn-lens run --out`")
        manifest = read_manifest(path / "manifest.json")
        try:
            index = json.loads((path / "prompts.json").read_text(encoding="utf-8"))
            if not is_sealed(index):
                raise ValueError("the checksum does not match")
            if index["run"] != manifest["fingerprint"]:
                raise ValueError("it belongs to another run")
            chunks = tuple(map(PromptSet.from_plain, index["chunks"]))
            space = NeuronSpace(**index["space"] | {"sites": tuple(index["space"]["sites"])})
            return cls(RunFolder(path), space, chunks, tuple(index["keys"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(
                f"{path / 'prompts.json'} is missing, damaged or written by another version; run the same command again"
            ) from error

    def save_index(self) -> None:
        """Write prompts.json, which maps the scores to their prompts, so that `load` does not need the model."""
        index = {
            "run": self.folder.noted("fingerprint"),
            "space": asdict(self.space),
            "keys": self.keys,
            "chunks": [chunk.to_plain() for chunk in self.chunks],
        }
        self.folder.write_json("prompts.json", sealed(json.loads(json.dumps(index))))

    @property
    def prompts(self) -> PromptSet:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All prompts; without token ids if the scores were loaded from a folder."""
        return PromptSet(tuple(prompt for chunk in self.chunks for prompt in chunk))

    def each_question(self, questions: Collection[str] | None = None) -> Iterator[tuple[str, OfOrders]]:
        """D of each question (or of some) in each order in which it was asked: [order, layer, neuron] by site."""
        # a chunk without any of the questions is not read
        for index, chunk in enumerate(self.chunks):
            wanted = {q: rows for q, rows in chunk.groups.items() if questions is None or q in questions}
            tensors = self._read(index) if wanted else {}
            for question, rows in wanted.items():
                at = slice(rows.start, rows.stop)
                yield question, {site: _unpack(tensors, site, at) for site in self.space.sites}

    def at(self, neurons: Iterable[Neuron]) -> Float[Tensor, "prompt neuron"]:
        """D of the given neurons.

        Raises:
            BadInput: the model has no such neuron, or its site was not attributed.
        """
        return self.columns(neurons)["difference"].float()

    def columns(self, neurons: Iterable[Neuron]) -> dict[str, Float[Tensor, "prompt neuron"]]:
        """D of the given neurons as "difference", and Attr_t as "right" if it was stored; one pass over the chunks, in float64."""
        neurons = list(neurons)
        names = {"difference": "", "right": ".right"}
        columns: dict[str, list[Tensor]] = {}
        for index in range(len(self.chunks)):
            tensors = self._read(index)
            for name, suffix in names.items():
                if all(f"{site}{suffix}" in tensors for site in self.space.sites):
                    packed = {site: tensors[f"{site}{suffix}"] for site in self.space.sites}
                    scale = {site: tensors[f"{site}{suffix}.scale"] for site in self.space.sites}
                    values = at_neurons(packed, self.space, neurons).double()
                    scales = [scale[neuron.site] for neuron in neurons]
                    values *= torch.stack(scales, dim=1) if scales else 1
                    columns.setdefault(name, []).append(values)
        return {name: torch.cat(parts) for name, parts in columns.items()}

    def label_means(
        self, columns: Mapping[str, Float[Tensor, "prompt neuron"]], questions: Collection[str]
    ) -> tuple[Float[np.ndarray, " neuron"], Float[np.ndarray, " neuron"]] | None:
        """Mean Attr_t and Attr_f over the prompts of some questions; None if Attr_t was not stored.

        Args:
            columns: scores of the neurons, from the method `columns`.
            questions: ids of the questions.
        """
        # rows of the questions in each chunk
        rows = [[row for row, prompt in enumerate(chunk) if prompt.question in questions] for chunk in self.chunks]
        n_prompts = sum(map(len, rows))
        if "right" not in columns or not n_prompts:
            return None

        def mean(values: Float[Tensor, "prompt neuron"]) -> Float[np.ndarray, " neuron"]:
            parts = values.split(list(map(len, self.chunks)))
            # always summed chunk by chunk, since the order of summation affects the last digits
            sums = [part[at].T.contiguous().sum(-1).numpy() for part, at in zip(parts, rows, strict=True)]
            return sum(sums, start=np.zeros(values.shape[1])) / n_prompts

        # D = Attr_t - Attr_f
        return mean(columns["right"]), mean(columns["right"] - columns["difference"])

    def completeness(self) -> Gaps:
        """Mean |gap| and mean |change| of every site and layer, over all prompts."""
        totals = {
            site: {name: torch.zeros(self.space.n_layers).double() for name in ("gap", "change")}
            for site in self.space.sites
        }
        for index in range(len(self.chunks)):
            with self._open(index) as chunk:
                for site, by_name in totals.items():
                    for name, total in by_name.items():
                        total += chunk.get_tensor(f"{site}.{name}").abs().sum(0).double()  # [prompt, layer] -> [layer]
        n = sum(map(len, self.chunks))
        return {
            site: {name: (total / n).tolist() for name, total in by_name.items()} for site, by_name in totals.items()
        }

    def convergence(self) -> Convergence | None:
        """The estimated errors of the scores; None if the method does not estimate them."""
        error, n_nodes, largest = ({site: [] for site in self.space.sites} for _ in range(3))
        tolerance = None
        for index in range(len(self.chunks)):
            with self._open(index) as chunk:
                if TOLERANCE not in chunk.keys():  # noqa: SIM118 (it is not a mapping)
                    return None
                tolerance = float(chunk.get_tensor(TOLERANCE))
                for site in self.space.sites:
                    for kept, name in ((error, "error"), (n_nodes, "n_nodes"), (largest, "scale")):
                        kept[site].append(chunk.get_tensor(f"{site}.{name}"))
        if tolerance is None:
            return None
        joined = ({site: torch.cat(parts) for site, parts in kept.items()} for kept in (error, n_nodes, largest))
        return Convergence.of(tolerance, *joined)

    def backed_off(self) -> PassSize | None:
        """The smallest pass size of the chunks during which memory ran out; None if it never did."""
        sizes = []
        for index in range(len(self.chunks)):
            with self._open(index) as chunk:
                if BACKED_OFF in chunk.keys():  # noqa: SIM118 (it is not a mapping)
                    sizes.append(PassSize(*chunk.get_tensor(BACKED_OFF).tolist()))
        return min(sizes, default=None)

    def _open(self, index: int) -> Any:
        """Open a chunk to read only its small tensors; the scores are neither read nor hashed."""
        return safe_open(self.folder.chunk(SCORES, index), "pt")

    def _read(self, index: int) -> dict[str, Tensor]:
        stored = self.folder.read_chunk(SCORES, index)
        if stored is None or stored[0] != self.keys[index]:
            raise BadInput(f"{self.folder.chunk(SCORES, index)} is missing or damaged; run again to recompute it")
        return stored[1]


def pack_scores(attribution: Attribution, backed_off: PassSize | None = None) -> dict[str, Tensor]:
    """D in half precision, scaled per prompt and site, with gap and change, and the pass size that fitted if memory ran out."""
    tensors: dict[str, Tensor] = {}
    for suffix, scores in (("", attribution.difference), (".right", attribution.right or {})):
        for site, values in scores.items():
            # half precision covers few orders of magnitude, so scores are scaled to a maximum of 1
            scale = values.abs().amax((1, 2)).float().clamp(min=torch.finfo(torch.float32).tiny)  # [prompt]
            tensors[f"{site}{suffix}"] = (values.float() / scale[:, None, None]).half().contiguous()
            tensors[f"{site}{suffix}.scale"] = scale
    for site in attribution.difference:
        tensors[f"{site}.gap"] = attribution.gap[site].float().contiguous()
        tensors[f"{site}.change"] = attribution.change[site].float().contiguous()
    if attribution.error is not None and attribution.n_nodes is not None and attribution.tolerance is not None:
        tensors[TOLERANCE] = torch.tensor(attribution.tolerance, dtype=torch.float64)
        for site in attribution.difference:
            tensors[f"{site}.error"] = attribution.error[site].float().contiguous()
            tensors[f"{site}.n_nodes"] = attribution.n_nodes[site].int().contiguous()
    if backed_off is not None:
        tensors[BACKED_OFF] = torch.tensor(backed_off)
    return tensors


def _unpack(tensors: Mapping[str, Tensor], site: str, at: slice) -> Float[Tensor, "order layer neuron"]:
    return tensors[site][at].float() * tensors[f"{site}.scale"][at, None, None]
