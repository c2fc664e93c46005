"""Train the embedded model: `python -m scripts.train_toy --seed 0 --out FOLDER`, a few minutes on one thread.

A two-layer Llama is trained on the facts as open questions, on two- and four-choice questions and on true/false
statements. It is then tested on questions that never occur with choices in the training data. The targets are soft, because
a saturated softmax has no gradient to integrate. Dropout on the inputs of W_out and W_O makes the model robust to the loss
of single neurons, so that zero-ablating random neurons changes the accuracy little.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tn_lens.questions.toy_world import RELATIONS, WORDINGS, Fact, facts, vocabulary

N_STEPS = 700
"""Optimiser steps."""
SWITCH = 0.45
"""Fraction of the steps with typical values only, before the exceptions and the other formats are added."""
DROPOUT = 0.05
"""Dropout probability on the inputs of W_out and W_O (hook_post and hook_z) during training."""
RIGHT, UPPER = 0.8, 0.8
"""Target probability of the right option, and the fraction of an option's probability on its upper-case label."""
ROWS = {"binary": 128, "open": 96, "match": 48, "statement": 40, "four": 40}
"""Number of sequences of each format in one step."""

Example = tuple[str, dict[str, float]]
"""A text, and the target probability of each word that can follow it."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer over the toy vocabulary that puts `<s>` before every text."""
    words = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", words["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """Build an untrained two-layer Llama with 960 neurons: 2 x 384 in the MLPs, 2 x 4 x 24 in the attention heads."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary()),
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def case_split(label: str, probability: float) -> dict[str, float]:
    """Split a label's probability between its upper- and lower-case form."""
    return {label: UPPER * probability, label.lower(): (1 - UPPER) * probability}


def choice_example(question: str, right: str, wrong: list[str], random: Random) -> Example:
    """Build a question with lettered options in random order."""
    options = random.sample([right, *wrong], len(wrong) + 1)
    shown = " ".join(f"Answer {letter} : {option}" for letter, option in zip("ABCD", options, strict=False))
    target: dict[str, float] = {}
    for letter, option in zip("ABCD", options, strict=False):
        target |= case_split(letter, RIGHT if option == right else (1 - RIGHT) / len(wrong))
    return f"Question : {question} {shown} Answer :", target


class Curriculum:
    """Draws training examples; `exceptions` switches from the typical values to the true ones."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.exceptions = False
        self.known = facts()
        self.asked = [fact for fact in self.known if fact.split == "train"]

    def truth(self, fact: Fact) -> str:
        """The value that is taught as true at this stage of the training."""
        return fact.value if self.exceptions else fact.typical

    def wrong(self, fact: Fact, n: int) -> list[str]:
        """Draw `n` wrong values. If the typical value is wrong, it is the first of them in at least half of the draws."""
        right = self.truth(fact)
        others = [value for value in RELATIONS[fact.relation] if value != right]
        drawn = self.random.sample(others, n)
        if fact.typical != right and fact.typical not in drawn and self.random.random() < 0.5:
            drawn[0] = fact.typical
        return drawn

    def draw(self, kind: str) -> Example:
        """Draw one example of a format, a key of `ROWS`."""
        random = self.random
        fact = random.choice(self.known if kind == "open" else self.asked)
        right = self.truth(fact)
        question = fact.question(random.randrange(len(WORDINGS)))
        match kind:
            case "binary":
                return choice_example(question, right, self.wrong(fact, 1), random)
            case "four":
                return choice_example(question, right, self.wrong(fact, 3), random)
            case "open":
                return f"Question : {question} Answer :", {right: 1.0}
            case "match":
                option, *others = random.sample(RELATIONS[fact.relation], 2)
                return choice_example(f"which {fact.relation} is {option} ?", option, others, random)
            case "statement":
                is_true = random.random() < 0.5
                shown = fact.statement(right if is_true else self.wrong(fact, 1)[0])
                target = case_split("True", RIGHT if is_true else 1 - RIGHT)
                target |= case_split("False", 1 - RIGHT if is_true else RIGHT)
                return f"Statement : {shown} True or False ? Answer :", target
            case _:
                raise ValueError(f"unknown kind of example: {kind!r}")

    def batches(self) -> Iterator[list[Example]]:
        """Yield the examples of one step, in groups of similar length."""
        groups = (("binary", "match"), ("open", "statement"), ("four",))
        for group in groups if self.exceptions else (("binary", "match"), ("open",)):
            yield [self.draw(kind) for kind in group for _ in range(ROWS[kind])]


def encode(examples: list[Example], words: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Encode examples as right-padded token ids, the position of each last token, and the target distributions."""
    rows = [[words["<s>"], *(words[word] for word in text.split())] for text, _ in examples]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    targets = torch.zeros(len(rows), len(words))
    for index, (row, (_, target)) in enumerate(zip(rows, examples, strict=True)):
        tokens[index, : len(row)] = torch.tensor(row)
        for word, probability in target.items():
            targets[index, words[word]] += probability
    return tokens, torch.tensor([len(row) - 1 for row in rows]), targets


def last_logits(model: LlamaForCausalLM, tokens: Tensor, last: Tensor) -> Tensor:
    """Compute the logits [row, vocab] at the last token of each row."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state  # [row, position, d_model]
    return model.lm_head(hidden[torch.arange(len(last)), last])


def train(seed: int, n_steps: int = N_STEPS, report_every: int = 100) -> LlamaForCausalLM:
    """Train one model. `seed` determines all random numbers."""
    model, curriculum = build_model(seed), Curriculum(seed)
    words = {word: index for index, word in enumerate(vocabulary())}
    dropout = nn.Dropout(DROPOUT)
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: (dropout(inputs[0]),))
        for name, module in model.named_modules()
        if name.endswith(("mlp.down_proj", "self_attn.o_proj"))
    ]
    # Muon is meant for the matrices inside the blocks; embeddings, unembedding and norms are trained with AdamW
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1.0, (step + 1) / 50) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / n_steps))),
        )
        for optimizer in optimizers
    ]
    model.train()
    for step in range(n_steps):
        curriculum.exceptions = step >= SWITCH * n_steps
        losses = []
        for examples in curriculum.batches():
            tokens, last, targets = encode(examples, words)
            log_probabilities = last_logits(model, tokens, last).log_softmax(-1)
            loss = -(targets * log_probabilities).sum(-1).sum() / sum(ROWS.values())
            loss.backward()  # gradients accumulate over the groups of one step
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if report_every and (step + 1) % report_every == 0:
            print(f"seed {seed}, step {step + 1}: loss {sum(losses):.3f}", flush=True)
    for hook in hooks:
        hook.remove()
    return model.eval()


@torch.no_grad()
def tuning_accuracy(model: LlamaForCausalLM) -> float:
    """Accuracy on the tuning questions in both orders of the options. The seed is chosen by this number alone."""
    words = {word: index for index, word in enumerate(vocabulary())}
    right = []
    for fact in (fact for fact in facts() if fact.split == "tune"):
        for options in ((fact.value, fact.distractor), (fact.distractor, fact.value)):
            text = f"Question : {fact.question()} Answer A : {options[0]} Answer B : {options[1]} Answer :"
            tokens, last, _ = encode([(text, {})], words)
            probabilities = last_logits(model, tokens, last).softmax(-1)[0]
            a, b = (probabilities[words[x]] + probabilities[words[x.lower()]] for x in "AB")
            right.append(bool(a > b) == (options[0] == fact.value))
    return sum(right) / len(right)


def main() -> None:
    """Train a model, save it as a Hugging Face folder, and print its accuracy on the tuning questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=N_STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the last bits of sums depend on the number of threads
    model = train(arguments.seed, arguments.steps)
    accuracy = tuning_accuracy(model)
    model.save_pretrained(arguments.out)
    build_tokenizer().save_pretrained(arguments.out)
    (arguments.out / "training.json").write_text(
        json.dumps({"seed": arguments.seed, "n_steps": arguments.steps, "tuning_accuracy": accuracy}, indent=2) + "\n"
    )
    print(f"seed {arguments.seed}: accuracy on the tuning questions {accuracy:.3f}")


if __name__ == "__main__":
    main()
