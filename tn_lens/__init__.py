"""tn_lens: find truth neurons in language models, show that they matter, and show where they sit.

The public names in the order of the pipeline; `find_truth_neurons` calls them all.
"""

# isort: off
from .loading import load_model
from .questions import Question, QuestionSet, load_questions
from .prompts import Prompt, build_prompt, build_prompts
from .manipulation import ManipulationCheck, manipulation_check
from .attribution import Attribution, attribute, mean_activations
from .selection import Selection, select_neurons
from .ablation import ablate
from .evaluation import Evaluation, evaluate
from .figures import plot_layers
from .neurons import Neuron, NeuronSet
from .pipeline import TruthNeurons, find_truth_neurons
from .errors import BadInput
# isort: on

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "BadInput",
    "Evaluation",
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
    "evaluate",
    "find_truth_neurons",
    "load_model",
    "load_questions",
    "manipulation_check",
    "mean_activations",
    "plot_layers",
    "select_neurons",
]
