"""The interface of attribution methods, which compute scores with a prepared engine."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float, Shaped
from torch import Tensor

from tn_lens.core.registry import Registry
from tn_lens.neurons import SiteName
from tn_lens.questions.prompts import Prompt

Place: TypeAlias = tuple[SiteName, int]
"""A site and a layer."""


@runtime_checkable
class Engine(Protocol):
    """Prompts that were run once and can be run again with activations replaced."""

    prompts: list[Prompt]
    precision: float
    """Relative precision of the activations, the machine epsilon of their dtype."""
    own: dict[SiteName, Float[Tensor, "prompt layer position _"]]
    """The activations at the attributed positions, in at least float32."""
    logits: Float[Tensor, "prompt vocab"]
    """Logits at the last position of the prompts, without any replacement."""
    layers: Mapping[SiteName, Container[int]]
    """The layers to attribute, for each site of which not all are."""

    def carry(self, place: Place, activation: Float[Tensor, "*batch neuron"]) -> Float[Tensor, "*batch _"]:
        """Map an activation linearly to the vector that the engine interpolates at a place."""
        ...

    def carry_back(self, place: Place, gradient: Float[Tensor, "*batch _"]) -> Float[Tensor, "*batch neuron"]:
        """Map a gradient with respect to that vector to one with respect to the activation: the transpose of `carry`."""
        ...

    def run(
        self,
        paths: Mapping[Place, Float[Tensor, "prompt _ position _"]],
        nudges: Mapping[Place, Float[Tensor, "prompt 1 position _"]],
    ) -> Float[Tensor, "prompt row _"]:
        """Run rows, each with one site of one layer replaced, in the order of `paths`.

        Args:
            paths: replacements of each place, one for each row.
            nudges: added to the activations of an additional first row, in which nothing is replaced. Empty: no such row.

        Returns:
            The final vectors of the rows, the input of `logits_of`.
        """
        ...

    def logits_of(self, final: Float[Tensor, "prompt row _"]) -> Float[Tensor, "prompt row vocab"]:
        """Logits of all or some of the rows, in at least float32."""
        ...


@dataclass(frozen=True, eq=False)
class BatchScores:
    """Scores of a batch of prompts, with one entry for each target."""

    scores: list[dict[SiteName, Float[Tensor, "prompt layer _"]]]
    change: list[dict[SiteName, Float[Tensor, "prompt layer"]]]
    """target(activation) - target(baseline)."""
    error: dict[SiteName, Float[Tensor, "prompt layer"]] | None = None
    """Estimated largest error of the first target's scores at a site and layer; None if it was not estimated."""
    n_nodes: dict[SiteName, Shaped[Tensor, "prompt layer"]] | None = None
    """Number of nodes at which the path was evaluated."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """An attribution method."""

    attribute: Callable[..., BatchScores]
    """Called with an engine and the keyword arguments targets (a list of `Target`), baseline (site -> [layer, neuron],
    or [prompt, layer, neuron]), n_steps, and n_rows (rows in one pass); with tolerance and max_nodes as well if the method
    has a `tolerance`."""
    check: Callable[[int], object]
    """Raises `BadInput` if the method cannot use this number of steps."""
    tolerance: float | None = None
    """Default tolerance of a method that controls its error. 0: a quadrature rule, which does so only on request. None: the
    method has no tolerance."""
    uses_counterparts: bool = False
    """Whether the baseline of each prompt consists of the activations of its counterpart; see `counterpart_activations`."""
    sees_edge: bool = False
    """Whether some nodes lie close enough to the baseline for the scores of post-norm models to be accurate."""


METHODS: Registry[Method] = Registry("attribution method")
"""All attribution methods by name."""
