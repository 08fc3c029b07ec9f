"""`trimtab data`: look at training data before a run does."""

from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="Look at training data before a run does.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at training data before a run does."""


@app.command()
def check(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A .jsonl, .jsonl.gz or .parquet file, or a folder.")],
    max_problems: Annotated[int, typer.Option(min=1, help="How many problems to print.")] = 50,
) -> None:
    """Say what a file holds and every bad row in it, by line and field; exit 1 if there is one."""
    from trimtab.trainer.data.check import check_file

    out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
    report = check_file(source)
    for problem in report.problems[:max_problems]:
        line = f":{problem.line}" if problem.line else ""
        field = f": {problem.field}" if problem.field else ""
        err.print(f"{problem.path}{line}{field}: {problem.reason}", style="red", markup=False)
    if len(report.problems) > max_problems:
        err.print(f"… and {len(report.problems) - max_problems} more problems", style="red", markup=False)
    out.print(f"{source}: {report.row_count:,} rows of {report.kind or 'no known kind'}", markup=False)
    if report.kind == "rankings" and report.rankings_by_k:
        sizes = ", ".join(f"K={k}: {count:,}" for k, count in report.rankings_by_k)
        tied = f"; {report.tied_row_count:,} rankings tie throughout" if report.tied_row_count else ""
        out.print(f"  {sizes}; {report.pair_count:,} untied pairs; {report.labeler_count:,} labelers named{tied}")
    if not report.ok:
        err.print(f"{len(report.problems):,} problems in {report.bad_count:,} rows", style="bold red")
        raise typer.Exit(1)
    out.print("  every row is good", style="green")
