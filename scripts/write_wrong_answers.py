"""Have a chat model write a plausible wrong answer to every question (paper A.1).

    python -m scripts.write_wrong_answers verified-web-dev.json --chat-model NAME --out wrong.jsonl

The paper asks GPT-4.1 for an answer to each TriviaQA question that is "plausible, tempting to choose, but factually
incorrect". The prompt itself is available only as an image (figure 6), so the wording used here is not the paper's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from scripts.replies import wrong_answer_in
from tn_lens.cli.main import replace_unencodable
from tn_lens.core.errors import BadInput
from tn_lens.core.sentences import count
from tn_lens.models import Backend, backend_of
from tn_lens.models.loading import load_model
from tn_lens.questions.files import read_json_lines
from tn_lens.questions.load import load_questions
from tn_lens.questions.question import Dropped, Question, QuestionSet
from tn_lens.questions.triviaqa import read_answers
from tn_lens.runs.context import track

SYSTEM = "You write answers for a quiz in which only one of two answers is right."
REQUEST = (
    "Question: {question}\nRight answer: {right}\n\n"
    "Write one other answer that is plausible, tempting to choose, but factually incorrect. It must be of the same kind, length "
    "and style as the right answer, and must not mean the same. Reply with the answer alone."
)
N_TRIES = 3
"""Number of replies requested before a question is dropped."""
TIMEOUT = 120.0
"""Timeout for one reply, in seconds."""


@runtime_checkable
class Chat(Protocol):
    """A chat model: takes a system turn, a user turn and a seed, and returns its reply."""

    name: str
    """The model's name, which is written to the file beside each answer."""

    def __call__(self, system: str, user: str, seed: int) -> str: ...


@dataclass(frozen=True, kw_only=True)
class OpenAIChat:
    """A model on a server with OpenAI's chat completions API: OpenAI, vLLM, llama.cpp, Ollama."""

    name: str
    """The model's name on the server."""
    base_url: str = "https://api.openai.com/v1"
    api_key: str | None = None
    """API key; the environment variable OPENAI_API_KEY by default. It is sent to `base_url` only and is never stored."""
    temperature: float = 0.7

    def __call__(self, system: str, user: str, seed: int) -> str:
        """Request one reply.

        Raises:
            BadInput: the server cannot be reached, returns an error, or returns something other than a chat completion.
        """
        try:
            import httpx
        except ImportError as error:
            raise BadInput("a chat server needs httpx; install it with pip install httpx") from error
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
            choice = reply.json()["choices"][0]
            # a reply that was cut off or filtered, or a refusal without content, holds no answer
            is_whole = choice.get("finish_reason") not in ("length", "content_filter")
            return str(choice["message"]["content"] or "") if is_whole else ""
        except httpx.HTTPStatusError as error:
            message = " ".join(error.response.text.split())[:200]
            raise BadInput(
                f"{url} answered {error.response.status_code}: {message}; the answers written so far are kept, "
                "so run the same command again to continue"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BadInput(
                f"cannot reach {url} ({type(error).__name__}: {error}); the answers written so far are kept, "
                "so run the same command again to continue"
            ) from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise BadInput(
                f"expected a chat completion in OpenAI's format from {url}, got another reply "
                f"({type(error).__name__}: {error}); check the base URL"
            ) from error


@dataclass(frozen=True)
class LocalChat:
    """A loaded model, with its chat template if it has one."""

    model: Any
    """A model from `load_model`."""
    max_new_tokens: int = 32
    """Maximum length of a reply, in tokens."""

    @property
    def _backend(self) -> Backend:
        return backend_of(self.model)

    @property
    def name(self) -> str:
        """The model's name."""
        return self._backend.name

    def __call__(self, system: str, user: str, seed: int) -> str:
        """Sample one reply at temperature 0.7.

        Raises:
            BadInput: the model has no tokenizer, or the prompt is too long for its context window.
        """
        backend, tokenizer = self._backend, self.model.tokenizer
        if tokenizer is None:
            raise BadInput(
                "expected a model with a tokenizer, got one without; load it with load_model(..., tokenizer=...)"
            )
        if getattr(tokenizer, "chat_template", None) is None:
            text, special = f"{system}\n\n{user}\n\nAnswer:", True
        else:
            turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
            text, special = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), False
        ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if len(ids) + self.max_new_tokens > backend.n_ctx:
            raise BadInput(
                f"expected a prompt that leaves {self.max_new_tokens} tokens for the reply in the context window of "
                f"{backend.n_ctx} tokens, got one of {len(ids)} tokens; shorten the question, or use another model"
            )
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
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> QuestionSet:
    """Have a chat model write one wrong answer to every question, and append the answers to a file.

    Args:
        questions: questions with their right answers; their wrong choices, if any, are ignored.
        chat: `OpenAIChat(...)`, `LocalChat(model)`, or a function with the same signature.
        out: JSON-lines file with the keys question, right, wrong, model and seed. Questions that are already in the file
            are not asked again, so an interrupted call can be continued.
        seed: random seed of the first try at each question; every further try adds 1.
        aliases: further right answers by the text of the question; a wrong answer must differ from all of them.

    Returns:
        The questions with their right and wrong answers. `dropped` lists those without a usable wrong answer after
        three tries: they are not written, so that the next call asks them again.

    Raises:
        BadInput: the file does not contain wrong answers, or the model cannot be asked. The answers written so far are kept.
    """
    out = Path(out)
    known: dict[str, str] = {}
    if out.exists():
        for row in read_json_lines(out):
            if not isinstance(row.get("question"), str) or not isinstance(row.get("wrong"), str):
                raise BadInput(
                    f"expected wrong answers (JSON lines with question and wrong) in {out}, got something else; "
                    "give another file"
                )
            known[row["question"]] = row["wrong"]
    name = getattr(chat, "name", getattr(chat, "__name__", "chat"))
    kept: list[Question] = []
    dropped: list[Dropped] = []
    try:
        with out.open("a", encoding="utf-8") as file:
            for number, question in enumerate(track(questions, "wrong answers"), start=1):
                right = question.choices[question.answer]
                rights = [right, *(aliases or {}).get(question.text, ())]
                # earlier versions wrote the first line of any reply
                if not wrong_answer_in(known.get(question.text, ""), rights):
                    wrong, used = _ask(chat, question.text, rights, seed)
                    if not wrong:
                        dropped.append(Dropped(number, question.text, f"no usable wrong answer in {N_TRIES} tries"))
                        continue
                    row = {"question": question.text, "right": right, "wrong": wrong, "model": name, "seed": used}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()  # requests cost money, so answers must not be lost in a crash
                    known[question.text] = wrong
                wrong = known[question.text]
                kept.append(Question(text=question.text, choices=(right, wrong), category=question.category))
    except OSError as error:
        raise BadInput(f"cannot write {str(out)!r}: {error.strerror}; give another file") from error
    set_name = questions.name if isinstance(questions, QuestionSet) else "questions"
    return QuestionSet(name=set_name, questions=tuple(kept), dropped=tuple(dropped))


def load_answered(name_or_path: str) -> tuple[list[Question], dict[str, tuple[str, ...]]]:
    """Load questions with right answers, also from TriviaQA's original files, which have no wrong answers.

    Returns:
        The questions, and further right answers by the text of the question.

    Raises:
        BadInput: there is no such question set or file, or it has no right answers.
    """
    if Path(name_or_path).suffix == ".json":
        answers = read_answers(Path(name_or_path))
        questions = [Question(text=question, choices=(right,)) for question, (right, _) in answers.items()]
        return questions, {question: aliases for question, (_, aliases) in answers.items()}
    return list(load_questions(name_or_path)), {}


def _ask(chat: Callable[[str, str, int], str], question: str, rights: Sequence[str], seed: int) -> tuple[str, int]:
    """Return a wrong answer and the seed that gave it; the answer is empty if no try was usable."""
    for attempt in range(seed, seed + N_TRIES):
        wrong = wrong_answer_in(chat(SYSTEM, REQUEST.format(question=question, right=rights[0]), attempt), rights)
        if wrong:
            return wrong, attempt
    return "", seed + N_TRIES - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 2 after invalid input, which is reported in one line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.write_wrong_answers",
        description="Have a chat model write plausible wrong answers, as in the paper for TriviaQA.",
    )
    parser.add_argument(
        "questions", help="'truthfulqa', one of TriviaQA's original .json files, or a .csv or .jsonl file"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file; an existing one is continued")
    parser.add_argument(
        "--chat-model", required=True, help="name of the model on the server, or with --local the model to load"
    )
    parser.add_argument(
        "--base-url",
        default=OpenAIChat.base_url,
        help="server with OpenAI's chat completions API; the key is read from OPENAI_API_KEY (default: %(default)s)",
    )
    parser.add_argument("--local", action="store_true", help="load the model here instead of asking a server")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the replies (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT questions")
    options = parser.parse_args(arguments)
    replace_unencodable()
    try:
        if options.limit is not None and options.limit < 1:
            raise BadInput(f"limit must be a positive integer; got {options.limit}")
        questions, aliases = load_answered(options.questions)
        questions = questions[: options.limit]
        if options.local:
            chat = LocalChat(load_model(options.chat_model))
        else:
            chat = OpenAIChat(name=options.chat_model, base_url=options.base_url)
        answered = write_wrong_answers(questions, chat, options.out, seed=options.seed, aliases=aliases)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Wrong answers to {len(answered)} of {count(len(questions), 'question')}: {options.out}")
    if answered.dropped:
        first, n_left = answered.dropped[0], count(len(answered.dropped), "question")
        print(f"No usable reply to {n_left}, such as {first.text!r:.80}; run the same command again to ask again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
