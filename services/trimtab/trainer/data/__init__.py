"""Training data: what a row may look like, loaders that stop at the first bad row, a checker that lists them all.

Rows come from JSONL, Parquet, folders of these, or the Hugging Face hub (`source`), are read into frozen dataclasses
(`rows`, `load`), and become token ids (`tokenize`), which the three stages pack. Nothing here needs torch.
docs/data.md shows every format.
"""

from trimtab.trainer.data.check import CheckReport, Problem, check_file
from trimtab.trainer.data.errors import DataError
from trimtab.trainer.data.load import load_demonstrations, load_prompts, load_rankings
from trimtab.trainer.data.rows import ChatMessage, Demonstration, Prompt, PromptRow, Ranking
from trimtab.trainer.data.tokenize import (
    Tokenized,
    TokenizedRanking,
    TokenSequence,
    tokenize_demonstrations,
    tokenize_prompts,
    tokenize_rankings,
)

__all__ = [
    "ChatMessage",
    "CheckReport",
    "DataError",
    "Demonstration",
    "Problem",
    "Prompt",
    "PromptRow",
    "Ranking",
    "TokenSequence",
    "Tokenized",
    "TokenizedRanking",
    "check_file",
    "load_demonstrations",
    "load_prompts",
    "load_rankings",
    "tokenize_demonstrations",
    "tokenize_prompts",
    "tokenize_rankings",
]
