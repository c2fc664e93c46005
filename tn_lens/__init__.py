"""tn_lens: find truth neurons in language models, show that they matter, and show where they sit.

The public names in the order of the pipeline; `find_truth_neurons` calls them all.
"""

# isort: off
from tn_lens.models.loading import load_model
from tn_lens.questions import Question, QuestionSet, load_questions
from tn_lens.prompts import Prompt, build_prompt, build_prompts
from tn_lens.inference.manipulation import ManipulationCheck, manipulation_check
from tn_lens.attribution import Attribution, attribute
from tn_lens.selection.select import Selection, select_neurons
from tn_lens.inference.interventions import Intervention, ablate, mean_activations
from tn_lens.evaluation import Evaluation, dose_response, evaluate, table1, table2
from tn_lens.figures import plot_layers
from tn_lens.results import neuron_card
from tn_lens.neurons.neuron import Neuron, NeuronSet
from tn_lens.pipeline.run import find_truth_neurons
from tn_lens.results.found import TruthNeurons
from tn_lens.core.errors import BadInput
# isort: on

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "BadInput",
    "Evaluation",
    "Intervention",
    "ManipulationCheck",
    "Neuron",
    "NeuronSet",
    "Prompt",
    "Question",
    "QuestionSet",
    "Selection",
    "TruthNeurons",
    "ablate",
    "attribute",
    "build_prompt",
    "build_prompts",
    "dose_response",
    "evaluate",
    "find_truth_neurons",
    "load_model",
    "load_questions",
    "manipulation_check",
    "mean_activations",
    "neuron_card",
    "plot_layers",
    "select_neurons",
    "table1",
    "table2",
]
