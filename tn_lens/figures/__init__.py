"""Figures: pure functions from a result to a plotly figure. `save_figure` writes files."""

from tn_lens.core.options import Theme
from tn_lens.figures.accuracies import plot_accuracies
from tn_lens.figures.attribution import plot_attribution, plot_completeness
from tn_lens.figures.evaluation import plot_categories, plot_dose_response, plot_probability_change
from tn_lens.figures.layers import plot_layers, plot_overlap
from tn_lens.figures.layout import Figure
from tn_lens.figures.save import plotly_js, save_figure
from tn_lens.figures.selection import plot_candidates, plot_difference, plot_sweep

__all__ = [
    "Figure",
    "Theme",
    "plot_accuracies",
    "plot_attribution",
    "plot_candidates",
    "plot_categories",
    "plot_completeness",
    "plot_difference",
    "plot_dose_response",
    "plot_layers",
    "plot_overlap",
    "plot_probability_change",
    "plot_sweep",
    "plotly_js",
    "save_figure",
]
