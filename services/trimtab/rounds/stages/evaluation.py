"""The stage that says what a round achieved: versions of its PPO run on held-out prompts, against SFT.

Every score (the judge, the gold score behind a simulated labeler, the round's own reward model) is put on one scale,
the share of comparisons won against SFT's answers to the same prompt. So over-optimisation shows as it is: the reward
model's line goes on rising with KL while the judge's or the gold one turns (Gao et al. 2210.10760).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.rounds.answers import Answers, draw, read_prompts
from trimtab.rounds.evaluate import Interval, KlSummary, TextSummary, win_rate
from trimtab.rounds.journal import StageResult
from trimtab.rounds.ranking.source import read_json_rows, write_rows
from trimtab.rounds.recipe import SimulatedRanking
from trimtab.rounds.scorers import Scorer, WirePrompt
from trimtab.rounds.stages.context import RoundsContext, read_version, write_version
from trimtab.runtime.caller import channel_options
from trimtab_client import GeneratorClient, ModelVersion, RaggedTokens, ReferenceClient, RewardClient

JUDGE, GOLD, REWARD = "judge", "gold", "reward"


@dataclass(frozen=True)
class Point:
    """One evaluated version.

    Attributes:
        wins: by scorer, how often its answers win against SFT's; of SFT itself 0.5 by definition.
        means: by scorer, the mean score.
    """

    version: str
    kl: KlSummary
    text: TextSummary
    wins: dict[str, Interval]
    means: dict[str, float]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Point:
        """What `asdict` made of it."""
        return cls(
            version=values["version"],
            kl=KlSummary(**{name: Interval(**interval) for name, interval in values["kl"].items()}),
            text=TextSummary(**(values["text"] | {"tokens_mean": Interval(**values["text"]["tokens_mean"])})),
            wins={name: Interval(**interval) for name, interval in values["wins"].items()},
            means=values["means"],
        )


def run_evaluate(context: RoundsContext, number: int) -> StageResult:
    """Evaluate the round's checkpoints; the one that the judge prefers stands for the round (in round 0, SFT)."""
    prompts = read_prompts(context.recipe.evaluate.prompts)
    folder = context.round_folder(number) / "evaluation"
    versions = checkpoints(context, number) if number else [context.sft]
    generator, reference = context.services.generator_and_reference(versions[0], context.sft)
    scorers = _scorers(context)
    files, points = [], []
    options = channel_options()
    with GeneratorClient(generator, options) as sampler, ReferenceClient(reference, options) as judge_of_kl:
        for version in versions:
            context.say(f"{version} answers {len(prompts)} held-out prompts")
            sampling = context.sampling(context.recipe.evaluate.samples, context.seed(number, 7))
            answers = draw(sampler, version, prompts, sampling)
            scores = {name: answers.scores(scorer) for name, scorer in scorers.items()}
            files.append(_write_answers(folder / f"{version.step:06}.jsonl", answers, scores))
            kl, text = answers.against_reference(judge_of_kl)
            points.append((version, kl, text))
    base = _read_answers(answers_file(context, 0, context.sft))
    rewards = _reward_scores(context, number, [base, *map(_read_answers, files)]) if number else []
    evaluated = []
    for i, (version, kl, text) in enumerate(points):
        own = _read_answers(files[i])
        scores = {name: (own.scores_PS(name), base.scores_PS(name)) for name in scorers}
        if number:
            scores[REWARD] = (rewards[i + 1], rewards[0])
        evaluated.append(
            Point(
                version=write_version(version),
                kl=kl,
                text=text,
                wins={name: win_rate(mine, theirs) for name, (mine, theirs) in scores.items()},
                means={name: float(mine.mean()) for name, (mine, _) in scores.items()},
            )
        )
    for remark in over_optimised(evaluated):
        context.say(remark)
    best = max(evaluated, key=lambda point: point.wins[JUDGE].value)
    against = _against_previous(context, number, read_version(best.version)) if number else None
    page = {
        "prompts": len(prompts),
        "samples": context.recipe.evaluate.samples,
        "points": [asdict(point) for point in evaluated],
        "best": best.version,
        "against_previous": asdict(against) if against else None,
    }
    file = folder / "evaluation.json"
    write_rows(file, [page])
    return StageResult(
        inputs={f"checkpoint {version.step}": write_version(version) for version in versions}
        | {"sft": write_version(context.sft), "judge": context.recipe.evaluate.judge},
        outputs={"best": best.version},
        files=(*files, file),
        metrics=_metrics(best, against),
    )


def over_optimised(points: Sequence[Point]) -> list[str]:
    """A remark for each checkpoint that the reward model prefers to the one before and the judge clearly does not."""
    return [
        f"warning: gold divergence from {before.version} to {after.version}: the reward model's win rate rose, the "
        f"judge's fell from {before.wins[JUDGE].value:.2f} to {after.wins[JUDGE].value:.2f}; take the earlier version, "
        "and collect rankings on newer answers"
        for before, after in pairwise(points)
        if REWARD in before.wins and REWARD in after.wins
        if after.wins[REWARD].value > before.wins[REWARD].value and after.wins[JUDGE].high < before.wins[JUDGE].low
    ]


def checkpoints(context: RoundsContext, number: int) -> list[ModelVersion]:
    """Versions of the round's PPO run that are in the store, evenly spaced, the last among them; never step 0."""
    last = read_version(context.journal.output(f"{number}/ppo", "policy"))
    stored = {m.version.step: m.version for m in context.store.versions(last.run_id, last.name) if m.version.step > 0}
    count = min(context.recipe.evaluate.checkpoints, len(stored))
    wanted = [last.step * (i + 1) / count for i in range(count)]
    steps = sorted({min(stored, key=lambda step: abs(step - place)) for place in wanted} | {last.step})
    return [stored[step] for step in steps]


def answers_file(context: RoundsContext, number: int, version: ModelVersion) -> Path:
    """The evaluated answers of one version."""
    return context.round_folder(number) / "evaluation" / f"{version.step:06}.jsonl"


def read_points(context_folder: Path, number: int) -> tuple[list[Point], dict[str, Any]]:
    """The evaluated versions of a round and the whole of its evaluation.json."""
    page = json.loads((context_folder / "rounds" / f"{number:03}" / "evaluation" / "evaluation.json").read_text())
    return [Point.from_json(values) for values in page["points"]], page


def _scorers(context: RoundsContext) -> dict[str, Scorer]:
    scorers = {JUDGE: context.scorer(context.recipe.evaluate.judge)}
    if isinstance(context.recipe.rank, SimulatedRanking):
        scorers[GOLD] = context.scorer(context.recipe.rank.gold)
    return scorers


@dataclass(frozen=True)
class _Stored:
    """Evaluated answers as they lie in a file."""

    rows: list[dict[str, Any]]

    def scores_PS(self, name: str) -> np.ndarray:
        return np.array([row["scores"][name] for row in self.rows], np.float64)

    @property
    def sequences(self) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for row in self.rows for ids in row["token_ids"]]

    @property
    def tokenizer_digest(self) -> str:
        return self.rows[0]["tokenizer"]


def _write_answers(file: Path, answers: Answers, scores: Mapping[str, np.ndarray]) -> Path:
    """A row a prompt: its answers, their token ids with the prompt's, and their scores."""
    samples = answers.shape[1]

    def row(place: int, prompt: WirePrompt) -> dict[str, Any]:
        own = answers.completions[place * samples : (place + 1) * samples]
        return {
            "prompt" if isinstance(prompt, str) else "messages": prompt,
            "responses": [completion.text for completion in own],
            "token_ids": [[*map(int, c.prompt_token_ids), *map(int, c.token_ids)] for c in own],
            "tokenizer": answers.tokenizer_digest,
            "scores": {name: scores_PS[place].tolist() for name, scores_PS in scores.items()},
        }

    return write_rows(file, (row(place, prompt) for place, prompt in enumerate(answers.prompts)))


def _read_answers(file: Path) -> _Stored:
    return _Stored(read_json_rows(file))


def _reward_scores(context: RoundsContext, number: int, stored: Sequence[_Stored]) -> list[np.ndarray]:
    """Scores of the round's reward model, [P, S] of each file."""
    reward = read_version(context.journal.output(f"{number}/reward", "reward"))
    with RewardClient(context.services.reward(reward), channel_options()) as client:
        return [
            client.score_tokens(RaggedTokens.from_sequences(one.sequences), one.tokenizer_digest)
            .scores.astype(np.float64)
            .reshape(len(one.rows), -1)
            for one in stored
        ]


def _against_previous(context: RoundsContext, number: int, best: ModelVersion) -> Interval:
    """How often the judge prefers the round's version to that of the round before."""
    before = read_version(context.journal.output(f"{number - 1}/evaluate", "best"))
    mine = _read_answers(answers_file(context, number, best)).scores_PS(JUDGE)
    return win_rate(mine, _read_answers(answers_file(context, number - 1, before)).scores_PS(JUDGE))


def _metrics(best: Point, against: Interval | None) -> dict[str, float]:
    metrics = {f"{name}_win_rate": interval.value for name, interval in best.wins.items()}
    metrics |= {f"{name}_mean": mean for name, mean in best.means.items()}
    wins = best.wins[JUDGE]
    metrics |= {
        "judge_win_rate_low": wins.low,
        "judge_win_rate_high": wins.high,
        "kl_nats_per_response": best.kl.k1_per_response.value,
        "distinct_2": best.text.distinct_2,
        "perplexity": best.text.perplexity,
        "tokens_mean": best.text.tokens_mean.value,
    }
    if against is not None:
        metrics |= {
            "win_rate_against_previous": against.value,
            "win_rate_against_previous_low": against.low,
            "win_rate_against_previous_high": against.high,
        }
    return metrics
