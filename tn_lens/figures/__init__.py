"""Figures: pure functions from a result to a plotly figure. `save_figure` writes files."""

from plotly.offline import get_plotlyjs as get_plotlyjs

from tn_lens.figures.accuracies import plot_accuracies as plot_accuracies
from tn_lens.figures.attribution import plot_attribution as plot_attribution
from tn_lens.figures.attribution import plot_completeness as plot_completeness
from tn_lens.figures.attribution import plot_convergence as plot_convergence
from tn_lens.figures.damage import plot_damage as plot_damage
from tn_lens.figures.evaluation import plot_categories as plot_categories
from tn_lens.figures.evaluation import plot_dose_response as plot_dose_response
from tn_lens.figures.evaluation import plot_probability_change as plot_probability_change
from tn_lens.figures.layers import plot_layers as plot_layers
from tn_lens.figures.layers import plot_overlap as plot_overlap
from tn_lens.figures.layout import Figure as Figure
from tn_lens.figures.save import save_figure as save_figure
from tn_lens.figures.selection import plot_candidates as plot_candidates
from tn_lens.figures.selection import plot_difference as plot_difference
from tn_lens.figures.selection import plot_sweep as plot_sweep
