"""An estimate of the cost of a run before it is started."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from tn_lens.attribution.attribute import attribute
from tn_lens.attribution.methods import METHODS
from tn_lens.core.sentences import say
from tn_lens.core.settings import Settings
from tn_lens.evaluation.text import plain_texts, text_loss
from tn_lens.inference.answers import ask
from tn_lens.inference.manipulation import ManipulationCheck, manipulation_check
from tn_lens.models import Model, backend_of, check_model
from tn_lens.pipeline.effect import has_loss
from tn_lens.pipeline.parts import split_questions
from tn_lens.pipeline.settings import resolve_settings
from tn_lens.questions.prompt_set import PromptSet
from tn_lens.questions.prompts import build_prompts
from tn_lens.questions.question import QuestionSet

N_PROBES = 16
"""Maximum number of questions that are asked and attributed for the measurement."""
ENOUGH = 5.0
"""Seconds after which a measurement is not repeated with more prompts."""
SETS_DAMAGED = 50
"""Number of sets of neurons, whole, in part and alone, with which the loss on plain text is usually measured."""
CONVERGING = 2
"""Cost of integrating adaptively, relative to a fixed rule: between 1 on trained models and 4 on the toy."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The expected cost of a run on this machine, measured on a few prompts."""

    n_questions: int
    n_prompts: int
    longest_prompt: int
    """Number of tokens of the longest prompt."""
    check: ManipulationCheck
    """The manipulation check of the questions that were asked for the measurement."""
    seconds: float
    """Expected duration if as large a fraction of all questions passes the manipulation check."""
    memory: int
    """Memory of this process after the measurement (on CUDA the peak memory of the device), in bytes."""

    def summary(self) -> str:
        """The cost in one sentence; `check.explain` says what the model answers to the questions that were asked."""
        return say("run.plan", self)


def plan_run(
    model: Model, questions: QuestionSet, settings: Settings | None = None, *, drop_long: bool = False
) -> Plan:
    """Estimate the cost of `find_truth_neurons` by running its stages on a few prompts."""
    check_model(model)
    settings = resolve_settings(model, settings or Settings())
    parts = split_questions(questions, settings)
    prompts = build_prompts(
        model, parts.finding, order=settings.order or "random", seed=settings.seed, drop_long=drop_long
    )
    reporting = build_prompts(model, parts.reporting, order="both", drop_long=drop_long)
    check = manipulation_check(model, prompts.sample(N_PROBES, settings.seed))
    probe = check.prompts or check.asked
    kept = len(probe) / len(check.asked)
    per_attribution = _seconds_each(partial(attribute, model, **settings.of_attribution()), probe)
    per_answer = _seconds_each(partial(ask, model), reporting)
    n_attributed = kept * len(prompts)
    if METHODS[settings.method].tolerance == 0:  # a rule, of which a run checks the convergence
        n_attributed += CONVERGING * min(settings.convergence_sample, n_attributed)
    n_conditions = 2 + len(settings.controls) * settings.n_repetitions
    seconds = per_attribution * n_attributed
    if has_loss(model, settings, None):
        loss = _seconds(lambda: text_loss(model, plain_texts(model)))
        seconds += SETS_DAMAGED * (loss + N_PROBES * per_answer)
        n_conditions += 2  # without damage neurons
    seconds += per_answer * (len(prompts) + n_conditions * len(reporting))
    return Plan(
        n_questions=len(parts.finding),
        n_prompts=len(prompts),
        longest_prompt=max(len(p.token_ids) for p in prompts),
        check=check,
        seconds=seconds,
        memory=_memory(model),
    )


def _seconds_each(act: Callable[[PromptSet], object], prompts: PromptSet) -> float:
    """Seconds per prompt, measured on twice as many prompts each time, until the measurement takes long enough or all are run."""
    questions = list(prompts.groups)
    n = 1
    while True:
        part = prompts.only(questions[:n])  # whole questions, since some methods compare their orders
        seconds = _seconds(partial(act, part))
        if n >= len(questions) or (n > 1 and seconds > ENOUGH / 3) or seconds > ENOUGH:
            return seconds / len(part)
        n *= 2


def _seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _memory(model: Model) -> int:
    on_gpu = backend_of(model).device.type == "cuda"
    return torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
