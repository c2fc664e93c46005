"""Neurons and sets of neurons.

A *neuron* is one entry of a site's vector in one layer: of `blocks.L.mlp.hook_post` (site `"mlp"`) or of
`blocks.L.attn.hook_z` (site `"attn"`). Attention neurons have a head and an index within the head, also in models with
grouped-query attention. In tensors, the neurons of a layer and site form one axis with the index head * d_head + index.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tn_lens.core.errors import BadInput
from tn_lens.neurons.sites import NEURON_SITES, SITES, SiteName

NAME = re.compile(r"\s*(?P<site>[a-z]\w*)\s+(?P<layer>[0-9]+)(?:\.h(?P<head>[0-9]+))?:(?P<index>[0-9]+)\s*")


@dataclass(frozen=True, order=True)
class Neuron:
    """One neuron. Sorts by site (alphabetically), layer, head and index."""

    site: SiteName
    layer: int
    head: int | None
    """The attention head; None for sites without heads."""
    index: int
    """Index within the head, or within the site's vector."""

    def __str__(self) -> str:
        head = "" if self.head is None else f".h{self.head}"
        return f"{self.site} {self.layer}{head}:{self.index}"

    @classmethod
    def from_name(cls, name: str) -> Neuron:
        """Parse a name in the format of `str`.

        Raises:
            BadInput: the text is not the name of a neuron.
        """
        parsed = NAME.fullmatch(name)
        site = SITES.get(parsed["site"]) if parsed else None
        if parsed is None or site is None or site.has_heads != (parsed["head"] is not None):
            raise BadInput(f"expected the name of a neuron, such as 'mlp 3:17' or 'attn 2.h1:5', got {name!r:.60}")
        head = None if parsed["head"] is None else int(parsed["head"])
        return cls(parsed["site"], int(parsed["layer"]), head, int(parsed["index"]))

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Neuron:
        """Read the keys site, layer, head and index; other keys are ignored.

        Raises:
            BadInput: a key is missing or its value is not valid.
        """
        try:
            site, layer, head, index = (entry[key] for key in ("site", "layer", "head", "index"))
        except KeyError as error:
            raise BadInput(
                f"a neuron needs the keys site, layer, head and index; {dict(entry)} lacks {error}"
            ) from None
        # a file may contain any types; `type(n) is int` excludes bool, which is a subclass of int
        has_heads = site in SITES and SITES[site].has_heads
        numbers = [layer, index] + ([head] if has_heads else [])
        are_valid = all(type(n) is int and n >= 0 for n in numbers)
        if site not in SITES or not are_valid or (head is not None and not has_heads):
            raise BadInput(
                "expected a neuron as {site: 'mlp', layer, head: null, index} or {site: 'attn', layer, head, index} "
                f"with non-negative integers; got {dict(entry)}"
            )
        return cls(site, layer, head, index)

    to_plain = __str__
    """The representation in stored results."""
    from_plain = from_name
    """The inverse of `to_plain`."""


class NeuronSet(Set[Neuron]):
    """An immutable set of neurons, iterated in sorted order, with Python's set operators (`|`, `&`, `-`, `<=`)."""

    def __init__(self, neurons: Iterable[Neuron] = ()) -> None:
        # sorted once, so that iteration, digests and files do not depend on hashing
        self._neurons = tuple(sorted(set(neurons)))
        self._members = frozenset(self._neurons)

    def __contains__(self, neuron: object) -> bool:
        return neuron in self._members

    def __iter__(self) -> Iterator[Neuron]:
        return iter(self._neurons)

    def __len__(self) -> int:
        return len(self._neurons)

    def __hash__(self) -> int:
        return hash(self._members)

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self._neurons[:4])) + (", ..." if len(self) > 4 else "")
        return f"NeuronSet of {len(self)}: {{{shown}}}"

    @property
    def sites(self) -> tuple[SiteName, ...]:
        """The sites at which the set has neurons, in the order of `SITES`."""
        there = {neuron.site for neuron in self}
        return tuple(site for site in SITES if site in there)

    def at(self, site: SiteName, layer: int | None = None) -> NeuronSet:
        """The neurons of one site, in one layer or in all."""
        return type(self)(n for n in self if n.site == site and layer in (None, n.layer))

    def by_layer(self, n_layers: int) -> dict[SiteName, list[int]]:
        """Number of neurons in each layer, for the MLP, attention and every other site of the set."""
        counts = {site: [0] * n_layers for site in dict.fromkeys((*NEURON_SITES, *self.sites))}
        for neuron in self:
            counts[neuron.site][neuron.layer] += 1
        return counts

    def jaccard(self, other: NeuronSet) -> float:
        """Size of the intersection divided by the size of the union; 1 for two empty sets."""
        return len(self._members & other._members) / len(self._members | other._members) if self or other else 1.0

    @property
    def digest(self) -> str:
        """SHA-256 of the neurons' names, which identifies the set."""
        return hashlib.sha256("\n".join(map(str, self)).encode()).hexdigest()

    def to_frame(self) -> pd.DataFrame:
        """One row per neuron: site, layer, head, index."""
        frame = pd.DataFrame([asdict(n) for n in self], columns=["site", "layer", "head", "index"])
        return frame.astype({"head": "Int64"})

    def to_plain(self) -> list[str]:
        """The representation in stored results."""
        return list(map(str, self))

    @classmethod
    def from_plain(cls, names: Iterable[str]) -> NeuronSet:
        """The inverse of `to_plain`."""
        return cls(map(Neuron.from_name, names))

    def save(self, path: str | Path, **provenance: Any) -> None:
        """Write the neurons to a JSON file, with their provenance (model, thresholds, seeds)."""
        payload = {**provenance, "neurons": [asdict(n) for n in self]}
        Path(path).write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> NeuronSet:
        """Load a set that `save` has written, or the neurons.json of a run.

        Raises:
            BadInput: the file does not exist or has no list of neurons.
        """
        try:
            payload = json.loads(Path(path).read_text(encoding="utf-8"))
            entries = payload["neurons"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"expected a JSON file with a 'neurons' list at {path}, got {type(error).__name__}: {error}"
            ) from None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise BadInput(f"expected a list of neurons under 'neurons' in {path}, got {str(entries)[:60]}")
        return cls(map(Neuron.from_dict, entries))
