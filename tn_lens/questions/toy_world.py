"""The toy world: invented names, their properties, and the misconceptions about them.

Each name has a hidden *kind*, which determines a typical value for every property. For 15 % of the facts the
typical value is wrong: it is the popular misconception, which a model that has learned the kinds tends to give.
Like TruthfulQA, the world thus has both facts and tempting misconceptions, and its model is small enough for the wheel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random
from typing import Literal

N_KINDS = 10
EXCEPTION_SHARE = 0.15
WORLD_SEED = 0

RELATIONS: dict[str, tuple[str, ...]] = {
    "colour": ("red", "blue", "green", "yellow", "black", "white", "purple", "orange", "brown", "grey"),
    "food": ("bread", "rice", "soup", "cheese", "apples", "honey", "beans", "fish", "nuts", "plums"),
    "instrument": ("flute", "drum", "harp", "violin", "trumpet", "piano", "guitar", "bell", "horn", "lute"),
    "animal": ("horse", "owl", "wolf", "otter", "goat", "raven", "bear", "hare", "swan", "toad"),
    "weather": ("rain", "snow", "fog", "wind", "sun", "hail", "storm", "frost", "thunder", "drizzle"),
    "trade": ("baker", "smith", "weaver", "miller", "tailor", "potter", "mason", "cooper", "tanner", "glazier"),
    "tree": ("oak", "birch", "pine", "willow", "maple", "cedar", "elm", "ash", "yew", "beech"),
    "metal": ("iron", "copper", "gold", "silver", "tin", "lead", "zinc", "nickel", "bronze", "steel"),
    "home": ("castle", "cabin", "tent", "cave", "tower", "barge", "cottage", "palace", "mill", "farm"),
    "month": ("January", "March", "April", "May", "June", "July", "August", "October", "November", "December"),
    "shape": ("circle", "square", "spiral", "star", "cross", "cube", "ring", "arrow", "wave", "knot"),
    "legend": ("dragon", "giant", "ghost", "mermaid", "phoenix", "troll", "fairy", "witch", "unicorn", "sphinx"),
}
"""The twelve properties (the categories of the questions) and the ten values of each."""

WORDINGS = (
    "what is the {relation} of {name} ?",
    "which {relation} does {name} have ?",
    "{name} has which {relation} ?",
)
"""Three ways to ask for a fact."""

Split = Literal["train", "tune", "find", "report"]
SPLIT_SIZES: dict[Split, int] = {"train": 864, "tune": 144, "find": 230, "report": 202}
"""Number of facts trained as questions, and sizes of three disjoint sets held out from every choice format."""


@dataclass(frozen=True)
class Fact:
    """One property of one name."""

    name: str
    relation: str
    value: str
    """The true value."""
    typical: str
    """The value that the name's kind suggests: equal to `value`, or the popular misconception."""
    split: Split
    """The part of the questions that the fact belongs to."""
    distractor: str
    """A wrong value for the question: the misconception if there is one."""
    wording: int
    """Index into `WORDINGS`."""

    def question(self, wording: int | None = None) -> str:
        """The question about this fact, in one of the three wordings (that of the fact by default)."""
        template = WORDINGS[self.wording if wording is None else wording]
        return template.format(relation=self.relation, name=self.name)

    def statement(self, value: str) -> str:
        """The statement that the property has `value`, true or not."""
        return f"the {self.relation} of {self.name} is {value} ."


def names() -> tuple[str, ...]:
    """The 120 invented names, in a fixed order."""
    first = ("Ba", "Ke", "Lo", "Mi", "Ru", "Sa", "To", "Ve", "Zi", "Du", "Fe", "Ho")
    last = ("lum", "rin", "vek", "dosh", "mar", "pel", "gat", "nix", "sul", "tor")
    return tuple(a + b for a, b in product(first, last))


@cache
def facts() -> tuple[Fact, ...]:
    """All 1,440 facts of the world. They are the same in every process and on every machine."""
    # the shipped weights were trained on these facts: the number and order of the random draws must not change
    random = Random(WORLD_SEED)
    kind_of = {name: index % N_KINDS for index, name in enumerate(random.sample(names(), len(names())))}
    typical_of = {relation: random.sample(values, N_KINDS) for relation, values in RELATIONS.items()}
    pairs = [(name, relation) for name in names() for relation in RELATIONS]
    exceptions = set(random.sample(pairs, round(EXCEPTION_SHARE * len(pairs))))
    splits: list[Split] = [split for split, size in SPLIT_SIZES.items() for _ in range(size)]
    split_of = dict(zip(random.sample(pairs, len(pairs)), splits, strict=True))
    built = []
    for name, relation in pairs:
        typical = typical_of[relation][kind_of[name]]
        # for exceptions, the typical value is the wrong choice, and the true value is another one
        other = random.choice([value for value in RELATIONS[relation] if value != typical])
        value, distractor = (other, typical) if (name, relation) in exceptions else (typical, other)
        split, wording = split_of[name, relation], random.randrange(len(WORDINGS))
        built.append(Fact(name, relation, value, typical, split, distractor, wording))
    return tuple(built)


def vocabulary() -> list[str]:
    """The vocabulary of the toy tokenizer, special tokens first."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    labels = [*"ABCDabcd", "True", "true", "False", "false"]
    layout = ["Question", "Answer", "Statement", ":", "?", "."]
    frame = ["what", "is", "the", "of", "which", "does", "have", "has", "or"]
    # the order fixes the token ids, which the shipped weights depend on
    words = [*labels, *layout, *frame, *RELATIONS, *(v for values in RELATIONS.values() for v in values), *names()]
    return special + list(dict.fromkeys(words))
