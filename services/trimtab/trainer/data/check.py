"""Looks through a whole file and reports everything wrong with it, where the loaders stop at the first fault."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.trainer.data.errors import DataError, RowError
from trimtab.trainer.data.rows import Ranking, detect_kind, parse_demonstration, parse_prompt, parse_ranking
from trimtab.trainer.data.source import read_rows

PARSERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "demonstrations": parse_demonstration,
    "prompts": parse_prompt,
    "rankings": parse_ranking,
}


@dataclass(frozen=True)
class Problem:
    """One fault: the file, the 1-based line (0: the file itself), the field ("" for the row) and what is wrong."""

    path: str
    line: int
    field: str
    reason: str


@dataclass(frozen=True)
class CheckReport:
    """What a file holds and every fault in it.

    Attributes:
        kind: "demonstrations", "prompts" or "rankings", as the first readable row shows; "" if there is none.
        row_count: rows found, good and bad.
        bad_count: rows with a fault.
        rankings_by_k: for rankings, how many good rows have K responses, as (K, rows) by rising K.
        pair_count: for rankings, the untied pairs in the good rows.
        tied_row_count: rankings whose responses all tie, which teach nothing.
        labeler_count: distinct labelers named.
        problems: every fault, in file order.
    """

    source: str
    kind: str
    row_count: int
    bad_count: int
    rankings_by_k: tuple[tuple[int, int], ...]
    pair_count: int
    tied_row_count: int
    labeler_count: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def check_file(path: str | Path) -> CheckReport:
    """Check every row of a file, folder or hub id against the kind that its first row shows. Never raises DataError."""
    kind = ""
    row_count = 0
    problems: list[Problem] = []
    rankings: list[Ranking] = []
    try:
        for raw in read_rows(path):
            row_count += 1
            try:
                fields = raw.fields()
                row_kind = detect_kind(fields)
                kind = kind or row_kind
                if row_kind != kind and not (kind == "prompts" and "prompt" in fields):
                    raise RowError("", f"a row of {row_kind} in a file of {kind}")
                row = PARSERS[kind](fields)
            except RowError as error:
                problems.append(Problem(raw.path, raw.line, error.field, error.reason))
            except DataError as error:
                problems.append(Problem(error.path, error.line, error.field, error.reason))
            else:
                if isinstance(row, Ranking):
                    rankings.append(row)
    except DataError as error:
        problems.append(Problem(error.path, error.line, error.field, error.reason))
    if not row_count and not problems:
        problems.append(Problem(str(path), 0, "", "holds no rows"))
    return CheckReport(
        source=str(path),
        kind=kind,
        row_count=row_count,
        bad_count=len({(problem.path, problem.line) for problem in problems if problem.line}),
        rankings_by_k=tuple(sorted(Counter(len(row.responses) for row in rankings).items())),
        pair_count=sum(untied_pairs(row.ranks) for row in rankings),
        tied_row_count=sum(len(set(row.ranks)) == 1 for row in rankings),
        labeler_count=len({row.labeler for row in rankings if row.labeler}),
        problems=tuple(problems),
    )


def untied_pairs(ranks: tuple[int, ...]) -> int:
    """Pairs of responses with different ranks, of the K·(K−1)/2 there are."""
    k = len(ranks)
    return k * (k - 1) // 2 - sum(count * (count - 1) // 2 for count in Counter(ranks).values())
