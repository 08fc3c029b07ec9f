"""`trimtab doctor`: examine a recipe before it burns a GPU hour."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.connection import TlsCa, TlsCert, TlsFlag, TlsKey, TokenFile, channel_options
from trimtab.cli.errors import is_expected, one_line
from trimtab.cli.train import Stage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trimtab.doctor.finding import Finding

UNITS = {"": 1 << 30, "GIB": 1 << 30, "GB": 10**9, "MIB": 1 << 20}
MARKS = {"ok": ("✓", "green"), "skipped": ("-", "yellow"), "failed": ("✗", "bold red")}


def doctor(
    recipe: Annotated[
        list[Path], typer.Argument(metavar="RECIPE…", help="Files of trimtab train, up, job or rounds, together.")
    ],
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of the machine it is for; none: this one's.")] = None,
    gpu_memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of each of them.")] = "80GiB",
    torchrun: Annotated[str, typer.Option(help="torchrun's arguments, as `trimtab job` takes them.")] = "",
    stage: Annotated[Stage | None, typer.Option(help="Which stage a file is of that could be of several.")] = None,
    store: Annotated[
        str | None, typer.Option(envvar="TRIMTAB_STORE", help="The store; none: the one that a file names.")
    ] = None,
    like: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Folder or hub id with the shape of unpublished versions.")
    ] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, one object a line.")] = False,
    tls: TlsFlag = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Check a recipe: services, tokenizers, memory, store, data, kernels, a dry PPO step. Exit 1 where one fails."""
    from dataclasses import replace

    from trimtab.cli.doctor_recipe import read_plan, torchrun_ranks
    from trimtab.cli.settings import parse_assignments
    from trimtab.doctor.devices import devices_given
    from trimtab.doctor.examination import examine
    from trimtab.doctor.finding import failed

    given = devices_given(gpus, size_bytes(gpu_memory)) if gpus else None
    ranks, local_ranks = torchrun_ranks(torchrun)
    over = parse_assignments(assignments or [])
    try:
        plan = read_plan(recipe, stage.value if stage else None, over)
    except Exception as error:
        if not is_expected(error):
            raise
        findings: Iterable[Finding] = [failed("recipe", one_line(error), "correct what it names")]
    else:
        addresses = ",".join(plan.called.values())
        options = channel_options(addresses, tls, tls_ca, tls_cert, tls_key, token_file) if addresses else plan.options
        chosen = {"ranks": ranks, "local_ranks": local_ranks, "like": like, "options": options}
        findings = examine(replace(plan, store=store or plan.store, **chosen), given)
    if show(findings, as_json):
        raise typer.Exit(1)


def show(findings: Iterable[Finding], as_json: bool) -> int:
    """Print the findings as they come; returns how many failed."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    counts = dict.fromkeys(MARKS, 0)
    for finding in findings:
        counts[finding.state] += 1
        if as_json:
            typer.echo(json.dumps(asdict(finding)))
            continue
        mark, style = MARKS[finding.state]
        console.print(mark, style=style, end=" ")
        console.print(f"{finding.check}: {finding.detail}", markup=False)
        if finding.fix:
            console.print(f"    fix: {finding.fix}", style=style, markup=False)
    if not as_json:
        console.print(f"{counts['ok']} fine, {counts['skipped']} not looked at, {counts['failed']} to put right")
    return counts["failed"]


def size_bytes(text: str) -> int:
    """ "80GiB", "80 GB" or "80" (GiB) in bytes; a usage error otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise typer.BadParameter(f"{text!r} is no size; write 80GiB", param_hint="--gpu-memory")
    return int(float(match[1]) * UNITS[match[2].upper()])
