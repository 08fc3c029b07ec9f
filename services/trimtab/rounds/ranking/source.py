"""Sets of answers that wait for rankings, and what every source of rankings does with them.

A source is offered the sets of a round (again after a restart: offering twice is offering once) and polled until
nothing is missing. People on a web page are one more such source: `offer` makes a campaign, `poll` asks how far it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trimtab.rounds.scorers import WirePrompt
from trimtab.weights.staging import fsync_folder


@dataclass(frozen=True)
class AnswerSet:
    """K answers of one version to one prompt. `task` names the set wherever it goes."""

    task: str
    prompt: WirePrompt
    responses: tuple[str, ...]
    ended: tuple[bool, ...]

    @property
    def is_one_text(self) -> bool:
        """Whether all responses are equal."""
        return len(set(self.responses)) == 1

    def row(self) -> dict[str, Any]:
        """The row of a JSONL file, as docs/data.md describes rankings, without the ranks."""
        key = "prompt" if isinstance(self.prompt, str) else "messages"
        return {"task": self.task, key: self.prompt, "responses": list(self.responses), "ended": list(self.ended)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> AnswerSet:
        """What `row` wrote."""
        prompt = row["prompt"] if "prompt" in row else row["messages"]
        return cls(row["task"], prompt, tuple(row["responses"]), tuple(row["ended"]))


@dataclass(frozen=True)
class RankedSet:
    """One labeler's order of a set: `ranks[i]` belongs to `responses[i]`, 1 is best, equal ranks are ties."""

    answers: AnswerSet
    ranks: tuple[int, ...]
    labeler: str

    def row(self) -> dict[str, Any]:
        """The row of a JSONL file of rankings."""
        return self.answers.row() | {"ranks": list(self.ranks), "labeler": self.labeler}


@dataclass(frozen=True)
class Collected:
    """What a source has. `waiting` says in one line what is missing; "" once all is there."""

    rankings: tuple[RankedSet, ...]
    waiting: str = ""


class RankingSource(Protocol):
    """A source of rankings.

    Attributes:
        poll_s: how long to wait before it is asked again.
        inputs: what it draws on, for the record: names to specs or digests.
    """

    poll_s: float
    inputs: dict[str, str]

    def offer(self, sets: Sequence[AnswerSet], offered: Path) -> None:
        """Have the sets ranked; they also lie in the file `offered`."""
        ...

    def poll(self, sets: Sequence[AnswerSet]) -> Collected:
        """What is ranked by now; must not block for long."""
        ...


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write a JSONL file whole or not at all, and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync_folder(path.parent)
    return path


def read_json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `write_rows` wrote."""
    with path.open(encoding="utf-8") as lines:  # str.splitlines() would also cut at U+2028
        return [json.loads(line) for line in lines]
