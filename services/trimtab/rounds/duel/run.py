"""Two models answer the same prompts, and a judge says how often the second is better: a scorer, or people.

Each model is a folder, a hub id or a version of a store; a generator serves one after the other, so that memory need
only hold one. `report` lays the result out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.rounds.answers import draw
from trimtab.rounds.duel.people import PEOPLE, TO_RANK, page_of, people_wins
from trimtab.rounds.duel.plan import Duel, DuelError, DuelPlan, Side
from trimtab.rounds.evaluate import bootstrap_mean, win_rate
from trimtab.rounds.launchers.local import Supervisor
from trimtab.rounds.launchers.services import service_process
from trimtab.rounds.ranking.source import read_json_rows, write_rows
from trimtab.rounds.scorers import WirePrompt, open_scorer
from trimtab_client import GeneratorClient


def run_duel(plan: DuelPlan, say: Callable[[str], None]) -> Duel:
    """Sample both, judge both. With people as judge, answers that lie in the folder already are used again.

    Raises:
        DuelError: people have not judged all pairs yet, or cannot be asked so, or the folder holds answers of another
            comparison.
        ScorerError, LaunchError.
    """
    if plan.judge.startswith(PEOPLE):
        page_of(plan)  # what is wrong with it is told before anything is sampled
    with ExitStack() as stack:
        supervisor = stack.enter_context(Supervisor())
        if plan.judge.startswith(PEOPLE) and (plan.folder / TO_RANK).exists():
            say(f"taking the answers in {plan.folder}")
            first, second = (read_side(plan, letter) for letter in "ab")
        else:
            first = _answers(plan, plan.first, "a", supervisor, say)
            second = _answers(plan, plan.second, "b", supervisor, say)
        if plan.judge.startswith(PEOPLE):
            wins_P = people_wins(plan, first, second)
            return Duel(plan, first, second, bootstrap_mean(wins_P), wins_P, None)

        def serve_reward(source: str) -> str:
            return _serve(plan, supervisor, "reward", source)

        say(f"judging with {plan.judge}")
        scorer = open_scorer(plan.judge, serve_reward, stack)
        first_PS, second_PS = (_score(scorer.score, plan.prompts, side) for side in (first, second))
        difference_PSS = second_PS[:, :, None] - first_PS[:, None, :]
        return Duel(
            plan,
            _judged(first, first_PS),
            _judged(second, second_PS),
            win_rate(second_PS, first_PS),
            ((difference_PSS > 0) + 0.5 * (difference_PSS == 0)).mean(axis=(1, 2)),
            bootstrap_mean(second_PS.mean(1) - first_PS.mean(1)),
        )


def _answers(plan: DuelPlan, source: str, letter: str, supervisor: Supervisor, say: Callable[[str], None]) -> Side:
    """Sample one model; its answers also go into the folder."""
    say(f"{source} answers {len(plan.prompts)} prompts")
    address = _serve(plan, supervisor, "generator", source)
    with GeneratorClient(address) as generator:
        served = str(generator.get_model().version)
        answers = draw(generator, None, plan.prompts, plan.sampling)
    supervisor.remove("generator")
    rows = [
        {
            "source": source,
            "served": served,
            "prompt": prompt,
            "responses": [c.text for c in answers.completions[p * plan.sampling.n : (p + 1) * plan.sampling.n]],
            "tokens": [len(c.token_ids) for c in answers.completions[p * plan.sampling.n : (p + 1) * plan.sampling.n]],
            "ended": [
                c.finish_reason == "stop" for c in answers.completions[p * plan.sampling.n : (p + 1) * plan.sampling.n]
            ],
        }
        for p, prompt in enumerate(plan.prompts)
    ]
    write_rows(_answers_file(plan, letter), rows)
    return _side(rows)


def read_side(plan: DuelPlan, letter: str) -> Side:
    """Answers that an earlier call wrote. Raises DuelError where they are not those of this comparison."""
    rows = read_json_rows(_answers_file(plan, letter))
    source = plan.first if letter == "a" else plan.second
    if rows[0]["source"] != source or [row["prompt"] for row in rows] != list(plan.prompts):
        raise DuelError(f"{plan.folder} holds answers of another comparison: give a new --out")
    return _side(rows)


def _side(rows: Sequence[dict[str, Any]]) -> Side:
    return Side(
        source=rows[0]["source"],
        served=rows[0]["served"],
        texts=tuple(tuple(row["responses"]) for row in rows),
        tokens_PS=np.array([row["tokens"] for row in rows], np.float64),
        ended_PS=np.array([row["ended"] for row in rows], bool),
    )


def _judged(side: Side, scores_PS: np.ndarray) -> Side:
    return Side(side.source, side.served, side.texts, side.tokens_PS, side.ended_PS, scores_PS)


def _score(
    score: Callable[[Sequence[WirePrompt], Sequence[str]], np.ndarray], prompts: Sequence[WirePrompt], side: Side
) -> np.ndarray:
    asked = [prompt for prompt, row in zip(prompts, side.texts, strict=True) for _ in row]
    return score(asked, [text for row in side.texts for text in row]).reshape(len(prompts), -1)


def _answers_file(plan: DuelPlan, letter: str) -> Path:
    return plan.folder / f"answers_{letter}.jsonl"


def _serve(plan: DuelPlan, supervisor: Supervisor, kind: str, source: str) -> str:
    settings = {"model": source, "store": plan.store}
    spec = service_process(kind, settings, plan.folder / "services", threads=plan.threads)
    supervisor.add(spec)
    supervisor.wait_ready(spec.name)
    return spec.address
