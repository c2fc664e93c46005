"""What a run says in plain sentences, each from its own numbers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from tn_lens.attribution.attribute import default_memory
from tn_lens.attribution.result import worst_gap
from tn_lens.core.wording import plural
from tn_lens.evaluation import StoredEvaluation
from tn_lens.figures.attribution import say_worst
from tn_lens.results.run import Run
from tn_lens.selection.significance import say_welch

ENOUGH_SHARED = 0.7
"""Overlap of two splits (Jaccard) below which the found set depends much on the split."""
CONTROLS: Mapping[str, str] = {"random": "random neurons", "random_matched": "random neurons of the same layers"}
"""What the controls are called within a sentence."""
SMALL_GAP = 0.05
"""Completeness gap (`Run.completeness_gap`) up to which the scores' size can be taken at its word."""
OPTIONS: Mapping[str, str] = {
    "t": "--t",
    "p": "--p",
    "alpha": "--alpha",
    "correction": "--correction",
    "family": "--family",
    "order": "--order",
    "n_steps": "--n-steps",
    "method": "--method",
    "baseline": "--baseline",
    "positions": "--positions",
    "target": "--target",
    "n_repetitions": "--repetitions",
    "seed": "--seed",
    "limit": "--limit",
}
"""Settings as options of the command."""


def abstract(run: Run) -> list[str]:
    """The run in four sentences."""
    check, evaluation = run.checks["manipulation"], run.evaluation
    arms = evaluation.arms
    said = [
        f"We asked {run.model_name} {check['n_asked']:,} {plural('question', check['n_asked'])} of {run.questions_name}, each with a right and a wrong "
        f"answer to choose from; it answers {check['n_kept']:,} of them right{_in_every_order(run)}.",
    ]
    if not run.neurons:
        said.append(
            f"On these, integrated gradients single out none of its {run.selection.space.n_neurons:,} neurons, so that "
            "none was suppressed."
        )
    else:
        n_2 = len(run.selection.half_2)
        said.append(
            f"On these, integrated gradients single out {len(run.neurons):,} of its {run.selection.space.n_neurons:,} neurons: "
            f"they support the right answer on {n_2:,} {plural('question', n_2)} that had no part in choosing them."
        )
        others = [f"{_percent(arms[arm].accuracy)} with {name}" for arm, name in CONTROLS.items() if arm in arms]
        averaged = ""
        if arms["baseline"].is_complete and arms["suppressed"].is_complete and evaluation.n_orders > 1:
            before, after = (arms[arm].order_averaged_accuracy for arm in ("baseline", "suppressed"))
            averaged = f" With the letters averaged out it goes from {_percent(before)} to {_percent(after)}."
        said.append(
            f"With these neurons {evaluation.intervention}, accuracy on {evaluation.n_questions:,} questions goes from "
            f"{_percent(arms['baseline'].accuracy)} to {_percent(arms['suppressed'].accuracy)}"
            f" ({say_welch(evaluation.welch_p)})"
            f"{'; it is ' + ' and '.join(others) + ' ' + evaluation.intervention if others else ''}.{averaged}"
        )
    return said


def cautions(run: Run) -> list[str]:
    """What to be careful about, in this run."""
    selection, evaluation, checks = run.selection, run.evaluation, run.checks
    check, n = checks["manipulation"], len(run.neurons)
    said = []
    if run.model_name == "toy":
        said.append("This is the embedded toy: it shows that the machinery works, and says nothing about large models.")
    if n:
        verdicts = checks["verdicts"]
        said.append(
            f"Choice or truth. The check keeps only questions whose right answer is what the model chose, so that what supports "
            f"any choice looks like truth. On {checks['n_mistaken']:,} questions that it gets wrong{_in_one_order(run)}, {verdicts['truth']:,} of "
            f"{n:,} neurons support the right answer, {verdicts['choice']:,} the chosen one, and {verdicts['unclear']:,} "
            "cannot be told."
            if checks["n_mistaken"] > 1
            else "Choice or truth. The check keeps only questions whose right answer is what the model chose, and the model gets "
            "too few questions wrong to tell what supports truth from what supports any choice."
        )
        if evaluation.said:
            said.append(f"Letters. {evaluation.said[0]}")
        comparison = evaluation.compare("suppressed", "baseline")
        said.append(
            "Questions or orders. "
            + (
                f"The Welch test over {evaluation.n_repetitions} repetitions sees only the order of the answers. "
                if evaluation.n_repetitions > 1
                else "With one repetition there is no Welch test, and the order of the answers was drawn once. "
            )
            + f"Over the {evaluation.n_questions:,} questions the difference is {comparison.difference:.1f} points, with a 95 % "
            f"interval from {comparison.low:.1f} to {comparison.high:.1f}."
        )
        if run.unseen:
            before, after = (run.unseen[arm]["accuracy_mean"] for arm in ("baseline", "suppressed"))
            said.append(
                "The same questions. The neurons were found on some of the questions that accuracy is reported on, as in the "
                f"paper. On the others, which the model answered wrong in the check, accuracy is {before:.1f} % untouched and "
                f"{after:.1f} % suppressed."
            )
    if selection.alpha is not None and len(selection.candidates) and len(selection.half_2) > 1:
        least = _least_effect(run)
        said.append(
            f"Size of the test. {len(selection.candidates):,} candidates were tested on {len(selection.half_2):,} questions: "
            f"a neuron whose mean D is below about {least:.2f} of its standard deviation cannot pass. What is not found may "
            "still be there."
        )
    if checks["stability"]["n_splits"] > 1 and n:
        jaccard = checks["stability"]["mean_jaccard"]
        much = "much" if jaccard < ENOUGH_SHARED else "little"
        said.append(
            f"The split. Which neurons are found depends {much} on how the questions are halved: two splits share {100 * jaccard:.0f} % "
            f"of their neurons (Jaccard), and {checks['stability']['n_in_every_split']:,} neurons are found in all of "
            f"{checks['stability']['n_splits']}."
        )
    worst = worst_gap(run.checks["completeness"])
    said.append(
        f"The integral. The scores of a site and layer miss what they should sum to most in {say_worst(worst)}"
        + (
            ". Their size is not to be taken at its word, their ranking within a site is what t uses."
            if worst.share > SMALL_GAP
            else ", little enough to read them as probabilities."
        )
    )
    if np.isfinite(evaluation.probability_change) and n:
        said.append(
            f"Equation 11. The mean loss of the right answer's probability ({_percent(evaluation.probability_change)}) divides by "
            "the probability before, so that unlikely answers weigh without limit; with at least 0.01 under the line it is "
            f"{_percent(evaluation.probability_change_floored)}, the median {_percent(evaluation.probability_change_median)}."
        )
    said.append(
        f"Positions. The scores are those of {'the last position' if run.settings['positions'] == 'last' else 'all positions'}, "
        "whose logits are the answer; suppression acts at every position."
    )
    if check["is_lopsided"]:
        said.append(f"Lopsided. {check['summary'].split('. ', 1)[-1]}")
    if run.backed_off:
        said.append(
            f"Memory. It ran out on the way: passes of {run.backed_off['n_prompts']} prompts and {run.backed_off['n_rows']} rows "
            "fitted, and other sizes of a pass differ in the last bits."
        )
    if run.strangers:
        said.append(
            f"Older evaluations. The folder also holds an evaluation of other neurons on {', '.join(run.strangers)}; it is not "
            "shown here. Run `tn-lens evaluate` again to replace it."
        )
    return said


def command(run: Run) -> str:
    """The command that makes this run again."""
    settings, source = run.settings, run.source
    parts = ["tn-lens", "run", "--model", source.get("model") or run.model_name]
    parts += ["--questions", run.questions_source or run.questions_name]
    parts += ["--out", "runs/again"]
    for name, option in OPTIONS.items():
        if settings.get(name) is not None:
            parts += [option, f"{settings[name]:g}" if isinstance(settings[name], float) else str(settings[name])]
    for name, option in (("dtype", "--dtype"), ("revision", "--revision")):
        if source.get(name):
            parts += [option, str(source[name])]
    if settings["engine"] == "direct":
        parts += ["--engine", "direct"]
    if settings["device"] != "cpu":
        parts += ["--device", str(settings["device"])]
    if "max_memory" in _unusual(run):
        parts += ["--max-memory", f"{settings['max_memory'] / 2**30:.12g}"]
    if settings["separate"]:
        parts.append("--separate")
    return f"OMP_NUM_THREADS={settings['n_threads']} {shlex.join(parts)}"


def python_call(run: Run) -> str:
    """The same in Python."""
    settings, source = run.settings, run.source
    loading = [repr(source.get("model") or run.model_name)]
    loading += [f"{name}={source[name]!r}" for name in ("dtype", "revision") if source.get(name)]
    given = {name: settings[name] for name in OPTIONS if settings.get(name) is not None} | _unusual(run)
    arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return (
        "import tn_lens as tn\n\n"
        f"model = tn.load_model({', '.join(loading)})\n"
        f"questions = tn.load_questions({run.questions_source or run.questions_name!r})\n"
        f'found = tn.find_truth_neurons(model, questions, out="runs/again", {arguments})\n'
    )


def _unusual(run: Run) -> dict[str, Any]:
    """Settings that depend on the device by default, where they are others."""
    memory = run.settings["max_memory"]
    return {} if memory == default_memory(run.settings["device"]) else {"max_memory": memory}


def seeds(run: Run) -> list[str]:
    """What the seed draws."""
    seed = run.settings["seed"]
    return [
        f"One seed ({seed}) draws the orders of the answers, the halves of the questions, the control neurons of each "
        "repetition and the bootstrap; nothing else is random.",
        f"The numbers are those of {run.settings['n_threads']} {plural('thread', run.settings['n_threads'])} in "
        f"{run.settings['dtype']} on {run.settings['device']}: another number of threads changes the last bits.",
    ]


def falls(evaluation: StoredEvaluation) -> str:
    """One line about an evaluation on another question set."""
    before, after = (evaluation.arms[arm].accuracy for arm in ("baseline", "suppressed"))
    return f"{evaluation.name}: {_percent(before)} untouched, {_percent(after)} suppressed"


def _least_effect(run: Run) -> float:
    """The smallest mean D, in standard deviations, that passes the test; for Bonferroni, and the first step of the others."""
    selection = run.selection
    tested = 1 if selection.correction == "none" else len(selection.candidates)
    if selection.family == "all" and selection.correction != "none":
        tested = selection.space.n_neurons
    n = len(selection.half_2)
    return float(stats.t.isf((selection.alpha or 0) / tested, n - 1) / np.sqrt(n))


def _in_every_order(run: Run) -> str:
    return " in both orders of the answers" if run.settings["order"] == "both" else ""


def _in_one_order(run: Run) -> str:
    return " in one order or both" if run.settings["order"] == "both" else ""


def _percent(value: float | Any) -> str:
    return f"{100 * value:.1f} %" if value == value else "not known"
