"""Sites: the named hook points at which a model's activations are read, attributed and changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from tn_lens.core.options import NEURON_SITES as NEURON_SITES
from tn_lens.core.registry import Registry

SiteName: TypeAlias = str
"""A key of `SITES`."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A kind of activation vector that every layer has."""

    hook: str
    """Name of TransformerLens' hook point, without the prefix `blocks.L.`."""
    width: Literal["d_mlp", "d_attn", "d_model"]
    """Length of the vector: MLP neurons, all heads together (n_heads * d_head), or the residual stream."""
    label: str
    """Name in figures and tables."""

    @property
    def has_heads(self) -> bool:
        """Whether the vector is a concatenation of attention heads."""
        return self.width == "d_attn"


SITES: Registry[Site] = Registry("site")
"""All sites by name. The paper's neurons are `"mlp"` and `"attn"`; the others are directions of the residual stream."""

SITES.register("mlp", Site(hook="mlp.hook_post", width="d_mlp", label="MLP (hook_post)"))
SITES.register("attn", Site(hook="attn.hook_z", width="d_attn", label="Attention (hook_z)"))
for _hook in ("hook_mlp_out", "hook_attn_out", "hook_resid_pre", "hook_resid_mid", "hook_resid_post"):
    SITES.register(_hook, Site(hook=_hook, width="d_model", label=f"Residual stream ({_hook})"))


def hook_name(site: SiteName, layer: int) -> str:
    """TransformerLens' name of a hook point, for example `blocks.3.mlp.hook_post`.

    Raises:
        BadInput: the site is unknown.
    """
    return f"blocks.{layer}.{SITES[site].hook}"
