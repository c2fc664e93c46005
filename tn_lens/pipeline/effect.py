"""The effect of ablating the found neurons in a run: on the questions, and on plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tn_lens.core.settings import Settings
from tn_lens.evaluation.damage import Damage, measure_damage
from tn_lens.evaluation.evaluate import evaluate, with_values
from tn_lens.evaluation.result import Evaluation
from tn_lens.evaluation.text import Text
from tn_lens.inference.interventions import Mean, intervention_called
from tn_lens.inference.manipulation import ManipulationCheck
from tn_lens.models import Model
from tn_lens.neurons import NeuronSet
from tn_lens.questions.question import QuestionSet
from tn_lens.runs.context import Run
from tn_lens.selection.result import Selection


def effect_of(
    run: Run,
    model: Model,
    selection: Selection,
    check: ManipulationCheck,
    questions: QuestionSet,
    settings: Settings,
    *,
    texts: Sequence[Text] | None,
    drop_long: bool,
) -> tuple[Selection, Evaluation, Damage | None]:
    """The selection, without damage neurons if the settings exclude them, and the effect of its ablation."""
    damage = run.stage("damage", damage_of, model, selection.neurons, check, settings, texts)
    if damage is not None and settings.exclude == "damage":
        selection = selection.without(damage.neurons)
    measuring = settings.of_evaluation() | {"order": "both", "drop_long": drop_long}
    evaluation = run.stage("evaluation", evaluate, model, questions, selection.neurons, **measuring)
    damage = run.stage("others", with_others, damage, model, questions, selection.neurons, measuring)
    return selection, evaluation, damage


def has_loss(model: Model, settings: Settings, texts: Sequence[Text] | None) -> bool:
    """Whether the loss on plain text can be measured: not without a tokenizer, or with values from other prompts."""
    intervention = intervention_called(settings.intervention, settings.seed)
    if isinstance(intervention, Mean):  # a run computes the means
        intervention = replace(intervention, values={})
    return intervention.acts_on_any_text and (texts is not None or model.tokenizer is not None)


def damage_of(
    model: Model, neurons: NeuronSet, check: ManipulationCheck, settings: Settings, texts: Sequence[Text] | None
) -> Damage | None:
    """Measure the loss on plain text with the found neurons ablated.

    None without neurons, and where there is no loss on plain text. The values of mean-ablation are means over the kept prompts.
    """
    if not neurons or not has_loss(model, settings, texts):
        return None
    intervention = intervention_called(settings.intervention, settings.seed)
    intervention = with_values(model, check.prompts, neurons, intervention)
    about = {"intervention": intervention, "bound": settings.damage_bound, "seed": settings.seed}
    return measure_damage(model, neurons, check.prompts, texts=texts, **about)


def with_others(
    damage: Damage | None, model: Model, questions: QuestionSet, neurons: NeuronSet, measuring: Mapping[str, Any]
) -> Damage | None:
    """Add the evaluation of the found neurons that are not damage neurons."""
    if damage is None or not neurons & damage.neurons or not neurons - damage.neurons:
        return damage
    others = NeuronSet(neurons - damage.neurons)
    measuring = {**measuring, "conditions": ("unablated", "ablated")}
    return replace(damage, others=evaluate(model, questions, others, **measuring))
