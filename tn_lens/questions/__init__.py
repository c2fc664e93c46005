"""Questions: question sets, prompt formats, and how they are loaded."""

# importing the module of a question set registers it
from tn_lens.questions import common_facts, mmlu, relations, statements, toy, triviaqa, truthfulqa  # noqa: F401
