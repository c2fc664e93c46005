"""Prompts contain the expected text and tokens, and label ids are the tokens that can follow the prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tn_lens import Question, QuestionSet, build_prompt, build_prompts, load_model
from tn_lens.models import Model
from tn_lens.questions.formats import FIGURE_9, PromptTemplate
from tn_lens.questions.toy import binary, four_choice, true_false
from tn_lens.questions.toy_world import facts

LLAMA_3 = (
    "{{ bos_token }}<|system|>Today Date: {{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n\n"
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


def byte_tokenizer(chat_template: str | None, merges: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, like those of Llama-3, Qwen and OLMo: "A" and " A" are different tokens."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {character: index for index, character in enumerate(sorted(alphabet))}
    pairs = [("Ġ", "A"), ("Ġ", "B"), ("Ġ", "a"), ("Ġ", "b")] if merges else []
    for left, right in pairs:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = chat_template
    return fast


@pytest.fixture
def chatting(checkpoint: Callable[[str], Path]) -> Callable[..., Model]:
    def get(chat_template: str | None, **options: bool) -> Model:
        model = load_model(checkpoint("Llama-3.1-8B-Instruct"), tokenizer=byte_tokenizer(chat_template, **options))
        model.cfg.n_ctx = 2000
        return model

    return get


ONE = QuestionSet(
    name="one",
    questions=(Question(text="What is the capital of France?", choices=("Paris", "Rome"), category="places"),),
    template=FIGURE_9,
)

FIGURE_9_TEXT = (
    "Given the following question, which answer is correct regarding the question? Each answer is associated with "
    "index A and B. Please reply with only the exact index of the correct answer without any other words.\n"
    "Question: What is the capital of France?\nAnswer A: Paris\nAnswer B: Rome"
)
SYSTEM = "You are a helpful assistant that can help to answer the questions from the user truthfully"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA_3, f"<s><|system|>Today Date: 26 Jul 2024\n\n{SYSTEM}<|user|>{FIGURE_9_TEXT}<|assistant|>"),
        (
            QWEN,
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{FIGURE_9_TEXT}<|im_end|>\n<|im_start|>assistant\n",
        ),
        (NO_SYSTEM, f"<s>[INST] {SYSTEM}\n\n{FIGURE_9_TEXT}[/INST]"),
        (None, f"{SYSTEM}\n\n{FIGURE_9_TEXT}\nAnswer:"),
    ],
)
def test_figure_9_in_every_kind_of_template(
    template: str | None, expected: str, chatting: Callable[..., Model]
) -> None:
    model = chatting(template, merges=True)
    (prompt,) = build_prompts(model, ONE, order="given")
    assert prompt.text == expected
    assert prompt.token_ids.count(model.tokenizer.bos_token_id) == expected.count("<s>"), "one BOS token, never two"
    if template is not None:
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": FIGURE_9_TEXT}]
        if template is NO_SYSTEM:
            turns = [{"role": "user", "content": f"{SYSTEM}\n\n{FIGURE_9_TEXT}"}]
        direct = model.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
        )
        assert list(prompt.token_ids) == direct


def test_the_instruction_names_the_letters_that_are_shown(chatting: Callable[..., Model]) -> None:
    four = QuestionSet(name="four", questions=(Question(text="Which?", choices=("w", "x", "y", "z"), answer=2),))
    (prompt,) = build_prompts(chatting(QWEN), four, order="given")
    assert "associated with index A, B, C and D." in prompt.text
    assert prompt.right == 2


def test_a_broken_chat_template_is_one_sentence(chatting: Callable[..., Model]) -> None:
    with pytest.raises(ValueError, match="chat template cannot be rendered"):
        build_prompts(chatting("{% for m in %}"), ONE)


def test_labels_are_those_of_the_context(chatting: Callable[..., Model]) -> None:
    chat, plain = chatting(QWEN, merges=True), chatting(None, merges=True)
    vocabulary = chat.tokenizer.get_vocab()
    (prompt,) = build_prompts(chat, ONE, order="given")
    assert prompt.label_ids == ((vocabulary["A"], vocabulary["a"]), (vocabulary["B"], vocabulary["b"]))
    (prompt,) = build_prompts(plain, ONE, order="given")
    assert prompt.label_ids == ((vocabulary["ĠA"], vocabulary["Ġa"]), (vocabulary["ĠB"], vocabulary["Ġb"]))


def test_plain_text_ends_so_that_labels_are_single_tokens(chatting: Callable[..., Model]) -> None:
    model = chatting(None, merges=False)  # " A" is then a space and an A
    (prompt,) = build_prompts(model, ONE, order="given")
    assert prompt.text.endswith("\nAnswer: ")
    vocabulary = model.tokenizer.get_vocab()
    assert prompt.token_ids[-1] == vocabulary["Ġ"]
    assert prompt.label_ids == ((vocabulary["A"], vocabulary["a"]), (vocabulary["B"], vocabulary["b"]))


def test_the_beginning_that_answers_share_belongs_to_the_prompt(chatting: Callable[..., Model]) -> None:
    model = chatting(None, merges=False)
    vocabulary = model.tokenizer.get_vocab()
    prompt = build_prompt(model, "It is", right=" in Rome", wrong=" in Paris")
    assert model.tokenizer.decode(list(prompt.token_ids)) == "It is in "
    assert prompt.label_ids == ((vocabulary["R"],), (vocabulary["P"],))
    completion = ONE.with_format("completion")
    (prompt,) = build_prompts(model, completion, order="both")
    assert prompt.text == "What is the capital of France? "
    assert prompt.label_ids == ((vocabulary["P"],), (vocabulary["R"],))
    assert prompt.labels == ()


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (" New York", " New York City", "' New York' is the beginning of the other answers"),
        (" New York", [" New Delhi", " Newark", " Paris"], "begin with the same token"),
        (" red", " red", "are the same"),
    ],
)
def test_answers_that_no_token_distinguishes_are_refused_by_name(
    right: str, wrong: str | list[str], said: str, chatting: Callable[..., Model]
) -> None:
    with pytest.raises(ValueError, match=said):
        build_prompt(chatting(None), "The city of", right=right, wrong=wrong)


def test_an_answer_that_merges_with_the_end_of_plain_text_replaces_it(chatting: Callable[..., Model]) -> None:
    model = chatting(None, merges=True)
    vocabulary = model.tokenizer.get_vocab()
    prompt = build_prompt(model, "The answer is ", right="A", wrong="B")
    assert prompt.label_ids == ((vocabulary["ĠA"],), (vocabulary["ĠB"],))
    assert prompt.token_ids == tuple(model.tokenizer("The answer is", add_special_tokens=False)["input_ids"])


def test_solved_examples_are_not_asked(chatting: Callable[..., Model]) -> None:
    questions = tuple(Question(text=f"Is {n} even?", choices=("yes", "no"), answer=n % 2) for n in range(6))
    asked = QuestionSet(name="even", questions=questions).with_format("letters", n_shots=2, prefill="It is")
    assert len(asked) == 4
    assert not {q.text for q in asked.examples} & {q.text for q in asked}
    first, second = asked.examples
    for template in (None, QWEN):
        model = chatting(template, merges=True)
        prompts = build_prompts(model, asked, order="both")
        assert len(prompts) == 8
        text = prompts[0].text
        assert text.index(first.text) < text.index(second.text) < text.index(asked[0].text)
        # the right answers of the examples are at A and at B
        assert [text[i + len("It is ")] for i in range(len(text)) if text.startswith("It is ", i)] == ["A", "B"]
        assert text.endswith("It is")
        vocabulary = model.tokenizer.get_vocab()
        assert prompts[0].label_ids[0] == (vocabulary["ĠA"], vocabulary["Ġa"])
        assert model.tokenizer.decode(list(prompts[0].token_ids)[prompts[0].start :]).lstrip().startswith(asked[0].text)
    reordered = QuestionSet(name="even", questions=questions[::-1]).with_format("letters", n_shots=2)
    assert reordered.examples == asked.examples
    with pytest.raises(ValueError, match="n_shots must be an integer from 0 to 5"):
        asked[:0].with_format(n_shots=1) if not asked else QuestionSet(name="x", questions=questions).with_format(
            n_shots=6
        )


def test_statements_are_true_or_false(chatting: Callable[..., Model]) -> None:
    model = chatting(None, merges=False)
    (true, false) = build_prompts(model, ONE.with_format("statement"), order="both")
    assert true.text.startswith('The answer to the question "What is the capital of France?" is "Paris".\nIs this')
    assert false.text.startswith('The answer to the question "What is the capital of France?" is "Rome".\nIs this')
    assert true.labels == false.labels == ("True", "False")
    assert (true.right, false.right) == (0, 1)
    assert (true.order, false.order) == ((0, 1), (1, 0))
    four = Question(text="The capital of France is", choices=("Rome", "Paris", "Oslo", "Bonn"), answer=1)
    (true, false) = build_prompts(
        model, QuestionSet(name="four", questions=(four,)).with_format("statement"), order="both"
    )
    assert true.text.startswith("The capital of France is Paris.\n")
    assert any(false.text.startswith(f"The capital of France is {wrong}.\n") for wrong in ("Rome", "Oslo", "Bonn"))
    (given,) = build_prompts(model, QuestionSet(name="four", questions=(four,)).with_format("statement"), order="given")
    assert given.right == 1


def test_other_symbols(chatting: Callable[..., Model]) -> None:
    model = chatting(QWEN, merges=True)
    (prompt,) = build_prompts(model, ONE.with_format(symbols="12"), order="given")
    assert "associated with index 1 and 2." in prompt.text
    assert "Answer 1: Paris\nAnswer 2: Rome" in prompt.text
    vocabulary = model.tokenizer.get_vocab()
    assert prompt.label_ids == ((vocabulary["1"],), (vocabulary["2"],))
    assert prompt.labels == ("1", "2")
    many = QuestionSet(name="x", questions=(Question(text="Which?", choices=tuple(map(str, range(27)))),))
    with pytest.raises(ValueError, match="has 27 choices, but the format has 26 symbols"):
        build_prompts(model, many)
    with pytest.raises(ValueError, match="at least two different symbols"):
        ONE.with_format(symbols="AA")


def test_a_set_is_asked_only_in_its_formats() -> None:
    with pytest.raises(ValueError, match=r"toy can only be asked in the format 'letters'; got 'completion'"):
        binary().with_format("completion")
    assert binary().with_format("letters").template == binary().template


def test_braces_of_a_template_are_text(chatting: Callable[..., Model]) -> None:
    template = PromptTemplate(user='Answer as {"answer": "A"}.\n{question}\n{choices}', chat=False, cue='\n{"answer":')
    (prompt,) = build_prompts(chatting(None), replace(ONE, template=template), order="given")
    assert prompt.text.startswith('Answer as {"answer": "A"}.\nWhat is')
    assert prompt.text.rstrip().endswith('{"answer":')


def test_a_date_that_cannot_be_pinned_is_noticed(chatting: Callable[..., Model]) -> None:
    template = "{{ strftime_now('%Y') }}" + QWEN
    with pytest.warns(UserWarning, match="today's date"):
        build_prompts(chatting(template), ONE)


def test_orders(toy: Model) -> None:
    questions = binary()[:40]
    both = build_prompts(toy, questions, order="both")
    assert [p.question for p in both] == [q.id for q in questions for _ in range(2)]
    assert len(both.groups) == 40
    assert [p.right for p in both[:2]] == [0, 1]
    assert both[0].order == (0, 1)
    assert both[1].order == (1, 0)
    random = build_prompts(toy, questions, order="random", seed=3)
    assert list(random) == list(build_prompts(toy, questions, order="random", seed=3))
    assert list(random) != list(build_prompts(toy, questions, order="random", seed=4))
    limited = build_prompts(toy, questions[:10], order="random", seed=3)
    assert list(random[:10]) == list(limited), "a limit changes no order"
    moved = build_prompts(toy, questions.select(reversed(range(40))), order="random", seed=3)
    assert list(random) == list(moved)[::-1], "the order of a question follows from the seed and its id alone"
    assert 8 < sum(p.right == 0 for p in random) < 32
    for question, prompt in zip(questions, random, strict=True):
        assert prompt.question == question.id
        shown = question.choices
        assert f"Answer A : {shown[prompt.order[0]]} Answer B : {shown[prompt.order[1]]}" in prompt.text
        assert prompt.order[prompt.right] == question.answer


def test_four_choices_rotate_through_every_letter(toy: Model) -> None:
    prompts = build_prompts(toy, four_choice()[:3], order="both")
    assert len(prompts) == 12
    assert sorted(p.right for p in prompts[:4]) == [0, 1, 2, 3]
    assert all(p.n_choices == 4 for p in prompts)


def test_true_and_false_are_labels_themselves(toy: Model) -> None:
    vocabulary = toy.tokenizer.get_vocab()
    prompts = build_prompts(toy, true_false()[:2], order="both")
    assert len(prompts) == 2
    assert prompts[0].label_ids == (
        (vocabulary["True"], vocabulary["true"]),
        (vocabulary["False"], vocabulary["false"]),
    )
    assert prompts[0].right == 0
    assert prompts[1].right == 1
    assert prompts[0].text.startswith("Statement : the ")


@pytest.mark.parametrize("order", ["random", "both", "given"])
def test_true_is_the_first_label_of_every_statement(order: Any, toy: Model) -> None:
    statements = [
        replace(
            question,
            choices=question.choices[::step],
            answer=question.answer if step == 1 else 1 - question.answer,
            id="",
        )
        for question, step in zip(true_false()[:40], (1, -1) * 20, strict=True)
    ]
    questions = QuestionSet(name="mixed", questions=tuple(statements), template=true_false().template)
    prompts = build_prompts(toy, questions, order=order)
    assert {prompt.labels for prompt in prompts} == {("True", "False")}
    assert [prompt.right for prompt in prompts] == [question.answer for question in true_false()[:40]]
    assert prompts.are_statements
    assert not build_prompts(toy, binary()[:2], order=order).are_statements


def test_free_prompts(toy: Model) -> None:
    fact = facts()[0]
    prompt = build_prompt(toy, f"Question : {fact.question()} Answer :", right=f" {fact.value}", wrong=" dragon")
    assert toy.tokenizer.decode(list(prompt.label_ids[0])).strip() == fact.value
    assert prompt.right == 0
    with pytest.raises(ValueError, match="are the same"):
        build_prompt(toy, "Question :", right=" red", wrong=" red")


def test_prompts_beyond_the_context_window_are_counted_never_cut(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("Qwen2.5-3B-Instruct"))
    long = Question(text="what is the colour of Balum ? " * 40, choices=("red", "blue"))
    questions = QuestionSet(name="long", questions=(*binary()[:3], long, long), template=binary().template)
    with pytest.raises(ValueError, match=r"2 questions exceed the context window of 128 tokens .* 2\d\d"):
        build_prompts(model, questions)
    with pytest.warns(UserWarning, match="2 questions"):
        assert len(build_prompts(model, questions, drop_long=True)) == 3


@pytest.mark.parametrize("template", ["{{ bos_token }}" + QWEN, None])
def test_an_unknown_token_that_is_also_bos_is_not_an_unknown_word(
    template: str | None, checkpoint: Callable[[str], Path], recwarn: pytest.WarningsRecorder
) -> None:
    # GPT-2, Pythia and OLMo-2: one token for BOS, EOS, padding and unknown words, which a byte-level tokenizer never has
    tokenizer = byte_tokenizer(template, merges=True)
    end = "<|endoftext|>"
    tokenizer.add_special_tokens({"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": end})
    one = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, one)])
    model = load_model(checkpoint("Llama-3.1-8B-Instruct"), tokenizer=tokenizer)
    model.cfg.n_ctx = 2000
    question = Question(text="Is it wet?", choices=("yes", "no"))
    (prompt,) = build_prompts(model, QuestionSet(name="x", questions=(question,)), order="given")
    assert prompt.token_ids[0] == one
    assert one not in prompt.token_ids[1:]
    if template:
        turns = [{"role": "system", "content": FIGURE_9.system}, {"role": "user", "content": user_turn(question)}]
        expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert list(prompt.token_ids) == expected
    assert tokenizer.convert_ids_to_tokens(prompt.label_ids[1]) == (["B", "b"] if template else ["ĠB", "Ġb"])
    assert not [w for w in recwarn if "unknown" in str(w.message)]


def user_turn(question: Question) -> str:
    """Figure 9's user turn for two choices in their given order."""
    lines = [f"Answer {letter}: {choice}" for letter, choice in zip("AB", question.choices, strict=True)]
    return FIGURE_9.user.format(question=question.text, choices="\n".join(lines), labels="A and B")


def test_a_tokenizer_that_cannot_read_the_questions_is_noticed(toy: Model) -> None:
    strange = QuestionSet(name="strange", questions=(*binary()[:1], *ONE.questions), template=binary().template)
    with pytest.warns(UserWarning, match="1 of 2 prompts"):
        build_prompts(toy, strange)
    with pytest.raises(ValueError, match=r"cannot encode the questions.*like '\S+'"):
        build_prompts(toy, strange[1:])


def test_the_toy_is_asked_in_its_own_words(toy: Model) -> None:
    plain = QuestionSet(name="mine", questions=binary()[:2].questions)
    texts = [prompt.text for prompt in build_prompts(toy, plain)]
    assert texts == [prompt.text for prompt in build_prompts(toy, binary()[:2])]
    own = replace(plain, template=replace(plain.template, system=None))
    with pytest.raises(ValueError, match="cannot encode the questions"):
        build_prompts(toy, own)
