"""An estimate of the cost of a run before it is started."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch

from tn_lens.attribution.attribute import attribute
from tn_lens.core.sentences import say
from tn_lens.core.settings import Settings
from tn_lens.inference.answers import ask
from tn_lens.models import Model, backend_of, check_model
from tn_lens.pipeline.parts import split_questions
from tn_lens.pipeline.settings import resolve_settings
from tn_lens.questions.prompts import build_prompts
from tn_lens.questions.question import QuestionSet

N_PROBES = 16
"""Number of prompts that are run for the measurement."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The expected cost of a run on this machine, measured on a few prompts."""

    n_questions: int
    n_prompts: int
    longest_prompt: int
    """Number of tokens of the longest prompt."""
    seconds: float
    """Expected duration if every question passes the manipulation check."""
    memory: int
    """Memory of this process after the measurement (on CUDA the peak memory of the device), in bytes."""

    def summary(self) -> str:
        """Summary in one sentence."""
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
    probe = prompts.chunks(N_PROBES)[0]  # whole questions, since some methods compare their orders
    ask(model, probe)  # warm-up, which is not measured
    started = time.perf_counter()
    attribute(model, probe, **settings.of_attribution())
    per_attribution = (time.perf_counter() - started) / len(probe)
    started = time.perf_counter()
    ask(model, probe)
    per_answer = (time.perf_counter() - started) / len(probe)
    # both orders: unablated and ablated once, two controls in every repetition
    n_answers = len(prompts) + 2 * len(parts.reporting) * (2 + 2 * settings.n_repetitions)
    on_gpu = backend_of(model).device.type == "cuda"
    return Plan(
        n_questions=len(parts.finding),
        n_prompts=len(prompts),
        longest_prompt=max(len(p.token_ids) for p in prompts),
        seconds=per_attribution * len(prompts) + per_answer * n_answers,
        memory=torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss,
    )
