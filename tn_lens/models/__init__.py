"""The model classes that every stage accepts, and their common interface. Other modules do not depend on the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.supported_models import MODEL_ALIASES

from tn_lens.core.errors import BadInput
from tn_lens.core.options import BackendName
from tn_lens.models import bridge_loading
from tn_lens.models.backend import Backend, Checkpoint, TokenRows
from tn_lens.models.backend import Hooks as Hooks
from tn_lens.models.bridge import Bridge
from tn_lens.neurons import NEURON_SITES, NeuronSpace, SiteName

HAS_HOOKED = find_spec("transformer_lens.HookedTransformer") is not None
"""Whether the installed TransformerLens has HookedTransformer (up to 3.9)."""

if TYPE_CHECKING or HAS_HOOKED:
    from transformer_lens import HookedTransformer

    from tn_lens.models import conversion
    from tn_lens.models.hooked import Hooked, assemble, build_model, lay_out_weights

    Model: TypeAlias = HookedTransformer | TransformerBridge
    """The model classes that every stage accepts."""
else:
    Model: TypeAlias = TransformerBridge

    def build_model(*_: object, **__: object) -> Any:
        """Placeholder: models that are built from a configuration are HookedTransformers.

        Raises:
            BadInput: always.
        """
        raise BadInput(NO_HOOKED)

    assemble = lay_out_weights = build_model

NO_HOOKED = (
    f"TransformerLens {version('transformer-lens')} has no HookedTransformer; use backend='bridge', or install "
    "'transformer-lens<4'"
)


def choose_backend(name: str | None) -> BackendName:
    """Check the name of a backend. The default is "hooked" if TransformerLens has it, "bridge" otherwise.

    Raises:
        BadInput: an unknown name, or "hooked" with a TransformerLens that has no HookedTransformer.
    """
    if name is None:
        return "hooked" if HAS_HOOKED else "bridge"
    if name not in get_args(BackendName):
        raise BadInput(f"expected backend {' or '.join(map(repr, get_args(BackendName)))}; got {name!r}")
    if name == "hooked" and not HAS_HOOKED:
        raise BadInput(NO_HOOKED)
    return "hooked" if name == "hooked" else "bridge"


def make_model(backend: BackendName, checkpoint: Checkpoint) -> Model:
    """Build a model of the backend's class from a checkpoint."""
    return conversion.load(checkpoint) if backend == "hooked" else bridge_loading.load(checkpoint)


def backend_of(model: object) -> Backend:
    """The common interface to a model.

    Raises:
        BadInput: the object is not a model of a supported class.
    """
    if isinstance(model, TransformerBridge):
        return Bridge(model)
    if HAS_HOOKED and isinstance(model, HookedTransformer):
        return Hooked(model)
    kinds = "a HookedTransformer or a TransformerBridge" if HAS_HOOKED else "a TransformerBridge"
    raise BadInput(f"expected {kinds}, got {type(model).__name__}; load the model with load_model(...)")


def official_name(source: str) -> str:
    """Resolve TransformerLens' short names ('gpt2-small') and return other names unchanged."""
    aliases = {alias: official for official, names in MODEL_ALIASES.items() for alias in names}
    return aliases.get(source, source)


def neuron_space(model: Model, sites: Sequence[SiteName] = NEURON_SITES) -> NeuronSpace:
    """The neuron space of a model at the given sites."""
    return replace(backend_of(model).space, sites=tuple(sites))


def check_model(model: object) -> None:
    """Reject, or warn about, models in which hook_z and hook_post are not the neurons of the paper.

    Raises:
        BadInput: a mixture of experts, an encoder, attention that is not causal, processed weights, or a rotated basis of z.
    """
    backend_of(model).check()


def last_logits(model: Model, tokens: TokenRows, mask: TokenRows | None = None) -> Float[Tensor, "row vocab"]:
    """Logits at the last position, in at least float32. Rows may be padded on the left if there is a mask."""
    return backend_of(model).last_logits(tokens, mask=mask)
