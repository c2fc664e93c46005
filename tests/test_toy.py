"""The embedded model shows the paper's effect on held-out questions, and the documentation contains its numbers."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.train_toy import Curriculum, build_tokenizer, choice_example, tuning_accuracy
from tests.conftest import needs_hooked
from tn_lens import TruthNeurons, find_truth_neurons, load_model, load_questions
from tn_lens.evaluation.condition import condition_label
from tn_lens.models import Model
from tn_lens.questions.toy_world import facts, vocabulary

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tn_lens" / "toy" / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy") / "demo"


@pytest.fixture(scope="module")
def demo(toy: Model, folder: Path) -> TruthNeurons:
    return find_truth_neurons(toy, load_questions("toy"), out=folder, progress=False)


def test_ablating_truth_neurons_hurts_and_random_ones_do_not(demo: TruthNeurons) -> None:
    conditions = demo.evaluation.conditions
    before, after = conditions["unablated"], conditions["ablated"]
    assert 0.80 <= before.accuracy <= 0.95
    assert after.accuracy <= before.accuracy - 0.10
    assert demo.evaluation.welch_p < 1e-6
    assert abs(conditions["random"].accuracy - before.accuracy) <= 0.02
    assert conditions["random_matched"].accuracy >= after.accuracy + 0.08
    assert after.order_averaged_accuracy <= before.order_averaged_accuracy - 0.08
    assert after.answer_mass >= 0.95


def test_the_questions_of_the_report_were_not_used_to_find_neurons(demo: TruthNeurons) -> None:
    questions = load_questions("toy")
    assert demo.evaluation.n_questions == len(questions.part("report")) == 202
    assert demo.check.n_asked == len(questions.part("find")) == 230
    assert demo.unseen is None
    assert set(demo.selection.half_1).isdisjoint(demo.selection.half_2)


def test_the_documentation_shows_this_run(demo: TruthNeurons) -> None:
    text = (ROOT / "docs" / "toy.md").read_text(encoding="utf-8")
    assert demo.selection.summary() in text
    assert demo.diagnosis.summary() in " ".join(text.split())
    for name, result in demo.evaluation.conditions.items():
        label = condition_label(name, demo.evaluation.intervention)
        # the label may be the end of a longer one: "random neurons zero-ablated"
        row = next(line for line in text.splitlines() if re.search(rf"[│┃]\s*{label}\s*[│┃]", line))
        shown = [float(number) for number in re.findall(r"\d+\.\d+", row)]
        expected = [
            100 * result.accuracy,
            100 * result.accuracy_std,
            100 * result.order_averaged_accuracy,
            result.answer_mass,
            result.share_a,
        ]
        assert shown == pytest.approx(expected, abs=0.6)


EXPECTED = Path(__file__).with_name("toy_expected.json")
"""Expected numbers of the run with HookedTransformer; written by `python -m tests.test_toy`."""


def summed_up(found: TruthNeurons) -> dict[str, Any]:
    """The numbers and sentences of a run of the toy."""
    conditions = found.evaluation.conditions
    return {
        "neurons": [[r["site"], r["layer"], r["head"], r["index"], r["mean_difference"]] for r in found.records()],
        "accuracies": {name: result.accuracies.tolist() for name, result in conditions.items()},
        "answer_mass": {name: result.answer_mass for name, result in conditions.items()},
        "order_averaged": {name: result.order_averaged_accuracy for name, result in conditions.items()},
        "welch_p": found.evaluation.welch_p,
        "verdicts": found.diagnosis.summary(),
        "check": found.check.summary(),
        "selection": found.selection.summary(),
    }


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Neurons, accuracies and sentences are equal; scores and probabilities agree up to float32 precision."""
    assert {tuple(n[:4]) for n in found["neurons"]} == {tuple(n[:4]) for n in expected["neurons"]}
    scores, others = ({tuple(n[:4]): n[4] for n in one["neurons"]} for one in (found, expected))
    assert scores == pytest.approx(others, rel=1e-3, abs=1e-3 * max(map(abs, others.values())))
    for key in ("accuracies", "order_averaged", "verdicts", "check", "selection"):
        assert found[key] == expected[key], key
    assert found["answer_mass"] == pytest.approx(expected["answer_mass"], abs=1e-5)
    assert found["welch_p"] == pytest.approx(expected["welch_p"], rel=1e-6)


def test_the_run_is_the_same_wherever_it_is_made(demo: TruthNeurons) -> None:
    """On HookedTransformer, and on the bridge of TransformerLens 4."""
    assert_same_run(summed_up(demo), json.loads(EXPECTED.read_text(encoding="utf-8")))


def words_and_numbers(report: Path) -> tuple[list[str], list[float]]:
    """The visible text of a report, without figures, the manifest, the digest of the weights and the name of the backend."""
    page = report.read_text(encoding="utf-8")
    text = re.sub(r"(?s)<(script|style|svg|details)\b.*?</\1>|<[^>]*>", " ", page)
    text = re.sub(r"weights:\s*[0-9a-f]+", "", text)
    text = re.sub(r"backend='\w+'", "", html.unescape(text))
    parts = re.split(r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)", text)
    return " ".join(parts[::2]).split(), [float(part) for part in parts[1::2]]


@needs_hooked
def test_the_report_is_the_same_on_the_bridge(demo: TruthNeurons, folder: Path, tmp_path: Path) -> None:
    model, out = load_model("toy", backend="bridge"), tmp_path / folder.name
    found = find_truth_neurons(model, load_questions("toy"), out=out, progress=False)
    assert_same_run(summed_up(found), json.loads(EXPECTED.read_text(encoding="utf-8")))
    for path, backend in ((out, "bridge"), (folder, "hooked")):
        page = html.unescape((path / "report.html").read_text(encoding="utf-8"))
        assert f"load_model('toy', backend='{backend}')" in page, "the call that repeats the run names the backend"
    (words, numbers), (others, expected) = (words_and_numbers(one / "report.html") for one in (out, folder))
    assert len(words) > 1000
    assert words == others
    assert numbers == pytest.approx(expected, rel=2e-2, abs=1.1e-3), "the last digit that is shown may differ"


def test_the_model_card_names_every_seed_and_the_rules() -> None:
    card = (MODEL / "MODEL_CARD.md").read_text(encoding="utf-8")
    rows = [line for line in card.splitlines() if re.match(r"\| \d", line)]
    assert [int(row.split("|")[1].split()[0]) for row in rows] == [0, 1, 2, 3, 4]
    (shipped,) = (row for row in rows if "(shipped)" in row)
    best = max(rows, key=lambda row: float(row.split("|")[2]))
    assert shipped == best, "the rule is the highest accuracy on the tuning questions"
    t = json.loads((MODEL / "tn_lens.json").read_text())["adaptive_threshold"]
    assert f"| {t:.0%} |" in shipped


def test_the_shipped_weights_reach_the_accuracy_on_the_card() -> None:
    from transformers import LlamaForCausalLM

    card = (MODEL / "MODEL_CARD.md").read_text(encoding="utf-8")
    shown = float(re.search(r"\(shipped\) \| ([\d.]+)", card)[1])
    assert 100 * tuning_accuracy(LlamaForCausalLM.from_pretrained(MODEL)) == pytest.approx(shown, abs=0.05)


def test_the_shipped_tokenizer_is_the_one_that_the_script_builds() -> None:
    built = json.loads(build_tokenizer().backend_tokenizer.to_str())
    shipped = json.loads((MODEL / "tokenizer.json").read_text())
    assert shipped["model"]["vocab"] == built["model"]["vocab"] == {w: i for i, w in enumerate(vocabulary())}


def test_training_never_asks_about_held_out_facts() -> None:
    curriculum = Curriculum(seed=0)
    curriculum.exceptions = True
    held_out = {(f.name, f.relation) for f in facts() if f.split != "train"}
    for kind in ("binary", "four", "statement"):
        for _ in range(300):
            text, _ = curriculum.draw(kind)
            words = set(text.split())
            assert not any(name in words and relation in words for name, relation in held_out)


def test_training_targets_are_soft_distributions() -> None:
    curriculum = Curriculum(seed=1)
    for switched in (False, True):
        curriculum.exceptions = switched
        for examples in curriculum.batches():
            for text, target in examples:
                assert sum(target.values()) == pytest.approx(1)
                assert text.endswith("Answer :")
    text, target = choice_example("which colour is red ?", "red", ["blue"], curriculum.random)
    right = "A" if "A : red" in text else "B"
    assert target[right] == pytest.approx(0.64)
    assert target[right.lower()] == pytest.approx(0.16)


def test_training_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps on a quarter of the examples reduce the loss; `make train` runs the whole training."""
    from scripts.train_toy import ROWS, encode, last_logits, train

    for kind, n_rows in tuple(ROWS.items()):
        monkeypatch.setitem(ROWS, kind, n_rows // 4)
    examples = next(iter(Curriculum(seed=5).batches()))
    words = {word: index for index, word in enumerate(vocabulary())}
    tokens, last, targets = encode(examples, words)

    def loss(n_steps: int) -> float:
        model = train(0, n_steps, report_every=0)
        with torch.no_grad():
            return float(-(targets * last_logits(model, tokens, last).log_softmax(-1)).sum(-1).mean())

    assert loss(12) < loss(1) - 0.5


if __name__ == "__main__":
    expected = summed_up(find_truth_neurons(load_model("toy"), load_questions("toy"), progress=False))
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
