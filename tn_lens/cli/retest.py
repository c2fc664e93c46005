"""The parts of `tn-lens evaluate` that need torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging

from tn_lens.cli.console import frame_table, print_warnings
from tn_lens.cli.tables import open_console
from tn_lens.cli.waiting import spinner
from tn_lens.core.errors import BadInput
from tn_lens.evaluation.result import Evaluation
from tn_lens.evaluation.text import Text, plain_texts, read_texts
from tn_lens.inference.interventions import INTERVENTIONS, Intervention
from tn_lens.models import Model
from tn_lens.models.loading import load_model
from tn_lens.pipeline import retest
from tn_lens.questions.question import QuestionSet
from tn_lens.results.found import Provenance


def load(name: str | None, provenance: Provenance, *, trust_remote_code: bool, **options: Any) -> Model:
    """Load the model to evaluate: by its name, or the model of the run.

    Args:
        name: a model to use instead of that of the run.
        provenance: manifest of the run, whose dtype, revision and backend are the defaults of the options.
        trust_remote_code: run Python code of the checkpoint; only for a model given by name.
        options: dtype, device, revision and backend of `load_model`.

    Raises:
        BadInput: see `load_model` and `load_noted`.
    """
    logging.disable_progress_bar()
    source, backend = provenance.model_source, provenance.settings.get("backend")
    defaults = {"dtype": source.get("dtype"), "revision": source.get("revision"), "backend": backend}
    options = {key: value or defaults.get(key) for key, value in options.items()}
    with spinner(f"loading {name or source['model']}"):
        if name is None:
            return retest.load_noted(source["model"], **options)
        return load_model(name, trust_remote_code=trust_remote_code, **options)


def load_sets(on: Sequence[str], **options: Any) -> list[QuestionSet]:
    """Load question sets, and print warnings about them; see `tn_lens.pipeline.retest.load_sets`."""
    with print_warnings():
        return retest.load_sets(on, **options)


def intervention_of(mode: str, **options: Any) -> Intervention:
    """Create a registered intervention from those options that it accepts.

    Raises:
        BadInput: the mode is unknown, or a factor is missing or not supported.
    """
    kind = INTERVENTIONS[mode]
    names = {field.name for field in fields(kind)}
    if ("factor" in names) != (options["factor"] is not None):
        problem = "needs a factor; give one with --factor" if "factor" in names else "takes no factor; omit --factor"
        raise BadInput(f"--mode {mode} {problem}")
    return kind(**{name: value for name, value in options.items() if name in names})


def texts_of(model: Model, intervention: Intervention, file: Path | None) -> Sequence[Text] | None:
    """Plain texts to measure the loss on; None for interventions that need prompts.

    Raises:
        BadInput: the file cannot be read.
    """
    if not intervention.acts_on_any_text:
        return None
    if file is None:
        return plain_texts(model)
    return read_texts(file)


def print_evaluations(sets: Sequence[QuestionSet], evaluations: Sequence[Evaluation]) -> Console:
    """Print the tables, and sentences on their results."""
    console = open_console()
    for questions, evaluation in zip(sets, evaluations, strict=True):
        console.print(f"\n{questions.summary()}", style="bold")
        console.print(evaluation.table1())
        for sentence in [*evaluation.explain(), *evaluation.warnings()]:
            console.print(f"- {sentence}")
        if evaluation.parts:
            frame = evaluation.by_part()
            columns = ["part", "condition", "n_questions", "accuracy_mean", "order_averaged_accuracy", "answer_mass"]
            rows = frame["condition"].isin(["unablated", "ablated"])
            console.print(frame_table(frame.loc[rows, columns], title="by part"))
    if len(evaluations) > 1:
        console.print(evaluations[0].table2(*evaluations[1:]))
    return console
