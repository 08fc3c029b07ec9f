"""What the task page shows: answers under their letters in this labeler's order, with what they said so far.

Versions never leave this module, and neither do positions: a letter is all that a labeler's browser learns.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.labeling.judgments import Draft, shown
from trimtab.labeling.prompts import Prompt
from trimtab.labeling.tables import Campaign, Judgment, Task
from trimtab.labeling.vocabulary import LETTERS, Kind
from trimtab.labeling.web.room import Form


@dataclass(frozen=True)
class AnswerView:
    """One answer as shown, with the labeler's marks."""

    letter: str
    text: str
    rank: int | None
    rating: int | None
    flags: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class TaskView:
    """One task as shown. `key` is the submission's, drawn anew for each page."""

    id: int
    key: str
    prompt: Prompt
    answers: tuple[AnswerView, ...]
    note: str
    answer: str
    is_edit: bool
    is_adjudication: bool


def task_view(
    task: Task, order: list[int], judgment: Judgment | None, *, key: str, adjudication: bool = False
) -> TaskView:
    """A task in one labeler's order."""
    texts = {response.position: response.text for response in task.responses}
    count = len(order)
    said = judgment is not None and count > 0
    ranks = shown(judgment.ranks, order) if judgment is not None and said else [None] * count
    ratings = shown(judgment.ratings, order) if judgment is not None and said else [None] * count
    flags = shown(judgment.flags, order) if judgment is not None and said else [()] * count
    notes = shown(judgment.notes, order) if judgment is not None and said else [""] * count
    answers = tuple(
        AnswerView(LETTERS[i], texts[position], ranks[i], ratings[i], tuple(flags[i]), notes[i])
        for i, position in enumerate(order)
    )
    return TaskView(
        id=task.id,
        key=key,
        prompt=Prompt.from_json(task.prompt),
        answers=answers,
        note=judgment.note if judgment else "",
        answer=judgment.answer if judgment else "",
        is_edit=judgment is not None,
        is_adjudication=adjudication,
    )


def draft_of(form: Form, campaign: Campaign, count: int) -> Draft:
    """What a posted task page says, in the order shown. An answer without a rank gets 0, which `submit` refuses."""
    letters = LETTERS[:count]
    if campaign.kind == Kind.COMPARISON:
        preferred = {"a": (1, 2), "tie": (1, 1), "b": (2, 1)}.get(form.text("preference"), (0, 0))
        ranks = preferred
    else:
        ranks = tuple(form.integer(f"rank_{letter}") or 0 for letter in letters)
    return Draft(
        key=form.text("key"),
        ranks=() if campaign.kind == Kind.DEMONSTRATION else ranks,
        ratings=tuple(form.integer(f"rating_{letter}") for letter in letters),
        flags=tuple(tuple(form.texts(f"flags_{letter}")) for letter in letters),
        notes=tuple(form.text(f"note_{letter}") for letter in letters),
        note=form.text("note").strip(),
        answer=form.text("answer").replace("\r\n", "\n"),
        seconds=_seconds(form.text("seconds")),
    )


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds < 1e6 else 0.0
