"""Prompts and labels of the kinds of tokenizers and chat templates that models come with, rebuilt small.

The tokens of a prompt are those of `apply_chat_template`, and the label is the token with which the rendered answer turn
continues them; or the tokenizer is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.test_prompts import FIGURE_9_TEXT, ONE, SYSTEM, byte_tokenizer
from tn_lens import BadInput, Question, QuestionSet, build_prompt, build_prompts, load_model
from tn_lens.models import Model

END = "<|endoftext|>"

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML
# thoughts belong to the last answer, and to a prompt for which thinking is turned off
QWEN_3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# prompts open a block that answers of earlier turns do not have
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<|User|>"
    "{{ m.content }}{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + "
    "' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NEMO = LLAMA_2.replace("' ' + m.content + ' ' + eos_token", "m.content + eos_token").replace("' [/INST]'", "'[/INST]'")
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n{% elif m.role == 'assistant' %}"
    "<|assistant|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
MARKUP = [
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|User|>",
        "<|Assistant|>",
    ),
    *(
        "<start_of_turn>",
        "<end_of_turn>",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
        "<|start|>",
        "<|channel|>",
        "<|message|>",
    ),
]


def byte_level(template: Any, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(template, merges=True)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKUP, **special})
    return tokenizer


def gpt2_style(template: Any, adds: str | None) -> PreTrainedTokenizerFast:
    """One token for BOS, EOS, padding and unknown words; `adds` is what the tokenizer writes around a text."""
    tokenizer = byte_level(template, bos_token=END, eos_token=END, unk_token=END, pad_token=END)
    if adds:
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single=adds, special_tokens=[(END, tokenizer.bos_token_id)]
        )
    return tokenizer


def sentencepiece(template: str | None) -> PreTrainedTokenizerFast:
    """As Llama-2's: a space is part of the word after it, and a text begins with one."""
    characters = sorted(set(map(chr, range(33, 127))) | {"▁", "\n"})
    pieces = ["<unk>", "<s>", "</s>", *characters, "▁A", "▁B", "▁a", "▁b"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", letter) for letter in "ABab"]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # pyright: ignore
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])  # pyright: ignore
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # pyright: ignore
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


@pytest.fixture
def model_with(checkpoint: Callable[[str], Path]) -> Callable[[Any], Model]:
    def get(tokenizer: Any) -> Model:
        model = load_model(checkpoint("Llama-3.1-8B-Instruct"), tokenizer=tokenizer)
        model.cfg.n_ctx = 4000
        return model

    return get


def texts(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def parts(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": [{"type": "text", "text": content}]} for role, content in turns]


SEPARATE = [("system", SYSTEM), ("user", FIGURE_9_TEXT)]
MERGED = [("user", f"{SYSTEM}\n\n{FIGURE_9_TEXT}")]

CHATS: dict[str, tuple[Callable[[], Any], list[tuple[str, str]], Callable[..., Any]]] = {
    "gpt-2 style, BOS written by the template": (
        lambda: gpt2_style("{{ bos_token }}" + CHATML, f"{END} $A"),
        SEPARATE,
        texts,
    ),
    "sentencepiece, a space before the answer": (lambda: sentencepiece(LLAMA_2), SEPARATE, texts),
    "sentencepiece, no space before the answer": (lambda: sentencepiece(NEMO), SEPARATE, texts),
    "llama-3": (lambda: byte_level(LLAMA_3), SEPARATE, texts),
    "qwen": (lambda: byte_level(QWEN), SEPARATE, texts),
    "qwen-3": (lambda: byte_level(QWEN_3), SEPARATE, texts),
    "gemma": (lambda: byte_level(GEMMA), MERGED, texts),
    "the system turn is dropped": (lambda: byte_level(NO_SYSTEM), MERGED, texts),
    "content parts": (lambda: byte_level(PARTS), SEPARATE, parts),
    "the tokenizer appends EOS": (lambda: gpt2_style(CHATML, f"$A {END}"), SEPARATE, texts),
    "named templates": (lambda: byte_level({"default": CHATML, "rag": QWEN}), SEPARATE, texts),
}


@pytest.mark.parametrize("name", CHATS)
def test_prompts_are_those_of_the_template_and_labels_those_of_its_answer(
    name: str, model_with: Callable[[Any], Model]
) -> None:
    make, turns, content = CHATS[name]
    tokenizer = make()
    model = model_with(tokenizer)
    (prompt,) = build_prompts(model, ONE, order="given")

    def rendered(*more: tuple[str, str]) -> list[int]:
        options = {"add_generation_prompt": not more, "enable_thinking": False, "return_dict": False}
        return tokenizer.apply_chat_template(content([*turns, *more]), **options)

    assert list(prompt.token_ids) == rendered()
    for position, letter in enumerate("AB"):
        for label, written in zip(prompt.label_ids[position], (letter, letter.lower()), strict=True):
            assert rendered(("assistant", written))[: len(prompt.token_ids) + 1] == [*prompt.token_ids, label]
    assert prompt.text.count(SYSTEM) == prompt.text.count(FIGURE_9_TEXT) == 1


def test_a_template_without_answer_turns_is_asked_as_it_ends_the_prompt(model_with: Callable[[Any], Model]) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' else '' }}")
    question = Question(text="Is ANSWER a word?", choices=("yes", "no"))  # also the placeholder for an answer
    tokenizer = byte_level(template)
    (prompt,) = build_prompts(model_with(tokenizer), QuestionSet(name="x", questions=(question,)), order="given")
    assert prompt.text.endswith("<|im_start|>assistant\n")
    assert tokenizer.convert_ids_to_tokens([i for ids in prompt.label_ids for i in ids]) == ["A", "a", "B", "b"]


@pytest.mark.parametrize("space", ["", " "])
def test_a_system_text_that_only_the_last_user_turn_holds(space: str, model_with: Callable[[Any], Model]) -> None:
    """Mistral's templates of 2024: an answer turn after the question takes the system text away from it."""
    template = (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}{% else %}"
        "{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}"
        "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}{% else %}"
        "{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% else %}{{ SPACE + m.content + eos_token }}{% endif %}{% endfor %}"
    ).replace("SPACE", repr(space))
    tokenizer = byte_level(template)
    (prompt,) = build_prompts(model_with(tokenizer), ONE, order="given")
    options = {"add_generation_prompt": True, "return_dict": False}
    assert list(prompt.token_ids) == tokenizer.apply_chat_template(texts(SEPARATE), **options)
    labels = tokenizer.convert_ids_to_tokens([i for ids in prompt.label_ids for i in ids])
    assert labels == (["ĠA", "Ġa", "ĠB", "Ġb"] if space else ["A", "a", "B", "b"])


def test_what_stands_between_prompt_and_answer_is_part_of_the_prompt(model_with: Callable[[Any], Model]) -> None:
    tokenizer = byte_level(CHANNELS)
    model = model_with(tokenizer)
    (prompt,) = build_prompts(model, ONE, order="given")
    answered = tokenizer.apply_chat_template(texts([*SEPARATE, ("assistant", "B")]), return_dict=False)
    assert answered[: len(prompt.token_ids) + 1] == [*prompt.token_ids, prompt.label_ids[1][0]]
    assert prompt.text.endswith("<|start|>assistant<|channel|>final<|message|>")


@pytest.mark.parametrize(("adds", "before"), [(None, 0), (f"{END} $A", 1), (f"$A {END}", 0), (f"{END} $A {END}", 1)])
def test_plain_text_begins_with_what_the_tokenizer_adds_and_ends_with_the_text(
    adds: str | None, before: int, model_with: Callable[[Any], Model]
) -> None:
    tokenizer = gpt2_style(None, adds)
    model = model_with(tokenizer)
    (prompt,) = build_prompts(model, ONE, order="given")
    text = f"{SYSTEM}\n\n{FIGURE_9_TEXT}\nAnswer:"
    assert list(prompt.token_ids) == [tokenizer.bos_token_id] * before + tokenizer.encode(
        text, add_special_tokens=False
    )
    assert tokenizer.convert_ids_to_tokens([i for ids in prompt.label_ids for i in ids]) == ["ĠA", "Ġa", "ĠB", "Ġb"]
    free = build_prompt(model, "It is", right=" A", wrong=" B")
    assert free.token_ids.count(tokenizer.bos_token_id) == before


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "thinking cannot be turned off": (
        lambda: byte_level(R1),
        r"ends inside an open thinking block \(<think>\).*prefill",
    ),
    "the template ends the prompt with EOS": (
        lambda: byte_level(CHATML + "{{ eos_token }}"),
        r"ends the prompt with '.*</s>', but renders an answer after",
    ),
    "a template that raises any error": (
        lambda: byte_level("{% for m in messages %}{{ m.content + 1 }}{% endfor %}"),
        "the chat template cannot be rendered: ",
    ),
    "a template without a question": (
        lambda: byte_level("{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}"),
        "the chat template leaves out a part of the prompt",
    ),
    "named templates without a default": (
        lambda: byte_level({"rag": QWEN, "tool_use": QWEN}),
        "the chat template cannot be rendered: .*default",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_right_is_refused_in_a_sentence(
    name: str, model_with: Callable[[Any], Model]
) -> None:
    make, said = REFUSED[name]
    with pytest.raises(BadInput, match=said) as raised:
        build_prompts(model_with(make()), ONE)
    assert "\n" not in str(raised.value)


def test_a_prefill_closes_a_thinking_block(model_with: Callable[[Any], Model]) -> None:
    tokenizer = byte_level(R1)
    model = model_with(tokenizer)
    (prompt,) = build_prompts(model, ONE.with_format(prefill="</think>\n\n"), order="given")
    assert prompt.text.endswith("<|Assistant|><think>\n</think>\n\n")
    assert tokenizer.convert_ids_to_tokens([i for ids in prompt.label_ids for i in ids]) == ["A", "a", "B", "b"]


def test_variables_of_the_template_reach_it(model_with: Callable[[Any], Model]) -> None:
    tokenizer = byte_level(QWEN_3)
    model = model_with(tokenizer)
    thinking = ONE.with_format(template_kwargs={"enable_thinking": True})
    (prompt,) = build_prompts(model, thinking, order="given")
    # without thinking turned off, the prompt ends before the block that the answer turn begins with
    assert prompt.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    named = byte_level({"rag": "RAG: " + CHATML})
    model = model_with(named)
    (prompt,) = build_prompts(model, ONE.with_format(template_kwargs={"chat_template": "rag"}), order="given")
    assert prompt.text.startswith("RAG: ")


def test_ids_beyond_the_embedding_are_refused_by_name(model_with: Callable[[Any], Model]) -> None:
    tokenizer = byte_level(CHATML.replace("<|im_end|>", "<|new|>"))
    tokenizer.add_tokens([f"<|{n}|>" for n in range(300)], special_tokens=True)
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    with pytest.raises(
        BadInput, match=r"the token '<\|new\|>' with id \d+, but the model's vocabulary has 283 entries"
    ):
        build_prompts(model_with(tokenizer), ONE)


@pytest.mark.parametrize("place", ["text", "choices"])
def test_special_tokens_in_a_question_are_refused_by_name(place: str, model_with: Callable[[Any], Model]) -> None:
    question: Any = {"text": "What is it?", "choices": ("this", "that")}
    question |= {"text": "Is it <|im_end|>?"} if place == "text" else {"choices": ("this", "<|im_start|>user")}
    strange = QuestionSet(name="strange", questions=(*ONE.questions, Question(**question)))
    with pytest.raises(BadInput, match=r"contains '<\|im_(end|start)\|>', which is a special token"):
        build_prompts(model_with(byte_level(CHATML)), strange)
