"""The wrong answer in the reply of a chat model: without thoughts, greetings, labels, markup and explanations."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence

from tn_lens.questions.triviaqa import normalize

THOUGHTS = r"think|thinking|thought|thoughts|reasoning|reflection|scratchpad|analysis"
FIELDS = ("wrong_answer", "incorrect_answer", "false_answer", "wrong", "incorrect", "answer", "response", "text")
"""Keys of a JSON object that may hold the answer, by priority."""
QUOTES = ('""', "''", "“”", "‘’", "«»", "„“", "「」", "``", "**", "__")
ADJECTIVES = (
    "wrong|incorrect|false|plausible|tempting|alternative|possible|believable|convincing|other|final|likely|one|my|your"
)
ANSWER = rf"(?:(?:an?|the|one|here|is|are|{ADJECTIVES}|but|and|yet|factually|very|that|would|be)[,\s]+|-)*(?:answer|response|option|reply)"
LABEL = re.compile(
    rf"(?:{ANSWER}(?:[^:.\n]{{0,60}}?)\s*[:=]|a:|here(?:'s| is| are| you go)[^:\n]{{0,80}}:|{ANSWER}\s+(?:is|would be|could be|might be|may be)\b)\s*",
    re.IGNORECASE,
)
"""The beginning of a reply up to the answer: "Wrong answer: ...", "A plausible but incorrect answer would be ..."."""
GREETING = re.compile(
    r"(?:sure(?: thing)?|certainly|of course|okay|ok|absolutely|alright|all right|got it|understood|no problem|great(?: question)?)"
    r"(?:[!.,:]+\s+|[!.:]*\s*$)",
    re.IGNORECASE,
)
SUGGESTION = re.compile(
    r"(?:how about|i would say|i'd say|i would suggest|i'd suggest|let's say|let's go with)\b[,:]?\s+", re.IGNORECASE
)
LIST_MARK = re.compile(r"(?:[-•*+>#]+\s+|\(?\d{1,2}[.)](?:\s+|$)|\(?[A-Da-d]\)\s+)")
REFUSAL = re.compile(
    r"\bI(?:'m| am) (?:sorry|unable|not able|not sure|afraid|not comfortable|just an?)\b"
    r"|\bI (?:can(?:'t|not)|can not|could not|couldn't|won't|will not|don't|do not|must|need|should|apologize|think|believe)\b(?= [a-z])"
    r"|(?i:^(?:sorry|unfortunately|apologies|my apologies)\b[,.]? (?:but |i |there |that ))"
    r"|(?i:^i'?m sorry\b[,.]? (?:but|i)\b)"
    r"|(?i:\bas an? (?:ai|language model|large language model|assistant|helpful)\b)"
    r"|\b(?:cannot|can't|unable to|not able to) (?:help|assist|provide|answer|fulfill|comply|generate|create)\b"
    r"|(?i:^i(?:'d| would| can|'ll| will) (?:be|help|love|like|provide|write|give|try)\b)"
    r"|^analysis[A-Z]"
    r"|(?i:^(?:the user|we need|we are asked|let me think|let's think|hmm|okay, so|ok, so|first, i|to answer|thinking)\b)"
    r"|(?i:\b(?:right|correct|actual|wrong|incorrect) answer\b)"
)
"""A reply that gives no answer, or that talks about it."""
NOTHING = {"na", "none", "null", "nil", "nan", "unknown", "noanswer", "idontknow", "undefined", "tbd"}
REMARK = re.compile(
    r"\s*[(\[][^()\[\]]*\b(?:wrong|incorrect|false|plausible|tempting|note|explanation|correct|actually|actual|fictional)\b[^()\[\]]*[)\]]\s*[.!]?$"
    r"|,?\s+(?:because|since it|as it|although|even though|which is)\b.*$"
    r"|\s+[-–—]+\s+[a-z].*$"
    r"|(?<=\w)[.!;]\s+(?:This|That|It|It's|He|She|They|While|Although|The|Explanation|Note|Many|Because|However|Both|In|I|Here|Let|Reason)\b.*$",
    re.DOTALL,
)
"""An explanation after the answer."""
ABBREVIATION = re.compile(
    r"(?:\.\S*|\b(?:jr|sr|inc|co|ltd|st|mt|dr|mr|mrs|ms|no|vs|etc|bros|corp|\w))\.$", re.IGNORECASE
)


def wrong_answer_in(reply: str, rights: Sequence[str]) -> str:
    """The wrong answer in a reply; empty if the reply does not certainly contain one.

    Args:
        reply: the whole reply of a chat model.
        rights: the right answer, then its aliases. A wrong answer must differ from each in more than case, accents,
            punctuation, articles and spaces. What the right answer has as well, such as quotation marks, is not removed.
    """
    right = rights[0]
    text = _final(reply.replace("’", "'"))
    if text.lstrip().startswith(("{", "[")) and not right.startswith(("{", "[")):
        text = _from_json(text.strip())
    answers = (_clean(line.strip(), right) for line in text.splitlines())
    answer = next(filter(None, answers), "")
    if REFUSAL.search(answer) and not REFUSAL.search(right):
        return ""
    # an answer of another kind: sentences instead of a name
    too_long = len(answer.split()) > 10 + 3 * len(right.split())
    is_lettered = re.match(r"[A-D]\. (?!\w\.)", answer) and not re.match(r"\w\. ", right)
    is_open = answer.endswith(":") or "<" in answer or "```" in answer
    if too_long or is_open or _form(answer) in NOTHING or is_lettered:
        return ""
    is_right = any(
        normalize(answer) == normalize(other) or (_form(answer) and _form(answer) == _form(other)) for other in rights
    )
    return "" if is_right or not normalize(answer) else answer


def _final(reply: str) -> str:
    """The reply without its thoughts and special tokens; the content of an answer tag, a box or a code block."""
    if "<|channel|>" in reply:
        reply = reply.rpartition("<|channel|>final")[2] if "<|channel|>final" in reply else ""
        reply = reply.removeprefix("<|message|>")
    reply = reply.rpartition("assistantfinal")[2]  # the same without special tokens
    reply = re.sub(rf"[<\[◁]({THOUGHTS})[>\]▷].*?[<\[◁]/\1[>\]▷]", "", reply, flags=re.DOTALL | re.IGNORECASE)
    # a chat template may have written the opening tag
    reply = re.split(rf"[<\[◁]/(?:{THOUGHTS})[>\]▷]", reply, flags=re.IGNORECASE)[-1]
    if re.search(rf"[<\[◁](?:{THOUGHTS})[>\]▷]", reply, re.IGNORECASE):
        return ""  # it was cut off while thinking
    parts = re.split(r"<\|[^|>]*\|>|</?s>|<end_of_turn>|<eos>", reply)
    reply = next((part for part in parts if part.strip()), "")
    for pattern in (
        r"<answer>(.*?)</answer>",
        r"\\boxed\{(?:\\text\{)?([^{}]*)\}",
        r"```[^\n`]*\n(.*?)```",
        r"```(.*?)```",
    ):
        if found := re.search(pattern, reply, re.DOTALL):
            return found[1]
    return reply


def _from_json(text: str) -> str:
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return "" if text.startswith("{") else text
    if isinstance(value, list) and value and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, dict):
        keys = [key for key in FIELDS if key in value] or list(value)
        value = value[keys[0]] if keys and (keys[0] in FIELDS or len(value) == 1) else ""
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def _clean(line: str, right: str) -> str:
    """The answer in a line; empty if the line only introduces it."""
    before = None
    while line != before:
        before = line
        if not LIST_MARK.match(right) and (mark := LIST_MARK.match(line)):
            line = line[mark.end() :]
        line = re.sub(r"(\*\*|__|`)(?=\S)(.+?)(?<=\S)\1", r"\2", line)
        for pattern in (GREETING, LABEL, SUGGESTION):
            found = pattern.match(line)
            if found and not pattern.match(right) and not (":" in found[0] and line.count(":") <= right.count(":")):
                line = line[found.end() :].strip()
                line = line.removesuffix("?") if pattern is SUGGESTION else line
        if not REMARK.search(right):
            line = REMARK.sub("", line).strip()
        pair = line[:1] + line[-1:]
        inner = line[1:-1].strip()
        if len(line) > 1 and pair in QUOTES and right[:1] + right[-1:] != pair and not set(pair) & set(inner) - {"'"}:
            line = inner
        if line.count('"') == 1 and line.startswith('"'):
            line = line[1:].strip()
        if line.endswith(".") and not right.endswith(".") and not ABBREVIATION.search(line):
            line = line[:-1].strip()
    return line


def _form(text: str) -> str:
    """Letters and digits without case, accents and a first article."""
    plain = re.sub(r"^(?:an?|the)\s+", "", unicodedata.normalize("NFKD", text).casefold().strip())
    # vowel signs, unlike accents, distinguish words
    return "".join(c for c in plain if c.isalnum() or (c > "\u036f" and unicodedata.category(c).startswith("M")))
