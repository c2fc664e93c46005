"""A trained model, SmolLM2-135M-Instruct, gives the numbers of an independent loop over the plain Hugging Face model.

The loop uses nothing of this package: it encodes the prompts itself, replaces the inputs of `down_proj` and `o_proj` with torch
hooks, and differentiates the probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import tn_lens as tn
from tests.conftest import needs_hooked
from tn_lens.models import Model, backend_of
from tn_lens.questions.formats import COMPLETION as COMPLETION_FORMAT

pytestmark = pytest.mark.slow
RULES = {"shared_prefix": ("riemann_right", (0.5, 1.0)), "direct": ("riemann_middle", (0.5,))}
"""Engine -> its quadrature rule, and the nodes; the direct engine runs whole prompts, which is slow with many nodes."""
LAYERS = (0, 1, 14, 29)
SITES = {"mlp": "mlp.down_proj", "attn": "self_attn.o_proj"}
QUESTION = tn.Question(text="The capital of Egypt is", choices=("Cairo", "Athens"))
COMPLETION = tn.Question(text="The capital of India is", choices=("New Delhi", "New York"))
TEMPLATES = {  # short, with a system turn that is shorter than the model's own
    "letters": tn.PromptTemplate(system="Answer.", user="{question}\n{choices}", choice="{label}: {choice}"),
    "completion": COMPLETION_FORMAT,
    "statement": tn.PromptTemplate(system="True or False?", user="{question}", choice="", kind="statement"),
}


@pytest.fixture(scope="module", params=[pytest.param("hooked", marks=needs_hooked), "bridge"])
def model(request: pytest.FixtureRequest, plain_smollm2: Any) -> Model:
    hf, tokenizer = plain_smollm2
    return tn.load_model("SmolLM2", hf_model=hf, tokenizer=tokenizer, backend=request.param, device="cpu")


def prompt_ids(tokenizer: Any, form: str) -> tuple[list[int], list[list[int]]]:
    """The tokens of the prompt, and the label ids of the right and the wrong answer, without this package."""
    if form == "completion":
        texts = ("The capital of India is", "The capital of India is New Delhi", "The capital of India is New York")
        before, right, wrong = (tokenizer(text)["input_ids"] for text in texts)
        n = len(before) + 1  # " New" is shared
        assert right[:n] == wrong[:n]
        assert right[n] != wrong[n]
        return right[:n], [[right[n]], [wrong[n]]]
    if form == "letters":
        turns = ("Answer.", "The capital of Egypt is\nA: Cairo\nB: Athens")
        words = ("A", "a", "B", "b")
    else:
        turns, words = ("True or False?", "The capital of Egypt is Cairo."), ("True", "true", "False", "false")
    turns = [{"role": role, "content": content} for role, content in zip(("system", "user"), turns, strict=True)]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    labels = []
    for word in words:
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": word}], return_dict=False)
        assert whole[: len(ids)] == ids
        labels.append(whole[len(ids)])
    return ids, [labels[:2], labels[2:]]


@contextmanager
def replaced(hf: Any, layer: int, site: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the input of the output projection of one site."""
    module = hf.model.layers[layer].get_submodule(SITES[site])
    handle = module.register_forward_pre_hook(lambda _, arguments: (change(arguments[0]),))
    try:
        yield
    finally:
        handle.remove()


def probabilities(hf: Any, ids: Tensor, labels: list[list[int]]) -> Tensor:
    last = hf(ids, use_cache=False).logits[:, -1].float().softmax(-1)  # [row, vocab]
    return torch.stack([last[:, i].sum(-1) for i in labels], -1)  # [row, choice]


def integrated(hf: Any, ids: list[int], labels: list[list[int]], layer: int, site: str) -> dict[str, Tensor]:
    """The sums of equations 3 and 4 for the rule of each engine, at one site and layer."""
    nodes = [node for _, nodes in RULES.values() for node in nodes]
    tokens = torch.tensor([ids] * len(nodes))
    seen: list[Tensor] = []
    with torch.no_grad(), replaced(hf, layer, site, lambda value: seen.append(value[:1, -1]) or value):
        hf(tokens[:1], use_cache=False)
    (activation,) = seen[0]
    path = (torch.tensor(nodes)[:, None] * activation).requires_grad_()

    def put(value: Tensor) -> Tensor:
        return torch.cat([value[:, :-1], path[:, None]], dim=1)

    with torch.enable_grad(), replaced(hf, layer, site, put):
        p = probabilities(hf, tokens, labels)
        (gradient,) = torch.autograd.grad((p[:, 0] - p[:, 1]).sum(), path)
    parts = gradient.split([len(nodes) for _, nodes in RULES.values()])
    return {engine: activation * part.mean(0) for engine, part in zip(RULES, parts, strict=True)}


FORMS = ("letters", "completion", "statement")


@pytest.fixture(scope="module")
def expected(plain_smollm2: Any) -> Callable[[str], Any]:
    hf, tokenizer = plain_smollm2
    known: dict[str, Any] = {}

    def get(form: str) -> Any:
        if form not in known:
            ids, labels = prompt_ids(tokenizer, form)
            scores = {(s, layer): integrated(hf, ids, labels, layer, s) for s in SITES for layer in LAYERS}
            with torch.no_grad():
                before = probabilities(hf, torch.tensor([ids]), labels)[0]
            known[form] = ids, labels, before, scores
        return known[form]

    return get


def asked(model: Model, form: str) -> tn.PromptSet:
    question = COMPLETION if form == "completion" else QUESTION
    questions = tn.QuestionSet(name="capitals", questions=(question,), template=TEMPLATES[form])
    return tn.build_prompts(model, questions, order="given")


@pytest.mark.parametrize("form", FORMS)
def test_probabilities_attributions_and_ablation_are_those_of_the_plain_model(
    form: str, model: Model, plain_smollm2: Any, expected: Callable[[str], Any]
) -> None:
    hf, _ = plain_smollm2
    ids, labels, before, scores = expected(form)
    prompts = asked(model, form)
    (prompt,) = prompts
    assert list(prompt.token_ids) == ids
    assert [list(one) for one in prompt.label_ids] == labels
    torch.testing.assert_close(tn.ask(model, prompts)[0], before, atol=1e-5, rtol=1e-4)
    # all layers of the shortest prompt, and the compared ones of the others
    some = {} if form == "completion" else {"sites": dict.fromkeys(SITES, LAYERS)}
    for engine, (method, nodes) in RULES.items():
        ours = tn.attribute(model, prompts, n_steps=len(nodes), method=method, engine=engine, **some)
        for site in SITES:
            wanted = torch.stack([scores[site, layer][engine] for layer in LAYERS])
            found = ours.difference[site][0, list(LAYERS)]
            largest = ours.difference[site].abs().max()
            torch.testing.assert_close(found, wanted, atol=1e-4 * float(largest), rtol=0)
    space = backend_of(model).space
    strongest = {place: int(by_engine["shared_prefix"].argmax()) for place, by_engine in scores.items() if place[1]}
    neurons = [space.neuron(*place, index) for place, index in strongest.items()]
    with torch.no_grad():
        ablated = ablated_probabilities(hf, ids, labels, strongest)
    ours = tn.ask(model, prompts, neurons=tn.NeuronSet(neurons))[0]
    torch.testing.assert_close(ours, ablated, atol=1e-4 * float(before.max()), rtol=0)
    assert (ours - before).abs().max() > 1e-4, "the neurons have an effect"


def ablated_probabilities(
    hf: Any, ids: list[int], labels: list[list[int]], neurons: dict[tuple[str, int], int]
) -> Tensor:
    """Answer probabilities with one neuron of each of these places zero-ablated at all positions."""
    with ExitStack() as stack:
        for (site, layer), index in neurons.items():
            keep = torch.ones(hf.model.layers[layer].get_submodule(SITES[site]).in_features)
            keep[index] = 0
            stack.enter_context(replaced(hf, layer, site, lambda value, keep=keep: value * keep))
        return probabilities(hf, torch.tensor([ids]), labels)[0]
