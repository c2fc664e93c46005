"""A model with planted truth neurons, which provide the ground truth for methods that search for them.

The model is not trained: its weights are written by hand into a residual stream with named dimensions and without
normalization. The last position reads whether the answer at A is the true one and separates the logits of the labels; the
neurons involved are the truth neurons. The model also contains traps, neurons that a method without one of the filters
mistakes for truth neurons, and a background of small random neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.models import Model, build_model, neuron_space
from tn_lens.neurons.neuron import Neuron, NeuronSet
from tn_lens.questions.prompts import Prompt, PromptSet

N_TOKENS = 12
AT_A, AT_B, LAST = 4, 7, N_TOKENS - 1
"""Positions of the two answers, and of the cue whose logits are read."""
LABELS = ((0, 1), (2, 3))
"""Token ids of A, a and B, b."""
TRUE, FALSE, WORDS, CUES = range(4, 10), range(10, 16), range(16, 32), 32
"""Token ids of true answers, of false answers, of words without meaning, and of the first cue (one cue per category)."""

ONE, FLAG, SECOND, DECISION, TO_A, TO_B, AT_FIRST, AT_LAST, MISTAKEN, CATEGORY = range(10)
"""Named dimensions: constant 1; whether the answer is true; a copy of it that is written later; the decision; the logits of
the labels; the position of the token; a category in which the model is mistaken; the first of the categories. All other
dimensions are nuisance dimensions."""

N_CATEGORIES = 5
N_NAMED = CATEGORY + N_CATEGORIES
SHARPNESS = 7.0
"""Query and key weight of the attention to the answer at A."""
OPEN = 2.0
"""Input of an open gate; silu(2) = 1.76."""

STRENGTHS = ((1, 0.34), (1, 0.30), (1, 0.26), (2, 0.32), (2, 0.24))
"""Layer of each planted MLP truth neuron, and its effect on the logit of A minus that of B."""
N_TEXTS = 20
BY_ATTENTION = 0.9
"""The direct effect of the second attention neuron on the logit of A minus that of B."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Planted:
    """A model, prompts for it, and the neurons that a method should and should not find."""

    model: Model
    prompts: PromptSet
    truth: NeuronSet
    """The neurons that support truth."""
    traps: Mapping[str, Neuron]
    """Neurons that resemble truth neurons, by the kind of trap."""
    mistaken: frozenset[str]
    """Questions that the model answers incorrectly."""
    texts: tuple[list[int], ...]
    """Plain texts: token ids of words without meaning."""


def planted(
    *,
    seed: int = 0,
    n_questions: int = 200,
    mistaken: float = 0.2,
    noise: float = 0.01,
    label_logit: float = 7.0,
    word_logit: float = 0.0,
    n_layers: int = 4,
    d_model: int = 48,
    d_mlp: int = 24,
    d_head: int = 8,
) -> Planted:
    """Plant truth neurons and one trap for every filter of the method.

    The traps, and the filter that excludes each of them with the default arguments:

    - `"letter"` supports A regardless of the truth: the held-out test.
    - `"format"` supports both labels equally: the threshold t; with a low `label_logit` only a target that is normalized
      over the labels.
    - `"weak"` supports truth, but only weakly: t.
    - `"category"` supports truth in one category: the share threshold p.
    - `"anti"` supports what is false: the manipulation check, p or the test.
    - `"contrarian"` contradicts the model where it is mistaken: the manipulation check or p; only the check if
      `mistaken` is at least 0.5.
    - `"elsewhere"` supports truth at another position: attribution at the last position only.
    - `"damage"`, planted if `word_logit` is positive, supports truth, since the first planted MLP neuron depends on it, but so do
      the words of every text: the loss on plain text.

    Args:
        seed: seed for the prompts and the background.
        n_questions: number of questions, with one prompt each; the right answer is at A in half of them.
        mistaken: fraction of the questions that the model answers incorrectly; they form a separate category.
        noise: standard deviation of the weights of the background neurons to the labels' logits.
        label_logit: logit of the labels without the format neuron, whose effect is small at 7 and large at 4.
        word_logit: logit that the damage neuron adds to every word; 0 plants no such neuron.
        n_layers, d_model, d_mlp, d_head: sizes; the planted neurons need 3 layers, 22 dimensions and 8 MLP neurons.

    Raises:
        BadInput: a size is too small, there is no question, or `mistaken` is outside [0, 1].
    """
    if n_layers < 3 or d_model < N_NAMED + 8 or d_mlp < 8 or d_head < 2:
        raise BadInput(
            f"planted needs at least 3 layers, d_model {N_NAMED + 8}, d_mlp 8 and d_head 2; "
            f"got {n_layers}, {d_model}, {d_mlp} and {d_head}"
        )
    if n_questions < 1 or not 0 <= mistaken <= 1:
        raise BadInput(f"expected n_questions of at least 1 and mistaken in [0, 1]; got {n_questions} and {mistaken}")
    model = _background(seed, noise, label_logit, n_layers, d_model, d_mlp, d_head)
    truth, traps = _plant(model, word_logit)
    prompts = _ask(seed, n_questions, round(mistaken * n_questions))
    return Planted(
        model=model,
        prompts=prompts,
        truth=truth,
        traps=traps,
        mistaken=frozenset(p.question for p in prompts if p.category == "mistaken"),
        texts=tuple(generator(seed, 5).choice(WORDS, (N_TEXTS, N_TOKENS)).tolist()),
    )


def _background(
    seed: int, noise: float, label_logit: float, n_layers: int, d_model: int, d_mlp: int, d_head: int
) -> Model:
    """A model with embeddings in the named dimensions, and neurons that read and write nuisance dimensions."""
    model = build_model(
        {
            "n_layers": n_layers,
            "d_model": d_model,
            "n_ctx": N_TOKENS,
            "n_heads": 2,
            "d_head": d_head,
            "d_mlp": d_mlp,
            "d_vocab": CUES + N_CATEGORIES + 1,
            "act_fn": "silu",
            "gated_mlp": True,
            "normalization_type": None,
            "device": "cpu",
            "model_name": "planted",
        }
    )
    coins = generator(seed, 3)

    def random(*shape: int, scale: float) -> Float[Tensor, "..."]:
        return scale * torch.from_numpy(coins.standard_normal(shape)).float()

    n_nuisance = d_model - N_NAMED

    def small(*shape: int, scale: float) -> Float[Tensor, "..."]:
        """A matrix into or out of the nuisance dimensions."""
        matrix = torch.zeros(shape)
        matrix[..., N_NAMED:] = random(*shape[:-1], n_nuisance, scale=scale)
        return matrix

    reading, writing = 0.9 * n_nuisance**-0.5, 0.7 * d_mlp**-0.5  # so that activations do not grow with the sizes

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        embed = model.embed.W_E
        embed[4:, N_NAMED:] = random(len(embed) - 4, n_nuisance, scale=0.5)
        embed[list(TRUE), FLAG], embed[list(FALSE), FLAG] = 1.0, -1.0
        for category in range(N_CATEGORIES):
            embed[CUES + category, CATEGORY + category] = 1.0
        embed[CUES + N_CATEGORIES, MISTAKEN] = 1.0
        where = model.pos_embed.W_pos
        where[:, ONE], where[AT_A, AT_FIRST], where[LAST, AT_LAST] = 1.0, 1.0, 1.0
        for shown, (upper, lower) in enumerate(LABELS):
            model.unembed.W_U[TO_A + shown, [upper, lower]] = 1.0
            model.unembed.b_U[[upper, lower]] = label_logit + torch.tensor([0.0, -1.4])
        for block in model.blocks:
            attention: Any = block.attn
            mlp: Any = block.mlp
            for weight in (attention.W_Q, attention.W_K, attention.W_V):
                weight.copy_(small(2, d_head, d_model, scale=reading).transpose(1, 2))
            attention.W_O.copy_(small(2, d_head, d_model, scale=0.4 * d_head**-0.5))
            attention.W_O[:, :, [TO_A, TO_B]] = random(2, d_head, 2, scale=noise)
            for weight in (mlp.W_in, mlp.W_gate):
                weight.copy_(small(d_mlp, d_model, scale=reading).T)
            mlp.W_gate[ONE] = OPEN / 2
            mlp.W_out.copy_(small(d_mlp, d_model, scale=writing))
            mlp.W_out[:, [TO_A, TO_B]] = random(d_mlp, 2, scale=noise)
    return model


@torch.no_grad()
def _plant(model: Model, word_logit: float) -> tuple[NeuronSet, dict[str, Neuron]]:
    """Overwrite the first background neurons of the layers with the truth neurons and the traps."""
    used = [0] * neuron_space(model).n_layers
    needed = ONE
    if word_logit:
        needed = model.cfg.d_model - 1
        for name, weight in model.named_parameters():
            if name.endswith(("W_E", "W_O", "W_out")):
                weight[..., needed] = 0  # nothing else writes to this dimension
            elif name.endswith(("W_Q", "W_K", "W_V", "W_in", "W_gate")):
                weight[..., needed, :] = 0  # and the background does not read from it
        model.unembed.W_U[needed, list(WORDS)] = word_logit

    def neuron(
        layer: int, gate: int, reads: int, to_a: float, to_b: float, *, writes: int | None = None, sign: float = 1.0
    ) -> Neuron:
        """An MLP neuron that adds `to_a` and `to_b` to the logits of the labels when its gate is open and it reads 1."""
        mlp: Any = model.blocks[layer].mlp
        index = used[layer]
        used[layer] += 1
        for weight in (mlp.W_in, mlp.W_gate):
            weight[:, index] = 0
        mlp.W_out[index] = 0
        opened = float(torch.nn.functional.silu(torch.tensor(OPEN)))
        mlp.W_gate[gate, index], mlp.W_in[reads, index] = OPEN, sign
        if writes is not None:
            mlp.W_out[index, writes] = sign / opened
        mlp.W_out[index, TO_A], mlp.W_out[index, TO_B] = sign * to_a / opened, sign * to_b / opened
        return Neuron("mlp", layer, None, index)

    def head(layer: int, which: int, reads: int, writes: list[tuple[int, float]]) -> Neuron:
        """An attention neuron that moves a dimension of the answer at A to the last position."""
        attention: Any = model.blocks[layer].attn
        for weight in (attention.W_Q, attention.W_K):
            weight[which] = 0
        attention.W_Q[which, AT_LAST, 0] = attention.W_K[which, AT_FIRST, 0] = SHARPNESS
        attention.W_V[which, :, 0], attention.W_O[which, 0] = 0, 0
        attention.W_V[which, reads, 0] = 1
        for dimension, value in writes:
            attention.W_O[which, 0, dimension] = value
        return Neuron("attn", layer, which, 0)

    half = BY_ATTENTION / 2
    truth = [head(0, 0, FLAG, [(DECISION, 1.0)]), head(1, 1, SECOND, [(TO_A, half), (TO_B, -half)])]
    for which, (layer, logit) in enumerate(STRENGTHS):
        gate = ONE if which else needed
        truth.append(neuron(layer, gate, DECISION, logit / 2, -logit / 2, sign=1.0 if which % 2 == 0 else -1.0))
    traps = {
        "letter": neuron(2, ONE, ONE, 0.13, -0.13),
        "format": neuron(2, ONE, ONE, 1.0, 1.0),
        "weak": neuron(1, ONE, DECISION, 0.006, -0.006),
        "category": neuron(2, CATEGORY, DECISION, 0.15, -0.15),
        "anti": neuron(1, ONE, DECISION, -0.06, 0.06),
        "contrarian": neuron(2, MISTAKEN, DECISION, -0.25, 0.25),
        "elsewhere": neuron(0, AT_FIRST, FLAG, 0.0, 0.0, writes=SECOND),
    }
    if word_logit:
        traps["damage"] = neuron(0, ONE, ONE, 0.0, 0.0, writes=needed)
    return NeuronSet(truth), traps


def _ask(seed: int, n_questions: int, n_mistaken: int) -> PromptSet:
    """Prompts whose right answer is alternately at A and at B, within every category."""
    coins = generator(seed, 4)
    prompts = []
    for question in range(n_questions):
        mistaken = question >= n_questions - n_mistaken
        category = N_CATEGORIES if mistaken else (question // 2) % N_CATEGORIES
        believes_a = question % 2 == 0
        tokens = coins.choice(WORDS, N_TOKENS).tolist()
        tokens[AT_A], tokens[AT_B] = (
            int(coins.choice(TRUE if is_a == believes_a else FALSE)) for is_a in (True, False)
        )
        tokens[LAST] = CUES + category
        prompts.append(
            Prompt(
                token_ids=tuple(tokens),
                label_ids=LABELS,
                right=int(believes_a == mistaken),
                question=str(question),
                order=(0, 1) if believes_a != mistaken else (1, 0),
                labels=("A", "B"),
                category="mistaken" if mistaken else f"category {category}",
            )
        )
    return PromptSet(tuple(prompts))
