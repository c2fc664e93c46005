"""Every format goes through the whole pipeline, and answers without letters are never spoken of in letters."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tn_lens as tn
from tests.conftest import QUICK, first_of_parts
from tests.test_report import text_of
from tn_lens.inference.forward import prompt_logits
from tn_lens.models import Model
from tn_lens.questions.formats import PromptTemplate
from tn_lens.questions.toy_world import facts

pytestmark = pytest.mark.usefixtures("few_resamples")
SETTINGS = tn.Settings(
    n_steps=2,
    n_repetitions=2,
    order="both",
    limit=24,
    share_threshold=0.3,
    adaptive_threshold=0.2,
    correction="none",
    alpha=0.1,
    convergence_sample=1,
)
LETTERS = re.compile(
    r"letter|labeled|“A”|\"A\"|both orders|answer order|order-averaged|unbalanced|use order|right answer at|\bnan\b"
)


@pytest.fixture(scope="session")
def completions() -> tn.QuestionSet:
    """Facts of the toy world, in which the right value is the next word."""
    template = PromptTemplate(user="Statement : {question}", choice="", cue="", chat=False, kind="completion")
    questions = [
        tn.Question(
            text=fact.statement(fact.value).removesuffix(f" {fact.value}"),
            choices=(fact.value, fact.distractor),
            category=fact.relation,
        )
        for fact in facts()
        if fact.split == "find"
    ]
    return tn.QuestionSet(name="facts", questions=tuple(questions), template=template, formats=("completion",))


def test_a_run_on_completions_has_no_letters(
    toy: Model, completions: tn.QuestionSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tn.find_truth_neurons(toy, completions, SETTINGS, out=tmp_path / "run", force=True)
    assert found.check.asked.labels == ()
    assert len(found.check.asked) == found.check.n_asked == 24
    assert found.neurons
    page = text_of((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert "The manipulation check kept" in printed
    for text in (
        page,
        printed,
        found.summary(),
        *found.warnings(),
        *found.check.explain(),
        *found.evaluation.explain(),
    ):
        assert not (matched := LETTERS.search(text)), text[max(0, matched.start() - 80) : matched.end() + 80]
    assert not any("answer at" in name for card in found.cards for name in card.activations)
    assert np.isnan(found.evaluation.conditions["unablated"].share_a)
    assert tn.load_run(tmp_path / "run").summary() == found.summary()


def test_the_settings_select_format_symbols_and_examples(toy: Model, tmp_path: Path) -> None:
    questions = first_of_parts(tn.load_questions("toy"), find=24, report=16)
    settings = replace(QUICK, n_shots=2, format="letters")
    found = tn.find_truth_neurons(toy, questions, settings, out=tmp_path / "run", force=True, progress=False)
    prompt = found.provenance.settings["rendered_prompt"]
    assert len(re.findall(r"Question :", prompt)) == 3
    assert found.check.n_asked == 24 - sum(q.split == "find" for q in questions.with_format(n_shots=2).examples)
    with pytest.raises(ValueError, match="toy can only be asked in the format 'letters'; got 'statement'"):
        tn.find_truth_neurons(toy, questions, tn.Settings(format="statement"), progress=False)


def test_the_check_says_why_questions_failed(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    # right in both orders; in one; in none; without probability
    answers = [[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [1e-3, 0], [1e-3, 0]]
    monkeypatch.setattr("tn_lens.inference.answers.ask_with", lambda *_, **__: torch.tensor(answers)[None])
    check = tn.manipulation_check(toy, tn.build_prompts(toy, tn.load_questions("toy")[:4], order="both"))
    assert check.failures == {"mass": 1, "position": 1, "content": 1}
    counts, mass, tokens = check.explain()
    assert counts.startswith("The manipulation check kept 1 of 4 questions; of the others, ")
    for reason in (
        "1 was given too little",
        "1 was answered correctly in some orders only",
        "1 was answered incorrectly in every",
    ):
        assert reason in counts
    assert mass == "The answers have 75.0 % of the probability, and the model chooses A in 75 % of the prompts."
    assert tokens.startswith("Most probable next tokens: “A” ")
    logits = torch.cat([logits for _, logits in prompt_logits(toy, check.asked)]).softmax(-1).mean(0)
    assert [p for _, p in check.next_tokens] == pytest.approx(logits.topk(5).values.tolist(), rel=1e-5)
