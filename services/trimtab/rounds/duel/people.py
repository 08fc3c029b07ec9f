"""People as judges of a duel: every pair of answers blind, ranked into a file or compared on the labeling page.

Two equal answers are a tie that nobody is asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab.rounds.duel.plan import DuelError, DuelPlan, Side
from trimtab.rounds.ranking.file_source import FileSource
from trimtab.rounds.ranking.people_source import PeopleSource
from trimtab.rounds.ranking.source import AnswerSet, RankedSet, RankingSource, write_rows
from trimtab_client import LabelingClient
from trimtab_client.clear_text import check_token_may_travel_to

PEOPLE = "people:"
TO_RANK = "to_rank.jsonl"


def people_wins(plan: DuelPlan, first: Side, second: Side) -> np.ndarray:
    """How often people prefer the second's answers, one value for each prompt that was judged, a tie counting half.

    DuelError while judgments are missing; on the page, closing the campaign ends that.
    """
    pairs, second_first = _blind_pairs(plan, first, second)
    asked = [pair for pair in pairs if not pair.is_one_text]
    offered = plan.folder / TO_RANK
    if not offered.exists():
        write_rows(offered, (pair.row() for pair in asked))
    source = _source(plan, first, second, pairs, second_first)
    wanted = asked if isinstance(source, FileSource) else pairs  # the page counts equal answers as ties, too
    source.offer(wanted, offered)
    collected = source.poll(wanted)
    if collected.waiting:
        raise DuelError(f"people have not judged all pairs: {collected.waiting}; then run the same command again")
    return _count(pairs, second_first, collected.rankings, len(first.texts[0]))


@dataclass(frozen=True)
class Page:
    """A campaign of the labeling page at `address`."""

    address: str
    campaign: str
    token_file: Path


def page_of(plan: DuelPlan) -> Page | None:
    """The page on which people judge; None where their rankings come as a file. DuelError where it cannot be asked."""
    where = plan.judge.removeprefix(PEOPLE)
    if not where.startswith(("http://", "https://")):
        return None
    address, mark, campaign = where.rpartition("/c/")
    if not mark or not campaign:
        raise DuelError(f"--judge: {where} names no campaign; people:https://HOST:PORT/c/NAME does")
    if plan.token_file is None:
        raise DuelError("--token-file: the page asks for a lead's access token; `trimtab label labeler add` makes one")
    try:
        check_token_may_travel_to(address)
    except ValueError as error:
        raise DuelError(f"--judge: {error}") from None
    return Page(address, campaign, plan.token_file)


def _source(
    plan: DuelPlan, first: Side, second: Side, pairs: Sequence[AnswerSet], second_first: np.ndarray
) -> RankingSource:
    page = page_of(plan)
    if page is None:
        return FileSource(Path(plan.judge.removeprefix(PEOPLE)), 1, 0)
    names = (first.served, second.served)
    if names[0] == names[1]:
        names = (f"A {names[0]}", f"B {names[1]}")
    versions = {pair.task: names[::-1] if flip else names for pair, flip in zip(pairs, second_first, strict=True)}
    return PeopleSource(
        LabelingClient(page.address, page.token_file.read_text().strip()),
        page.campaign,
        minimum=1,
        title=page.campaign,
        guideline="",
        poll_s=0,
        versions=versions,
    )


def _count(
    pairs: Sequence[AnswerSet], second_first: np.ndarray, rankings: Sequence[RankedSet], samples: int
) -> np.ndarray:
    place = {pair.task: i for i, pair in enumerate(pairs)}
    sums, counts = np.zeros(len(pairs) // samples), np.zeros(len(pairs) // samples)
    for i, pair in enumerate(pairs):
        if pair.is_one_text:
            sums[i // samples] += 0.5
            counts[i // samples] += 1
    for ranked in rankings:
        i = place[ranked.answers.task]
        mine, other = ranked.ranks if second_first[i] else reversed(ranked.ranks)
        sums[i // samples] += 1.0 if mine < other else 0.5 if mine == other else 0.0
        counts[i // samples] += 1
    return sums[counts > 0] / counts[counts > 0]


def _blind_pairs(plan: DuelPlan, first: Side, second: Side) -> tuple[list[AnswerSet], np.ndarray]:
    """A set of two for each sample of each prompt, in an order that tells nothing; True: the second stands first."""
    samples = len(first.texts[0])
    flips = np.random.default_rng(plan.sampling.seed).integers(0, 2, len(plan.prompts) * samples).astype(bool)
    pairs = []
    for p, prompt in enumerate(plan.prompts):
        for s in range(samples):
            texts = (first.texts[p][s], second.texts[p][s])
            ended = (bool(first.ended_PS[p, s]), bool(second.ended_PS[p, s]))
            order = -1 if flips[p * samples + s] else 1
            pairs.append(AnswerSet(f"pair-{p * samples + s + 1:05}", prompt, texts[::order], ended[::order]))
    return pairs, flips
