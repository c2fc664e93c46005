"""Wrong answers that tempt, written by a chat model (paper A.1).

The paper asks GPT-4.1 for an answer to each TriviaQA question that is "plausible, tempting to choose, but factually
incorrect"; the text of its prompt (figure 6) is a picture, so the wording here is ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tn_lens.core.errors import BadInput
from tn_lens.models import Backend, backend_of
from tn_lens.questions.files import read_json_lines
from tn_lens.questions.question import Dropped, Question, QuestionSet
from tn_lens.questions.triviaqa import normalize, read_answers
from tn_lens.runs.progress import track

SYSTEM = "You write answers for a quiz in which only one of two answers is right."
REQUEST = (
    "Question: {question}\nRight answer: {right}\n\n"
    "Write one other answer that is plausible, tempting to choose, but factually incorrect. It must be of the same kind, length "
    "and style as the right answer, and must not mean the same. Reply with the answer alone."
)
N_TRIES = 3
"""Replies asked for before a question is given up."""
TIMEOUT = 120.0
"""Seconds to wait for one reply."""


@runtime_checkable
class Chat(Protocol):
    """Anything that answers a system and a user turn; the seed makes another try another answer."""

    name: str

    def __call__(self, system: str, user: str, seed: int) -> str: ...


@dataclass(frozen=True, kw_only=True)
class OpenAIChat:
    """A model behind any server that speaks OpenAI's chat completions: OpenAI, vLLM, llama.cpp, Ollama."""

    name: str
    """The model's name on the server."""
    base_url: str = "https://api.openai.com/v1"
    api_key: str | None = None
    """By default the environment variable OPENAI_API_KEY; it is sent to `base_url` alone, and never stored."""
    temperature: float = 0.7

    def __call__(self, system: str, user: str, seed: int) -> str:
        """One reply.

        Raises:
            BadInput: the server cannot be reached, refuses, or answers in another form.
        """
        import httpx

        key = self.api_key or os.environ.get("OPENAI_API_KEY", "")
        body = {
            "model": self.name,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            "temperature": self.temperature,
            "seed": seed,
        }
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        try:
            reply = httpx.post(
                url, json=body, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=TIMEOUT
            )
            reply.raise_for_status()
            return str(reply.json()["choices"][0]["message"]["content"])
        except httpx.HTTPStatusError as error:
            said = " ".join(error.response.text.split())[:200]
            raise BadInput(
                f"{url} answered {error.response.status_code}: {said}; what was written so far is kept"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BadInput(
                f"cannot reach {url} ({type(error).__name__}: {error}); what was written so far is kept"
            ) from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise BadInput(
                f"{url} did not answer as OpenAI's chat completions do ({type(error).__name__}: {error})"
            ) from error


@dataclass(frozen=True)
class LocalChat:
    """A loaded model with a chat template."""

    model: Any
    """From `load_model`."""
    max_new_tokens: int = 32

    @property
    def _backend(self) -> Backend:
        return backend_of(self.model)

    @property
    def name(self) -> str:
        """The model's name."""
        return self._backend.name

    def __call__(self, system: str, user: str, seed: int) -> str:
        """One reply, sampled at temperature 0.7.

        Raises:
            BadInput: the model has no tokenizer, or the prompt fills its context window.
        """
        import torch

        backend, tokenizer = self._backend, self.model.tokenizer
        if tokenizer is None:
            raise BadInput("this model has no tokenizer; load it with load_model(..., tokenizer=...)")
        if getattr(tokenizer, "chat_template", None) is None:
            text, special = f"{system}\n\n{user}\n\nAnswer:", True
        else:
            turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
            text, special = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), False
        ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if len(ids) + self.max_new_tokens > backend.n_ctx:
            raise BadInput(f"the prompt of {len(ids)} tokens leaves no room in a context of {backend.n_ctx}")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            reply = backend.generate(
                torch.tensor([ids]),
                n_tokens=self.max_new_tokens,
                temperature=0.7,
                stop=tokenizer.eos_token_id is not None,
            )
        return str(tokenizer.decode(reply, skip_special_tokens=True))


def write_wrong_answers(
    questions: QuestionSet | Sequence[Question],
    chat: Chat | Callable[[str, str, int], str],
    out: str | Path,
    *,
    seed: int = 0,
    progress: bool = True,
) -> QuestionSet:
    """Write one wrong answer to every question, and keep it in a file that a later call goes on with.

    Args:
        questions: with their right answers; wrong choices that are there are ignored.
        chat: `OpenAIChat(...)`, `LocalChat(model)`, or a function of the same form.
        out: a JSON-lines file: question, right, wrong, model, seed. Questions that stand in it are not asked again.
        seed: of the first try; further tries of a question count on from it.
        progress: show a progress bar.

    Returns:
        The questions with their right and wrong answer; `dropped` names those that got no usable one in three tries.

    Raises:
        BadInput: the file is of something else, or the model cannot be asked; what was written stays.
    """
    out = Path(out)
    known: dict[str, str] = {}
    if out.exists():
        for row in read_json_lines(out):
            if not isinstance(row.get("question"), str) or not isinstance(row.get("wrong"), str):
                raise BadInput(f"{out} holds something else than wrong answers; give another file")
            known[row["question"]] = row["wrong"]
    name = getattr(chat, "name", getattr(chat, "__name__", "chat"))
    kept: list[Question] = []
    dropped: list[Dropped] = []
    try:
        with out.open("a", encoding="utf-8") as file:
            for number, question in enumerate(track(questions, "wrong answers" if progress else None), start=1):
                right = question.choices[question.answer]
                if question.text not in known:
                    wrong, used = _ask(chat, question.text, right, seed)
                    row = {"question": question.text, "right": right, "wrong": wrong, "model": name, "seed": used}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    known[question.text] = wrong
                wrong = known[question.text]
                if not wrong:
                    dropped.append(Dropped(number, question.text, f"no usable wrong answer in {N_TRIES} tries"))
                    continue
                kept.append(Question(text=question.text, choices=(right, wrong), category=question.category))
    except OSError as error:
        raise BadInput(f"cannot write {str(out)!r}: {error.strerror}; give another file") from error
    set_name = questions.name if isinstance(questions, QuestionSet) else "questions"
    return QuestionSet(name=set_name, questions=tuple(kept), dropped=tuple(dropped))


def load_answered(name_or_path: str) -> list[Question]:
    """Questions with right answers; of TriviaQA's own files, which have no wrong ones, too.

    Raises:
        BadInput: no such set or file, or one without right answers.
    """
    if Path(name_or_path).suffix == ".json":
        return [Question(text=question, choices=(right,)) for question, right in read_answers(Path(name_or_path))]
    from tn_lens.questions.load import load_questions

    return list(load_questions(name_or_path))


def _ask(chat: Callable[[str, str, int], str], question: str, right: str, seed: int) -> tuple[str, int]:
    """A wrong answer and the seed that gave it; empty after too many tries."""
    for attempt in range(seed, seed + N_TRIES):
        lines = chat(SYSTEM, REQUEST.format(question=question, right=right), attempt).strip().splitlines()
        wrong = lines[0].strip().strip("\"'").strip() if lines else ""
        if normalize(wrong) and normalize(wrong) != normalize(right):
            return wrong, attempt
    return "", seed + N_TRIES - 1
