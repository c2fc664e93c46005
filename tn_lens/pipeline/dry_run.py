"""What a run would cost, before it is started."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from tn_lens.attribution import attribute
from tn_lens.inference.answers import ask
from tn_lens.models import Model, backend_of, check_model
from tn_lens.pipeline.run import split_questions
from tn_lens.pipeline.settings import resolve_settings
from tn_lens.prompts import build_prompts
from tn_lens.questions.question import QuestionSet


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would cost on this machine, from a few prompts that were really run."""

    n_questions: int
    n_prompts: int
    longest_prompt: int
    """Tokens."""
    seconds: float
    """Expected, if every question passes the check."""
    memory: int
    """Bytes of this process (of the device, on CUDA) at its peak so far."""

    def summary(self) -> str:
        """One sentence."""
        minutes, seconds = divmod(round(self.seconds), 60)
        return (
            f"{self.n_questions} questions, {self.n_prompts} prompts of up to {self.longest_prompt} tokens; at most about "
            f"{minutes} min {seconds} s on this machine, and {self.memory / 2**30:.1f} GiB of memory."
        )


def plan_run(model: Model, questions: QuestionSet, *, drop_long: bool = False, **settings: Any) -> Plan:
    """Say what `find_truth_neurons` would cost, by running its stages on a few prompts."""
    check_model(model)
    resolved = resolve_settings(model, **settings)
    finding, reporting, _ = split_questions(questions, resolved)
    prompts = build_prompts(model, finding, order=resolved.order, seed=resolved.seed, drop_long=drop_long)
    probe = prompts[:16]
    ask(model, probe)  # whatever is set up once
    started = time.perf_counter()
    attribute(model, probe, **resolved.of_attribution())
    per_attribution = (time.perf_counter() - started) / len(probe)
    started = time.perf_counter()
    ask(model, probe)
    per_answer = (time.perf_counter() - started) / len(probe)
    n_answers = len(prompts) + 2 * len(reporting) * (2 + 2 * resolved.n_repetitions)
    on_gpu = backend_of(model).device.type == "cuda"
    return Plan(
        n_questions=len(finding),
        n_prompts=len(prompts),
        longest_prompt=max(len(p.token_ids) for p in prompts),
        seconds=per_attribution * len(prompts) + per_answer * n_answers,
        memory=torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss,
    )
