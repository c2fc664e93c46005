"""What evaluation costs beside a plain loop: `python benchmarks/evaluation.py [TruthfulQA.csv]`.

Random weights (12 layers, d_model 1024, vocabulary 32,000), TruthfulQA's questions in figure 9's prompt, four conditions, ten
repetitions, float32. The loop runs every prompt of every repetition whole, in the order of the file, padded on the left, takes
the logits of every position and the softmax of the last. One of its repetitions is measured, since all cost the same, and
times ten; ours is measured whole, for the accuracies alone, and with --order-averaged also with every order of
every draw, for which the loop would have to ask everything twice. Equal probabilities are asserted first. The parts are switched on one after the other, on
the prompts of one repetition. Writes evaluation.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine, random_model, timed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tn_lens import Intervention, NeuronSet, Prompt, QuestionSet, evaluate, load_questions
from tn_lens.evaluation import PAPER_ARMS
from tn_lens.evaluation.controls import random_neurons
from tn_lens.evaluation.evaluate import draw_orders, draw_sets
from tn_lens.inference.forward import pad_left, prompt_logits
from tn_lens.inference.interventions import ablate
from tn_lens.models import Model, last_logits, lay_out_weights, neuron_space
from tn_lens.prompts import build_prompts

RESULTS = Path(__file__).with_suffix(".json")
N_REPETITIONS = 10
BATCH_SIZE = 16
N_NEURONS = 100


def tokenizer_for(questions: QuestionSet) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the questions themselves: about as many tokens as a large model's would give."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [" ".join([q.text, *q.choices]) for q in questions] + [
        questions.template.user,
        str(questions.template.system),
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts * 2, trainers.BpeTrainer(vocab_size=31_000, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def labels(probabilities: Tensor, prompts: list[Prompt]) -> Tensor:
    """f of every shown choice."""
    return torch.stack(
        [
            torch.stack([p[list(ids)].sum() for ids in prompt.label_ids])
            for p, prompt in zip(probabilities, prompts, strict=True)
        ]
    )


@torch.no_grad()
def by_loop(model: Model, prompts: list[Prompt], neurons: NeuronSet, *, last_only: bool = False) -> Tensor:
    """What a user would write: batches in order, whole logits; or the last position's alone."""
    found = []
    with ablate(model, neurons):
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = prompts[start : start + BATCH_SIZE]
            tokens, mask = (t.to(str(model.cfg.device)) for t in pad_left(batch))
            logits = last_logits(model, tokens, mask) if last_only else model(tokens, attention_mask=mask)[:, -1]
            found.append(labels(logits.softmax(-1).cpu(), batch))
    return torch.cat(found)


def ours(model: Model, prompts: list[Prompt], neurons: NeuronSet, *, share_prefix: bool) -> Tensor:
    """Batches of similar length, with what the prompts have in common run once or not."""
    found = torch.zeros(len(prompts), 2)
    hooks = Intervention(neurons=neurons).prepare(model, prompts)
    for rows, logits in prompt_logits(model, prompts, hooks=hooks, share_prefix=share_prefix):
        probabilities = logits.softmax(-1).cpu()
        found[rows] = labels(probabilities, [prompts[row] for row in rows])
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="?", help="TruthfulQA.csv; fetched by default")
    parser.add_argument("--n-questions", type=int, default=24)
    parser.add_argument("--order-averaged", action="store_true", help="also ask every order of every draw")
    arguments = parser.parse_args()
    every = load_questions("truthfulqa", source=arguments.questions)
    drawn = np.random.default_rng(0).choice(len(every), arguments.n_questions, replace=False)
    questions = every.select(drawn.tolist())
    plain, model = random_model(1024, 12), lay_out_weights(random_model(1024, 12))
    plain.tokenizer = model.tokenizer = tokenizer_for(every)  # pyright: ignore[reportAttributeAccessIssue]
    space = neuron_space(model)
    neurons = random_neurons(space, N_NEURONS, NeuronSet(), np.random.default_rng(0))
    prompts = build_prompts(model, questions, order="both")
    asked = draw_orders(prompts, N_REPETITIONS, 0)
    one = [prompts[i] for i in asked[0].tolist()]
    sets = draw_sets(space, neurons, PAPER_ARMS, N_REPETITIONS, None, 0)

    by_loop(model, one[:BATCH_SIZE], neurons)  # whatever is set up once
    looped, loop = timed(lambda: {arm: by_loop(plain, one, drawn[0]) for arm, drawn in sets.items()})
    options: Any = {"arms": PAPER_ARMS, "n_repetitions": N_REPETITIONS}
    found, fast = timed(lambda: evaluate(model, questions, neurons, control_orders="drawn", **options))
    for arm, expected in looped.items():
        shown = torch.tensor(found.probabilities[arm][0][asked[0]])
        torch.testing.assert_close(shown, expected.double(), atol=1e-4, rtol=0)
    parts: dict[str, float] = {}
    steps: dict[str, Any] = {
        "plain loop": lambda: by_loop(plain, one, neurons),
        "weights in the order they are read": lambda: by_loop(model, one, neurons),
        "only the last position unembedded": lambda: by_loop(model, one, neurons, last_only=True),
        "batches of similar length": lambda: ours(model, one, neurons, share_prefix=False),
        "common beginning run once": lambda: ours(model, one, neurons, share_prefix=True),
    }
    expected = by_loop(plain, one, neurons)
    for name, step in steps.items():
        result = step()
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
        parts[name] = timed(step)[1]
        print(f"  {name:36s} {parts[name]:6.2f} s for one set and {len(one)} prompts", flush=True)
    lengths = [len(p.token_ids) for p in prompts]
    n_loop, n_both = N_REPETITIONS * len(sets) * len(one), sum(map(len, sets.values())) * len(prompts)
    fixed = sum(len(drawn) == 1 for drawn in sets.values())
    n_drawn = fixed * len(prompts) + (sum(map(len, sets.values())) - fixed) * len(one)
    row: dict[str, Any] = {
        "n_questions": len(questions),
        "n_tokens": {"mean": round(float(np.mean(lengths)), 1), "longest": max(lengths)},
        "accuracies": {
            "loop_seconds": round(loop * N_REPETITIONS, 1),
            "ours_seconds": round(fast, 1),
            "ratio": round(loop * N_REPETITIONS / fast, 2),
            "prompts": {"loop": n_loop, "ours": n_drawn},
        },
    }
    if arguments.order_averaged:
        every, whole = timed(lambda: evaluate(model, questions, neurons, **options))
        for arm in sets:
            np.testing.assert_allclose(every.arms[arm].accuracies, found.arms[arm].accuracies)
        row["accuracies_and_order_averaged"] = {
            "loop_seconds": round(2 * loop * N_REPETITIONS, 1),
            "ours_seconds": round(whole, 1),
            "ratio": round(2 * loop * N_REPETITIONS / whole, 2),
            "prompts": {"loop": 2 * n_loop, "ours": n_both},
        }
    row |= {
        "seconds_of_one_set": {name: round(value, 3) for name, value in parts.items()},
        "machine": machine(),
        "n_threads": torch.get_num_threads(),
    }
    print(json.dumps(row, indent=1))
    there = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([r for r in there if r["machine"] != row["machine"]] + [row], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
