"""`trimtab compare`: two models side by side on the same prompts, with a judge's or people's win rate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Folder, hub id or version:RUN/NAME[@STEP].")],
    second: Annotated[str, typer.Argument(metavar="B", help="The one that is hoped to be better.")],
    prompts: Annotated[Path, typer.Option(help="Prompts, as docs/data.md describes them.")],
    judge: Annotated[
        str,
        typer.Option(
            help="reward:SOURCE, vader, sentences:FILE, words:A,B,…, people:FILE of rankings or people:PAGE/c/CAMPAIGN."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where report.md, its plot and the answers go.")] = Path("runs/compare"),
    store: Annotated[str, typer.Option(envvar="TRIMTAB_STORE", help="Store of versions.")] = "runs/store",
    limit: Annotated[int | None, typer.Option(min=2, help="Only this many prompts, evenly drawn.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers of each to each prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    min_tokens: Annotated[int, typer.Option(min=0, help="Fewest tokens of an answer.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Both answer with the same seeds.")] = 0,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a lead's access token, where people compare on the labeling page.")
    ] = None,
) -> None:
    """Say how often B's answers are preferred to A's, with a 95 % interval; samples and a plot go into --out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from trimtab.cli.signals import sigterm_interrupts
    from trimtab.rounds.answers import read_prompts
    from trimtab.rounds.duel.people import PEOPLE
    from trimtab.rounds.duel.plan import DuelPlan
    from trimtab.rounds.duel.report import figures, verdict, write_duel_report
    from trimtab.rounds.duel.run import run_duel
    from trimtab.rounds.launchers.services import fair_threads
    from trimtab.rounds.scorers import check_spec
    from trimtab_client import Sampling

    if not judge.startswith(PEOPLE):
        check_spec(judge)
    asked = read_prompts(prompts)
    if limit is not None and limit < len(asked):
        asked = [asked[i * len(asked) // limit] for i in range(limit)]
    plan = DuelPlan(
        first=first,
        second=second,
        prompts=tuple(asked),
        judge=judge,
        sampling=Sampling(n=samples, max_tokens=max_tokens, min_tokens=min_tokens, temperature=temperature, seed=seed),
        folder=out,
        store=store,
        threads=fair_threads(1),
        token_file=token_file,
    )
    console = Console(highlight=False)
    with sigterm_interrupts():
        duel = run_duel(plan, lambda text: console.print(text, soft_wrap=True, markup=False))
    page = write_duel_report(duel)
    table = Table("", "A", "B", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in figures(duel):
        table.add_row(*row)
    console.print(table)
    console.print(verdict(duel), style="bold", soft_wrap=True, markup=False)
    console.print(f"report  {page}", soft_wrap=True, markup=False)
