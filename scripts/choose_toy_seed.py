"""Train every seed, choose one seed and its threshold by rules that were fixed in advance, and write the model card.

`python -m scripts.choose_toy_seed --out FOLDER [--trained FOLDER]`. Both rules use the tuning questions only. The results on
the reporting questions are measured afterwards for every seed, and the model card lists all of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import tn_lens.toy
from scripts.train_toy import DROPOUT, N_STEPS, ROWS, SWITCH
from tn_lens import attribute, build_prompts, evaluate, load_model, load_questions, manipulation_check, select_neurons
from tn_lens.evaluation.result import Evaluation

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2, 3, 4)
THRESHOLDS = (0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
LEAST_FALL = 0.10
"""Minimum reduction of the order-averaged accuracy on the tuning questions when the found neurons are zero-ablated."""
LEAST_MASS = 0.95
"""Minimum answer mass with the found neurons zero-ablated."""
MODEL_FOLDER = Path(tn_lens.toy.__file__).parent / "model"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One trained seed: the numbers that the rules use, and the evaluation on the reporting questions."""

    seed: int
    tuning_accuracy: float
    adaptive_threshold: float | None
    """The first adaptive threshold t that meets the rule; None if no threshold does."""
    n_found: int
    report: Evaluation | None


def threshold_and_report(folder: Path, seed: int) -> Candidate:
    """Try the thresholds from high to low and take the first one that meets `LEAST_FALL` and `LEAST_MASS`."""
    model, questions = load_model(folder), load_questions("toy")
    tune, report = questions.part("tune"), questions.part("report")
    check = manipulation_check(model, build_prompts(model, questions.part("find"), order="both"))
    scores = attribute(model, check.prompts)
    accuracy = json.loads((folder / "training.json").read_text())["tuning_accuracy"]
    for t in THRESHOLDS:
        neurons = select_neurons(scores, adaptive_threshold=t).neurons
        tuning = evaluate(model, tune, neurons, n_repetitions=1, conditions=("unablated", "ablated"))
        unablated, ablated = tuning.conditions["unablated"], tuning.conditions["ablated"]
        reduction = unablated.order_averaged_accuracy - ablated.order_averaged_accuracy
        if reduction >= LEAST_FALL and ablated.answer_mass >= LEAST_MASS:
            evaluation = evaluate(model, report, neurons)
            return Candidate(
                seed=seed,
                tuning_accuracy=accuracy,
                adaptive_threshold=t,
                n_found=len(neurons),
                report=evaluation,
            )
    return Candidate(seed=seed, tuning_accuracy=accuracy, adaptive_threshold=None, n_found=0, report=None)


def train_all(folder: Path) -> None:
    """Train every seed in a separate process with one thread, two processes at a time."""

    def train(seed: int) -> None:
        command = [sys.executable, "-m", "scripts.train_toy", "--seed", str(seed), "--out", str(folder / str(seed))]
        subprocess.run(command, check=True, cwd=ROOT)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, SEEDS))


def model_card(candidates: list[Candidate], chosen: Candidate) -> str:
    """Write the model card as Markdown: what the model is, how it was trained, the rules, and every seed."""
    rows = []
    for candidate in candidates:
        shipped = " (shipped)" if candidate is chosen else ""
        start = f"| {candidate.seed}{shipped} | {100 * candidate.tuning_accuracy:.1f} |"
        if candidate.report is None:
            rows.append(f"{start} none | - | - | - | - | - | - | - |")
            continue
        conditions = candidate.report.conditions
        unablated, ablated = conditions["unablated"], conditions["ablated"]
        shown = (unablated, ablated, conditions["random"], conditions["random_matched"])
        cells = " | ".join(f"{100 * condition.accuracy:.1f}" for condition in shown)
        averaged = " -> ".join(f"{100 * condition.order_averaged_accuracy:.1f}" for condition in (unablated, ablated))
        letters = f"{ablated.answer_mass:.2f}, {ablated.share_a:.2f}"
        t = f"{candidate.adaptive_threshold:.0%}"
        rows.append(f"{start} {t} | {candidate.n_found} | {cells} | {averaged} | {letters} |")
    formats = ", ".join(f"{n} {kind}" for kind, n in ROWS.items())
    return f"""# Model card: the embedded toy model

A two-layer Llama (d_model 96, 4 heads of 24, d_mlp 384, 960 neurons, untied embeddings, word-level vocabulary of 283) that was
trained on the 1,440 facts of an invented world and answers questions about them with a letter. With it the whole method runs
in seconds without a GPU or a download. It says nothing about where truth neurons are in large models.

It is trained by `scripts/train_toy.py`: {N_STEPS} steps of {formats} sequences (the last two formats only after
{SWITCH:.0%} of the steps, when the exceptions are added), Muon for the matrices of the blocks, AdamW for all other parameters,
soft targets (0.8 on the right option, 80 % of it on the upper-case letter), dropout {DROPOUT} on the inputs of W_out and W_O.
Three groups of questions are never seen with choices in training: 144 for tuning, 230 for finding neurons and 202 for
reporting.

## The rules, fixed in advance

- Seed: of {", ".join(map(str, SEEDS))}, the one with the highest accuracy on the tuning questions.
- Threshold: t is tried in the order {", ".join(f"{t:.0%}" for t in THRESHOLDS)}. The first t is taken at which
  zero-ablating the found neurons reduces the order-averaged accuracy on the tuning questions by at least
  {100 * LEAST_FALL:.0f} points and leaves an answer mass of at least {LEAST_MASS}. Neurons are found with both answer orders,
  p = 40 % and m = 20.

## Every seed

Accuracies in percent on the reporting questions, which neither rule uses; 10 repetitions.

| seed | tuning accuracy | t | found | unablated | zero-ablated | random | matched | order-averaged | mass, fraction of "A" |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

## Recipes tried before

All of them used the same world and data. They were given up because the neurons of the seed that the rule chose had no effect
on the order-averaged accuracy: in four layers the choice is read in several places, and zero-ablating all attention neurons
of layers 2 and 3 still left 81 %.

- Four layers, d_mlp 192, dropout 0.1, seeds 0 to 4: tuning accuracies 84.0, 84.7, 83.7, 82.3, 83.7. The rule's seed (1) lost
  no accuracy at any t. Of the three other seeds examined, one (2) did: 84.7 -> 75.7 at t = 7 %.
- The same with a penalty of 0.3 on spread-out activations, seeds 0 to 4: 83.7, 83.7, 83.0, 84.0, 84.4. No seed met the rule.
- Single seeds (1) of four layers with other penalties (0.1, 0.2, 0.5) and dropout probabilities (0, 0.05, 0.1): from no learning at
  all to 87.6 -> 69.8 at t = 1 %. Three layers with dropout 0.1: no accuracy lost.
- Single seeds (1) of two layers: with dropout 0 the answer mass falls together with the accuracy (0.88 at t = 10 %). With dropout
  0.1 the loss is mostly letter bias (83.3 -> 72.2 order-averaged, 50 % plain). Dropout 0.05 lies between the two, and was trained
  with every seed.
"""


def main() -> None:
    """Train the seeds that are missing, choose one, and write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="model folder to write")
    parser.add_argument(
        "--trained",
        type=Path,
        default=Path("runs/toy-training"),
        help="folder with the trained models 0 to 4, which are trained if missing",
    )
    arguments = parser.parse_args()
    if not all((arguments.trained / str(seed) / "training.json").exists() for seed in SEEDS):
        train_all(arguments.trained)
    torch.set_num_threads(1)
    candidates = [threshold_and_report(arguments.trained / str(seed), seed) for seed in SEEDS]
    chosen = max(candidates, key=lambda candidate: candidate.tuning_accuracy)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(arguments.trained / str(chosen.seed) / name, arguments.out / name)
    settings = {"adaptive_threshold": chosen.adaptive_threshold, "order": "both"}
    (arguments.out / "tn_lens.json").write_text(json.dumps(settings) + "\n")
    (arguments.out / "MODEL_CARD.md").write_text(model_card(candidates, chosen))
    print(model_card(candidates, chosen))


if __name__ == "__main__":
    main()
