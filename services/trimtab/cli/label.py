"""`trimtab label`: the page where people rank. Commands work on its database, so they need no running server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.auditing import AuditFile, open_audit
from trimtab.cli.errors import CommandError

if TYPE_CHECKING:
    from trimtab.labeling.database import Database
    from trimtab.runtime.audit import AuditLog

app = typer.Typer(
    name="label",
    help="The page where people rank: serve it, make campaigns, add people, import and export. Alone: try it.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
campaigns = typer.Typer(help="Campaigns: what people are asked.", no_args_is_help=True, rich_markup_mode=None)
labelers = typer.Typer(help="The people who label.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(campaigns, name="campaign")
app.add_typer(labelers, name="labeler")

DatabaseUrl = Annotated[
    str, typer.Option("--database", envvar="TRIMTAB_DATABASE", help="SQLite file, or postgresql://user@host/name.")
]
DEFAULT_DATABASE = "runs/labels.sqlite"
CampaignName = Annotated[str, typer.Argument(metavar="CAMPAIGN", help="A campaign's short name.")]


@app.callback(invoke_without_command=True)
def label(
    context: typer.Context,
    demo: Annotated[Path, typer.Option(help="Folder that `trimtab demo` made.")] = Path("runs/demo"),
    port: Annotated[int, typer.Option(help="Port of the page.")] = 7110,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts the try-out samples answers for.")] = 24,
    k: Annotated[int, typer.Option("--answers", "-k", min=2, max=9, help="Answers to rank of each prompt.")] = 4,
) -> None:
    """The page where people rank. Without a command: a campaign on the demo's policy, ready to try."""
    if context.invoked_subcommand is None:
        from trimtab.cli.label_try import try_out

        try_out(demo, port, prompts, k)


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file of the server's settings.")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting.")] = None,
    database: Annotated[str | None, typer.Option(help="SQLite file, or postgresql://user@host/name.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
) -> None:
    """Serve the page and its API until SIGTERM. Settings come from the file, then TRIMTAB_* variables, then flags."""
    from trimtab.cli.settings import merged, parse_assignments
    from trimtab.labeling.config import LabelingConfig
    from trimtab.labeling.server import main
    from trimtab.runtime.config import load_config

    flags: dict[str, Any] = {"database": database, "host": host, "port": port}
    given = {key: value for key, value in flags.items() if value is not None}
    settings = load_config(LabelingConfig, config, merged(parse_assignments(assignments or []), given))
    raise typer.Exit(main(settings))


@campaigns.command("create")
def create(
    name: CampaignName,
    kind: Annotated[str, typer.Option(help="ranking, comparison or demonstration.")] = "ranking",
    title: Annotated[str, typer.Option(help="What people read; the name by default.")] = "",
    guideline: Annotated[Path | None, typer.Option(help="Markdown file that tells people what to go by.")] = None,
    answers: Annotated[int, typer.Option("--answers", "-k", help="Answers to rank of each prompt.")] = 4,
    overlap: Annotated[int, typer.Option(help="How many people judge each task.")] = 1,
    quota: Annotated[int | None, typer.Option(help="Most tasks for one person.")] = None,
    ratings: Annotated[str, typer.Option(help="Ratings 1-7: off, optional or required.")] = "optional",
    flags: Annotated[bool, typer.Option("--flags/--no-flags", help="Ask for InstructGPT's flags.")] = True,
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT[=RUN/NAME@STEP]", help="A generator that answers, and the version it serves."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer; 0: the generator's default.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    file: Annotated[Path | None, typer.Option("--import", help="JSONL rows to begin with.")] = None,
    database: DatabaseUrl = DEFAULT_DATABASE,
) -> None:
    """Make a campaign. With sources, K is shared among them and prompts need no responses."""
    from trimtab.labeling.campaigns import CampaignPlan, SamplingPlan, Source, create_campaign
    from trimtab.labeling.vocabulary import Ask, Kind

    given = source or []
    samples = [1] * len(given) if kind == "comparison" else _shares(answers, len(given))
    parts = [one.partition("=") for one in given]
    plan = CampaignPlan(
        name=name,
        title=title,
        kind=_choice(Kind, kind, "--kind"),
        guideline=guideline.read_text() if guideline else "",
        responses_per_task=answers,
        overlap=overlap,
        quota=quota,
        ratings=_choice(Ask, ratings, "--ratings"),
        ask_flags=flags,
        sources=tuple(Source(a, n, v) for (a, _, v), n in zip(parts, samples, strict=True)),
        sampling=SamplingPlan(max_tokens=max_tokens, temperature=temperature, seed=seed),
    )
    with _open(database) as opened:
        with opened.write() as session:
            create_campaign(session, plan, None, datetime.now(UTC))
        typer.echo(f"campaign {name} is open")
        if file is not None:
            _import(opened, name, file)


@campaigns.command("list")
def list_campaigns(database: DatabaseUrl = DEFAULT_DATABASE) -> None:
    """All campaigns and how far they are."""
    from sqlalchemy import select

    from trimtab.labeling.reports import progress
    from trimtab.labeling.tables import Campaign

    with _open(database) as opened, opened.read() as session:
        for campaign in session.scalars(select(Campaign).order_by(Campaign.created_at)):
            state = progress(session, campaign, datetime.now(UTC))
            facts = f"{state.judgments}/{state.wanted} judged, {state.waiting} waiting, {state.filling} being sampled"
            typer.echo(f"{campaign.name}  {campaign.kind}  {campaign.state}  {facts}")


@campaigns.command("close")
def close(name: CampaignName, database: DatabaseUrl = DEFAULT_DATABASE) -> None:
    """Hand out no more tasks; what was said stays."""
    _set_state(database, name, "closed")


@campaigns.command("open")
def reopen(name: CampaignName, database: DatabaseUrl = DEFAULT_DATABASE) -> None:
    """Hand out tasks again."""
    _set_state(database, name, "open")


@labelers.command("add")
def add(
    name: Annotated[str, typer.Argument(help="The name that they sign in with.")],
    role: Annotated[str, typer.Option(help="labeler, lead or admin.")] = "labeler",
    database: DatabaseUrl = DEFAULT_DATABASE,
    audit_file: AuditFile = None,
) -> None:
    """Add a person; their access token goes to stdout and is not kept."""
    from trimtab.labeling.labelers import add_labeler
    from trimtab.labeling.vocabulary import Role
    from trimtab.runtime.audit import operator

    log = _audit(audit_file, database)
    with _open(database) as opened, opened.write() as session:
        _, token = add_labeler(session, name, _choice(Role, role, "--role"), datetime.now(UTC))
    log.act(who=operator(), what="labeler add", target=f"{name}: {role}")
    typer.echo(token)


@labelers.command("list")
def list_labelers(database: DatabaseUrl = DEFAULT_DATABASE) -> None:
    """Everybody and their roles."""
    from sqlalchemy import select

    from trimtab.labeling.tables import Labeler

    with _open(database) as opened, opened.read() as session:
        for labeler in session.scalars(select(Labeler).order_by(Labeler.name)):
            state = "disabled" if labeler.disabled_at else "active" if labeler.token_hash else "imported"
            typer.echo(f"{labeler.name}  {labeler.role}  {state}")


@labelers.command("token")
def token(
    name: Annotated[str, typer.Argument(help="Whose.")],
    database: DatabaseUrl = DEFAULT_DATABASE,
    audit_file: AuditFile = None,
) -> None:
    """A new access token in place of the old one, which ends at once."""
    from trimtab.labeling.labelers import renew_token
    from trimtab.runtime.audit import operator

    log = _audit(audit_file, database)
    with _open(database) as opened, opened.write() as session:
        fresh = renew_token(session, name)
    log.act(who=operator(), what="labeler token", target=name)
    typer.echo(fresh)


@labelers.command("data")
def data(name: Annotated[str, typer.Argument(help="Whose.")], database: DatabaseUrl = DEFAULT_DATABASE) -> None:
    """Everything kept about a person, as JSON."""
    import json

    from trimtab.labeling.labelers import labeler_data

    with _open(database) as opened, opened.read() as session:
        typer.echo(json.dumps(labeler_data(session, name), ensure_ascii=False, indent=1))


@labelers.command("delete")
def delete(
    name: Annotated[str, typer.Argument(help="Whose.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    database: DatabaseUrl = DEFAULT_DATABASE,
    audit_file: AuditFile = None,
) -> None:
    """Delete a person and all they did."""
    from trimtab.labeling.labelers import delete_labeler
    from trimtab.runtime.audit import operator

    if not yes:
        typer.confirm(f"Delete {name} and every ranking of theirs?", abort=True)
    log = _audit(audit_file, database)
    with _open(database) as opened, opened.write() as session:
        count = delete_labeler(session, name)
    log.act(who=operator(), what="labeler delete", target=name)
    typer.echo(f"{name} and {count} judgments are deleted")


@app.command("import")
def import_file(name: CampaignName, file: Path, database: DatabaseUrl = DEFAULT_DATABASE) -> None:
    """Add JSONL rows to a campaign: prompts, responses to rank, rankings, pairs, demonstrations."""
    with _open(database) as opened:
        _import(opened, name, file)


@app.command()
def export(
    name: CampaignName,
    out: Annotated[Path | None, typer.Option(help="File to write; stdout by default.")] = None,
    resolve: Annotated[bool, typer.Option(help="Only the decision where a lead decided.")] = False,
    database: DatabaseUrl = DEFAULT_DATABASE,
) -> None:
    """Write what people said as JSONL, ready for `trimtab train reward` (or sft, for demonstrations)."""
    from trimtab.labeling.exporting import export_lines

    with _open(database) as opened:
        lines = export_lines(opened, name, resolve=resolve)
        if out is None:
            sys.stdout.writelines(lines)
            return
        partial = out.with_name(out.name + ".partial")
        with partial.open("w", encoding="utf-8") as target:
            count = sum(1 for line in lines if target.write(line))
        partial.replace(out)
    typer.echo(f"{count} rows in {out}")


@app.command()
def feed(name: CampaignName, database: DatabaseUrl = DEFAULT_DATABASE) -> None:
    """Sample answers for all prompts of a campaign that wait for some; a server does so by itself."""
    from trimtab.labeling.feeding import feed_campaign

    with _open(database) as opened:
        report = feed_campaign(opened, name)
    typer.echo(f"{report.ready} tasks ready, {report.identical} with equal answers, {report.short} short of answers")


@app.command()
def results(name: CampaignName, database: DatabaseUrl = DEFAULT_DATABASE) -> None:
    """Agreement, and which version people prefer."""
    from trimtab.labeling.campaigns import find_campaign
    from trimtab.labeling.reports import campaign_agreement
    from trimtab.labeling.win_rates import win_rates

    with _open(database) as opened, opened.read() as session:
        campaign = find_campaign(session, name)
        agreed = campaign_agreement(session, campaign)
        rates = win_rates(session, campaign)
    share = f"{100 * agreed.pairs.share:.1f} %" if agreed.pairs.share is not None else "not known"
    alpha = f"{agreed.rank_alpha:.2f}" if agreed.rank_alpha is not None else "not known"
    typer.echo(f"pairwise agreement {share}, alpha {alpha}, {agreed.shared_tasks} tasks judged by several people")
    for rate in rates:
        interval = f"{100 * rate.rate:.1f} % ({100 * rate.low:.1f} to {100 * rate.high:.1f})"
        counts = f"{rate.wins} won, {rate.ties + rate.identical} tied, {rate.losses} lost on {rate.tasks} tasks"
        typer.echo(f"{rate.challenger or '?'} over {rate.base or '?'}: {interval}; {counts}")


def _audit(given: Path | None, database: str) -> AuditLog:
    return open_audit(given, None if "://" in database else Path(database).with_suffix(".audit.jsonl"))


def _import(database: Database, name: str, file: Path) -> None:
    from trimtab.labeling.importing import import_rows
    from trimtab.labeling.rows import RowError, lines_of, read_rows

    try:
        rows = read_rows(lines_of(file.read_text(encoding="utf-8-sig")))
    except RowError as error:
        raise CommandError(f"{file}:{error.line}: {error}") from error
    report = import_rows(database, name, rows, datetime.now(UTC))
    typer.echo(
        f"{report.tasks} tasks and {report.judgments} judgments added, {report.repeated} rows were there already"
    )


def _set_state(database: str, name: str, state: str) -> None:
    from trimtab.labeling.campaigns import change_campaign

    with _open(database) as opened, opened.write() as session:
        change_campaign(session, name, {"state": state})
    typer.echo(f"campaign {name} is {state}")


@contextmanager
def _open(url: str) -> Iterator[Database]:
    from trimtab.labeling.database import Database

    database = Database(url)
    try:
        database.migrate()
        yield database
    finally:
        database.close()


def _shares(total: int, count: int) -> list[int]:
    """`total` answers shared among `count` sources as evenly as it goes."""
    return [total // count + (i < total % count) for i in range(count)]


def _choice(kind: Any, value: str, flag: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(kind)}", param_hint=flag) from None
