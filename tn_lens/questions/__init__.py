"""Questions: what they are, and where they come from."""

from .load import load_questions
from .question import FIGURE_9, Dropped, PromptTemplate, Question, QuestionSet

__all__ = ["FIGURE_9", "Dropped", "PromptTemplate", "Question", "QuestionSet", "load_questions"]
