"""Rows of JSONL as labeling takes them: prompts, responses to be ranked, rankings and pairs made elsewhere.

The fields are those of docs/data.md, which the trainer's loader reads, plus what only labeling knows (versions,
ratings, flags, times). A row is checked here as a whole; `importing` puts it into the database, `exporting` writes it
again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, StrictBool, StrictInt, ValidationError

from trimtab.labeling.errors import InvalidError
from trimtab.labeling.prompts import ROLES, Message, Prompt
from trimtab.labeling.vocabulary import FLAGS, HIGHEST_RATING, LOWEST_RATING, MOST_RESPONSES

TRANSCRIPT_MARK = "\n\nAssistant:"


class RowError(InvalidError):
    """One row cannot be taken. `line` counts from 1."""

    def __init__(self, line: int, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.line = line


@dataclass(frozen=True)
class Answer:
    """One response of a row. `version` names the policy that wrote it, "" where nobody knows."""

    text: str
    ended: bool = True
    version: str = ""


@dataclass(frozen=True)
class Verdict:
    """What somebody said of a row's responses, in the row's order; for a demonstration, what they wrote."""

    labeler: str
    ranks: tuple[int, ...] = ()
    ratings: tuple[int | None, ...] = ()
    flags: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    note: str = ""
    answer: str = ""
    order_shown: tuple[int, ...] = ()
    seconds: float = 0.0
    started_at: datetime | None = None
    submitted_at: datetime | None = None
    is_adjudication: bool = False


@dataclass(frozen=True)
class TaskRow:
    """One row: a prompt, its responses (none: they are still to be sampled or written), a verdict where there is one.

    `task` is the name that the row gave its task, "" where it gave none.
    """

    prompt: Prompt
    answers: tuple[Answer, ...] = ()
    task: str = ""
    verdict: Verdict | None = None


def _word(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class _Message(BaseModel):
    role: str
    content: str


Text = str | list[_Message]


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore")

    prompt: Text | None = None
    messages: list[_Message] | None = None
    responses: list[Text] | None = None
    chosen: Text | None = None
    rejected: Text | None = None
    completion: Text | None = None
    versions: list[str] | None = None
    ended: StrictBool | list[StrictBool] = True
    ranks: list[StrictInt] | None = None
    ratings: list[StrictInt | None] | None = None
    flags: list[list[str]] | None = None
    notes: list[str] | None = None
    note: str = ""
    order_shown: list[StrictInt] | None = None
    labeler: Annotated[str, BeforeValidator(_word)] = ""
    task: Annotated[str, BeforeValidator(_word)] = ""
    seconds: float = 0.0
    started_at: AwareDatetime | None = None
    submitted_at: AwareDatetime | None = None
    adjudication: bool = False


def lines_of(text: str) -> list[str]:
    r"""The lines of a JSONL text: only "\n" ends one, for JSON's strings may hold Unicode's other line ends."""
    return text.split("\n")


def read_rows(lines: Iterable[str]) -> list[TaskRow]:
    """All rows of a JSONL text; blank lines are passed over. The first wrong one is a RowError with its line."""
    return [parse_row(line, number) for number, line in enumerate(lines, start=1) if line.strip()]


def parse_row(line: str, number: int = 1) -> TaskRow:
    """One line; RowError names the line and the field."""
    try:
        return task_row(json.loads(line))
    except RecursionError:
        raise RowError(number, "", "not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise RowError(number, "", f"not JSON: {error.msg} at column {error.colno}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("str", "list[_Message]"))
        raise RowError(number, place, first["msg"]) from None
    except InvalidError as error:
        raise RowError(number, error.field, error.reason) from None


def task_row(fields: Any) -> TaskRow:
    """A row's fields, checked. InvalidError or pydantic's ValidationError name the field."""
    if not isinstance(fields, dict):
        raise InvalidError("", "a row is an object with named fields")
    _no_broken_text(fields)
    row = _Row.model_validate(fields)
    if row.chosen is not None or row.rejected is not None:
        return _pair(row)
    prompt = _prompt(row)
    if row.completion is not None:
        verdict = _verdict(row, 0, answer=_answer(row.completion, "completion"))
        return TaskRow(prompt, (), row.task, verdict)
    if row.responses is None:
        if row.ranks is not None:
            raise InvalidError("responses", "missing, but there are ranks")
        return _demonstration_or_prompt(row, prompt)
    if not 2 <= len(row.responses) <= MOST_RESPONSES:
        raise InvalidError("responses", f"2 to {MOST_RESPONSES}, found {len(row.responses)}")
    texts = [_answer(value, f"responses[{i}]") for i, value in enumerate(row.responses)]
    verdict = _verdict(row, len(texts)) if row.ranks is not None else None
    return TaskRow(prompt, _answers(row, texts), row.task, verdict)


def _demonstration_or_prompt(row: _Row, prompt: Prompt) -> TaskRow:
    if prompt.messages and prompt.messages[-1].role == "assistant":
        if len(prompt.messages) == 1:
            raise InvalidError("messages", "a demonstration needs a message before the assistant's")
        verdict = _verdict(row, 0, answer=prompt.messages[-1].content)
        return TaskRow(Prompt(messages=prompt.messages[:-1]), (), row.task, verdict)
    return TaskRow(prompt, (), row.task)


def _pair(row: _Row) -> TaskRow:
    if row.chosen is None or row.rejected is None:
        raise InvalidError("rejected" if row.rejected is None else "chosen", "missing: a pair has both")
    if row.prompt is not None or row.messages is not None:
        prompt, texts = _prompt(row), [_answer(row.chosen, "chosen"), _answer(row.rejected, "rejected")]
    elif isinstance(row.chosen, list) and isinstance(row.rejected, list):
        if not row.chosen or not row.rejected or row.chosen[:-1] != row.rejected[:-1]:
            raise InvalidError("rejected", "must be the same conversation as chosen up to its last message")
        prompt = Prompt(messages=_messages(row.chosen[:-1], "chosen"))
        texts = [row.chosen[-1].content, row.rejected[-1].content]
    elif isinstance(row.chosen, str) and isinstance(row.rejected, str):
        prompt, texts = _transcripts(row.chosen, row.rejected)
    else:
        raise InvalidError("rejected", "must be of the same form as chosen")
    ranked = row.model_copy(update={"ranks": [1, 2]})
    return TaskRow(prompt, _answers(row, texts), row.task, _verdict(ranked, 2))


def _transcripts(chosen: str, rejected: str) -> tuple[Prompt, list[str]]:
    """Two transcripts as in hh-rlhf: the prompt is what they share, up to the last common mark of the assistant."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    start = chosen.rfind(TRANSCRIPT_MARK, 0, shared if shared is not None else min(len(chosen), len(rejected)))
    cut = start + len(TRANSCRIPT_MARK) if start >= 0 else 0
    return Prompt(chosen[:cut]), [chosen[cut:], rejected[cut:]]


def _prompt(row: _Row) -> Prompt:
    if row.prompt is not None and row.messages is not None:
        raise InvalidError("messages", "give prompt or messages, not both")
    value = row.messages if row.messages is not None else row.prompt
    if value is None:
        raise InvalidError("prompt", "missing; a row has prompt or messages")
    if isinstance(value, str):
        return Prompt(value)
    name = "messages" if row.messages is not None else "prompt"
    if not value:
        raise InvalidError(name, "is empty")
    return Prompt(messages=_messages(value, name))


def _messages(values: list[_Message], name: str) -> tuple[Message, ...]:
    for i, message in enumerate(values):
        if message.role not in ROLES:
            raise InvalidError(f"{name}[{i}].role", f"one of {', '.join(ROLES)}, found {message.role!r}")
    return tuple(Message(message.role, message.content) for message in values)


def _answer(value: Text, name: str) -> str:
    if isinstance(value, str):
        return value
    if len(value) != 1 or value[0].role != "assistant":
        raise InvalidError(name, "a response given as messages is exactly one assistant message")
    return value[0].content


def _answers(row: _Row, texts: list[str]) -> tuple[Answer, ...]:
    ended = [row.ended] * len(texts) if isinstance(row.ended, bool) else row.ended
    versions = row.versions or [""] * len(texts)
    _one_each("ended", ended, len(texts))
    _one_each("versions", versions, len(texts))
    return tuple(Answer(*answer) for answer in zip(texts, ended, versions, strict=True))


def _verdict(row: _Row, count: int, *, answer: str = "") -> Verdict:
    for name in ("ranks", "ratings", "flags", "notes", "order_shown"):
        values = getattr(row, name)
        if values is not None and count:
            _one_each(name, values, count)
    for i, rank in enumerate(row.ranks or []):
        if rank < 1:
            raise InvalidError(f"ranks[{i}]", f"a rank is a whole number from 1 (best), found {rank}")
    for i, rating in enumerate(row.ratings or []):
        if rating is not None and not LOWEST_RATING <= rating <= HIGHEST_RATING:
            raise InvalidError(f"ratings[{i}]", f"{LOWEST_RATING} to {HIGHEST_RATING}, found {rating}")
    for i, flags in enumerate(row.flags or []):
        if not set(flags) <= set(FLAGS):
            raise InvalidError(f"flags[{i}]", f"any of {', '.join(FLAGS)}")
    if row.order_shown is not None and count and sorted(row.order_shown) != list(range(count)):
        raise InvalidError("order_shown", f"each of 0 to {count - 1} once")
    return Verdict(
        labeler=row.labeler,
        ranks=tuple(row.ranks or ()),
        ratings=tuple(row.ratings or ()),
        flags=tuple(tuple(flags) for flags in row.flags or ()),
        notes=tuple(row.notes or ()),
        note=row.note,
        answer=answer,
        order_shown=tuple(row.order_shown or ()),
        seconds=row.seconds,
        started_at=row.started_at,
        submitted_at=row.submitted_at,
        is_adjudication=row.adjudication,
    )


def _one_each(name: str, values: list[Any], count: int) -> None:
    if len(values) != count:
        raise InvalidError(name, f"{len(values)} values for {count} responses")


def _no_broken_text(value: Any, name: str = "") -> None:
    """No NUL, which PostgreSQL cannot keep, and no half of a surrogate pair, which is not text."""
    if isinstance(value, str):
        if "\x00" in value or any("\ud800" <= char <= "\udfff" for char in value):
            raise InvalidError(name, "holds a NUL or half of a surrogate pair, which is not text")
    elif isinstance(value, dict):
        for key, item in value.items():
            _no_broken_text(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _no_broken_text(item, f"{name}[{i}]")
