"""Figures: a result in, a plotly figure out. Nothing is shown, and nothing is written but by `save_figure`."""

from .accuracies import plot_accuracies
from .attribution import plot_attribution, plot_completeness
from .evaluation import plot_categories, plot_dose_response, plot_probability_change
from .layers import plot_layers, plot_overlap
from .look import Figure, Theme
from .save import plotly_js, save_figure
from .selection import plot_candidates, plot_difference, plot_sweep

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
