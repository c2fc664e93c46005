"""True and false statements on several topics, and their negations (Bürger et al. 2024, after Marks and Tegmark 2024).

Most topics have pairs: two statements about the same subject, of which one is true. A pair is a question whose text is the common
beginning, and whose choices are the two endings, so that it can also be asked as a completion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from tn_lens.core.errors import BadInput
from tn_lens.questions.files import fetch, read_csv
from tn_lens.questions.formats import COMPLETION, STATEMENT
from tn_lens.questions.load import parse_questions
from tn_lens.questions.question import Dropped, Question, QuestionSet, plain
from tn_lens.questions.registry import QUESTION_SETS, Source, single
from tn_lens.questions.repeats import without_repeats

URL = "https://raw.githubusercontent.com/sciai-lab/Truth_is_Universal/main/datasets/{name}.csv"
SHA256 = {
    "animal_class": "598ed996dd00dd6cddcf125fafad48ad7c4d827a91dfbd8202473354fdba0d97",
    "cities": "f2560a0c1758c69935b50125111b574b71896bb75930dd87b1d8c973c1fa086e",
    "element_symb": "2aa8da5696a1f0f0c4630b7a75949cf47e81254728be13c0f4e835ed6129a5a6",
    "facts": "303ec926c2710a13a6166e204a24ea013bb2991b8761e2899739fddcb923aee1",
    "inventors": "6990771f01efcbae18bfa3960facbe36c39199f850f407540548a9c04339084c",
    "sp_en_trans": "9afa97c1b8af539a05f47655a80a5c7832c6fdb914885fd24cb4bcccbe2795b5",
    "neg_animal_class": "03676e51600e8357e4e200d08eca7c38952b07a5aef807d5aaefbedc7f257256",
    "neg_cities": "66c5c84de98ca15570138c205ab0e3907b57750083fac72a4eacafc3d9ebcea7",
    "neg_element_symb": "8ee4b64b38fe1e43fb0e794d5acf914f9af4f8a9a99f3df187bfd84f429ffa78",
    "neg_facts": "84c26b283996d4016d3a9b470f09a6b9fe721d9f68444893c060e3ea8419287a",
    "neg_inventors": "f275742ae02a1d2ca11e90d25753b2d3a90f4788f6399e22442cd7774b7db8a7",
    "neg_sp_en_trans": "bec33e37047135b15cdd18c0cb0c66b65fb435ace08910cbcc220ce1ef610c96",
}
"""SHA-256 of the file of every topic, by name."""
ENDINGS = {"cities": "in", "animal_class": "an?", "element_symb": "symbol", "inventors": "lived in|live in"}
"""The words before the part in which the two statements of a pair differ, for the topics that have pairs."""
UNPAIRED = "no statement has the same beginning and the other label"
REPEATED = "an earlier statement has the same beginning and the same label"


def load_statements(name: str, source: Source = None, *, paired: bool = True) -> QuestionSet:
    """Load the statements on one topic.

    Args:
        name: name of the topic.
        source: path or URL of the file, with the columns `statement` and `label` (1 for a true one, 0 for a false one); the
            public URL by default.
        paired: whether to combine the two statements about a subject into one question with two choices, if the topic has
            pairs; statements without a counterpart are then left out, and listed in `dropped`.

    Raises:
        BadInput: the file cannot be downloaded, or a row is invalid.
    """
    path = fetch(single(source, name) or URL.format(name=name), SHA256[name], "the published version")
    statements = parse_questions(read_csv(path), {}, name)
    ending = ENDINGS.get(name.removeprefix("neg_"))
    if not paired or ending is None:
        asked = QuestionSet(name=name, questions=statements, template=STATEMENT, formats=("statement",))
        return without_repeats(asked)
    questions, dropped = pairs(statements, ending)
    if not questions:
        raise BadInput(
            f"{name}: expected pairs of statements that differ only after {ending!r}, got none; use paired=False"
        )
    return QuestionSet(name=name, questions=questions, template=COMPLETION, dropped=dropped)


def pairs(statements: Sequence[Question], ending: str) -> tuple[tuple[Question, ...], tuple[Dropped, ...]]:
    """Combine a true and a false statement with the same beginning into one question.

    Args:
        statements: questions with the choices True and False.
        ending: regular expression for the words before the part in which two statements differ.

    Returns:
        The questions, in the order of their first statement, and the statements without a counterpart.
    """
    pattern = re.compile(rf"(.+ (?:{ending})) (.+)")
    endings: dict[str, dict[int, tuple[int, str]]] = {}
    """Beginning -> 0 for the true statement or 1 for the false one -> its row and its ending."""
    dropped: list[Dropped] = []
    for row, statement in enumerate(statements, start=1):
        match = pattern.fullmatch(statement.text)
        if match is None or statement.answer in endings.setdefault(match[1], {}):
            dropped.append(Dropped(row, statement.text, REPEATED if match else UNPAIRED))
        else:
            # a full stop ends the statement, unless it belongs to an abbreviation such as U.S.
            ending = match[2] if match[2].count(".") > 1 else match[2].rstrip(".")
            endings[match[1]][statement.answer] = row, ending
    questions = []
    for beginning, by_answer in endings.items():
        if len({plain(ending) for _, ending in by_answer.values()}) == 2:
            questions.append(Question(text=beginning, choices=(by_answer[0][1], by_answer[1][1])))
        else:
            dropped += [Dropped(row, statements[row - 1].text, UNPAIRED) for row, _ in by_answer.values()]
    return tuple(questions), tuple(sorted(dropped, key=lambda each: each.row))


for _name in SHA256:
    QUESTION_SETS.register(_name, partial(load_statements, _name))
