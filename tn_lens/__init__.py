"""tn_lens: find truth neurons in language models, test whether they matter, and show where they sit.

The public names stand in `__init__.pyi` in the order of the pipeline; `find_truth_neurons` calls all stages. A name is imported
when it is first used, so that `import tn_lens` loads neither torch nor transformers.
"""

import lazy_loader

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
