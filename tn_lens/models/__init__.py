"""The model that every stage takes, of either kind, and what a stage may ask of it. No other module knows which kind it is."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.supported_models import MODEL_ALIASES

from tn_lens.core.errors import BadInput
from tn_lens.models import bridge
from tn_lens.models.backend import Backend, BackendName, Hooks, Prefix, Siblings
from tn_lens.neurons.neuron import NeuronSpace

HAS_HOOKED = find_spec("transformer_lens.HookedTransformer") is not None
"""Whether this TransformerLens still has HookedTransformer: to 3.9."""

if TYPE_CHECKING or HAS_HOOKED:
    from transformer_lens import HookedTransformer

    from tn_lens.models import conversion
    from tn_lens.models.hooked import Hooked, assemble, build_model, lay_out_weights

    Model: TypeAlias = HookedTransformer | TransformerBridge
    """The kinds of model that every stage takes."""
else:
    Model: TypeAlias = TransformerBridge

    def build_model(*_: object, **__: object) -> Any:
        """Models from a configuration are HookedTransformers.

        Raises:
            BadInput: always.
        """
        raise BadInput(NO_HOOKED)

    assemble = lay_out_weights = build_model

NO_HOOKED = (
    f"TransformerLens {version('transformer-lens')} has no HookedTransformer; take backend='bridge', or install "
    "'transformer-lens<4'"
)

__all__ = [
    "HAS_HOOKED",
    "Backend",
    "BackendName",
    "Hooks",
    "Model",
    "Prefix",
    "Siblings",
    "assemble",
    "backend_of",
    "build_model",
    "check_model",
    "choose_backend",
    "last_logits",
    "lay_out_weights",
    "make_model",
    "neuron_space",
    "official_name",
]


def choose_backend(name: str | None) -> BackendName:
    """The kind of model asked for; by default "hooked" where there is one.

    Raises:
        BadInput: an unknown name, or "hooked" where TransformerLens has it no longer.
    """
    if name is None:
        return "hooked" if HAS_HOOKED else "bridge"
    if name not in get_args(BackendName):
        raise BadInput(f"expected backend {' or '.join(map(repr, get_args(BackendName)))}; got {name!r}")
    if name == "hooked" and not HAS_HOOKED:
        raise BadInput(NO_HOOKED)
    return "hooked" if name == "hooked" else "bridge"


def make_model(backend: BackendName, name: str, architecture: str, config: Any, **options: Any) -> Model:
    """A model of the kind asked for, from a checkpoint's configuration and weights; see `bridge.load`."""
    return (conversion if backend == "hooked" else bridge).load(name, architecture, config, **options)


def backend_of(model: object) -> Backend:
    """A model as the stages see it.

    Raises:
        BadInput: it is of no kind that is known.
    """
    if isinstance(model, TransformerBridge):
        return bridge.Bridge(model)
    if HAS_HOOKED and isinstance(model, HookedTransformer):
        return Hooked(model)
    kinds = "a HookedTransformer or a TransformerBridge" if HAS_HOOKED else "a TransformerBridge"
    raise BadInput(f"expected {kinds}, got {type(model).__name__}; load the model with load_model(...)")


def official_name(source: str) -> str:
    """Resolve TransformerLens' short names ('gpt2-small'); everything else stays."""
    aliases = {alias: official for official, names in MODEL_ALIASES.items() for alias in names}
    return aliases.get(source, source)


def neuron_space(model: Model) -> NeuronSpace:
    """The sizes of a model's neuron space."""
    return backend_of(model).space


def check_model(model: object) -> None:
    """Refuse, or warn about, models in which hook_z and hook_post are not what the paper calls neurons.

    Raises:
        BadInput: mixture of experts, encoders, processed weights, or a rotated basis of z.
    """
    backend_of(model).check()


def last_logits(
    model: Model, tokens: Int[Tensor, "row column"], mask: Int[Tensor, "row column"] | None = None
) -> Float[Tensor, "row vocab"]:
    """Logits at the last position only, in at least float32; rows may be padded on the left."""
    return backend_of(model).last_logits(tokens, mask=mask)
