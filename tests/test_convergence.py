"""Scores of a quadrature rule next to converged ones, on a sample of prompts and in a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import QUICK
from tn_lens import (
    BadInput,
    ConvergenceCheck,
    NeuronSet,
    PromptSet,
    QuestionSet,
    TruthNeurons,
    attribute,
    build_prompts,
    convergence_check,
    figures,
    find_truth_neurons,
    load_run,
    neuron_space,
)
from tn_lens.models import Model
from tn_lens.report.page import figures_of, write_report

STEPS, T, P = (5, 20), 0.05, 0.5


@pytest.fixture(scope="module")
def prompts(toy: Model, toy_questions: QuestionSet) -> PromptSet:
    return build_prompts(toy, toy_questions.part("find"), order="both").sample(3, seed=1)


@pytest.fixture(scope="module")
def check(toy: Model, prompts: PromptSet) -> ConvergenceCheck:
    return convergence_check(toy, prompts, n_steps=STEPS, adaptive_threshold=T, share_threshold=P)


def salient_sets(scores: Mapping[str, Tensor], prompts: PromptSet) -> list[set[tuple[str, int]]]:
    """For each question, (site, flat index) of the neurons above t times the largest mean over its orders."""
    sets = []
    for rows in prompts.groups.values():
        flat = {site: values[rows.start : rows.stop].mean(0).flatten() for site, values in scores.items()}
        sets.append({(site, int(i)) for site, v in flat.items() for i in (v > T * v.max()).nonzero().flatten()})
    return sets


def test_errors_and_candidates_are_those_of_separate_attributions(
    toy: Model, prompts: PromptSet, check: ConvergenceCheck
) -> None:
    exact = attribute(toy, prompts, method="adaptive")
    by_rule = [attribute(toy, prompts, n_steps=m) for m in STEPS]
    assert exact.error is not None
    for site, scores in exact.difference.items():
        largest = scores.abs().amax((1, 2))[:, None]
        for step, each in enumerate(by_rule):
            errors = (each.difference[site] - scores).abs().amax(2) / largest
            np.testing.assert_allclose(check.error[site][step], errors, atol=1e-5)
        np.testing.assert_allclose(check.reference_error[site], exact.error[site] / largest, rtol=1e-3, atol=1e-5)
    converged = salient_sets(exact.difference, prompts)
    space = neuron_space(toy)

    def candidates(sets: list[set[tuple[str, int]]]) -> NeuronSet:
        counted = [one for each in sets for one in each]
        often = [one for one in set(counted) if counted.count(one) >= 2]  # at least half of three questions
        return NeuronSet(space.neuron(site, *divmod(index, space.width(site))) for site, index in often)

    for step, each in enumerate(by_rule):
        sets = salient_sets(each.difference, prompts)
        overlaps = [len(a & b) / len(a | b) for a, b in zip(sets, converged, strict=True)]
        np.testing.assert_allclose(check.jaccard[step], overlaps)
        assert check.candidates[step] == candidates(sets)
    assert check.converged == candidates(converged)
    assert check.lost(0) == check.candidates[0] - check.converged
    assert check.gained() == check.converged - check.candidates[1]
    assert check.lost(0)
    assert check.converged


def test_more_steps_come_closer_and_the_worst_place_is_named(check: ConvergenceCheck) -> None:
    site, layer, worst = check.worst()
    assert (site, layer) == ("attn", 0), "m = 20 misses the peak at the baseline"
    assert worst == check.error["attn"][1, :, 0].max() > 0.1
    assert check.median(1) < check.median(0)
    assert check.n_unconverged == 0
    assert (
        f"by up to {100 * worst:.1f} % of the largest score of the prompt and site (attn, layer 0)" in check.summary()
    )


def test_the_converged_scores_are_judged_too(toy: Model, prompts: PromptSet) -> None:
    check = convergence_check(toy, prompts, n_steps=5, tolerance=1e-9, max_nodes=8)
    assert check.n_unconverged > 0
    assert "The converged scores themselves exceed their tolerance of 1e-09 at" in check.summary()


def test_a_check_is_saved_and_loaded(check: ConvergenceCheck, tmp_path) -> None:
    for name in ("check.json", "check.safetensors"):
        check.save(tmp_path / name)
        loaded = ConvergenceCheck.load(tmp_path / name)
        assert loaded.summary() == check.summary()
        assert (*loaded.candidates, loaded.converged) == (*check.candidates, check.converged)
        for site in check.error:
            np.testing.assert_array_equal(loaded.error[site], check.error[site])


def test_baselines_of_single_prompts_stay_with_their_prompts(toy: Model, prompts: PromptSet) -> None:
    space, random = neuron_space(toy), torch.Generator().manual_seed(0)
    baseline = {
        site: torch.randn(len(prompts), space.n_layers, space.width(site), generator=random) * 0.1
        for site in space.sites
    }
    together = convergence_check(toy, prompts, n_steps=5, baseline=baseline)
    rows = prompts.groups[prompts[-1].question]
    own = {site: values[rows.start : rows.stop] for site, values in baseline.items()}
    last = convergence_check(toy, prompts[rows.start : rows.stop], n_steps=5, baseline=own)
    for site, error in last.error.items():
        np.testing.assert_allclose(together.error[site][:, rows.start : rows.stop], error, atol=1e-5)


def test_bad_input(toy: Model, prompts: PromptSet) -> None:
    with pytest.raises(BadInput, match="at least one prompt and one number of steps; got 0 and 2"):
        convergence_check(toy, (), n_steps=STEPS)
    with pytest.raises(BadInput, match="got 6 and 0"):
        convergence_check(toy, prompts, n_steps=())
    with pytest.raises(BadInput, match="fraction in"):
        convergence_check(toy, prompts, adaptive_threshold=20.0)
    with pytest.raises(BadInput, match="n_steps"):
        convergence_check(toy, prompts, n_steps=-1)


def test_the_figure_shows_the_largest_error_of_any_prompt(check: ConvergenceCheck) -> None:
    for theme in ("light", "dark"):
        figure = figures.plot_convergence(check, theme=theme)
        for trace, site in zip(figure.traces, check.error, strict=True):
            assert list(trace.y) == ["m = 5", "m = 20", "adaptive"]
            np.testing.assert_allclose(trace.z[:2], np.log10(check.error[site].max(1)))
            np.testing.assert_allclose(trace.customdata[2], check.reference_error[site].max(0))
    assert "Attention, layer 0" in figures.plot_convergence(check).finding


@pytest.fixture(scope="module")
def found(toy: Model, few: QuestionSet, few_resamples: None, tmp_path_factory: pytest.TempPathFactory) -> TruthNeurons:
    out = tmp_path_factory.mktemp("runs") / "run"
    find_truth_neurons(toy, few, replace(QUICK, n_steps=20, n_repetitions=1, alpha=0.05, convergence_sample=4), out=out)
    return load_run(out)


def test_a_run_with_a_rule_says_which_neurons_depend_on_its_error(found: TruthNeurons) -> None:
    check = found.convergence_check
    assert check is not None
    assert (check.n_questions, check.n_steps) == (4, (20,))
    assert check.adaptive_threshold == found.selection.adaptive_threshold
    assert found.unsupported == found.neurons & check.lost()
    n = len(found.unsupported)
    assert n > 0
    said = f"{n} of {len(found.neurons)} neurons would not be candidate" if n > 1 else "1 of"
    assert any(said in warning for warning in found.warnings())
    assert f"differ from converged scores by up to {100 * check.worst()[2]:.1f} %" in write_report(found)
    assert "convergence" in figures_of(found)


def test_runs_without_a_rule_or_without_a_sample_have_no_check(
    toy: Model, few: QuestionSet, few_resamples: None
) -> None:
    for options in ({"method": "adaptive", "tolerance": 0.01}, {"convergence_sample": 0}):
        found = find_truth_neurons(toy, few, replace(QUICK, n_repetitions=1, **options))
        assert found.convergence_check is None
        assert found.unsupported is None
        assert "converged scores (on a sample" not in " ".join(found.warnings())
    with pytest.raises(BadInput, match="convergence_sample must be a number of questions, or 0"):
        find_truth_neurons(toy, few, replace(QUICK, convergence_sample=-1))
