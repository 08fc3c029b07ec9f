"""The page of a comparison: report.md with duel.png and duel.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trimtab.rounds.duel.plan import Duel, Side
from trimtab.rounds.markdown import quoted, table

SAMPLES_SHOWN = 12


def write_duel_report(duel: Duel) -> Path:
    """Write the page, the picture and the numbers into the comparison's folder; returns the path of report.md."""
    from trimtab.rounds.duel.plot import draw_duel

    folder = duel.plan.folder
    folder.mkdir(parents=True, exist_ok=True)
    draw_duel(duel, folder / "duel.png")
    (folder / "duel.json").write_text(json.dumps(_numbers(duel), indent=1) + "\n", encoding="utf-8")
    page = folder / "report.md"
    page.write_text(_page(duel), encoding="utf-8")
    return page


def verdict(duel: Duel) -> str:
    """One sentence that says what came out."""
    rate = duel.win_rate
    if rate.low > 0.5:
        outcome = "B is better"
    elif rate.high < 0.5:
        outcome = "A is better"
    else:
        outcome = "no difference is shown"
    return f"B's answer is preferred in {rate.percent()} of pairs: {outcome}."


def figures(duel: Duel) -> list[tuple[str, str, str]]:
    """Rows of (what, A, B)."""
    rows = [("model", duel.first.source, duel.second.source), ("served", duel.first.served, duel.second.served)]
    rows.append(("preferred", _percent(1 - duel.win_rate.value), _percent(duel.win_rate.value)))
    if duel.first.scores_PS is not None and duel.second.scores_PS is not None:
        rows.append(
            ("judge's score, mean", f"{duel.first.scores_PS.mean():.3f}", f"{duel.second.scores_PS.mean():.3f}")
        )
    for name, of in (
        ("tokens of an answer", lambda side: f"{side.tokens_PS.mean():.1f}"),
        ("ended by themselves", lambda side: _percent(side.ended_PS.mean())),
        ("distinct-2, words of 16 answers", lambda side: f"{side.distinct_2:.3f}"),
    ):
        rows.append((name, of(duel.first), of(duel.second)))
    return rows


def _page(duel: Duel) -> str:
    plan = duel.plan
    prompts, samples = duel.first.tokens_PS.shape
    setting = (
        f"{prompts} prompts, {samples} answers of each to each, temperature {plan.sampling.temperature:g}, "
        f"seed {plan.sampling.seed}; judge: `{plan.judge}`. The interval is 95 %, bootstrapped over prompts; "
        "a tie counts half."
    )
    return (
        "\n\n".join(
            [
                f"# {duel.second.served} (B) against {duel.first.served} (A)",
                verdict(duel),
                "![Win rate and scores](duel.png)",
                table(("", "A", "B"), figures(duel)),
                setting,
                "## Side by side",
                "First answers, to prompts drawn evenly from the file; in brackets the judge's score.",
                *_samples(duel),
            ]
        )
        + "\n"
    )


def _samples(duel: Duel) -> Sequence[str]:
    count = len(duel.plan.prompts)
    blocks = []
    for p in range(0, count, max(1, count // SAMPLES_SHOWN)):
        prompt = duel.plan.prompts[p]
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        lines = [f"> **{quoted(asked)}**"]
        for name, side in (("A", duel.first), ("B", duel.second)):
            lines.append(f"> *{name}*{_bracket(side, p)}: {quoted(side.texts[p][0])}")
        blocks.append("\n>\n".join(lines))
    return blocks[:SAMPLES_SHOWN]


def _bracket(side: Side, prompt: int) -> str:
    return "" if side.scores_PS is None else f" ({side.scores_PS[prompt, 0]:.2f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _numbers(duel: Duel) -> dict:
    return {
        "first": duel.first.served,
        "second": duel.second.served,
        "judge": duel.plan.judge,
        "prompts": len(duel.plan.prompts),
        "samples": duel.plan.sampling.n,
        "win_rate": asdict(duel.win_rate),
        "score_difference": asdict(duel.difference) if duel.difference else None,
        "figures": [list(row) for row in figures(duel)],
    }
