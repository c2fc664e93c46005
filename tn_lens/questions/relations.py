"""Relations between subjects and objects, such as a country and its language (LRE; Hernandez et al. 2023)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.questions.files import download, read_json
from tn_lens.questions.formats import COMPLETION
from tn_lens.questions.question import Question, QuestionSet, plain, stream_of
from tn_lens.questions.registry import QUESTION_SETS, Source, single
from tn_lens.questions.repeats import without_repeats

URL = "https://raw.githubusercontent.com/evandez/relations/main/data/{name}.json"
NAMES = (
    "commonsense/fruit_outside_color",
    "commonsense/object_superclass",
    "commonsense/word_sentiment",
    "factual/city_in_country",
    "factual/company_hq",
    "factual/country_capital_city",
    "factual/country_currency",
    "factual/country_language",
    "factual/landmark_in_country",
    "factual/person_native_language",
    "factual/product_by_company",
    "linguistic/adj_antonym",
    "linguistic/adj_comparative",
    "linguistic/verb_past_tense",
)
"""Public relations, by folder and name."""


def load_relation(name: str, source: Source = None, *, template: int = 0, seed: int = 0) -> QuestionSet:
    """Load a relation as completions, each with a wrong object of the same relation.

    Args:
        name: name of the relation.
        source: path or URL of a JSON file with `prompt_templates` (with `{}` for the subject) and `samples` (with `subject`
            and `object`); the public URL by default.
        template: index of the template.
        seed: seed of the wrong answers. Each is drawn from the objects whose first word differs from the right one's, and
            that are no object of the same subject.

    Raises:
        BadInput: the file cannot be downloaded or is no relation, or a subject has no wrong answer.
    """
    address = str(single(source, name) or URL.format(name=next(each for each in NAMES if each.endswith(f"/{name}"))))
    path = Path(address)
    if not path.is_file():
        path = download(address, f"download {name}.json manually and pass its path as the source")
    return parse_relation(read_json(path), name, template=template, seed=seed)


def parse_relation(content: Any, name: str, *, template: int = 0, seed: int = 0) -> QuestionSet:
    """Turn the content of a relation's file into questions; see `load_relation`."""
    try:
        templates = [str(text) for text in content["prompt_templates"]]
        pairs = [(str(sample["subject"]), str(sample["object"])) for sample in content["samples"]]
    except (TypeError, KeyError) as error:
        raise BadInput(f"{name}: expected a JSON object with prompt_templates and samples, got {error!r}") from error
    if not 0 <= template < len(templates):
        raise BadInput(f"{name} has {len(templates)} templates; got the index {template}")
    if "{}" not in templates[template]:
        raise BadInput(f"{name}: expected a template with {{}} for the subject, got {templates[template]!r}")
    objects = sorted({each for _, each in pairs})
    right_of: dict[str, set[str]] = {}
    for subject, each in pairs:
        right_of.setdefault(subject, set()).add(each)
    questions = []
    for subject, right in pairs:
        others = [
            each
            for each in objects
            if each not in right_of[subject] and plain(each).split()[0] != plain(right).split()[0]
        ]
        if not others:
            raise BadInput(f"{name}: there is no wrong answer for {subject!r}; the relation needs another object")
        # a draw for each question, which does not depend on the others
        draw = int(generator(seed, stream_of(f"{name} {subject} {right}")).integers(len(others)))
        text = templates[template].replace("{}", subject)
        questions.append(Question(text=text, choices=(right, others[draw])))
    return without_repeats(QuestionSet(name=name, questions=tuple(questions), template=COMPLETION))


for _name in NAMES:
    _short = _name.rpartition("/")[2]
    QUESTION_SETS.register(_short, partial(load_relation, _short))
