"""tn_lens: find truth neurons in language models, test their effect by ablation, and plot their distribution over layers.

`__init__.pyi` lists the public names in the order of the pipeline; `find_truth_neurons` runs all stages. Names are imported
lazily, so `import tn_lens` loads neither torch nor transformers.
"""

import lazy_loader

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
