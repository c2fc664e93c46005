"""The vocabulary: sites, neurons, sets of neurons, and the space they live in.

A *neuron* is one entry of a named hook point: of `blocks.L.mlp.hook_post` (site `"mlp"`) or of
`blocks.L.attn.hook_z` (site `"attn"`). Attention neurons have a head and an index within it, also where
keys and values are shared by groups of heads. Inside tensors a site of a layer is flat: head * d_head + index.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from tn_lens.core.errors import BadInput

Site = Literal["mlp", "attn", "hook_mlp_out", "hook_attn_out", "hook_resid_pre", "hook_resid_mid", "hook_resid_post"]
"""Where in its layer a number is read: `"mlp"` after the MLP's activation function, `"attn"` in a head's output before W_O.

Those two hold the neurons. The others are directions of the residual stream, for attribution only.
"""

SITES: tuple[Site, ...] = ("mlp", "attn")
"""The sites of neurons."""

HOOKS: Mapping[Site, str] = {"mlp": "mlp.hook_post", "attn": "attn.hook_z"}
"""TransformerLens' hook point of each site, below `blocks.L.`; the others are called as their hooks are."""


def hook_name(site: Site, layer: int) -> str:
    """TransformerLens' name of a hook point, as in `blocks.3.mlp.hook_post`."""
    return f"blocks.{layer}.{HOOKS.get(site, site)}"


def layer_in_words(layer: int, n_layers: int) -> str:
    """Which layer, as in "layer 1, the last of 2": layers are counted from 0, which a sentence has to say."""
    if n_layers == 1:
        return "layer 0, the only one"
    if layer in (0, n_layers - 1):
        return f"layer {layer}, the {'last' if layer else 'first'} of {n_layers}"
    return f"layer {layer} of {n_layers}, counted from 0"


@dataclass(frozen=True, order=True)
class Neuron:
    """One neuron. Sorts by site, layer, head and index."""

    site: Site
    layer: int
    head: int | None
    """The attention head; None in an MLP."""
    index: int
    """Index within the head, or within the MLP."""

    def __str__(self) -> str:
        head = "" if self.head is None else f".h{self.head}"
        return f"{self.site} {self.layer}{head}:{self.index}"

    @classmethod
    def from_name(cls, name: str) -> Neuron:
        """Read what `str` writes.

        Raises:
            BadInput: it is no such name.
        """
        found = re.fullmatch(r"\s*(?:(mlp)\s+([0-9]+)|(attn)\s+([0-9]+)\.h([0-9]+)):([0-9]+)\s*", name)
        if found is None:
            raise BadInput(f"expected a neuron's name like 'mlp 3:17' or 'attn 2.h1:5', got {name!r:.60}")
        mlp, layer, _, of_head, head, index = found.groups()
        return cls("mlp", int(layer), None, int(index)) if mlp else cls("attn", int(of_head), int(head), int(index))

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Neuron:
        """Read the four keys; others are ignored.

        Raises:
            BadInput: a key is missing or has no sensible value.
        """
        try:
            site, layer, head, index = (entry[key] for key in ("site", "layer", "head", "index"))
        except KeyError as error:
            raise BadInput(
                f"a neuron needs the keys site, layer, head and index; {dict(entry)} lacks {error}"
            ) from None
        whole = [layer, index] + ([head] if site == "attn" else [])
        if site not in SITES or any(type(n) is not int or n < 0 for n in whole) or (site == "mlp" and head is not None):
            raise BadInput(
                "a neuron is {site: 'mlp', layer, head: null, index} or {site: 'attn', layer, head, index} "
                f"with whole numbers from 0; got {dict(entry)}"
            )
        return cls(site, layer, head, index)


class NeuronSet(Set[Neuron]):
    """An immutable set of neurons, iterated in sorted order, with Python's set operators (`|`, `&`, `-`, `<=`)."""

    def __init__(self, neurons: Iterable[Neuron] = ()) -> None:
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

    def at(self, site: Site, layer: int | None = None) -> NeuronSet:
        """The neurons of one site, of one layer or of all."""
        return type(self)(n for n in self if n.site == site and layer in (None, n.layer))

    def by_layer(self, n_layers: int) -> dict[Site, list[int]]:
        """How many neurons each layer holds, per site."""
        counts: dict[Site, list[int]] = {site: [0] * n_layers for site in SITES}
        for neuron in self:
            counts[neuron.site][neuron.layer] += 1
        return counts

    def jaccard(self, other: NeuronSet) -> float:
        """Size of the intersection over size of the union; 1 for two empty sets."""
        return len(self & other) / len(self | other) if self or other else 1.0

    @property
    def digest(self) -> str:
        """What tells this set from others: SHA-256 of the neurons' names."""
        return hashlib.sha256("\n".join(map(str, self)).encode()).hexdigest()

    def to_frame(self) -> pd.DataFrame:
        """One row per neuron: site, layer, head, index."""
        frame = pd.DataFrame([asdict(n) for n in self], columns=["site", "layer", "head", "index"])
        return frame.astype({"head": "Int64"})

    def save(self, path: str | Path, **provenance: Any) -> None:
        """Write JSON: the neurons, and whatever says where they come from (model, thresholds, seeds)."""
        payload = {**provenance, "neurons": [asdict(n) for n in self]}
        Path(path).write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> NeuronSet:
        """Read what `save` wrote, or the neurons.json of a run.

        Raises:
            BadInput: there is no such file, or it holds no neurons.
        """
        try:
            payload = json.loads(Path(path).read_text(encoding="utf-8"))
            entries = payload["neurons"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"expected a JSON file with a list 'neurons' at {path}; {type(error).__name__}: {error}"
            ) from None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise BadInput(f"expected a list of neurons under 'neurons' in {path}, got {str(entries)[:60]}")
        return cls(map(Neuron.from_dict, entries))


@dataclass(frozen=True, kw_only=True)
class NeuronSpace:
    """All neurons of a model: the sizes that turn a neuron into a place in a tensor and back."""

    n_layers: int
    d_mlp: int
    """Neurons of one MLP; 0 for attention-only models."""
    n_heads: int
    d_head: int
    d_model: int = 0
    """Width of the residual stream."""

    def width(self, site: Site) -> int:
        """Numbers in one layer at a site."""
        return {"mlp": self.d_mlp, "attn": self.n_heads * self.d_head}.get(site, self.d_model)

    @property
    def n_neurons(self) -> int:
        """Neurons of the whole model."""
        return self.n_layers * sum(self.width(site) for site in SITES)

    def flat(self, neuron: Neuron) -> int:
        """Index of a neuron within its layer and site."""
        return neuron.index if neuron.head is None else neuron.head * self.d_head + neuron.index

    def neuron(self, site: Site, layer: int, flat: int) -> Neuron:
        """The inverse of `flat`."""
        head, index = divmod(flat, self.d_head) if site == "attn" else (None, flat)
        return Neuron(site, layer, head, index)

    def check(self, neurons: NeuronSet) -> None:
        """Make sure that every neuron exists.

        Raises:
            BadInput: naming the first neuron that does not.
        """
        for n in neurons:
            fits = n.layer < self.n_layers and (
                n.index < self.d_mlp if n.head is None else n.head < self.n_heads and n.index < self.d_head
            )
            if not fits:
                raise BadInput(
                    f"the neuron set does not fit the model: it names {n}, and the model has {self.n_layers} layers, "
                    f"{self.d_mlp} MLP neurons a layer and {self.n_heads} heads of {self.d_head}; "
                    "use a set found in this model"
                )

    def mask(self, neurons: NeuronSet, site: Site) -> Bool[Tensor, "layer neuron"]:
        """True where a neuron of the set sits."""
        mask = torch.zeros(self.n_layers, self.width(site), dtype=torch.bool)
        for neuron in neurons.at(site):
            mask[neuron.layer, self.flat(neuron)] = True
        return mask

    def from_mask(self, mask: Bool[Tensor, "layer neuron"], site: Site) -> NeuronSet:
        """The inverse of `mask`."""
        return NeuronSet(self.neuron(site, layer, flat) for layer, flat in mask.nonzero().tolist())
