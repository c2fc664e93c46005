"""Train every seed, choose one and its threshold by rules fixed beforehand, and write the model card.

`python -m tn_lens.toy.choose --out FOLDER [--trained FOLDER]`. Both rules look at the tuning questions only; the reporting
questions are measured afterwards, for every seed, so that the card shows what the rules gave and what they passed over.
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

from tn_lens import attribute, build_prompts, evaluate, load_model, load_questions, manipulation_check, select_neurons
from tn_lens.evaluation import Evaluation
from tn_lens.toy.train import DROPOUT, N_STEPS, ROWS, SWITCH

SEEDS = (0, 1, 2, 3, 4)
THRESHOLDS = (0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
LEAST_FALL = 0.10
"""Order-averaged accuracy on the tuning questions that suppressing the set must cost."""
LEAST_MASS = 0.95
"""Answer mass that must be left."""
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One trained seed: the numbers the rules see, and the report that they do not."""

    seed: int
    tuning_accuracy: float
    t: float | None
    """The first threshold that meets the rule; None if none does."""
    n_found: int
    report: Evaluation | None


def threshold_and_report(folder: Path, seed: int) -> Candidate:
    """Walk the thresholds from high to low; take the first whose set costs enough and leaves the answer mass."""
    model, questions = load_model(folder), load_questions("toy")
    tune, report = questions.part("tune"), questions.part("report")
    check = manipulation_check(model, build_prompts(model, questions.part("find"), order="both"))
    scores = attribute(model, check.prompts)
    accuracy = json.loads((folder / "training.json").read_text())["tuning_accuracy"]
    for t in THRESHOLDS:
        neurons = select_neurons(scores, t=t).neurons
        arms = evaluate(model, tune, neurons, n_repetitions=1, arms=("baseline", "suppressed")).arms
        fall = arms["baseline"].order_averaged_accuracy - arms["suppressed"].order_averaged_accuracy
        if fall >= LEAST_FALL and arms["suppressed"].answer_mass >= LEAST_MASS:
            found = evaluate(model, report, neurons)
            return Candidate(seed=seed, tuning_accuracy=accuracy, t=t, n_found=len(neurons), report=found)
    return Candidate(seed=seed, tuning_accuracy=accuracy, t=None, n_found=0, report=None)


def train_all(folder: Path) -> None:
    """Train every seed in a process of its own, one thread each, two at a time."""

    def train(seed: int) -> None:
        command = [sys.executable, "-m", "tn_lens.toy.train", "--seed", str(seed), "--out", str(folder / str(seed))]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, SEEDS))


def model_card(candidates: list[Candidate], chosen: Candidate) -> str:
    """Markdown: what the model is, how it was made, every seed, and the rules."""
    rows = []
    for c in candidates:
        start = f"| {c.seed}{' (shipped)' if c is chosen else ''} | {100 * c.tuning_accuracy:.1f} |"
        if c.report is None:
            rows.append(f"{start} none | - | - | - | - | - | - | - |")
            continue
        arms = c.report.arms
        cells = [f"{100 * arms[a].accuracy:.1f}" for a in ("baseline", "suppressed", "random", "random_matched")]
        averaged = " -> ".join(f"{100 * arms[a].order_averaged_accuracy:.1f}" for a in ("baseline", "suppressed"))
        mass, share = arms["suppressed"].answer_mass, arms["suppressed"].share_a
        rows.append(f"{start} {c.t:.0%} | {c.n_found} | {' | '.join(cells)} | {averaged} | {mass:.2f}, {share:.2f} |")
    formats = ", ".join(f"{n} {kind}" for kind, n in ROWS.items())
    return f"""# Model card: the embedded toy

A two-layer Llama (d_model 96, 4 heads of 24, d_mlp 384, 960 neurons, untied, word-level vocabulary of 283) that knows the
1,440 facts of an invented world and answers questions about them with a letter. It exists so that the whole method runs in
seconds on a bare machine. It knows nothing else, and says nothing about where truth neurons sit in large models.

Trained by `tn_lens/toy/train.py`: {N_STEPS} steps of {formats} sequences (the last two only after {SWITCH:.0%} of the
steps, when the exceptions begin), Muon on the blocks' matrices, AdamW on the rest, soft targets (0.8 on the right option,
80 % of it on the upper-case letter), dropout {DROPOUT} on what W_out and W_O read.
Held out from every choice format: 144 questions to tune,
230 to find neurons, 202 to report.

## The rules, fixed beforehand

- Seed: of {", ".join(map(str, SEEDS))} the one with the highest accuracy on the tuning questions.
- Threshold: walk t = {", ".join(f"{t:.0%}" for t in THRESHOLDS)}; take the first whose found set costs at least
  {100 * LEAST_FALL:.0f} points of order-averaged accuracy on the tuning questions and leaves an answer mass of at
  least {LEAST_MASS}. Neurons are found with the answers in both orders, p = 40 %, m = 20.

## Every seed

Accuracies in percent on the reporting questions, which no rule saw; 10 repetitions.

| seed | tuning accuracy | t | found | untouched | found at zero | random | matched | order-averaged | mass, share of "A" |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

## Recipes tried before

All with the same world and data. They were given up because the rule's seed had no effect on order-averaged accuracy: in
four layers the choice is read in several places, and suppressing all of attention in layers 2 and 3 still left 81 %.

- Four layers, d_mlp 192, dropout 0.1, seeds 0 to 4: tuning accuracies 84.0, 84.7, 83.7, 82.3, 83.7. The rule's seed (1) lost
  nothing at any t; of the three others looked at one (2) did, 84.7 -> 75.7 at t = 7 %.
- The same with a penalty of 0.3 on spread-out activations, seeds 0 to 4: 83.7, 83.7, 83.0, 84.0, 84.4; no seed met the rule.
- Single seeds (1) of four layers with other penalties (0.1, 0.2, 0.5) and dropouts (0, 0.05, 0.1): from no learning at all to
  87.6 -> 69.8 at t = 1 %; of three layers with dropout 0.1: nothing lost.
- Single seeds (1) of two layers: dropout 0 loses the answer mass with the accuracy (0.88 at t = 10 %); dropout 0.1 leaves
  mostly letter bias (83.3 -> 72.2 order-averaged, 50 % plain). Dropout 0.05 lies between, and was trained on every seed.
"""


def main() -> None:
    """Train or take trained seeds, choose, and write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument(
        "--trained", type=Path, default=Path("runs/toy-training"), help="folders 0 to 4, trained if missing"
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
    settings = {"t": chosen.t, "order": "both"}
    (arguments.out / "tn_lens.json").write_text(json.dumps(settings) + "\n")
    (arguments.out / "MODEL_CARD.md").write_text(model_card(candidates, chosen))
    print(model_card(candidates, chosen))


if __name__ == "__main__":
    main()
