"""A run -> one self-contained HTML page, the same bytes for the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .diagnosis import CASES, VERDICTS
from .evaluation import ARM_NAMES
from .figures import plotly_js
from .neurons import Neuron

if TYPE_CHECKING:
    from .found import TruthNeurons

N_ROWS = 100
"""Neurons in the page's table."""


def write_report(found: TruthNeurons, manifest: Mapping[str, Any]) -> str:
    """The page as text. Works offline; whatever questions or models are called is escaped."""
    environment = Environment(
        loader=PackageLoader("tn_lens"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    records = found.records()
    rows = [{**record, "name": str(Neuron.from_dict(record))} for record in records[:N_ROWS]]
    layers = found.plot_layers().to_html(
        full_html=False, include_plotlyjs=False, div_id="layers", config={"displaylogo": False, "responsive": True}
    )
    settings = {key: value for key, value in manifest.items() if key != "rendered_prompt"}
    return environment.get_template("report.html.j2").render(
        found=found,
        arm_names=ARM_NAMES,
        rows=rows,
        verdicts=VERDICTS,
        cases=CASES,
        case_counts={case: int((found.diagnosis.case == case).sum()) for case in CASES},
        n_hidden=max(0, len(records) - N_ROWS),
        layers=Markup(layers),
        plotly_js=Markup(f"<script>{plotly_js()}</script>"),
        manifest=json.dumps(settings, indent=1),
        prompt=manifest["rendered_prompt"],
    )
