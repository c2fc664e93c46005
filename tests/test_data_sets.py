"""MMLU and TriviaQA from local files, and wrong answers from a chat model."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from scripts.write_wrong_answers import LocalChat, OpenAIChat, write_wrong_answers
from tn_lens import Question, QuestionSet, build_prompts, load_model, load_questions
from tn_lens.models import Model
from tn_lens.questions.triviaqa import normalize, plainest


@cache
def mmlu(shared: Path, n_shots: int = 0) -> QuestionSet:
    return load_questions("mmlu", source=shared / "data" / "mmlu", n_shots=n_shots)


def test_all_of_mmlu(shared: Path) -> None:
    found = mmlu(shared)
    assert len(found) == 14_042
    assert len(found.categories) == 57
    assert Counter(q.category for q in found)["anatomy"] == 135
    assert all(len(q.choices) == 4 for q in found)
    assert found.fixed_order


def test_mmlu_asks_like_figure_8(shared: Path, tiny: Callable[..., Model]) -> None:
    anatomy = [q for q in mmlu(shared) if q.category == "anatomy"]
    plain = mmlu(shared).select([0])
    model = load_model(shared / "models" / "tinystories-656k")
    (prompt,) = build_prompts(model, plain, order="given")
    q = plain[0]
    layout = "\n".join([q.text, *(f"{c}. {text}" for c, text in zip("ABCD", q.choices, strict=True)), "Answer:"])
    assert layout in prompt.text
    assert "You should only output 'A', 'B', 'C', or 'D' as one character index" in prompt.text
    assert prompt.n_choices == 4
    assert all(len(ids) == 2 for ids in prompt.label_ids), "upper and lower case"
    assert len(anatomy) == 135


@pytest.mark.parametrize("n_shots", [1, 5])
def test_examples_stand_before_the_question(n_shots: int, shared: Path) -> None:
    found = mmlu(shared, n_shots)
    assert len(found) == 14_042
    context = next(q for q in found if q.category == "high_school_biology").context
    assert context.startswith(
        "The following are multiple choice questions (with answers) about high school biology.\n\n"
    )
    assert context.count("\nAnswer: ") == n_shots
    assert found.name == f"mmlu_{n_shots}_shots"


def mmlu_folder(folder: Path, test: str, dev: str = "") -> Path:
    for split, text in (("test", test), ("dev", dev)):
        (folder / split).mkdir(exist_ok=True)
        (folder / split / f"law_{split}.csv").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("Why?,a,b,c,d,E\n", "a letter from A to D, got 'E'"),
        ("Why?,a,b,c,D\n", "expected 6 fields"),
        (",a,b,c,d,A\n", "expected a question"),
        ("Why?,a,,c,d,A\n", "four choices"),
    ],
)
def test_bad_rows_of_mmlu_are_named(row: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        load_questions("mmlu", source=mmlu_folder(tmp_path, row))


def test_what_mmlu_cannot_give_is_refused(tmp_path: Path) -> None:
    folder = mmlu_folder(tmp_path, "Why?,a,b,c,d,A\n", "Who?,a,b,c,d,B\n")
    assert load_questions("mmlu", source=folder, n_shots=1)[0].context.endswith("D. d\nAnswer: B\n\n")
    with pytest.raises(ValueError, match="1 row for 'law'"):
        load_questions("mmlu", source=folder, n_shots=2)
    with pytest.raises(ValueError, match="from 0 to 5"):
        load_questions("mmlu", source=folder, n_shots=6)
    with pytest.raises(ValueError, match="give the folder with test/"):
        load_questions("mmlu", source=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="n_shots is not an option of 'toy'"):
        load_questions("toy", n_shots=5)


def test_trivia_is_cleaned_and_counted(shared: Path) -> None:
    path = shared / "data" / "TriviaQA_false_answers.csv"
    found = load_questions("triviaqa", source=path)
    reasons = Counter(row.reason for row in found.dropped)
    assert len(found) + len(found.dropped) == 3610
    assert reasons["the wrong answer is a right one"] + reasons["no wrong answer"] == 1388
    assert len(found) + reasons["the question stands in an earlier row"] == 2222
    assert len(found) == len({q.text for q in found}) == 2079
    assert "Left out: " in found.summary()
    strict = load_questions("triviaqa", source=path, strict=True)
    assert Counter(row.reason for row in strict.dropped)["the wrong answer contains a right one"] == 154
    ruddigore = next(q for q in found if "Witches Curse" in q.text)
    assert ruddigore.choices == ("Ruddigore", "The Enchanted Sorceress")
    assert found.template.system is not None
    assert "truthfully" in found.template.system


def test_answers_are_compared_as_trivia_does() -> None:
    assert normalize("The  U.S.A.") == normalize("u s a")
    assert normalize("A ‘Fine’ Day_") == "fine day"
    assert plainest(["Yukon Optics", "PULSAR", "Beltex Optics"]) == "PULSAR"


def official(path: Path) -> Path:
    answer = {"Value": "Sunset Blvd", "Aliases": ["Sunset Boulevard"], "NormalizedAliases": ["sunset blvd"]}
    data = [
        {"Question": "Which street?", "Answer": answer, "QuestionPartOfVerifiedEval": True},
        {"Question": "Which lane?", "Answer": answer, "QuestionPartOfVerifiedEval": False},
        {"Question": "Which road?", "Answer": answer},
    ]
    path.write_text(json.dumps({"Data": data, "VerifiedEval": True}))
    return path


def test_the_verified_subset_with_written_wrong_answers(tmp_path: Path) -> None:
    source = official(tmp_path / "verified-web-dev.json")
    with pytest.raises(ValueError, match="give wrong_answers"):
        load_questions("triviaqa", source=source)
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps({"question": "Which street?", "wrong": "Mulholland Drive"}) + "\n")
    found = load_questions("triviaqa", source=[source, source], wrong_answers=wrong)
    assert [q.choices for q in found] == [("Sunset Blvd", "Mulholland Drive")]
    assert Counter(row.reason for row in found.dropped) == {
        "no wrong answer": 2,
        "the question stands in an earlier row": 1,
    }
    wrong.write_text(json.dumps({"question": "Which street?"}) + "\n")
    with pytest.raises(ValueError, match="every row needs 'question' and 'wrong'"):
        load_questions("triviaqa", source=source, wrong_answers=wrong)


def test_the_published_form_of_li_and_others(tmp_path: Path) -> None:
    answer = {"value": "Snudge", "aliases": ["Sgt Snudge"], "normalized_aliases": ["snudge"]}
    rows = [{"question": "Who?", "answer": answer, "false_answer": "Sergeant Major Snudge"}]
    pd.DataFrame(rows).to_parquet(tmp_path / "iti.parquet")
    (tmp_path / "iti.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("iti.parquet", "iti.jsonl"):
        assert load_questions("triviaqa", source=tmp_path / name)[0].choices == ("Snudge", "Sergeant Major Snudge")
        with pytest.raises(ValueError, match="no question of TriviaQA is left"):
            load_questions("triviaqa", source=tmp_path / name, strict=True)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "[]", "a list 'Data'"),
        ("a.json", "{", "cannot be read as UTF-8 JSON"),
        ("a.csv", "q,a\n1,2\n", "expected question, answer and false_answer"),
        ("a.csv", "question,answer,false_answer\nWho?,;,x\n", "the answer of 'Who\\?' is empty"),
        ("a.txt", "", "expected a .json"),
    ],
)
def test_bad_files_of_trivia_are_refused(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        load_questions("triviaqa", source=tmp_path / name)


QUESTIONS = [Question(text=f"What is {n}?", choices=(f"the {n}", "?")) for n in range(5)]


@pytest.fixture
def server() -> Iterator[Any]:
    """A server with OpenAI's chat completions API that records the requests."""

    class Handler(BaseHTTPRequestHandler):
        asked: list[dict[str, Any]] = []  # noqa: RUF012
        keys: list[str | None] = []  # noqa: RUF012
        status = 200

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            type(self).asked.append(body)
            type(self).keys.append(self.headers.get("Authorization"))
            text = body["messages"][1]["content"]
            number = text.split("What is ")[1][0]
            content = f'"wrong {number}"\nmore' if number != "3" or body["seed"] > 7 else "The 3."
            reply = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
            failing = len(self.asked) > 3 and self.status != 200
            self.send_response(self.status if failing else 200)
            self.end_headers()
            self.wfile.write(b"too many requests" if failing else reply)

        def log_message(self, *_: object) -> None: ...

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    Handler.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    yield Handler
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_wrong_answers_are_written_cached_and_resumed(server: Any, tmp_path: Path) -> None:
    out = tmp_path / "wrong.jsonl"
    chat = OpenAIChat(name="small", base_url=server.url, api_key="secret")
    server.status = 429
    with pytest.raises(ValueError, match="answered 429: too many requests; the answers written so far are kept"):
        write_wrong_answers(QUESTIONS, chat, out, seed=6)
    assert len(out.read_text().splitlines()) == 3
    server.status = 200
    found = write_wrong_answers(QUESTIONS, chat, out, seed=6)
    assert [q.choices[1] for q in found] == [f"wrong {n}" for n in range(5)]
    assert [b["seed"] for b in server.asked] == [6, 6, 6, 6, 6, 7, 8, 6], "the right answer was refused twice"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[3] == {"question": "What is 3?", "right": "the 3", "wrong": "wrong 3", "model": "small", "seed": 8}
    assert set(server.keys) == {"Bearer secret"}
    assert "secret" not in out.read_text()
    assert "plausible, tempting to choose, but factually incorrect" in server.asked[0]["messages"][1]["content"]
    n_asked = len(server.asked)
    write_wrong_answers(QUESTIONS, chat, out, seed=6)
    assert len(server.asked) == n_asked, "nothing is asked twice"


def test_questions_without_a_usable_answer_are_named(tmp_path: Path) -> None:
    found = write_wrong_answers(QUESTIONS[:2], lambda *_: " \n", tmp_path / "a.jsonl")
    assert [row.reason for row in found.dropped] == ["no usable wrong answer in 3 tries"] * 2


def test_what_cannot_be_asked_is_said(server: Any, tmp_path: Path) -> None:
    nowhere = OpenAIChat(name="small", base_url="http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"cannot reach http://127\.0\.0\.1:9/chat/completions"):
        write_wrong_answers(QUESTIONS, nowhere, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="cannot write"):
        write_wrong_answers(QUESTIONS, lambda *_: "x", tmp_path / "no" / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(ValueError, match=r"expected wrong answers .* got something else"):
        write_wrong_answers(QUESTIONS, lambda *_: "x", tmp_path / "b.jsonl")


def test_a_local_model_writes_them_too(shared: Path, tmp_path: Path) -> None:
    chat = LocalChat(load_model(shared / "models" / "tinystories-656k"), max_new_tokens=8)
    first = chat("Be brief.", "Who is there?", 1)
    assert first == chat("Be brief.", "Who is there?", 1)
    assert first != chat("Be brief.", "Who is there?", 2)
    found = write_wrong_answers(QUESTIONS[:2], chat, tmp_path / "a.jsonl")
    assert len(found) + len(found.dropped) == 2
