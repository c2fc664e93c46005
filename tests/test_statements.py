"""Statements and relations, compared with a second reading of the same files that uses only csv and json."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chisquare

import tn_lens as tn
from tn_lens.cli import main
from tn_lens.questions import relations, statements
from tn_lens.questions.formats import statement_about
from tn_lens.questions.relations import parse_relation
from tn_lens.questions.statements import ENDINGS

PAIRED = [name for name in statements.SHA256 if name.removeprefix("neg_") in ENDINGS]
UNPAIRED = [name for name in statements.SHA256 if name not in PAIRED]
RELATIONS = [path.rpartition("/")[2] for path in relations.SHA256]


@pytest.fixture
def topic(shared: Path) -> Callable[[str], Path]:
    return lambda name: shared / "data" / "truth_is_universal" / f"{name}.csv"


@pytest.fixture
def relation(shared: Path) -> Callable[[str], Path]:
    return lambda name: shared / "data" / "relations" / f"{name}.json"


def labels_of(path: Path) -> dict[str, bool]:
    """Statement -> whether it is true."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = {row["statement"]: row["label"] == "1" for row in rows}
    assert {row["label"] for row in rows} == {"0", "1"}
    return labels


@pytest.mark.parametrize("name", PAIRED)
def test_both_statements_of_a_pair_are_rows_with_their_labels(name: str, topic: Callable[[str], Path]) -> None:
    questions = tn.load_questions(name, source=topic(name))
    labels = labels_of(topic(name))
    asked = set()
    for question in questions:
        true, false = (statement_about(question.text, question.choices[i]) for i in (question.answer, 1))
        assert question.answer == 0
        assert labels[true]
        assert not labels[false]
        asked |= {true, false}
    dropped = {row.text for row in questions.dropped}
    assert len(asked) == 2 * len(questions)
    assert asked | dropped == set(labels)
    assert not asked & dropped
    assert {row.reason for row in questions.dropped} <= {statements.UNPAIRED}
    with topic(name).open(encoding="utf-8", newline="") as file:
        rows = [row["statement"] for row in csv.DictReader(file)]
    assert all(rows[row.row - 1] == row.text for row in questions.dropped)


@pytest.mark.parametrize(
    ("name", "n_pairs", "n_dropped"),
    [("cities", 748, 0), ("animal_class", 80, 4), ("element_symb", 93, 0), ("inventors", 175, 56)],
)
def test_numbers_of_pairs(name: str, n_pairs: int, n_dropped: int, topic: Callable[[str], Path]) -> None:
    for each in (name, f"neg_{name}"):
        questions = tn.load_questions(each, source=topic(each))
        assert (len(questions), len(questions.dropped)) == (n_pairs, n_dropped)
        assert questions.template.kind == "completion"
        assert questions.formats == ("letters", "completion", "statement")


def test_pairs_of_cities_agree_with_the_columns_of_the_file(topic: Callable[[str], Path]) -> None:
    with topic("cities").open(encoding="utf-8", newline="") as file:
        correct_country = {row["city"]: row["correct_country"] for row in csv.DictReader(file)}
    for name, words, place in (("cities", "is in", 0), ("neg_cities", "is not in", 1)):
        for question in tn.load_questions(name, source=topic(name)):
            city = question.text.removeprefix("The city of ").removesuffix(f" {words}")
            assert question.choices[place] == correct_country[city]


@pytest.mark.parametrize("name", ["cities", "animal_class", "element_symb", "inventors"])
def test_negations_exchange_right_and_wrong(name: str, topic: Callable[[str], Path]) -> None:
    affirmed = tn.load_questions(name, source=topic(name))
    negated = tn.load_questions(f"neg_{name}", source=topic(f"neg_{name}"))
    assert [question.choices[::-1] for question in negated] == [question.choices for question in affirmed]
    assert all(" not " in question.text for question in negated)


@pytest.mark.parametrize("name", [*UNPAIRED, "cities", "neg_inventors"])
def test_single_statements_have_the_labels_of_the_file(name: str, topic: Callable[[str], Path]) -> None:
    options = {} if name in UNPAIRED else {"paired": False}
    questions = tn.load_questions(name, source=topic(name), **options)
    labels = labels_of(topic(name))
    asked = {q.text: q.choices[q.answer] == "True" for q in questions}
    assert asked.items() <= labels.items()
    repeated = {row.text.casefold() for row in questions.dropped}  # some in other capitals: "The Sun is a star."
    assert {text.casefold() for text in labels} - {text.casefold() for text in asked} <= repeated
    assert repeated <= {text.casefold() for text in asked}
    assert questions.formats == ("statement",)
    with pytest.raises(tn.BadInput, match="can only be asked in the format 'statement'"):
        questions.with_format("completion")
    own = tn.load_questions(topic(name))
    assert own.questions == questions.questions, "without its name, a file has single statements"


def test_abbreviations_keep_their_full_stop(topic: Callable[[str], Path]) -> None:
    endings = {choice for q in tn.load_questions("inventors", source=topic("inventors")) for choice in q.choices}
    assert {"the U.S.", "the U.K.", "France"} <= endings
    assert not any(ending.endswith(".") for ending in endings - {"the U.S.", "the U.K."} if "/" not in ending)


def test_statements_without_counterpart_are_dropped(tmp_path: Path) -> None:
    rows = [
        "Rome is in Italy.,1",
        "Rome is in Peru.,0",
        "Rome is in Spain.,0",
        "Oslo is in Norway.,1",
        "Snow is cold.,1",
    ]
    path = tmp_path / "cities.csv"
    path.write_text("\n".join(["statement,label", *rows]))
    with pytest.warns(
        UserWarning, match=r"this cities\.csv is not the published version \(SHA-256 \w{12}\.\.\., expected"
    ):
        questions = tn.load_questions("cities", source=path)
    assert [(q.text, q.choices) for q in questions] == [("Rome is in", ("Italy", "Peru"))]
    assert [(row.row, row.text, row.reason) for row in questions.dropped] == [
        (3, "Rome is in Spain.", statements.REPEATED),
        (4, "Oslo is in Norway.", statements.UNPAIRED),
        (5, "Snow is cold.", statements.UNPAIRED),
    ]
    path.write_text("statement,label\nOslo is in Norway.,1\n")
    with (
        pytest.warns(UserWarning, match="not the published version"),
        pytest.raises(tn.BadInput, match="cities: expected pairs of statements"),
    ):
        tn.load_questions("cities", source=path)


@pytest.mark.parametrize("name", ["cities", "country_language"])
def test_a_file_that_is_not_the_published_one_is_named(
    name: str, topic: Callable[[str], Path], relation: Callable[[str], Path], tmp_path: Path
) -> None:
    original = topic(name) if name == "cities" else relation(name)
    tn.load_questions(name, source=original)  # warnings are errors in these tests
    changed = tmp_path / original.name
    changed.write_bytes(original.read_bytes() + b"\n")
    with pytest.warns(UserWarning, match=f"this {original.name} is not the published version"):
        questions = tn.load_questions(name, source=changed)
    assert questions.questions == tn.load_questions(name, source=original).questions


def test_the_warning_names_the_line_that_loads_the_file(tmp_path: Path) -> None:
    """In another process, where the functions have no wrappers that check types."""
    path = tmp_path / "cities.csv"
    path.write_text("statement,label\nRome is in Italy.,1\nRome is in Peru.,0\n")
    code = f"import tn_lens as tn\n\ntn.load_questions('cities', source={str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.startswith("<string>:3: UserWarning: this cities.csv is not the published version")


@pytest.mark.parametrize("ones", [("1", "0"), ("true", "false"), ("True", "FALSE"), ("1.0", "0.0")])
def test_statements_of_ones_own(ones: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(f"statement,label,source\nSnow is cold.,{ones[0]},me\nFire is cold.,{ones[1]},me\n")
    questions = tn.load_questions(path)
    assert [(q.text, q.choices[q.answer]) for q in questions] == [("Snow is cold.", "True"), ("Fire is cold.", "False")]
    path.write_text("statement,label\nSnow is cold.,yes\n")
    with pytest.raises(tn.BadInput, match="question 1: expected the label 1 or true, or 0 or false, got 'yes'"):
        tn.load_questions(path)


@pytest.mark.parametrize("name", RELATIONS)
def test_relations_agree_with_their_file(name: str, relation: Callable[[str], Path]) -> None:
    content = json.loads(relation(name).read_text(encoding="utf-8"))
    objects_of = defaultdict(set)
    for sample in content["samples"]:
        objects_of[sample["subject"]].add(sample["object"])
    objects = set().union(*objects_of.values())
    subject_of = {content["prompt_templates"][0].format(subject): subject for subject in objects_of}
    questions = tn.load_questions(name, source=relation(name))
    assert len(questions) + len(questions.dropped) == len(content["samples"])
    asked = set()
    for question in questions:
        right, wrong = question.choices
        known = objects_of[subject_of[question.text]]
        assert right in known
        assert wrong in objects - known
        assert right.split()[0].casefold() != wrong.split()[0].casefold()
        asked.add((subject_of[question.text], right))
    assert asked == {(subject, each) for subject, known in objects_of.items() for each in known}


def test_wrong_objects_depend_on_the_seed_only(relation: Callable[[str], Path]) -> None:
    content = json.loads(relation("country_language").read_text(encoding="utf-8"))
    first, again, other = (
        tn.load_questions("country_language", source=relation("country_language"), seed=seed) for seed in (0, 0, 1)
    )
    assert first.questions == again.questions
    assert [q.choices[0] for q in first] == [q.choices[0] for q in other]
    assert sum(a.choices != b.choices for a, b in zip(first, other, strict=True)) > len(first) / 2
    # every draw is independent of the other samples, as long as the objects are the same
    content["samples"].reverse()
    backwards = parse_relation(content, "country_language")
    assert backwards.questions == first.questions[::-1]


def test_wrong_objects_are_drawn_uniformly() -> None:
    draws: dict[str, int] = defaultdict(int)
    for seed in range(300):
        draws[
            parse_relation(samples(("joy", "good"), ("war", "bad"), ("day", "so-so")), "mood", seed=seed)[0].choices[1]
        ] += 1
    assert set(draws) == {"bad", "so-so"}
    assert chisquare(list(draws.values())).pvalue > 0.01


def test_templates_of_a_relation(relation: Callable[[str], Path]) -> None:
    path = relation("country_language")
    texts = [tn.load_questions("country_language", source=path, template=i)[0].text for i in range(3)]
    assert texts == [
        "People in United States speak",
        "The language used in United States is",
        "In United States, the primary language is",
    ]
    with pytest.raises(tn.BadInput, match=r"expected the index of a template .* one of \[0, 1, 2\]; got 3"):
        tn.load_questions("country_language", source=path, template=3)


def samples(*pairs: tuple[str, str], templates: tuple[str, ...] = ("In {} they speak",)) -> dict[str, Any]:
    keys = "subject", "object"
    return {"prompt_templates": list(templates), "samples": [dict(zip(keys, pair, strict=True)) for pair in pairs]}


def test_samples_that_cannot_be_asked_are_dropped() -> None:
    content = samples(
        ("Malta", "Maltese"),
        ("Malta", "English"),
        ("malta", "english"),
        ("", "French"),
        ("Togo", " "),
        ("Chad", "French"),
    )
    questions = parse_relation(content, "spoken")
    assert [(q.text, q.choices) for q in questions][:2] == [
        ("In Malta they speak", ("Maltese", "French")),
        ("In Malta they speak", ("English", "French")),
    ]
    assert [(row.row, row.reason) for row in questions.dropped] == [
        (3, "the question occurs in an earlier row"),
        (4, "the subject or the object is empty"),
        (5, "the subject or the object is empty"),
    ]
    one_word = parse_relation(samples(("a", "New York"), ("b", "New Delhi"), ("c", "Rome")), "spoken")
    assert [q.choices for q in one_word][:2] == [("New York", "Rome"), ("New Delhi", "Rome")]
    all_known = parse_relation(samples(("a", "Rome"), ("a", "Oslo"), ("b", "Rome")), "spoken")
    assert [row.reason for row in all_known.dropped] == [relations.NO_WRONG] * 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "expected a JSON object with prompt_templates, and samples with a subject and an object"),
        (
            {"prompt_templates": ["{}"], "samples": [{"subject": "a"}]},
            r"got \{'prompt_templates': \['\{\}'\], 'samples': \[\{'subject'",
        ),
        (samples(("a", "b"), ("c", "d"), templates=("They speak",)), r"one of \[\]; got 0"),
        (
            samples(("a", "b"), ("c", "b")),
            r"expected at least two objects that begin with different words; got \['b'\]",
        ),
        (samples(), "expected at least two objects"),
    ],
)
def test_files_that_are_not_relations_say_why(content: Any, said: str) -> None:
    with pytest.raises(tn.BadInput, match=f"spoken: .*{said}"):
        parse_relation(content, "spoken")


def test_options_of_other_sets_are_refused(topic: Callable[[str], Path]) -> None:
    with pytest.raises(tn.BadInput, match="template is not an option of 'cities', which accepts paired, source"):
        tn.load_questions("cities", source=topic("cities"), template=1)
    with pytest.raises(tn.BadInput, match="expected one source for 'cities', got 2"):
        tn.load_questions("cities", source=[topic("cities")] * 2)


def test_the_command_line_takes_a_local_copy_and_prints_that_it_was_changed(
    shared: Path,
    topic: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = tmp_path / "cities.csv"
    changed.write_bytes(topic("cities").read_bytes() + b"\n")
    model = str(shared / "models" / "tinystories-656k")
    for path in (topic("cities"), changed):
        monkeypatch.setattr(
            "sys.argv", ["tn-lens", "run", "--model", model, "--questions", f"cities={path}", "--dry-run"]
        )
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        printed = capsys.readouterr()
        assert "748 questions" in printed.out
        assert printed.err.startswith("Note: this cities.csv is not the published version") == (path == changed)
