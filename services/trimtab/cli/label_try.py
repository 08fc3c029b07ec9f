"""`trimtab label` alone: a generator with the demo's policy, a campaign on it, the page, and a link to sign in with."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import typer

from trimtab.cli.errors import CommandError

if TYPE_CHECKING:
    from trimtab.labeling.database import Database

CAMPAIGN = "try"
NAME = "you"
POLICIES = ("demo-ppo", "demo-sft")
GUIDELINE = (
    "Each task is the beginning of a story and several ways to go on with it, written by the small model of the demo. "
    "Rank them: which would you rather read to a child? The demo's people preferred **cheerful** texts."
)


def try_out(demo: Path, port: int, prompts: int, k: int) -> None:
    """Serve the try-out until ctrl-C. CommandError where there is no demo to try."""
    from trimtab.cli.signals import sigterm_interrupts
    from trimtab.labeling.config import LabelingConfig
    from trimtab.labeling.database import Database
    from trimtab.labeling.server import main
    from trimtab.rounds.launchers.local import Supervisor
    from trimtab.rounds.launchers.services import service_process

    version, openings = _policy(demo), _openings(demo, prompts)
    folder = demo / "label"
    settings = {"store": str(demo / "store"), "model": f"version:{version}"}
    with sigterm_interrupts(), Supervisor() as supervisor:
        spec = service_process("generator", settings, folder / "services", threads=1, name="generator")
        supervisor.add(spec)
        supervisor.wait_ready(spec.name)
        path = str(folder / "labels.sqlite")
        database = Database(path)
        database.migrate()
        token = _prepare(database, spec.address, openings, k)
        database.close()
        typer.echo(f"Answers come from {version}. Open this page, and stop with ctrl-C:\n")
        typer.echo(f"  http://127.0.0.1:{port}/sign-in#name={NAME}&token={quote(token)}\n")
        main(LabelingConfig(database=path, port=port, log_level="warning"))
    typer.echo(f"\nYour rankings: trimtab label export {CAMPAIGN} --database {path}")


def _prepare(database: Database, address: str, openings: list[str], k: int) -> str:
    """The person and the campaign of the try-out, those of an earlier one where they are; returns a new token."""
    from sqlalchemy import update

    from trimtab.labeling.campaigns import CampaignPlan, SamplingPlan, Source, create_campaign
    from trimtab.labeling.errors import ConflictError
    from trimtab.labeling.importing import import_rows
    from trimtab.labeling.labelers import add_labeler, renew_token
    from trimtab.labeling.rows import task_row
    from trimtab.labeling.tables import Campaign
    from trimtab.labeling.vocabulary import Role

    now = datetime.now(UTC)
    with database.write() as session:
        try:
            _, token = add_labeler(session, NAME, Role.ADMIN, now)
        except ConflictError:
            token = renew_token(session, NAME)
        source = Source(address, k)
        plan = CampaignPlan(
            CAMPAIGN,
            title="Stories of the demo's policy",
            guideline=GUIDELINE,
            responses_per_task=k,
            sources=(source,),
            sampling=SamplingPlan(max_tokens=96),
        )
        try:
            create_campaign(session, plan, None, now)
        except ConflictError:  # the generator of today has another port
            again = [{"address": address, "samples": k, "version": ""}]
            session.execute(update(Campaign).where(Campaign.name == CAMPAIGN).values(sources=again))
    import_rows(database, CAMPAIGN, [task_row({"prompt": opening}) for opening in openings], now)
    return token


def _policy(demo: Path) -> str:
    from trimtab.weights.store import open_store

    if (demo / "store").is_dir():
        store = open_store(str(demo / "store"))
        for run in POLICIES:
            versions = store.versions(run, "policy")
            if versions:
                return str(versions[-1].version)
    raise CommandError(f"{demo} holds no demo: run `trimtab demo` first, or give its folder with --demo")


def _openings(demo: Path, count: int) -> list[str]:
    path = demo / "data" / "evaluation" / "openings.jsonl"
    if not path.is_file():
        raise CommandError(f"{path} is not there: run `trimtab demo` again")
    return [json.loads(line)["prompt"] for line in path.read_bytes().splitlines()[:count]]
