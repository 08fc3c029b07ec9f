"""The stages that make a round's rankings: K answers of the best policy so far to each prompt, then their order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trimtab.rounds.answers import draw, read_prompts
from trimtab.rounds.journal import StageResult
from trimtab.rounds.ranking.file_source import FileSource
from trimtab.rounds.ranking.people_source import PeopleSource
from trimtab.rounds.ranking.simulated_labeler import SimulatedLabeler
from trimtab.rounds.ranking.source import (
    AnswerSet,
    Collected,
    RankedSet,
    RankingSource,
    read_json_rows,
    write_rows,
)
from trimtab.rounds.recipe import FileRanking, PeopleRanking, SimulatedRanking
from trimtab.rounds.stages.context import RoundsContext, write_version
from trimtab.runtime.caller import channel_options
from trimtab_client import GeneratorClient, LabelingClient

TRAIN, HELD_OUT = "train", "held_out"


class RankingsMissingError(RuntimeError):
    """Rankings are not all there, and the run was told not to wait for them."""


def run_sample(context: RoundsContext, number: int) -> StageResult:
    """Sample K answers of the best policy so far to prompts that earlier rounds did not use, while there are such."""
    section = context.recipe.sample
    policy = context.best_before(number)
    pool = read_prompts(section.prompts)
    order = np.random.default_rng(context.seed(3)).permutation(len(pool))
    places = [int(order[i % len(pool)]) for i in range((number - 1) * section.sets, number * section.sets)]
    prompts = [pool[place] for place in places]
    context.say(f"{policy} answers {len(prompts)} prompts, {section.k} times each")
    with GeneratorClient(context.services.generator(policy), channel_options()) as generator:
        answers = draw(generator, policy, prompts, context.sampling(section.k, context.seed(number, 4)))
    sets = []
    for i, prompt in enumerate(prompts):
        own = answers.completions[i * section.k : (i + 1) * section.k]
        ended = tuple(completion.finish_reason == "stop" for completion in own)
        task = f"{context.recipe.name}-r{number}-{i + 1:05}"
        sets.append(AnswerSet(task, prompt, tuple(completion.text for completion in own), ended))
    file = write_rows(sets_file(context, number), (one.row() for one in sets))
    tokens = sum(len(completion.token_ids) for completion in answers.completions)
    return StageResult(
        inputs={"policy": write_version(policy), "prompts": section.prompts},
        outputs={"sets": str(file.relative_to(context.folder))},
        files=(file,),
        metrics={"sets": len(sets), "answers": len(answers.completions), "tokens": tokens},
    )


def run_rank(context: RoundsContext, number: int) -> StageResult:
    """Wait for rankings of the round's sets; write those that train the reward model apart from those that check it."""
    source = ranking_source(context, number)
    sets = [AnswerSet.from_row(row) for row in read_json_rows(sets_file(context, number))]
    source.offer(sets, sets_file(context, number))
    rankings = _wait_for(context, number, source, sets)
    held_out = _held_out_tasks(context, number, sets)
    name = f"round-{number:03}.jsonl"
    files = tuple(
        write_rows(
            rankings_folder(context, part) / name,
            (ranked.row() for ranked in rankings if (ranked.answers.task in held_out) == (part == HELD_OUT)),
        )
        for part in (TRAIN, HELD_OUT)
    )
    return StageResult(
        inputs=source.inputs,
        outputs={"source": context.recipe.rank.source},
        files=files,
        metrics=_ranking_metrics(rankings, held_out),
    )


def ranking_source(context: RoundsContext, number: int) -> RankingSource:
    """The source that the recipe names, for one round."""
    rank = context.recipe.rank
    if isinstance(rank, FileRanking):
        return FileSource(Path(rank.file.replace("{round}", str(number))), rank.minimum, rank.poll_s)
    if isinstance(rank, PeopleRanking):
        return PeopleSource(
            LabelingClient(rank.address, Path(rank.token_file).read_text().strip()),
            f"{context.recipe.name}-r{number}".lower(),
            minimum=rank.minimum,
            title=f"{context.recipe.name}, round {number}",
            guideline=Path(rank.guideline).read_text() if rank.guideline else "",
            poll_s=rank.poll_s,
        )
    assert isinstance(rank, SimulatedRanking)
    return SimulatedLabeler(
        context.scorer(rank.gold),
        noise=rank.noise,
        tie_within=rank.tie_within,
        labelers=rank.labelers,
        seed=context.seed(number, 5),
    )


def sets_file(context: RoundsContext, number: int) -> Path:
    """The round's sets, as they are offered for ranking."""
    return context.round_folder(number) / "to_rank.jsonl"


def rankings_folder(context: RoundsContext, part: str) -> Path:
    """Rankings of all rounds, a file a round: those that train (`TRAIN`) or those that check (`HELD_OUT`)."""
    return context.folder / "rankings" / part


def _wait_for(
    context: RoundsContext, number: int, source: RankingSource, sets: Sequence[AnswerSet]
) -> tuple[RankedSet, ...]:
    told = None
    while True:
        collected: Collected = source.poll(sets)
        if not collected.waiting:
            return collected.rankings
        if not context.wait:
            raise RankingsMissingError(collected.waiting)
        if collected.waiting != told:
            told = collected.waiting
            context.say(f"waiting for rankings: {told}")
            context.journal.wait(f"{number}/rank", told)
        time.sleep(source.poll_s)


def _held_out_tasks(context: RoundsContext, number: int, sets: Sequence[AnswerSet]) -> frozenset[str]:
    count = max(1, round(context.recipe.rank.held_out * len(sets)))
    order = np.random.default_rng(context.seed(number, 6)).permutation(len(sets))
    return frozenset(sets[int(place)].task for place in order[:count])


def _ranking_metrics(rankings: Sequence[RankedSet], held_out: frozenset[str]) -> dict[str, float]:
    pairs = sum(len(ranked.ranks) * (len(ranked.ranks) - 1) // 2 for ranked in rankings)
    tied = sum(
        ranked.ranks[i] == ranked.ranks[j] for ranked in rankings for i in range(len(ranked.ranks)) for j in range(i)
    )
    return {
        "rankings": len(rankings),
        "rankings_held_out": sum(ranked.answers.task in held_out for ranked in rankings),
        "labelers": len({ranked.labeler for ranked in rankings}),
        "pairs": pairs,
        "tied_share": tied / max(pairs, 1),
    }
