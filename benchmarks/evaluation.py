"""Compare the cost of evaluation with that of a plain loop: `python benchmarks/evaluation.py [TruthfulQA.csv]`.

The model has random weights (12 layers, d_model 1024, vocabulary 32,000, float32). It is asked TruthfulQA's questions in the
prompt of figure 9, under four conditions and in ten repetitions. The loop runs every prompt of every repetition completely, in
the order of the file and padded on the left, and computes the logits at every position and the softmax at the last position. One
repetition of the loop is measured and multiplied by ten, since all repetitions cost the same. Our evaluation is measured
completely, for the accuracies alone and, with --order-averaged, also with every order of every draw, for which the loop would
have to ask every prompt twice. The probabilities are asserted to be equal first. The optimizations are then enabled one after the
other on the prompts of one repetition. Writes evaluation.json.

With --completions, the completions of 100 common facts are asked of SmolLM2 in its four conditions and ten repetitions instead, and
compared with running every prompt as a separate row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine, random_model, timed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tn_lens import (
    NeuronSet,
    Prompt,
    QuestionSet,
    ablate,
    build_prompts,
    evaluate,
    load_model,
    load_questions,
    neuron_space,
    random_neurons,
)
from tn_lens.evaluation.evaluate import draw_orders, draw_sets
from tn_lens.inference.answers import ask
from tn_lens.inference.forward import pad_left
from tn_lens.inference.trees import groves
from tn_lens.models import Model, last_logits, lay_out_weights

RESULTS = Path(__file__).with_suffix(".json")
N_REPETITIONS = 10
BATCH_SIZE = 16
PAPER_CONDITIONS = ("unablated", "random", "random_matched", "ablated")
N_NEURONS = 100


def tokenizer_for(questions: QuestionSet) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the questions, which gives about as many tokens as the tokenizer of a large model."""
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


def label_probabilities(probabilities: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Probability f of each choice shown: [prompt, vocab] -> [prompt, choice]."""
    return torch.stack(
        [
            torch.stack([p[list(ids)].sum() for ids in prompt.label_ids])
            for p, prompt in zip(probabilities, prompts, strict=True)
        ]
    )


@torch.no_grad()
def by_loop(model: Model, prompts: list[Prompt], neurons: NeuronSet, *, last_only: bool = False) -> Tensor:
    """A loop as a user would write it: batches in order, with the logits of all positions, or of the last alone."""
    answers = []
    with ablate(model, neurons):
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = prompts[start : start + BATCH_SIZE]
            tokens, mask = (t.to(str(model.cfg.device)) for t in pad_left(batch))
            logits = last_logits(model, tokens, mask) if last_only else model(tokens, attention_mask=mask)[:, -1]
            answers.append(label_probabilities(logits.softmax(-1).cpu(), batch))
    return torch.cat(answers)


def completions() -> dict[str, Any]:
    """The times for short completions, which share their templates, on a real model."""
    model = load_model("smollm2", dtype="float32", device="cpu")
    questions = load_questions("common_facts").part("report").sample(100, np.random.default_rng(0))
    neurons = random_neurons(neuron_space(model), 9, NeuronSet(), np.random.default_rng(1))
    prompts = build_prompts(model, questions, order="both")
    sets = draw_sets(model, prompts, neurons, PAPER_CONDITIONS, N_REPETITIONS, 0)
    drawn = [one for each in sets.values() for one in each]
    ask(model, prompts)  # excludes one-time setup from the measurement
    options: Any = {"conditions": PAPER_CONDITIONS, "n_repetitions": N_REPETITIONS}
    evaluation, ours = timed(lambda: evaluate(model, questions, neurons, **options))
    rows, whole = timed(lambda: [ask(model, prompts, neurons=one, share_prefix=False) for one in drawn])
    answers = np.concatenate([evaluation.probabilities[name] for name in sets])
    np.testing.assert_allclose(answers, torch.stack(rows).numpy(), atol=1e-5)
    return {
        "model": "SmolLM2-135M-Instruct",
        "n_prompts": len(prompts),
        "n_sets": len(drawn),
        "n_tokens": {
            "whole": sum(len(prompt.token_ids) for prompt in prompts),
            "trees": sum(grove.n_tokens for grove in groves(tuple(prompts))),
        },
        "whole_seconds": round(whole, 1),
        "ours_seconds": round(ours, 1),
        "ratio": round(whole / ours, 2),
    }


def store(row: dict[str, Any]) -> None:
    """Print a row, and write it in place of the one of the same model and machine."""
    row |= {"machine": machine(), "n_threads": torch.get_num_threads()}
    print(json.dumps(row, indent=1))
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    others = [r for r in stored if (r["machine"], r.get("model")) != (row["machine"], row.get("model"))]
    RESULTS.write_text(json.dumps([*others, row], indent=1) + "\n")


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="?", help="path of TruthfulQA.csv; downloaded by default")
    parser.add_argument("--n-questions", type=int, default=24, help="number of questions to ask")
    parser.add_argument("--order-averaged", action="store_true", help="also ask every draw of a control in every order")
    parser.add_argument("--completions", action="store_true", help="ask completions of SmolLM2 instead")
    arguments = parser.parse_args()
    if arguments.completions:
        return store(completions())
    all_questions = load_questions("truthfulqa", source=arguments.questions)
    drawn = np.random.default_rng(0).choice(len(all_questions), arguments.n_questions, replace=False)
    questions = all_questions.select(drawn.tolist())
    plain, model = random_model(1024, 12), lay_out_weights(random_model(1024, 12))
    plain.tokenizer = model.tokenizer = tokenizer_for(all_questions)  # pyright: ignore[reportAttributeAccessIssue]
    space = neuron_space(model)
    neurons = random_neurons(space, N_NEURONS, NeuronSet(), np.random.default_rng(0))
    prompts = build_prompts(model, questions, order="both")
    asked = draw_orders(prompts, N_REPETITIONS, 0)
    first = [prompts[i] for i in asked[0].tolist()]  # the prompts of the first repetition
    sets = draw_sets(model, prompts, neurons, PAPER_CONDITIONS, N_REPETITIONS, 0)

    by_loop(model, first[:BATCH_SIZE], neurons)  # excludes one-time setup from the measurement
    looped, loop = timed(lambda: {name: by_loop(plain, first, drawn[0]) for name, drawn in sets.items()})
    options: Any = {"conditions": PAPER_CONDITIONS, "n_repetitions": N_REPETITIONS}
    evaluation, fast = timed(lambda: evaluate(model, questions, neurons, control_orders="drawn", **options))
    for name, expected in looped.items():
        probabilities = torch.tensor(evaluation.probabilities[name][0][asked[0]])
        torch.testing.assert_close(probabilities, expected.double(), atol=1e-4, rtol=0)
    parts: dict[str, float] = {}
    steps: dict[str, Any] = {
        "plain loop": lambda: by_loop(plain, first, neurons),
        "weights in the order they are read": lambda: by_loop(model, first, neurons),
        "only the last position unembedded": lambda: by_loop(model, first, neurons, last_only=True),
        "batches of similar length": lambda: ask(model, first, neurons=neurons, share_prefix=False),
        "common beginnings run once": lambda: ask(model, first, neurons=neurons),
    }
    expected = by_loop(plain, first, neurons)
    for name, step in steps.items():
        result = step()
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
        parts[name] = timed(step)[1]
        print(f"  {name:36s} {parts[name]:6.2f} s for one set and {len(first)} prompts", flush=True)
    lengths = [len(p.token_ids) for p in prompts]
    n_loop, n_both = N_REPETITIONS * len(sets) * len(first), sum(map(len, sets.values())) * len(prompts)
    fixed = sum(len(drawn) == 1 for drawn in sets.values())
    n_drawn = fixed * len(prompts) + (sum(map(len, sets.values())) - fixed) * len(first)
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
        complete, whole = timed(lambda: evaluate(model, questions, neurons, **options))
        for name in sets:
            accuracies = [each.conditions[name].accuracies for each in (complete, evaluation)]
            np.testing.assert_allclose(*accuracies)
        row["accuracies_and_order_averaged"] = {
            "loop_seconds": round(2 * loop * N_REPETITIONS, 1),
            "ours_seconds": round(whole, 1),
            "ratio": round(2 * loop * N_REPETITIONS / whole, 2),
            "prompts": {"loop": 2 * n_loop, "ours": n_both},
        }
    store(row | {"seconds_of_one_set": {name: round(value, 3) for name, value in parts.items()}})
    return None


if __name__ == "__main__":
    sys.exit(main())
