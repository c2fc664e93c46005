"""tn_lens: find truth neurons in language models, show that they matter, and show where they sit.

The public names in the order of the pipeline; `find_truth_neurons` calls them all.
"""

# isort: off
from .loading import load_model
from .questions import Question, QuestionSet, load_questions
from .prompts import Prompt, build_prompt, build_prompts
from .manipulation import ManipulationCheck, manipulation_check
from .attribution import Attribution, attribute
from .selection import Selection, select_neurons
from .interventions import Intervention, ablate, mean_activations
from .evaluation import Evaluation, dose_response, evaluate, table1, table2
from .figures import plot_layers
from .cards import neuron_card
from .neurons import Neuron, NeuronSet
from .pipeline import find_truth_neurons
from .found import TruthNeurons
from .errors import BadInput
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
