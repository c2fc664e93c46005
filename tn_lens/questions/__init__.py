"""Questions: what they are, and where they come from."""

from tn_lens.questions.load import load_questions
from tn_lens.questions.question import FIGURE_9, Dropped, PromptTemplate, Question, QuestionSet

__all__ = ["FIGURE_9", "Dropped", "PromptTemplate", "Question", "QuestionSet", "load_questions"]
