"""What counts as the wrong answer in the reply of a chat model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.replies import wrong_answer_in
from scripts.write_wrong_answers import load_answered, main, write_wrong_answers
from tn_lens import Question

RIGHTS = ["Paris", "Paname", "City of Light"]

REPLIES = [
    "Lyon",
    " Lyon \n",
    "Lyon.",
    "**Lyon**",
    "*Lyon*",
    "__Lyon__",
    "_Lyon_",
    "`Lyon`",
    '"Lyon"',
    "“Lyon”",
    "'Lyon'",
    "«Lyon»",
    '"Lyon".',
    "**Lyon.**",
    "1. Lyon",
    "1) Lyon",
    "(1) Lyon",
    "- Lyon",
    "* Lyon",
    "• Lyon",
    "- **Lyon**",
    "# Lyon",
    "> Lyon",
    "A) Lyon",
    "a) Lyon",
    "1. Lyon\n2. Nice",
    "Answer: Lyon",
    "**Answer:** Lyon",
    "**Answer**: Lyon",
    "Wrong answer: Lyon",
    "Incorrect Answer: Lyon",
    "The wrong answer is: Lyon",
    "The wrong answer is Lyon.",
    "The answer is Lyon",
    "A plausible but incorrect answer would be: Lyon",
    "A plausible but incorrect answer would be Lyon.",
    "A plausible, tempting, but factually incorrect answer is Lyon.",
    "Plausible wrong answer: **Lyon**",
    "Sure! Here is a plausible wrong answer: Lyon",
    "Sure! Here is a plausible but incorrect answer:\n\nLyon",
    "Sure, here's one:\n\n**Lyon**",
    "Certainly! Lyon",
    "Of course! Here's a tempting but incorrect answer:\n- Lyon\n\nThis is wrong because Paris",
    "Sure!\nLyon",
    "Here is another answer: Lyon",
    "Here you go: Lyon",
    "Sure, Lyon.",
    "Answer:\nLyon",
    "A: Lyon",
    "Response: Lyon",
    "My answer: Lyon",
    "```\nLyon\n```",
    "```text\nLyon\n```",
    "Here is:\n```\nLyon\n```",
    "```Lyon```",
    '```json\n{"answer": "Lyon"}\n```',
    '{"answer": "Lyon"}',
    '{"wrong_answer": "Lyon", "reason": "x"}',
    '{"question": "What?", "answer": "Lyon"}',
    '["Lyon"]',
    '{"foo": "Lyon"}',
    '{"answer": "Lyon"}\nThis is so.',
    "<think>Paris is right, so\nsay Lyon</think>\nLyon",
    "<think></think>Lyon",
    "Paris is right.\n</think>\n\nLyon",
    "<thinking>x</thinking>\n\nAnswer: Lyon",
    "[THINK]x[/THINK]Lyon",
    "<|channel|>analysis<|message|>hm Paris<|end|><|start|>assistant<|channel|>final<|message|>Lyon",
    "Lyon<|im_end|>",
    "Lyon</s>",
    "<answer>Lyon</answer>",
    "\\boxed{Lyon}",
    "\\boxed{\\text{Lyon}}",
    "Lyon (a plausible but incorrect answer)",
    "Lyon (incorrect)",
    "Lyon - a large city in France",
    "Lyon — the third city",
    "Lyon. It is a large city.",
    "Lyon, because it is big.",
    "Lyon\n\nExplanation: it is big",
    "Lyon\n\n(Note: this is wrong.)",
    "How about Lyon?",
    "I would say Lyon.",
]

NO_ANSWERS = [
    "",
    " \n",
    "<think>",
    "<think>\nOkay, so Lyon",
    "<think>a</think>",
    "<think>a</think>\n<think>b Lyon",
    "Paris",
    "paris.",
    "The Paris",
    "**PARIS**",
    "Answer: Paris",
    "Paname",
    "PANAME!",
    "Pâris",
    "P.a.r.i.s",
    "I'm sorry, but I can't help with that.",
    "I’m sorry, but I can’t assist",
    "I cannot provide incorrect answers.",
    "Sorry, but I can't",
    "As an AI language model, I do not",
    "Unfortunately, I can't",
    "I don't know",
    "Sure! Here is a plausible wrong answer:",
    "Sure!",
    "Certainly!",
    "```",
    "```\n```",
    "{",
    "{}",
    '{"answer": null}',
    '{"answer": "Paris"}',
    '{"a": "x", "b": "y"}',
    "null",
    "None",
    "N/A",
    "The user wants a plausible wrong answer to the question",
    "Okay, so I need to think about it.",
    "We need to produce a wrong answer.",
    "Here is the answer:",
    "The correct answer is Paris.",
    "The right answer is Paris, but a wrong one could be Lyon",
    "...",
    '""',
    "I am unable to help.",
    "- ",
    "1.",
    "[]",
    "A. Lyon",
    "To answer this, we must think",
    "Sure, I can help with that!",
    "analysisWe need to give",
]

ANSWERS = [
    ("C. S. Lewis", "Agatha Christie"),
    ("St. Louis", "Kansas City"),
    ("I Am Legend", "Alien"),
    ("I Can't Help Myself", "Yesterday"),
    ("I Think I Love You", "Yesterday"),
    ("Let It Be", "Help!"),
    ("M*A*S*H", "Cheers"),
    ("U.S.A.", "U.K."),
    ("Washington, D.C.", "New York"),
    ("Martin Luther King Jr.", "Malcolm X"),
    ('12"', '7"'),
    ("Rock 'n' Roll", "Jazz"),
    ("'Tis Pity She's a Whore", "Hamlet"),
    ("1. FC Köln", "1. FC Nürnberg"),
    ("The Answer: A Story", "The Question: A Story"),
    ('"Heroes"', '"Low"'),
    ('"Weird Al" Yankovic', "Prince"),
    ("1889", "1887"),
    ("50%", "40%"),
    ("Vitamin C", "Vitamin D"),
    ("Dr. No", "Goldfinger"),
    ("No.", "Yes."),
    ("It", "Carrie"),
    ("東京", "京都"),
    ("कि", "का"),
    ("[0, 1]", "[0, 2]"),
    ("None of the above", "All of the above"),
    ("No, it is an urban legend. The Moon is far.", "Yes, it is. The sky is blue."),
    ("It passes through you because of acid", "You grow melons because of seeds"),
]


@pytest.mark.parametrize("reply", REPLIES)
def test_what_surrounds_an_answer_is_removed(reply: str) -> None:
    assert wrong_answer_in(reply, RIGHTS) == "Lyon"


@pytest.mark.parametrize("reply", NO_ANSWERS)
def test_a_reply_without_a_wrong_answer_is_refused(reply: str) -> None:
    assert wrong_answer_in(reply, RIGHTS) == ""


@pytest.mark.parametrize(("reply", "right"), ANSWERS)
def test_an_answer_is_kept_as_it_is(reply: str, right: str) -> None:
    assert wrong_answer_in(reply, [right]) == reply


def test_refused_replies_are_asked_again_and_nothing_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "wrong.jsonl"
    rows = [
        {"question": "What is the capital of Spain?", "wrong": "<think>"},  # by an earlier version
        {"question": "What is the capital of Italy?", "wrong": "**Milan**"},  # perhaps corrected by hand
    ]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [
        Question(text=f"What is the capital of {land}?", choices=(city,))
        for land, city in {"France": "Paris", "Spain": "Madrid", "Italy": "Rome"}.items()
    ]
    asked: list[str] = []

    def chat(system: str, user: str, seed: int) -> str:
        asked.append(user)
        return "Paname." if "France" in user else "<think>Not Madrid.</think>**Seville**"

    aliases = {"What is the capital of France?": ("Paname",)}
    found = write_wrong_answers(questions, chat, out, aliases=aliases)
    assert [q.choices for q in found] == [("Madrid", "Seville"), ("Rome", "**Milan**")]
    assert [row.row for row in found.dropped] == [1]
    assert [("France" in text, "Spain" in text) for text in asked] == [(True, False)] * 3 + [(False, True)]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written[:2] == rows
    assert [row["wrong"] for row in written[2:]] == ["Seville"]
    again = write_wrong_answers(questions, lambda *_: "Answer: Lyon", out, aliases=aliases)
    assert [q.choices[1] for q in again] == ["Lyon", "Seville", "**Milan**"]


def test_the_aliases_of_trivia_are_right_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"Value": "Sunset Blvd", "Aliases": ["Sunset Boulevard"], "NormalizedAliases": ["sunset blvd"]}
    source, out = tmp_path / "verified-web-dev.json", tmp_path / "wrong.jsonl"
    source.write_text(json.dumps({"Data": [{"Question": "Which street?", "Answer": answer}]}))
    (question,), aliases = load_answered(str(source))
    assert question.choices == ("Sunset Blvd",)
    assert set(aliases["Which street?"]) == {"Sunset Blvd", "Sunset Boulevard", "sunset blvd"}
    monkeypatch.setattr("scripts.write_wrong_answers.OpenAIChat.__call__", lambda *_: "The Sunset Boulevard!")
    arguments = [str(source), "--out", str(out), "--chat-model", "x"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == (
        f"Wrong answers to 0 of 1 question: {out}\n"
        "No usable reply to 1 question, such as 'Which street?'; run the same command again to ask again.\n"
    )
    assert out.read_text() == ""
    monkeypatch.setattr("scripts.write_wrong_answers.OpenAIChat.__call__", lambda *_: "Mulholland Drive")
    assert main(arguments) == 0
    assert json.loads(out.read_text())["wrong"] == "Mulholland Drive"
