"""Entries of every registry can be added from outside the package, and work in the whole pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import tn_lens as tn
from tests.conftest import first_of_parts
from tn_lens.attribution.methods import METHODS, BatchScores, Engine, Method
from tn_lens.core.registry import Registry
from tn_lens.evaluation.controls import CONTROLS, Control
from tn_lens.inference.interventions import INTERVENTIONS, Intervention
from tn_lens.neurons import SITES, NeuronSet, Site
from tn_lens.questions.formats import FORMATS
from tn_lens.questions.registry import QUESTION_SETS
from tn_lens.report.page import write_report

pytestmark = pytest.mark.usefixtures("few_resamples")
SMALL: dict[str, Any] = {
    "limit": 40,
    "n_steps": 4,
    "n_repetitions": 2,
    "order": "both",
    "alpha": 1e-3,
    "convergence_sample": 1,
}


@pytest.fixture
def registered() -> Iterator[Callable[[Registry, str, Any], None]]:
    """Register an entry for the duration of a test."""
    added: list[tuple[Registry, str]] = []

    def register(registry: Registry, name: str, entry: Any) -> None:
        registry.register(name, entry)
        added.append((registry, name))

    yield register
    for registry, name in added:
        del registry[name]


@pytest.fixture(scope="session")
def toy_questions() -> tn.QuestionSet:
    """So few of the toy's questions that a run takes seconds."""
    return first_of_parts(tn.load_questions("toy"), find=80, report=16)


def run(model: Any, questions: tn.QuestionSet, folder: Path, **settings: Any) -> tn.TruthNeurons:
    """The result of a small run, loaded from its folder."""
    tn.find_truth_neurons(model, questions, tn.Settings(**SMALL | settings), out=folder, progress=False)
    found = tn.load_run(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page == write_report(found)
    assert found.check.n_kept > 20
    return found


def gradient_times_activation(
    engine: Engine, *, targets: Any, baseline: Mapping[str, Tensor], n_steps: int, n_rows: int
) -> BatchScores:
    """The gradient at the activation, times the distance from the baseline, one site and layer at a time."""
    scores, change = [], []
    for target in targets:
        by_site: dict[str, Tensor] = {}
        changes: dict[str, Tensor] = {}
        for site, activation in engine.own.items():
            layers, changed = [], []
            for layer in range(activation.shape[1]):
                place = (site, layer)
                delta = activation[:, layer] - baseline[site][layer]
                start = engine.carry(place, baseline[site][layer].expand_as(activation[:1, layer]))[0, 0]
                direction = engine.carry(place, delta)
                # two rows: at the activation and at the baseline
                alphas = torch.tensor([1.0, 0.0], dtype=start.dtype)[:, None, None]
                point = (start + alphas * direction[:, None]).requires_grad_()
                with torch.enable_grad():
                    logits = engine.logits_of(engine.run({place: point}, {}))
                    values = torch.stack([target(rows, p) for rows, p in zip(logits, engine.prompts, strict=True)])
                (gradient,) = torch.autograd.grad(values[:, 0].sum(), point)
                layers.append((delta * engine.carry_back(place, gradient[:, 0])).sum(1))
                changed.append((values[:, 0] - values[:, 1]).detach())
            by_site[site], changes[site] = torch.stack(layers, 1), torch.stack(changed, 1)
        scores.append(by_site)
        change.append(changes)
    return BatchScores(scores, change)


def test_an_attribution_method(toy: Any, toy_questions: tn.QuestionSet, registered: Any, tmp_path: Path) -> None:
    method = Method(attribute=gradient_times_activation, check=lambda n_steps: None)
    registered(METHODS, "gradient_at_activation", method)
    prompt = tn.build_prompts(toy, toy_questions[:1], order="given")[0]
    scores = tn.attribute(toy, prompt, method="gradient_at_activation")
    one_node = tn.attribute(toy, prompt, n_steps=1)  # a single Riemann node at alpha = 1 gives the same scores
    for site in scores.difference:
        torch.testing.assert_close(scores.difference[site], one_node.difference[site], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(scores.change[site], one_node.change[site], atol=1e-6, rtol=1e-4)
    found = run(toy, toy_questions, tmp_path / "run", method="gradient_at_activation")
    assert found.settings.method == "gradient_at_activation"
    assert len(found.neurons)
    assert "gradient_at_activation" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_question_set(toy: Any, toy_questions: tn.QuestionSet, registered: Any, tmp_path: Path) -> None:
    def load_colours(source: Any = None, *, shade: str = "colour") -> tn.QuestionSet:
        kept = tuple(q for q in toy_questions if q.category in (shade, "food", "animal", "trade", "home"))
        return tn.QuestionSet(name="colours", questions=kept, template=toy_questions.template)

    registered(QUESTION_SETS, "colours", load_colours)
    questions = tn.load_questions("colours", shade="metal")
    assert "metal" in questions.categories
    with pytest.raises(tn.BadInput, match="tint"):
        tn.load_questions("colours", tint="metal")
    found = run(toy, tn.load_questions("colours"), tmp_path / "run")
    assert found.questions_name == "colours"
    assert set(found.check.asked.categories.values()) <= {"colour", "food", "animal", "trade", "home"}


def test_a_format(toy: Any, toy_questions: tn.QuestionSet, registered: Any, tmp_path: Path) -> None:
    template = tn.PromptTemplate(
        user="Question : {question} {choices}",
        choice="Answer {label} : {choice}",
        separator=" ",
        cue=" : Answer :",
        chat=False,
    )
    registered(FORMATS, "colon", template)
    found = run(toy, toy_questions, tmp_path / "run", format="colon")
    assert found.provenance.settings["rendered_prompt"].endswith(" : Answer :")


@dataclass(frozen=True, kw_only=True)
class Flip(Intervention):
    """Change the sign of the activations."""

    label = "flipped"

    def prepare(self, model: Any, prompts: Any, places: Any) -> Any:
        return lambda layout: lambda place, activations: -activations


def test_an_intervention(toy: Any, toy_questions: tn.QuestionSet, registered: Any, tmp_path: Path) -> None:
    registered(INTERVENTIONS, "flip", Flip)
    prompts = tn.build_prompts(toy, toy_questions[:4], order="given")
    neurons = NeuronSet([tn.Neuron("mlp", 1, None, 33), tn.Neuron("attn", 1, 1, 15)])
    flipped = tn.ask(toy, prompts, neurons=neurons, intervention=Flip())
    torch.testing.assert_close(flipped, tn.ask(toy, prompts, neurons=neurons, intervention=tn.Scale(factor=-1)))
    found = run(toy, toy_questions, tmp_path / "run", intervention="flip")
    assert found.evaluation.intervention == "flipped"
    assert "flipped" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_control(toy: Any, toy_questions: tn.QuestionSet, registered: Any, tmp_path: Path) -> None:
    def neighbours(
        space: Any, neurons: NeuronSet, activity: Callable[[], Mapping[str, Tensor]], rng: np.random.Generator
    ) -> NeuronSet:
        """The next neuron of the same site and layer that was not found."""
        drawn: set[tn.Neuron] = set()
        for neuron in neurons:
            width = space.width(neuron.site)
            places = ((space.flat(neuron) + step) % width for step in range(1, width))
            others = (space.neuron(neuron.site, neuron.layer, place) for place in places)
            drawn |= {next((n for n in others if n not in neurons and n not in drawn), neuron)} - set(neurons)
        return NeuronSet(drawn)

    registered(CONTROLS, "neighbours", Control(draw=neighbours, label="neighbouring neurons"))
    found = run(toy, toy_questions, tmp_path / "run", controls=("random", "neighbours"))
    assert list(found.evaluation.conditions) == ["unablated", "random", "neighbours", "ablated"]
    assert len(found.evaluation.conditions["neighbours"].probabilities) == SMALL["n_repetitions"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "neighbouring neurons" in page
    # another control does not change the draws of the others
    plain = tn.evaluate(
        toy,
        toy_questions.part("report"),
        found.neurons,
        n_repetitions=2,
        conditions=("unablated", "random", "ablated"),
    )
    np.testing.assert_array_equal(
        plain.conditions["random"].probabilities, found.evaluation.conditions["random"].probabilities
    )


def test_a_site_of_the_residual_stream(
    toy: Any, toy_questions: tn.QuestionSet, registered: Any, tmp_path: Path
) -> None:
    registered(SITES, "stream", Site(hook="hook_resid_mid", width="d_model", label="Stream after attention"))
    found = run(toy, toy_questions, tmp_path / "run", sites=("stream",), share_threshold=0.2)
    assert found.selection.space.sites == ("stream",)
    assert found.selection.space.n_neurons == 2 * 96
    assert found.neurons
    assert {neuron.site for neuron in found.neurons} == {"stream"}
    assert tn.Neuron.from_name(str(next(iter(found.neurons)))) in found.neurons
    # zero-ablating directions of the residual stream equals a hook that sets them to zero
    prompts = tn.build_prompts(toy, toy_questions[:4], order="given")

    def zero(value: Float[Tensor, "row column d_model"], hook: Any) -> Tensor:
        value = value.clone()
        for neuron in found.neurons:
            if f"blocks.{neuron.layer}.hook_resid_mid" == hook.name:
                value[..., neuron.index] = 0
        return value

    from tn_lens.models import backend_of

    hooks = [(f"blocks.{layer}.hook_resid_mid", zero) for layer in range(2)]
    with backend_of(toy).hooks(hooks):
        expected = tn.ask(toy, prompts)
    torch.testing.assert_close(tn.ask(toy, prompts, neurons=found.neurons), expected)
    # the output direction of such a neuron is a unit vector, and its card shows the unembedding of this vector
    assert found.cards[0].promotes
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Stream after attention" in page


def test_a_name_is_registered_once() -> None:
    with pytest.raises(tn.BadInput, match="the site 'mlp' is already registered"):
        SITES.register("mlp", SITES["attn"])


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(tn.BadInput, match="unknown control 'none': expected random, random_matched, top_activation"):
        CONTROLS["none"]
