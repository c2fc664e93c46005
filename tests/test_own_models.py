"""Models that users built themselves, with GPT-2-style tokenizers, go through the whole pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import tn_lens as tn
from tests.conftest import needs_hooked
from tests.test_tokenizers import END, gpt2_style

pytestmark = pytest.mark.usefixtures("few_resamples")
TEMPLATE = tn.PromptTemplate(user="{question}\n{choices}", choice="{label}. {choice}")
QUESTIONS = tn.QuestionSet(
    name="sums",
    questions=tuple(tn.Question(text=f"{n} + 2 =", choices=(str(n + 2), str(n + 3)), category="+") for n in range(24)),
    template=TEMPLATE,
)
SETTINGS = tn.Settings(
    n_steps=2, n_repetitions=2, adaptive_threshold=0.3, correction="none", alpha=0.3, convergence_sample=1
)


def built(kind: str, tokenizer: Any) -> Any:
    """A model with random weights, as a user builds it: in train mode, with gradients, with a tokenizer that adds BOS."""
    torch.manual_seed(0)
    n_vocab = len(tokenizer)
    if kind == "hooked":
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        sizes = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_head": 8, "d_mlp": 64, "n_ctx": 256, "d_vocab": n_vocab}
        cfg = HookedTransformerConfig(**sizes, act_fn="gelu_new", normalization_type="LN", device="cpu", seed=0)  # pyright: ignore
        return HookedTransformer(cfg, tokenizer=tokenizer)
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config = GPT2Config(vocab_size=n_vocab, n_positions=256, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    config.architectures = ["GPT2LMHeadModel"]
    return build_bridge_from_module(GPT2LMHeadModel(config), "GPT2LMHeadModel", hf_config=config, tokenizer=tokenizer)


@pytest.mark.parametrize("form", ["letters", "completion", "statement"])
@pytest.mark.parametrize("kind", [pytest.param("hooked", marks=needs_hooked), "bridge"])
def test_the_whole_pipeline_runs_on_it(kind: str, form: str, tmp_path: Path) -> None:
    gpt2_style(None, f"{END} $A").save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")  # TransformerLens loads it a second time
    model = built(kind, tokenizer)
    was_training = model.training
    questions = QUESTIONS.with_format(form)
    prompts = tn.build_prompts(model, questions[:3])
    for prompt in prompts:
        before = prompt.text if form != "completion" else prompt.text.rstrip()
        ids = tokenizer(before, add_special_tokens=False)["input_ids"]
        assert prompt.token_ids[: len(ids) + 1] == (tokenizer.bos_token_id, *ids), "one BOS, as the tokenizer adds it"
    about = {"out": tmp_path / "run", "force": True, "texts": ["One and two make three."], "progress": False}
    found = tn.find_truth_neurons(model, questions, SETTINGS, **about)
    assert found.check.n_asked == 24
    assert 0 < found.check.n_kept < 24
    assert (tmp_path / "run" / "report.html").is_file()
    assert tn.load_run(tmp_path / "run").neurons == found.neurons
    assert model.training == was_training
    assert all(parameter.grad is None for parameter in model.parameters())
