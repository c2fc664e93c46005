"""Relations between subjects and objects, such as a country and its language (LRE; Hernandez et al. 2023)."""

from __future__ import annotations

from functools import partial
from typing import Any

from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.questions.files import fetch, read_json
from tn_lens.questions.formats import COMPLETION
from tn_lens.questions.question import Dropped, Question, QuestionSet, plain, stream_of
from tn_lens.questions.registry import QUESTION_SETS, Source, single
from tn_lens.questions.repeats import REASON

URL = "https://raw.githubusercontent.com/evandez/relations/main/data/{path}.json"
SHA256 = {
    "commonsense/fruit_outside_color": "b0c11dbdd220f670e232db0ff2899ef221d2d91746415696d2a2ce0513ac033a",
    "commonsense/object_superclass": "e594c3288df3059638ae885d83f2934266bb1968932272c027786bf7b3c02678",
    "commonsense/word_sentiment": "436546dfbd9f308b6d27748359489e3f3e20a845e8913ab2da62ab2fead80487",
    "factual/city_in_country": "5fd8f9e99e6d8567d05cfb4e7c9324ed03b07ba1ebf827614b7b58a811bc11a5",
    "factual/company_hq": "22c86cf64b908db86c73b17add31e59fd6022ac74e500840fcad35bd706a8e4e",
    "factual/country_capital_city": "9945d2da1fa1145c1d7e59ac61a25ebee74299c00bd53fc9308167f9e1d44fc0",
    "factual/country_currency": "4a1a49afbdc4792fc330196475f456a22bc49dfe0ec9eb966439e4f36081d99b",
    "factual/country_language": "0996525735107934f0d2e467e6fac7d2c785c42e8300ccb41ae6e9b5dfde2b76",
    "factual/landmark_in_country": "58d545ec481a0d22be5f8ce1f50410093349daf002f3e7c1f8ad26c2c1fde581",
    "factual/person_native_language": "ad6f699fbad04cecf45a424713249803921598187c6302dd2a8e20702f4c1928",
    "factual/product_by_company": "373dac4b5322dc29ca800b8bf38bac78a0d9297e56ee877100733f68e9c3da40",
    "linguistic/adj_antonym": "bcfe2e8ed0cabe0650499a1aa64df908aed94898192efc112a0b082dc49b32dd",
    "linguistic/adj_comparative": "1409f9d0fd887990e016a417ad724dc9714b51ee68638130c7c2897ba7f8bc51",
    "linguistic/verb_past_tense": "7a9e9ad41d90e0ea18c03d62813881af66e96e10a8fc6e884404a05b21bfb5fc",
}
"""SHA-256 of the file of every relation, by its folder and name."""
EMPTY = "the subject or the object is empty"
NO_WRONG = "no other object begins with another word"


def load_relation(path: str, source: Source = None, *, template: int = 0, seed: int = 0) -> QuestionSet:
    """Load a relation as completions, each with a wrong object of the same relation.

    Args:
        path: folder and name of the relation.
        source: path or URL of a JSON file with `prompt_templates` (with `{}` for the subject) and `samples` (with `subject`
            and `object`); the public URL by default.
        template: index of the template.
        seed: seed of the wrong objects. Each is drawn from the objects that begin with another word than the right one, and
            that are not objects of the same subject in another sample.

    Raises:
        BadInput: the file cannot be downloaded or is not a relation, it has no such template, or no sample has a wrong object.
    """
    name = path.rpartition("/")[2]
    file = fetch(single(source, name) or URL.format(path=path), SHA256[path], "the published version")
    return parse_relation(read_json(file), name, template=template, seed=seed)


def parse_relation(content: Any, name: str, *, template: int = 0, seed: int = 0) -> QuestionSet:
    """Turn the content of a relation's file into questions; see `load_relation`."""
    try:
        templates = [str(text) for text in content["prompt_templates"]]
        samples = [(str(sample["subject"]), str(sample["object"])) for sample in content["samples"]]
    except (TypeError, KeyError) as error:
        raise BadInput(
            f"{name}: expected a JSON object with prompt_templates, and samples with a subject and an object; got {content!r:.60}"
        ) from error
    if template not in range(len(templates)) or "{}" not in templates[template]:
        choices = [index for index, text in enumerate(templates) if "{}" in text]
        raise BadInput(
            f"{name}: expected the index of a template with {{}} for the subject, one of {choices}; got {template!r}"
        )
    plain_of = {right: plain(right) for _, right in samples if right.strip()}
    objects_of: dict[str, set[str]] = {}
    for subject, right in samples:
        objects_of.setdefault(plain(subject), set()).add(plain(right))
    questions: dict[tuple[str, str], Question] = {}
    dropped: list[Dropped] = []
    for row, (subject, right) in enumerate(samples, start=1):
        sample = plain(subject), plain(right)
        known, first_word = objects_of[sample[0]], sample[1].split()[:1]
        others = [each for each, form in plain_of.items() if form not in known and form.split()[:1] != first_word]
        reason = EMPTY if not all(sample) else REASON if sample in questions else NO_WRONG if not others else ""
        if reason:
            dropped.append(Dropped(row, f"{subject}: {right}", reason))
            continue
        # a separate stream for each question, so that its draw does not depend on those before it
        draw = int(generator(seed, stream_of(f"{name} {subject} {right}")).integers(len(others)))
        text = templates[template].replace("{}", subject)
        questions[sample] = Question(text=text, choices=(right, sorted(others)[draw]))
    if not questions:
        raise BadInput(f"{name}: expected at least two objects that begin with different words; got {sorted(plain_of)}")
    return QuestionSet(name=name, questions=tuple(questions.values()), template=COMPLETION, dropped=tuple(dropped))


for _path in SHA256:
    QUESTION_SETS.register(_path.rpartition("/")[2], partial(load_relation, _path))
