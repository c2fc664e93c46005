"""Questions: question sets, prompt formats, and how they are loaded."""

# importing the module of a question set registers it
from tn_lens.questions import mmlu, toy, triviaqa, truthfulqa  # noqa: F401
from tn_lens.questions.formats import FIGURE_9, PromptTemplate
from tn_lens.questions.load import load_questions
from tn_lens.questions.question import Dropped, Question, QuestionSet

__all__ = ["FIGURE_9", "Dropped", "PromptTemplate", "Question", "QuestionSet", "load_questions"]
