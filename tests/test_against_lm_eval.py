"""lm-evaluation-harness gives the same answers for the same prompts and labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tn_lens import build_prompts, load_model, load_questions
from tn_lens.inference.answers import ask

N_QUESTIONS = 500


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mmlu_answers_equal_the_harness(shared: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "tinystories-656k"
    model = load_model(folder, dtype="float32")
    every = load_questions("mmlu", source=shared / "data" / "mmlu")
    drawn = np.random.default_rng(0).permutation(len(every))[: 2 * N_QUESTIONS].tolist()
    prompts = build_prompts(model, every.select(drawn), order="given", drop_long=True)[:N_QUESTIONS]
    ours = ask(model, prompts)
    harness = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=32,
        device="cpu",
    )
    requests = [
        ((prompt.text, f"label {token}"), list(prompt.token_ids), [token])
        for prompt in prompts
        for ids in prompt.label_ids
        for token in ids
    ]
    said = np.array([value for value, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)])
    theirs = np.exp(said).reshape(len(prompts), 4, 2).sum(-1)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-3, atol=1e-7)
    assert (ours.numpy().argmax(-1) == theirs.argmax(-1)).all()
    assert len(prompts) == N_QUESTIONS
    assert len(set(theirs.argmax(-1).tolist())) > 1
