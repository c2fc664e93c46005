"""The numbers on a card equal those computed independently from the model, the scores and the statistics."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, GPT2Config

from tests.conftest import first_of_parts, needs_hooked, paper_config, random_checkpoint
from tn_lens import (
    Neuron,
    QuestionSet,
    Settings,
    attribute,
    build_prompts,
    find_truth_neurons,
    load_model,
    manipulation_check,
    neuron_card,
    select_neurons,
)
from tn_lens.core.tokens import token_text, visible
from tn_lens.inference.manipulation import is_right
from tn_lens.models import Model, backend_of, build_model
from tn_lens.questions.toy import binary
from tn_lens.results.card import Card, load_cards
from tn_lens.results.make_cards import make_cards
from tn_lens.selection.stored import StoredScores
from tn_lens.toy.plant import planted

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def of_toy(
    toy: Model, toy_questions: QuestionSet, few_resamples: None, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    out = tmp_path_factory.mktemp("cards") / "run"
    settings = Settings(limit=40, n_steps=3, n_repetitions=2, convergence_sample=1)
    questions = first_of_parts(toy_questions, find=60, report=16)
    return find_truth_neurons(toy, questions, settings, out=out, progress=False), out


def test_the_cards_of_a_run_are_its_strongest_neurons_with_their_statistics(of_toy: Any) -> None:
    found, _ = of_toy
    records = {Neuron.from_dict(record): record for record in found.records()}
    assert len(found.cards) == min(50, len(records)) > 3
    assert [card.neuron for card in found.cards] == list(records)[: len(found.cards)]
    for card in found.cards:
        record = records[card.neuron]
        for key in ("mean_difference", "ci_low", "p_adjusted", "share", "cohens_d"):
            assert card.statistics[key] == record[key]
        assert (card.verdict, card.case) == (record["verdict"], record["case"])
        assert card.n_beside == len(found.neurons.at(card.neuron.site, card.neuron.layer)) - 1
        assert card.n_layers == 2
        assert str(card.neuron) in card.summary()


def test_stored_cards_are_the_same_ones(of_toy: Any) -> None:
    found, out = of_toy
    again = load_cards(out)
    assert [card.to_text() for card in again] == [card.to_text() for card in found.cards]
    assert [card.to_html() for card in again] == [card.to_html() for card in found.cards]
    assert [card.to_bytes(".json") for card in again] == [card.to_bytes(".json") for card in found.cards]
    assert "<" not in (out / "cards.json").read_text().replace("<unk>", "").replace("<pad>", "").replace("<s>", "")


def test_activations_equal_a_plain_cache_of_every_prompt(of_toy: Any, toy: Model) -> None:
    found, _ = of_toy
    prompts = found.check.asked
    right = is_right(found.check.probabilities, prompts).tolist()
    caches = [toy.run_with_cache(torch.tensor([p.token_ids]))[1] for p in prompts]
    for card in [next(c for c in found.cards if c.neuron.site == site) for site in ("mlp", "attn")]:
        n = card.neuron
        values = np.array(
            [
                float(cache[f"blocks.{n.layer}.mlp.hook_post"][0, -1, n.index])
                if n.head is None
                else float(cache[f"blocks.{n.layer}.attn.hook_z"][0, -1, n.head, n.index])
                for cache in caches
            ]
        )
        groups = {
            "answered right": np.array(right),
            "answered wrong": ~np.array(right),
            "right answer at A": np.array([p.right == 0 for p in prompts]),
            "right answer at B": np.array([p.right == 1 for p in prompts]),
        }
        assert set(card.activations) == set(groups)
        for name, rows in groups.items():
            of = card.activations[name]
            assert of.n == rows.sum()
            assert of.mean == pytest.approx(values[rows].mean(), rel=1e-4, abs=1e-6)
            assert of.std == pytest.approx(values[rows].std(ddof=1), rel=1e-4, abs=1e-6)


def test_the_questions_are_those_of_the_highest_and_lowest_scores(of_toy: Any, toy_questions: QuestionSet) -> None:
    found, out = of_toy
    stored = StoredScores.load(out)
    card = found.cards[1]
    n = card.neuron
    d = {q: float(of[n.site][n.layer, stored.space.flat(n)]) for q, of in stored.per_question()}
    ranked = sorted(d, key=lambda q: -d[q])
    assert [one.question for one in card.supports] == ranked[:5]
    assert [one.question for one in card.opposes] == ranked[:-6:-1]
    assert [one.difference for one in card.supports] == [d[q] for q in ranked[:5]]
    assert card.n_questions == len(d) == len(found.check.questions)
    assert card.share_positive == np.mean([value > 0 for value in d.values()])
    texts = {q.text: q for q in toy_questions.part("find")}
    for one in card.supports + card.opposes:
        asked = texts[one.text]
        assert (one.right, *one.wrong) == (asked.choices[asked.answer], *(c for c in asked.choices if c != one.right))
        assert one.category == asked.category


def test_tokens_are_those_of_a_plain_matrix_product(of_toy: Any, toy: Model) -> None:
    found, _ = of_toy
    for card in found.cards[:6]:
        n = card.neuron
        block: Any = toy.blocks[n.layer]
        row = block.mlp.W_out[n.index] if n.head is None else block.attn.W_O[n.head, n.index]
        logits = (row * toy.ln_final.w) @ toy.unembed.W_U
        logits = logits - logits.mean()
        order = logits.argsort(descending=True).tolist()
        assert [t.id for t in card.promotes] == order[:10]
        assert [t.id for t in card.demotes] == order[:-11:-1]
        assert [t.logit for t in card.promotes] == pytest.approx(logits[order[:10]].tolist(), rel=1e-4)
        assert [t.text for t in card.promotes] == toy.tokenizer.convert_ids_to_tokens(order[:10])
        assert [t.text for t in card.labels] == ["A", "a", "B", "b"]
        assert [t.logit for t in card.labels] == pytest.approx([float(logits[t.id]) for t in card.labels], rel=1e-4)


@needs_hooked
@pytest.mark.parametrize("norm", [None, "LN", "RMS"])
def test_direct_logits_are_what_the_last_layer_adds(norm: str | None) -> None:
    """They equal the change of the logits per unit of activation, times the scale of the final norm, up to a shared constant."""
    model = build_model(
        {
            "n_layers": 2, "d_model": 24, "n_ctx": 8, "n_heads": 2, "d_head": 12, "d_mlp": 16, "d_vocab": 31,
            "act_fn": "gelu", "normalization_type": norm, "device": "cpu", "dtype": torch.float64,
        }
    )  # fmt: skip
    for parameter in model.ln_final.parameters() if norm else ():
        parameter.data = 1 + 0.5 * torch.randn_like(parameter)
    tokens = torch.arange(5)[None]
    neurons = [Neuron("mlp", 1, None, 3), Neuron("mlp", 1, None, 9)]
    sizes = []

    def logits(index: int, by: float) -> torch.Tensor:
        def move(value: torch.Tensor, hook: object) -> torch.Tensor:
            value = value.clone()
            value[0, -1, index] += by
            return value

        def freeze(scale: torch.Tensor, hook: object) -> torch.Tensor:
            """Keep the scale of the norm constant, since the definition does not include it."""
            sizes.append(float(scale[0, -1, 0]))
            return torch.full_like(scale, sizes[0])

        frozen = [("ln_final.hook_scale", freeze)] if norm else []
        return model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.hook_post", move), *frozen])[0, -1]

    for neuron, ours in zip(neurons, backend_of(model).direct_logits(neurons), strict=True):
        sizes.clear()
        moved = (logits(neuron.index, 0.0) - logits(neuron.index, -1.0)) * (sizes[0] if norm else 1.0)
        torch.testing.assert_close(ours, moved - moved.mean())


@needs_hooked
def test_a_norm_behind_the_weights_counts(tiny: Callable[..., Model]) -> None:
    model = tiny("OLMo-2-1124-7B-Instruct")
    block: Any = model.blocks[1]
    neurons = [Neuron("mlp", 1, None, 5), Neuron("attn", 1, 2, 3)]
    last: Any = model.ln_final.w
    rows = torch.stack([block.mlp.W_out[5] * block.ln2.w, block.attn.W_O[2, 3] * block.ln1.w])
    expected = (rows * last) @ model.unembed.W_U
    torch.testing.assert_close(backend_of(model).direct_logits(neurons), expected - expected.mean(1, keepdim=True))
    plain = torch.stack([block.mlp.W_out[5], block.attn.W_O[2, 3]]) * last @ model.unembed.W_U
    assert not torch.allclose(plain - plain.mean(1, keepdim=True), backend_of(model).direct_logits(neurons), rtol=1e-2)


@pytest.mark.parametrize("name", ["Qwen2.5-3B-Instruct", "OLMo-2-1124-7B-Instruct", "gemma2", "gpt2"])
def test_direct_logits_of_a_bridge(name: str) -> None:
    """The norms follow Hugging Face's conventions: Gemma's add 1 to their weights, and GPT-2's subtract the mean."""
    small: dict[str, Any] = {"vocab_size": 283, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "gemma2":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        config = Gemma2Config(**small, **heads, hidden_size=32, intermediate_size=40, num_hidden_layers=2)
    elif name == "gpt2":
        config = GPT2Config(**small, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    else:
        config = paper_config(name)
    source: Any = random_checkpoint(config)
    ours = backend_of(load_model(name, hf_model=source, backend="bridge", dtype="float64")).direct_logits(
        [Neuron("mlp", 1, None, 5), Neuron("attn", 1, 2, 3)]
    )
    source = source.double()
    if name == "gpt2":
        block = source.transformer.h[1]
        rows = torch.stack([block.mlp.c_proj.weight[5], block.attn.c_proj.weight[2 * 8 + 3]])
        rows = (rows - rows.mean(-1, keepdim=True)) * source.transformer.ln_f.weight
    else:
        layer, d_head = source.model.layers[1], source.config.hidden_size // source.config.num_attention_heads
        rows = torch.stack([layer.mlp.down_proj.weight[:, 5], layer.self_attn.o_proj.weight[:, 2 * d_head + 3]])
        if name == "gemma2":
            behind = torch.stack([layer.post_feedforward_layernorm.weight, layer.post_attention_layernorm.weight])
            rows = rows * (1 + behind) * (1 + source.model.norm.weight)
        elif name.startswith("OLMo"):
            behind = torch.stack([layer.post_feedforward_layernorm.weight, layer.post_attention_layernorm.weight])
            rows = rows * behind * source.model.norm.weight
        else:
            rows = rows * source.model.norm.weight
    expected = (rows @ source.lm_head.weight.T).detach()
    torch.testing.assert_close(ours, expected - expected.mean(1, keepdim=True), rtol=1e-5, atol=1e-6)


@needs_hooked
def test_a_planted_neuron_shows_what_was_planted() -> None:
    world = planted(seed=2, noise=0.0)
    check = manipulation_check(world.model, world.prompts)
    scores = attribute(world.model, check.prompts, n_steps=5)
    selection = select_neurons(scores, adaptive_threshold=0.2)
    cards = {c.neuron: c for c in make_cards(world.model, scores, check, selection=selection)}
    assert set(cards) == set(world.truth)
    for neuron in world.truth.at("mlp"):
        card = cards[neuron]
        assert card.share_positive == 1
        by = {t.id: t.logit for t in card.labels}
        assert by[0] == by[1] == pytest.approx(-by[2], abs=1e-6)
        shown = {name: of.mean for name, of in card.activations.items()}
        assert shown["answered right"] == pytest.approx(0, abs=0.2), "it says A here and B there"
        # mistaken questions, a fifth, believe the opposite
        assert np.sign(shown["right answer at A"]) == np.sign(by[0]) == -np.sign(shown["right answer at B"])
        assert "right answer at" in card.turned
        assert card.activations["answered wrong"].n == len(world.mistaken)
    trap = world.traps["letter"]
    card = neuron_card(world.model, str(trap), scores, check, selection=selection)
    assert card.share_positive == pytest.approx(0.5, abs=0.02)
    assert card.activations["right answer at A"].mean == pytest.approx(card.activations["right answer at B"].mean)
    assert card.n_beside == len(world.truth.at("mlp", trap.layer))
    assert card.supports[0].text.startswith("question ")
    assert not card.statistics["found"]
    assert "did not pass" in card.summary()
    weak = neuron_card(world.model, world.traps["weak"], scores, check, selection=selection)
    assert not weak.statistics
    assert "neither found nor a candidate" in weak.summary()
    assert weak.verdict is None


def test_one_forward_over_the_prompts_whatever_the_number_of_cards(
    toy: Model, toy_questions: QuestionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = build_prompts(toy, toy_questions.part("find").select(range(6)), order="both")
    check = manipulation_check(toy, prompts)
    scores = attribute(toy, check.prompts, n_steps=2)
    runs = []
    forward = type(toy).forward
    monkeypatch.setattr(type(toy), "forward", lambda *a, **k: runs.append(1) or forward(*a, **k))
    neurons = [Neuron("mlp", layer, None, index) for layer in (0, 1) for index in range(8)]
    cards = make_cards(toy, scores, check, neurons=neurons)
    assert len(cards) == 16
    n_runs = len(runs)
    runs.clear()
    assert neuron_card(toy, neurons[5], scores, check).to_text() == cards[5].to_text()
    assert len(runs) == n_runs


SLY = "<img src=x onerror=alert(1)> & \x1b[31mred\x1b[0m 🧠👩‍🔬 שלום \u202egnidaeh [bold]x[/bold] {{ 7*7 }}"


def test_sly_text_is_shown_and_not_obeyed(of_toy: Any) -> None:
    found, _ = of_toy
    one = found.cards[0].supports[0]
    sly = type(one)(**{**vars(one), "text": SLY, "wrong": ("<script>x</script>",), "category": "<b>c</b>"})
    token = type(found.cards[0].promotes[0])("<i>t</i>", 5, 0.1)
    card = Card(**{**vars(found.cards[0]), "supports": (sly,), "promotes": (token,)})
    page, text = card.to_html(), card.to_text()
    for tag in ("<img", "<script>", "<b>c", "<i>t"):
        assert tag not in page
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; &lt;U+001B&gt;[31mred" in page
    assert "<bdi>" in page
    assert "{{ 7*7 }}" in page
    for shown in (page, text):
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert "🧠👩‍🔬 שלום" in shown
    assert "[bold]x[/bold]" in text
    assert Card.from_bytes(card.to_bytes(".json"), ".json").to_html() == page


def test_white_space_in_tokens_is_visible() -> None:
    assert visible(" A\n\t", spaces=True) == "␣A⏎⇥"
    assert visible("a\u200bb\u00a0", spaces=True) == "a<U+200B>b<U+00A0>"
    assert visible("a\u200db c\n") == "a\u200db c "


class Vocabulary:
    """A stub of a tokenizer with one raw token and its decoded text."""

    def __init__(self, raw: str, decoded: str) -> None:
        self.raw, self.decoded = raw, decoded

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.raw

    def decode(self, ids: list[int]) -> str:
        return self.decoded


@pytest.mark.parametrize(
    ("raw", "decoded", "shown"),
    [
        ("ĠParis", " Paris", "␣Paris"),
        ("▁Paris", "Paris", "␣Paris"),
        ("âĢ", "\ufffd", "<E2 80>"),
        ("<0xE2>", "\ufffd", "<0xE2>"),
        ("Ċ", "\n", "⏎"),
        ("<|eot_id|>", "<|eot_id|>", "<|eot_id|>"),
        ("é", "\ufffd", "<E9>"),
    ],
)
def test_tokens_read_as_text(raw: str, decoded: str, shown: str) -> None:
    assert token_text(Vocabulary(raw, decoded), 3) == shown


def test_tokens_of_a_real_vocabulary(shared: Path) -> None:
    from transformers import AutoTokenizer

    folders = sorted(p.parent for p in (shared / "models").rglob("tokenizer.json"))
    if not folders:
        pytest.skip("no real tokenizer there")
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert "".join(token_text(tokenizer, i) for i in ids).removeprefix("␣") == "the␣cat"
    texts = [token_text(tokenizer, i) for i in range(2000)]
    assert not any("\ufffd" in text or "Ġ" in text or "▁" in text or not text for text in texts)


@needs_hooked
def test_rows_without_a_token_are_left_out(toy: Model, toy_questions: QuestionSet) -> None:
    """Checkpoints pad their vocabulary to round sizes."""
    prompts = build_prompts(toy, toy_questions.part("find").select(range(3)), order="both")
    check = manipulation_check(toy, prompts)
    scores = attribute(toy, check.asked, n_steps=1)
    W_U = toy.unembed.W_U
    padded = torch.cat([W_U, 100 * torch.randn(W_U.shape[0], 5, generator=torch.Generator().manual_seed(0))], 1)
    toy.unembed.W_U, toy.unembed.b_U = torch.nn.Parameter(padded, False), torch.nn.Parameter(torch.zeros(288), False)
    try:
        card = neuron_card(toy, "mlp 1:2", scores, check)
    finally:
        toy.unembed.W_U, toy.unembed.b_U = torch.nn.Parameter(W_U, False), torch.nn.Parameter(torch.zeros(283), False)
    assert all(t.id < 283 for t in card.promotes + card.demotes)


@pytest.mark.parametrize("bad", ["mlp 3", "attn 3:1", "mlp 3.h1:2", "", "neuron 1:2", "mlp -1:2", "mlp 1:2 x"])
def test_bad_names(bad: str) -> None:
    with pytest.raises(ValueError, match="expected the name of a neuron"):
        Neuron.from_name(bad)


def test_names_are_read_as_they_are_written() -> None:
    for neuron in (Neuron("mlp", 3, None, 17), Neuron("attn", 12, 1, 5)):
        assert Neuron.from_name(str(neuron)) == neuron


def test_what_no_card_can_be_made_of(toy: Model, toy_questions: QuestionSet) -> None:
    prompts = build_prompts(toy, toy_questions.part("find").select(range(3)), order="both")
    check = manipulation_check(toy, prompts)
    scores = attribute(toy, check.asked, n_steps=1)
    with pytest.raises(ValueError, match="does not fit the model"):
        neuron_card(toy, "mlp 7:0", scores, check)
    with pytest.raises(ValueError, match="got neither"):
        make_cards(toy, scores, check)
    with pytest.raises(ValueError, match="that was passed to build_prompts"):
        neuron_card(toy, "mlp 1:0", scores, check, questions=toy_questions.select([0]))
    assert make_cards(toy, scores, check, neurons=[]) == ()


def test_show_prints_the_neurons_and_the_strongest_cards(of_toy: Any, run: Run) -> None:
    found, out = of_toy
    code, said, _ = run("show", out, "--top", 5)
    assert code == 0
    assert f"toy on toy: {len(found.neurons)} truth neurons of 960" in said
    for card in found.cards[:3]:
        assert f"─ {card.neuron} ─" in said
        assert f"{card.supports[0].difference:+.4f}" in said
    assert f"─ {found.cards[3].neuron} ─" not in said
    assert f"{len(found.neurons) - 5} more" in said


def test_show_loads_no_heavy_library(of_toy: Any, run: Run) -> None:
    """torch and transformers take seconds to import, and pandas and SciPy another."""
    code = (
        "import sys\nfrom tn_lens.cli import main\n"
        f"sys.argv = ['tn-lens', 'show', {str(of_toy[1])!r}]\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code\n"
        "print('loaded:', *sorted({'torch', 'transformers', 'transformer_lens', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *said, loaded = done.stdout.splitlines()
    assert loaded == "loaded:"
    assert "\n".join(said) == run("show", of_toy[1])[1].rstrip("\n")


def test_show_without_a_listing_prints_the_same(of_toy: Any, run: Run, tmp_path: Path) -> None:
    older = shutil.copytree(of_toy[1], tmp_path / "older")
    (older / "listing.json").unlink()
    assert run("show", older, "--top", 3) == run("show", of_toy[1], "--top", 3)
    altered = shutil.copytree(of_toy[1], tmp_path / "altered")
    (altered / "selection.json").write_text((altered / "selection.json").read_text().replace("1", "2", 1))
    code, _, error = run("show", altered)
    assert (code, "selection.json is damaged: its checksum does not match" in error) == (2, True)


@pytest.mark.parametrize("apart", [False, True])
def test_show_prints_named_neurons(of_toy: Any, run: Run, apart: bool) -> None:
    found, out = of_toy
    names = [str(found.cards[4].neuron), str(found.cards[0].neuron)]
    code, said, _ = run("show", out, *(" ".join(names).split() if apart else names))
    assert code == 0
    assert said.index(f"─ {names[0]} ─") < said.index(f"─ {names[1]} ─")
    assert said.count("supports most") == 2
    assert "truth neurons of" not in said


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["mlp3"], "expected the name of a neuron"), (["mlp 1:9999"], "is not among"), (["attn 0.h9:1"], "is not among")],
)
def test_show_says_what_is_wrong_in_one_sentence(of_toy: Any, run: Run, names: list[str], expected: str) -> None:
    code, said, error = run("show", of_toy[1], *names)
    assert code == 2
    assert not said
    assert expected in error
    assert error.count("\n") == 1


def test_show_needs_a_finished_run(of_toy: Any, run: Run, tmp_path: Path) -> None:
    assert run("show", tmp_path)[0] == 2
    shutil.copytree(of_toy[1], tmp_path / "old")
    (tmp_path / "old" / "cards.json").unlink()
    code, _, error = run("show", tmp_path / "old")
    assert code == 2
    assert "no cards.json" in error
    (tmp_path / "old" / "cards.json").write_text('{"cards": [{}]}')
    code, _, error = run("show", tmp_path / "old")
    assert code == 2
    assert "damaged" in error


def test_a_run_that_finds_nothing_has_no_cards(toy: Model, tmp_path: Path, run: Run) -> None:
    few = binary().part("find").select(range(5))
    found = find_truth_neurons(
        toy, few, Settings(n_steps=1, n_repetitions=1), out=tmp_path / "run", force=True, progress=False
    )
    assert not found.neurons
    assert found.cards == load_cards(tmp_path / "run") == ()
    code, said, _ = run("show", tmp_path / "run")
    assert code == 0
    assert said.startswith("toy on toy: 0 truth neurons")
