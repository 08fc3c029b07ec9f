"""The command `trimtab`: which commands there are. Each is one thin file that imports what is heavy when it runs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from trimtab import __version__
from trimtab.cli import data, keys, label, rounds, versions
from trimtab.cli.compare import compare
from trimtab.cli.demo import demo
from trimtab.cli.deploy import deploy
from trimtab.cli.doctor import doctor
from trimtab.cli.errors import exit_with
from trimtab.cli.generate import generate
from trimtab.cli.health import health
from trimtab.cli.job import job
from trimtab.cli.score import score
from trimtab.cli.serve import serve
from trimtab.cli.train import train
from trimtab.cli.up import up

app = typer.Typer(
    name="trimtab",
    help="Align a language model with what people prefer: SFT, reward model and PPO as gRPC services.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (demo, up, serve, train, job, doctor, generate, score, compare, deploy, health):
    app.command()(command)
app.add_typer(data.app, name="data")
app.add_typer(keys.app, name="keys")
app.add_typer(label.app, name="label")
app.add_typer(versions.app, name="versions")
app.add_typer(rounds.app, name="rounds")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trimtab {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of trimtab itself."""


def main() -> None:
    """Run the command line and exit: 0, 1 with one line on stderr for an expected error, 2 for wrong usage."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC's own remarks about closed connections are not for people
    try:
        app()
    except Exception as error:
        exit_with(error)
