"""Rankings from a JSONL file that somebody else writes: checked row by row, waited for until every set has enough."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.rounds.ranking.source import AnswerSet, Collected, RankedSet
from trimtab.trainer.data.errors import DataError, RowError
from trimtab.trainer.data.rows import parse_ranking
from trimtab.trainer.data.source import read_rows

NAMED = 3  # missing sets that are named


class FileSource:
    """Reads rankings of the offered sets from `file`; each row names its set by `task`.

    A row may leave out prompt and responses; with responses (in any order) its ranks belong to those. A bad row does
    not end the wait: it is named until somebody puts it right.
    """

    def __init__(self, file: Path, minimum: int, poll_s: float) -> None:
        self.poll_s = poll_s
        self.inputs = {"file": str(file)}
        self._file = file
        self._minimum = minimum
        self._offered = Path()

    def offer(self, sets: Sequence[AnswerSet], offered: Path) -> None:
        """The sets lie in `offered` for whoever ranks them."""
        self._offered = offered

    def poll(self, sets: Sequence[AnswerSet]) -> Collected:
        """The rankings in the file, newest last; a labeler's later ranking of a set replaces the earlier."""
        if not self._file.exists():
            return Collected((), f"{self._file} is not there: rank the sets in {self._offered} ({len(sets)} sets)")
        by_task = {answers.task: answers for answers in sets}
        found: dict[tuple[str, str], RankedSet] = {}
        try:
            for raw in read_rows(self._file):
                try:
                    ranked = _ranked(raw.fields(), by_task)
                except RowError as error:
                    raise DataError(raw.path, raw.line, error.field, error.reason) from error
                found[ranked.answers.task, ranked.labeler] = ranked
        except DataError as error:
            return Collected((), str(error))
        return Collected(tuple(found.values()), self._missing(sets, found))

    def _missing(self, sets: Sequence[AnswerSet], found: dict[tuple[str, str], RankedSet]) -> str:
        counts: dict[str, int] = defaultdict(int)
        for task, _ in found:
            counts[task] += 1
        missing = [answers.task for answers in sets if counts[answers.task] < self._minimum]
        if not missing:
            return ""
        names = ", ".join(missing[:NAMED]) + (", …" if len(missing) > NAMED else "")
        each = f" of {self._minimum} different labelers" if self._minimum > 1 else ""
        done = len(sets) - len(missing)
        return f"{self._file}: {done} of {len(sets)} sets have rankings{each}; missing: {names}"


def _ranked(fields: dict[str, Any], by_task: dict[str, AnswerSet]) -> RankedSet:
    """One row as a ranking of its set; RowError names the field that is wrong."""
    task = fields.get("task")
    if task not in by_task:
        known = next(iter(by_task))
        raise RowError("task", f"{task!r} is not a set of this round; they are named like {known!r}")
    answers = by_task[task]
    given = fields.get("responses")
    if given is not None and (not isinstance(given, list) or sorted(map(str, given)) != sorted(answers.responses)):
        raise RowError("responses", f"they are not the {len(answers.responses)} responses of {task}")
    offered = answers.row()
    ranking = parse_ranking(
        offered | {name: fields[name] for name in ("ranks", "labeler", "responses") if name in fields}
    )
    order = _places(ranking.responses, answers.responses)
    return RankedSet(answers, tuple(ranking.ranks[i] for i in order), ranking.labeler)


def _places(given: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where each of `wanted` stands in `given`; equal texts keep their order."""
    places = defaultdict(list)
    for place, text in enumerate(given):
        places[text].append(place)
    return [places[text].pop(0) for text in wanted]
