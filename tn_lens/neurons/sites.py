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
    """One kind of activation vector in every layer."""

    hook: str
    """TransformerLens' hook point below `blocks.L.`."""
    width: Literal["d_mlp", "d_attn", "d_model"]
    """Length of the vector: MLP neurons, d_head of every head, or directions of the residual stream."""
    label: str
    """Name in figures and tables."""

    @property
    def has_heads(self) -> bool:
        """Whether the vector is made of attention heads."""
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
        BadInput: there is no such site.
    """
    return f"blocks.{layer}.{SITES[site].hook}"
