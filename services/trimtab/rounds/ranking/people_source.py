"""Rankings by people on the labeling page: a round's sets become a campaign, and the run waits for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimtab.rounds.ranking.source import AnswerSet, Collected, RankedSet
from trimtab_client import AlreadyExists, LabelingClient, Unavailable

FEWEST_SETS = 2  # one to train on, one to check on


class PeopleSource:
    """Has the sets ranked in the campaign `campaign`, each by `minimum` people.

    A lead who closes the campaign ends the wait with what is ranked by then. A server that is away is asked again.
    Where a lead decided between people, only that decision counts. With `versions`, who wrote each response of a task,
    the sets are pairs and the campaign is a blind comparison, whose win rate the page shows.
    """

    def __init__(
        self,
        client: LabelingClient,
        campaign: str,
        *,
        minimum: int,
        title: str,
        guideline: str,
        poll_s: float,
        versions: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.poll_s = poll_s
        self.inputs = {"page": client.address, "campaign": campaign}
        self._client = client
        self._campaign = campaign
        self._plan = {"name": campaign, "title": title, "guideline": guideline, "overlap": minimum}
        self._versions = versions
        self._minimum = minimum
        self._is_offered = False

    def offer(self, sets: Sequence[AnswerSet], offered: Path) -> None:
        """Make the campaign with the sets as tasks; what is there already stays."""
        with suppress(Unavailable):  # `poll` offers again
            self._offer(sets)

    def poll(self, sets: Sequence[AnswerSet]) -> Collected:
        """What people have ranked by now."""
        try:
            if not self._is_offered:
                self._offer(sets)
            rankings = self._rankings(sets)
            is_closed = self._client.campaign(self._campaign)["state"] == "closed"
        except Unavailable as error:
            return Collected((), str(error))
        counts: dict[str, int] = defaultdict(int)
        for ranked in rankings:
            counts[ranked.answers.task] += 1
        asked = [answers for answers in sets if self._versions is None or not answers.is_one_text]
        done = sum(counts[answers.task] >= self._minimum for answers in asked)
        if done == len(asked) or (is_closed and len(counts) >= min(FEWEST_SETS, len(asked))):
            return Collected(rankings)
        each = f" by {self._minimum} people" if self._minimum > 1 else ""
        return Collected(
            (), f"{done} of {len(asked)} sets are ranked{each} on {self._client.address}/c/{self._campaign}"
        )

    def _offer(self, sets: Sequence[AnswerSet]) -> None:
        with suppress(AlreadyExists):  # an earlier attempt made it
            asked = {"responses_per_task": len(sets[0].responses)} if self._versions is None else {"kind": "comparison"}
            self._client.create_campaign(self._plan | asked)
        self._client.add_rows(self._campaign, [self._row(answers) for answers in sets])
        self._is_offered = True

    def _row(self, answers: AnswerSet) -> dict[str, Any]:
        written_by = {} if self._versions is None else {"versions": list(self._versions[answers.task])}
        return answers.row() | written_by

    def _rankings(self, sets: Sequence[AnswerSet]) -> tuple[RankedSet, ...]:
        by_task = {answers.task: answers for answers in sets}
        rows = self._client.rows(self._campaign, resolve=True)
        return tuple(_ranked(row, by_task[row["task"]]) for row in rows if row["task"] in by_task)


def _ranked(row: dict[str, Any], answers: AnswerSet) -> RankedSet:
    assert tuple(row["responses"]) == answers.responses, f"{answers.task} has other responses on the page"
    return RankedSet(answers, tuple(row["ranks"]), row["labeler"])
