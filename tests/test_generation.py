"""Greedy continuations: those of Hugging Face's `generate`, with and without rows of weights set to zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.train_toy import build_tokenizer
from tests.conftest import PAPER_MODELS, needs_hooked, paper_config, random_checkpoint, zeroed
from tn_lens import BadInput, Mean, NeuronSet, Resample, Scale, Zero, generate, load_model
from tn_lens.models import Model, backend_of, neuron_space

PROMPTS = ["Question : which home does Balum have ?", "Answer", "Statement : Bapel has which metal ? True or False ?"]
BACKENDS = [pytest.param("hooked", marks=needs_hooked), "bridge"]


def some_neurons(model: Model, n: int = 8) -> NeuronSet:
    """Neurons at both sites and in all layers."""
    space = neuron_space(model)
    widths = {"mlp": space.d_mlp, "attn": space.n_heads * space.d_head}
    places = [(site, layer, width) for site, width in widths.items() for layer in range(space.n_layers)]
    return NeuronSet(space.neuron(site, layer, (7 * i) % width) for site, layer, width in places for i in range(n))


def expected(hf: Any, tokenizer: Any, text: str, n_tokens: int, **special: Any) -> list[int]:
    """The new tokens of Hugging Face's greedy decoding, without the end-of-text token."""
    ids = torch.tensor([tokenizer(text, **special)["input_ids"]])
    with torch.no_grad():
        whole = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False)
    new = whole[0, ids.shape[1] :].tolist()
    ends = hf.generation_config.eos_token_id
    return new[:-1] if new and new[-1] in (ends if isinstance(ends, list) else [ends]) else new


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PAPER_MODELS)
def test_tokens_equal_hugging_face(name: str, backend: str) -> None:
    hf, tokenizer = random_checkpoint(paper_config(name)), build_tokenizer()
    model = load_model(name, hf_model=hf, tokenizer=tokenizer, backend=backend, dtype=torch.float32)
    neurons = some_neurons(model)
    before = [expected(hf, tokenizer, text, 20) for text in PROMPTS]
    written = generate(model, PROMPTS, neurons=neurons, max_new_tokens=20)
    changed = zeroed(random_checkpoint(paper_config(name)), neurons, neuron_space(model).d_head)
    after = [expected(changed, tokenizer, text, 20) for text in PROMPTS]
    assert before != after, "the neurons have an effect"
    assert list(written.columns) == ["prompt", "unablated", "ablated"]
    assert written["prompt"].tolist() == PROMPTS
    for column, tokens in (("unablated", before), ("ablated", after)):
        for text, continuation, new in zip(PROMPTS, written[column], tokens, strict=True):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) + continuation == tokenizer.decode(ids + new)
    assert backend_of(model).continue_greedily(tokenizer(PROMPTS[0])["input_ids"], 20) == before[0], (
        "no hook is left behind"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trained_checkpoint_equals_hugging_face(shared: Path, backend: str) -> None:
    folder = shared / "models" / "tinystories-656k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain, changed = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    model = load_model(folder, backend=backend, device="cpu")
    neurons = some_neurons(model, 40)
    texts = ["Once upon a time, there was a little girl named", "The dog", "Tom and his mom went to the"]
    written = generate(model, texts, neurons=neurons, max_new_tokens=60)
    alone = [generate(model, text, neurons=neurons, max_new_tokens=60).iloc[0] for text in texts]
    zeroed(changed, neurons, neuron_space(model).d_head)
    for column, judge in (("unablated", plain), ("ablated", changed)):
        for row, text in enumerate(texts):
            whole = tokenizer.decode([*tokenizer(text)["input_ids"], *expected(judge, tokenizer, text, 60)])
            assert whole.endswith(text + written[column][row])
            assert alone[row][column] == written[column][row]
    assert (written["unablated"] != written["ablated"]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_end_of_text_token_ends_a_text(tmp_path: Path, backend: str) -> None:
    """The generation config may list several; they are also known if the model is loaded from a folder."""
    hf, tokenizer = random_checkpoint(paper_config("Llama-3.1-8B-Instruct")), build_tokenizer()
    hf.generation_config.eos_token_id = None
    free = expected(hf, tokenizer, PROMPTS[0], 12)
    different = list(dict.fromkeys(free))
    hf.generation_config.eos_token_id = [different[3], different[2]]
    n = free.index(different[2])
    assert expected(hf, tokenizer, PROMPTS[0], 12) == free[:n] != []
    hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for model in (
        load_model("a", hf_model=hf, tokenizer=tokenizer, backend=backend),
        load_model(tmp_path, backend=backend, dtype=torch.float32),
    ):
        assert backend_of(model).continue_greedily(tokenizer(PROMPTS[0])["input_ids"], 12) == free[:n]


def test_other_interventions(toy: Model) -> None:
    neurons = some_neurons(toy, 60)
    same = generate(toy, PROMPTS[:1], neurons=neurons, intervention=Scale(factor=1))
    assert same["unablated"][0] == same["ablated"][0] != ""
    for bad in (Resample(), Mean(), Zero(positions="last")):
        with pytest.raises(BadInput, match="generate needs an intervention at all positions that takes no values"):
            generate(toy, PROMPTS, neurons=neurons, intervention=bad)


def test_a_text_can_be_a_user_turn(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("Llama-3.2-3B-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}Statement : {{ m.content }} {% endfor %}{% if add_generation_prompt %}Answer :{% endif %}"
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = load_model("a", hf_model=hf, tokenizer=tokenizer)
    written = generate(model, "Bapel has which metal ?", neurons=NeuronSet(), chat=True)
    rendered = "Statement : Bapel has which metal ? Answer :"
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    new = expected(hf, tokenizer, rendered, 30, add_special_tokens=False)
    assert written["prompt"].tolist() == ["Bapel has which metal ?"]
    assert tokenizer.decode(ids) + written["unablated"][0] == tokenizer.decode(ids + new)
    plain = generate(model, "Bapel has which metal ?", neurons=NeuronSet())
    assert plain["unablated"][0] != written["unablated"][0]


def test_bad_input_is_refused_in_one_sentence(toy: Model) -> None:
    none = NeuronSet()
    for said, arguments in {
        "at least one prompt and one new token; got 0 and 30 new tokens": {"prompts": []},
        "at least one prompt and one new token; got 1 and 0 new tokens": {"prompts": "Answer", "max_new_tokens": 0},
        "exceed the context window of 64; shorten it, or generate fewer tokens": {"prompts": "Answer " * 40},
        "this model has no chat template; omit chat=True": {"prompts": "Answer", "chat": True},
    }.items():
        with pytest.raises(BadInput, match=said) as raised:
            generate(toy, **{"neurons": none, **arguments})
        assert "\n" not in str(raised.value)
    bare = load_model("bare", hf_model=random_checkpoint(paper_config("Qwen2.5-3B-Instruct")))
    with pytest.raises(BadInput, match="has no tokenizer"):
        generate(bare, "Answer", neurons=none)


def test_the_command_prints_both_texts(whole: Path, run: Callable, toy: Model) -> None:
    neurons = NeuronSet.load(whole / "neurons.json")
    texts = ["Question : which home does Balum have ? Answer :", "Statement : Bapel"]
    code, said, error = run("generate", whole, *texts, "--max-new-tokens", "3")
    assert (code, error) == (0, "")
    shown = [[cell.strip() for cell in line.split("│")] for line in said.splitlines()]
    for intervention, printed in ((Zero(), shown), (Scale(factor=3), None)):
        if printed is None:
            arguments = ("--mode", "scale", "--factor", "3")
            code, said, error = run("generate", whole, *texts, "--max-new-tokens", "3", *arguments)
            printed = [[cell.strip() for cell in line.split("│")] for line in said.splitlines()]
        written = generate(toy, texts, neurons=neurons, intervention=intervention, max_new_tokens=3)
        for row in written.itertuples(index=False):
            assert ["", row.prompt, row.unablated.strip(), row.ablated.strip(), ""] in printed
        assert intervention.description in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--chat"], "this model has no chat template"),
        (["--mode", "mean"], "give --mode zero, or --mode scale with --factor F"),
        (["--mode", "scale"], "--mode scale needs a factor"),
        (["--max-new-tokens", "0"], "expected a value greater than or equal to 1"),
    ],
)
def test_the_command_refuses_bad_input(arguments: list[str], said: str, whole: Path, run: Callable) -> None:
    code, _, error = run("generate", whole, "Answer", *arguments)
    assert code == 2
    assert said in error
    assert len(error.strip().splitlines()) == 1
