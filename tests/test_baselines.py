"""Baselines of integrated gradients: activations on baseline inputs, and values given for each prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import unwrap
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from scripts.train_toy import build_tokenizer
from tests.conftest import QUICK, needs_hooked, random_checkpoint
from tn_lens import (
    BadInput,
    QuestionSet,
    Settings,
    attribute,
    build_prompt,
    build_prompts,
    find_truth_neurons,
    load_model,
)
from tn_lens.attribution.baseline import post_norm_warning
from tn_lens.attribution.methods.method import METHODS
from tn_lens.attribution.result import PassSize
from tn_lens.core.options import BaselineInput
from tn_lens.core.settings import PRESETS
from tn_lens.inference.baselines import baseline_tokens, input_activations, padding_token
from tn_lens.models import Model
from tn_lens.neurons import NEURON_SITES
from tn_lens.questions.formats import FORMATS
from tn_lens.questions.prompts import PromptSet
from tn_lens.questions.toy import binary

INPUTS = get_args(BaselineInput)
FAMILIES = ("Llama-3.1-8B-Instruct", "Qwen2.5-3B-Instruct", "OLMo-2-1124-7B-Instruct", "GPT-2")
PAD, BOS, EOS = 0, 1, 2


@pytest.fixture(scope="session")
def folder(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint; GPT-2 has biases and added positions."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name != "GPT-2":
            return checkpoint(name)
        if name not in made:
            made[name] = tmp_path_factory.mktemp("gpt2")
            config = GPT2Config(vocab_size=283, n_positions=128, n_embd=32, n_layer=3, n_head=4)
            random_checkpoint(config).save_pretrained(made[name])
            build_tokenizer().save_pretrained(made[name])
        return made[name]

    return get


def loaded(folder: Callable[[str], Path], name: str) -> Model:
    """A tiny model in float64."""
    return load_model(folder(name), dtype=torch.float64, backend="bridge" if name == "GPT-2" else None)


def prompts_of(model: Model) -> PromptSet:
    """Prompts of several lengths."""
    prompts = build_prompts(model, binary()[:12], order="given")
    assert len({len(prompt.token_ids) for prompt in prompts}) > 1
    return prompts


def expected_ids(model: Model, prompts: PromptSet, name: str) -> list[list[int]]:
    """The tokens of the baseline inputs, written by hand."""
    if name != "blanked":
        return [
            [BOS, *[PAD] * (len(p.token_ids) - 1)] if p.token_ids[0] == BOS else [PAD] * len(p.token_ids)
            for p in prompts
        ]
    template = binary().template
    lines = template.separator.join(template.choice.replace("{label}", x).replace("{choice}", "") for x in "AB")
    text = template.user.replace("{question}", "").replace("{choices}", lines).replace("{labels}", "A and B")
    system = f"{template.system}\n\n" if template.system else ""
    return [model.tokenizer(system + text + template.cue)["input_ids"]] * len(prompts)


def hugging_face(model: PreTrainedModel, token_ids: list[int], name: str) -> dict[str, Tensor]:
    """Activations at the last position of one input [layer, neuron] by site: the inputs of W_out and W_O."""
    read: dict[str, list[Tensor]] = {"mlp": [], "attn": []}
    projections = {"mlp.down_proj": "mlp", "mlp.c_proj": "mlp", "self_attn.o_proj": "attn", "attn.c_proj": "attn"}
    handles = []
    for path, module in model.named_modules():  # in the order of the layers
        site = next((site for end, site in projections.items() if path.endswith(end)), None)
        if site is not None:
            keep = read[site].append
            handles.append(module.register_forward_pre_hook(lambda _, given, keep=keep: keep(given[0][0, -1])))
    ids = torch.tensor([token_ids])
    embeddings = torch.zeros(1, len(token_ids), model.config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        model(**({"inputs_embeds": embeddings} if name == "zero_embeddings" else {"input_ids": ids}))
    for handle in handles:
        handle.remove()
    return {site: torch.stack(layers) for site, layers in read.items()}


def by_hand(model: Model, path: Path, prompts: PromptSet, name: str) -> dict[str, Tensor]:
    """The baseline of every prompt [prompt, layer, neuron], from Hugging Face's model, one input at a time."""
    judge = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    runs = [hugging_face(judge, ids, name) for ids in expected_ids(model, prompts, name)]
    return {site: torch.stack([run[site] for run in runs]) for site in NEURON_SITES}


BACKENDS = [pytest.param("hooked", marks=needs_hooked), "bridge"]


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_on_baseline_inputs_equal_hugging_faces(
    backend: Any, family: str, name: BaselineInput, folder: Callable[[str], Path]
) -> None:
    if (backend, family) == ("hooked", "GPT-2"):
        pytest.skip("TransformerLens loads only published GPT-2 checkpoints into a HookedTransformer")
    model = load_model(folder(family), dtype=torch.float64, backend=backend)
    prompts = prompts_of(model)
    found, expected = input_activations(model, prompts, name), by_hand(model, folder(family), prompts, name)
    for site in NEURON_SITES:
        # Hugging Face computes norms in float32
        torch.testing.assert_close(found[site], expected[site], atol=2e-5, rtol=1e-4)
    changes = {"zero_embeddings": family == "GPT-2", "end_of_text": True, "blanked": False}[name]
    assert changes == bool((found["mlp"] - found["mlp"][:1]).abs().max() > 1e-4), "inputs differ between lengths"


@needs_hooked  # compared in float64, in which the bridge does not compute norms
@pytest.mark.parametrize("name", ["end_of_text", "blanked"])
@pytest.mark.parametrize("family", ["Llama-3.1-8B-Instruct", "Qwen2.5-3B-Instruct"])
def test_both_engines_start_at_the_activation_on_the_baseline_input(
    family: str, name: BaselineInput, folder: Callable[[str], Path]
) -> None:
    model = loaded(folder, family)
    prompts = prompts_of(model)[:3]
    baseline = input_activations(model, prompts, name)
    options: dict[str, Any] = {"baseline": "input", "baseline_input": name, "n_steps": 6, "method": "gausslegendre"}
    engines = ["shared_prefix", "direct"]
    fast, slow = (attribute(model, prompts, engine=engine, **options) for engine in engines)
    for row, prompt in enumerate(prompts):
        options["baseline"] = {site: baseline[site][row] for site in NEURON_SITES}
        alone = attribute(model, prompt, engine="direct", **options)
        for site in NEURON_SITES:
            for scores in (fast, slow):
                torch.testing.assert_close(
                    scores.difference[site][row], alone.difference[site][0], atol=1e-10, rtol=1e-8
                )
                torch.testing.assert_close(scores.change[site][row], alone.change[site][0], atol=1e-10, rtol=1e-8)


@needs_hooked  # compared in float64, in which the bridge does not compute norms
@pytest.mark.parametrize("engine", ["shared_prefix", "direct"])
def test_every_prompt_gets_its_row_of_a_given_baseline(engine: str, folder: Callable[[str], Path]) -> None:
    model = loaded(folder, "Llama-3.1-8B-Instruct")
    prompts = prompts_of(model)[:5]
    draw = torch.Generator().manual_seed(0)
    shapes = {site: scores.shape for site, scores in input_activations(model, prompts).items()}
    rows = {site: 0.1 * torch.randn(shape, generator=draw, dtype=torch.float64) for site, shape in shapes.items()}
    options: dict[str, Any] = {"n_steps": 4, "engine": engine}
    together = attribute(model, prompts, baseline=rows, internal_batch_size=PassSize(2, 7), **options)
    for row, prompt in enumerate(prompts):
        alone = attribute(model, prompt, baseline={site: rows[site][row] for site in NEURON_SITES}, **options)
        for site in NEURON_SITES:
            torch.testing.assert_close(together.difference[site][row], alone.difference[site][0], atol=1e-10, rtol=1e-8)
            torch.testing.assert_close(together.change[site][row], alone.change[site][0], atol=1e-10, rtol=1e-8)
    shuffled = {site: values.flip(0) for site, values in rows.items()}
    other = attribute(model, prompts, baseline=shuffled, **options)
    assert (other.difference["mlp"] - together.difference["mlp"]).abs().max() > 1e-4, "the test can fail"


def test_a_shared_baseline_may_be_repeated_for_each_prompt(folder: Callable[[str], Path]) -> None:
    model = loaded(folder, "Llama-3.1-8B-Instruct")
    prompts = prompts_of(model)[:3]
    shared = {site: values[0] for site, values in input_activations(model, prompts).items()}
    repeated = {site: values.expand(3, -1, -1) for site, values in shared.items()}
    for positions in ("last", "all"):
        one, each = (attribute(model, prompts, n_steps=3, positions=positions, baseline=b) for b in (shared, repeated))
        torch.testing.assert_close(one.difference, each.difference, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_sum_to_the_change_from_the_baseline_input(
    family: str, name: BaselineInput, folder: Callable[[str], Path]
) -> None:
    if "OLMo" in family and name == "zero_embeddings":
        pytest.skip("zero activation in a post-norm model, see the warning")
    model = loaded(folder, family)
    found = attribute(
        model, prompts_of(model)[:2], baseline="input", baseline_input=name, method="gausslegendre", n_steps=60
    )
    assert found.completeness_gap < 1e-3
    assert found.change["mlp"].abs().max() > 1e-5


def test_zero_embeddings_are_zero_activations_without_biases(folder: Callable[[str], Path]) -> None:
    for family in FAMILIES:
        model = loaded(folder, family)
        values = input_activations(model, prompts_of(model)[:1], "zero_embeddings")
        is_zero = not any(values[site].any() for site in NEURON_SITES)
        assert is_zero == (family in ("Llama-3.1-8B-Instruct", "OLMo-2-1124-7B-Instruct")), family


def test_post_norm_models_are_warned_about_zero_embeddings(folder: Callable[[str], Path]) -> None:
    model = loaded(folder, "OLMo-2-1124-7B-Instruct")
    assert post_norm_warning(model, "riemann_right", "input", "zero_embeddings")
    assert post_norm_warning(model, "riemann_right", "zero", "zero_embeddings")
    assert post_norm_warning(model, "riemann_right", "input", "end_of_text") is None
    assert post_norm_warning(model, "riemann_right", "mean", "zero_embeddings") is None
    assert post_norm_warning(model, "graded", "input", "zero_embeddings") is None
    assert all(METHODS[values["method"]] for values in PRESETS.values())


class Words:
    """A tokenizer's special tokens."""

    def __init__(self, pad: int | None, eos: int | None, unk: int | None = None, bos: int | None = None) -> None:
        self.pad_token_id, self.eos_token_id, self.unk_token_id, self.bos_token_id = pad, eos, unk, bos


@needs_hooked  # the bridge accepts only real tokenizers
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (Words(0, 2, bos=1), 0),
        (Words(None, 2), 2),
        (Words(3, 2, unk=3), 2),
        (Words(1, 2, bos=1), 2),
        (Words(5, 5, unk=5, bos=5), 5),
        (Words(3, None, unk=3), None),
        (Words(None, None), None),
        (Words(283, 2), None),
        (None, None),
    ],
)
def test_the_padding_token(tokens: Any, expected: int | None, toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "tokenizer", tokens)
    if expected is not None:
        assert padding_token(toy) == expected
    else:
        with pytest.raises(BadInput, match="needs a tokenizer with a padding or end-of-text token"):
            padding_token(toy)


def test_blank_prompts_have_the_labels_and_the_examples(toy: Model) -> None:
    questions = binary()[:6].with_format("letters", n_shots=1)
    prompts = build_prompts(toy, questions, order="both")
    assert len({prompt.blank_ids for prompt in prompts}) == 1
    first, blank = prompts[0], prompts[0].blank_ids
    assert blank[: first.start] == first.token_ids[: first.start], "all tokens before the question"
    assert blank[-1] == first.token_ids[-1]
    assert len(blank) < len(first.token_ids)


@pytest.mark.parametrize("name", INPUTS)
def test_a_baseline_input_needs_the_last_position(name: BaselineInput, toy: Model) -> None:
    prompts = build_prompts(toy, binary()[:2])
    with pytest.raises(BadInput, match="the baseline 'input' is an activation at the last position"):
        attribute(toy, prompts, baseline="input", baseline_input=name, positions="all")
    with pytest.raises(BadInput, match="the baseline 'input' is an activation at the last position"):
        find_truth_neurons(toy, binary(), Settings(baseline="input", baseline_input=name, positions="all"))


def test_bad_baselines(toy: Model) -> None:
    prompts = build_prompts(toy, binary()[:2])
    with pytest.raises(BadInput, match=r"baseline_input must be one of 'zero_embeddings', .*; got 'silence'"):
        unwrap(baseline_tokens)(toy, prompts, "silence")  # the tests check types
    free = build_prompt(toy, prompts[0].text, right=" A", wrong=" B")
    with pytest.raises(BadInput, match="'blanked' needs prompts of build_prompts"):
        attribute(toy, free, baseline="input", baseline_input="blanked")
    completions = build_prompts(toy, replace(binary()[:2], template=FORMATS["completion"]))
    with pytest.raises(BadInput, match="'blanked' needs prompts of build_prompts"):
        attribute(toy, completions, baseline="input", baseline_input="blanked")
    values = input_activations(toy, prompts)
    with pytest.raises(BadInput, match=r"or \(1, .* with one row per prompt, got \(2, "):
        attribute(toy, prompts[:1], baseline=values)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("name", ["end_of_text", "blanked"])
def test_a_run_from_a_baseline_input(name: BaselineInput, toy: Model, few: QuestionSet) -> None:
    found = find_truth_neurons(toy, few, replace(QUICK, baseline="input", baseline_input=name), progress=False)
    assert found.settings.baseline_input == name
    assert found.provenance.settings["baseline_input"] == name
    assert all(max(map(abs, gaps["change"])) < float("inf") for gaps in found.completeness.values())


def test_presets() -> None:
    paper, default = Settings.preset("paper"), Settings()
    assert paper == replace(default, order="random"), "the defaults, also for models with a recommended order"
    for name, values in PRESETS.items():
        chosen = Settings.preset(name, n_steps=7, seed=3)
        assert (chosen.n_steps, chosen.seed) == (7, 3)
        assert all(getattr(chosen, key) == value for key, value in values.items() if key != "n_steps")
    with pytest.raises(BadInput, match="unknown preset 'best'; expected 'paper' or 'recommended'"):
        Settings.preset("best")
