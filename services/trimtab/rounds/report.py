"""The report of all rounds so far: report.md with rounds.png, laid out from the journal and the evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimtab.rounds.figures import RoundFigures, read_rounds
from trimtab.rounds.journal import Journal
from trimtab.rounds.markdown import quoted, table
from trimtab.rounds.ranking.source import read_json_rows
from trimtab.rounds.recipe import Recipe, SimulatedRanking
from trimtab.rounds.stages.evaluation import GOLD, JUDGE

SAMPLES_SHOWN = 6


def write_rounds_report(folder: Path, recipe: Recipe, journal: Journal) -> Path:
    """Write report.md and rounds.png for the rounds that are published; returns the path of report.md."""
    from trimtab.rounds.plots import draw_rounds

    rounds = read_rounds(folder, journal)
    best_round = int(_last_publish(journal).metrics["best_round"])
    draw_rounds(rounds, recipe, best_round, folder / "rounds.png")
    page = folder / "report.md"
    page.write_text(_page(folder, recipe, journal, rounds, best_round), encoding="utf-8")
    return page


def _page(folder: Path, recipe: Recipe, journal: Journal, rounds: Sequence[RoundFigures], best_round: int) -> str:
    best = _last_publish(journal).outputs["best"].partition(" ")[0]
    parts = [
        f"# Rounds of {recipe.name}",
        table(("", ""), _facts(recipe, rounds, best)),
        "![Win rate over rounds, and against KL](rounds.png)",
        _notes(recipe, rounds, best_round),
        "## Round by round",
        _rounds_table(recipe, rounds),
        "Intervals are 95 %, bootstrapped over prompts. A round's row is the checkpoint that the judge prefers.",
        "## Every evaluated version",
        _points_table(rounds),
        "## Samples",
        "Held-out prompts, the first answer of each version.",
        *_samples(folder, rounds, best_round),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(recipe: Recipe, rounds: Sequence[RoundFigures], best: str) -> list[tuple[str, str]]:
    facts = [("best policy", f"`{best}`"), ("judge", f"`{Path(recipe.evaluate.judge).name}`")]
    if isinstance(recipe.rank, SimulatedRanking):
        rank = recipe.rank
        facts.append(
            ("rankings", f"by a **simulated labeler**: `{Path(rank.gold).name}` with Gumbel noise of {rank.noise:g}")
        )
    else:
        facts.append(("rankings", "from files"))
    facts += [
        ("PPO starts from", recipe.ppo.start),
        ("seed", str(recipe.seed)),
        ("minutes", f"{sum(r.seconds for r in rounds) / 60:.1f}"),
    ]
    return facts


def _notes(recipe: Recipe, rounds: Sequence[RoundFigures], best_round: int) -> str:
    last = rounds[-1]
    if best_round == last.number:
        return ""
    return (
        f"The last round is not the best: on held-out prompts the judge prefers round {best_round} to SFT in "
        f"{rounds[best_round].chosen.wins[JUDGE].percent()} of pairs, round {last.number} in "
        f"{last.chosen.wins[JUDGE].percent()}. The pointer stands at round {best_round}."
    )


def _rounds_table(recipe: Recipe, rounds: Sequence[RoundFigures]) -> str:
    has_gold = GOLD in rounds[0].chosen.wins
    head = ["round", "rankings", "reward model, held-out pairs", "judge prefers it to SFT", "to the round before"]
    head += ["gold score, mean"] if has_gold else []
    head += ["KL, nats a response", "distinct-2", "perplexity under SFT", "minutes"]
    rows = []
    for figures in rounds:
        point = figures.chosen
        row = [
            "SFT" if figures.number == 0 else str(figures.number),
            f"{figures.rankings:,}" if figures.number else "",
            f"{100 * figures.reward_accuracy:.1f} %" if figures.reward_accuracy is not None else "",
            point.wins[JUDGE].percent() if figures.number else "",
            figures.against_previous.percent() if figures.against_previous else "",
        ]
        row += [f"{point.means[GOLD]:.3f}"] if has_gold else []
        row += [
            point.kl.k1_per_response.plain() if figures.number else "0",
            f"{point.text.distinct_2:.3f}",
            f"{point.text.perplexity:.2f}",
            f"{figures.seconds / 60:.1f}",
        ]
        rows.append(row)
    return table(head, rows)


def _points_table(rounds: Sequence[RoundFigures]) -> str:
    scorers = list(rounds[-1].chosen.wins)
    rows = [
        [
            f"`{point.version.partition(' ')[0]}`" + (" ★" if place == figures.best else ""),
            f"{point.kl.k1_per_response.value:.2f}",
            *(f"{100 * point.wins[name].value:.1f} %" for name in scorers),
        ]
        for figures in rounds
        if figures.number
        for place, point in enumerate(figures.points)
    ]
    return table(["version", "KL", *(f"{name}: wins against SFT" for name in scorers)], rows)


def _samples(folder: Path, rounds: Sequence[RoundFigures], best_round: int) -> list[str]:
    shown = [rounds[number] for number in sorted({0, best_round, rounds[-1].number})]
    names = ["SFT" if figures.number == 0 else f"round {figures.number}" for figures in shown]
    answers = [read_json_rows(_answers_file(folder, figures)) for figures in shown]
    blocks = []
    for place in range(0, len(answers[0]), max(1, len(answers[0]) // SAMPLES_SHOWN)):
        row = answers[0][place]
        prompt = row["prompt"] if "prompt" in row else row["messages"][-1]["content"]
        lines = [f"> **{quoted(prompt)}**"]
        for name, rows in zip(names, answers, strict=True):
            lines.append(f"> *{name}*: {quoted(rows[place]['responses'][0])}")
        blocks.append("\n>\n".join(lines))
    return blocks[:SAMPLES_SHOWN]


def _answers_file(folder: Path, figures: RoundFigures) -> Path:
    step = int(figures.chosen.version.partition(" ")[0].rpartition("@")[2])
    return folder / "rounds" / f"{figures.number:03}" / "evaluation" / f"{step:06}.jsonl"


def _last_publish(journal: Journal):
    return next(e for e in reversed(journal.events) if e.event == "done" and e.stage.endswith("/publish"))
