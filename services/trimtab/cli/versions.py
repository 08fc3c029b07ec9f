"""`trimtab versions`: what a store holds, and what people do with it by hand.

Works on the store itself, so no service need run; services that follow a model see a moved pointer by themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.auditing import AuditFile, open_audit
from trimtab.cli.errors import CommandError

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.weights.manifest import Manifest
    from trimtab.weights.store import Store

DEFAULT_STORE = "./runs/store"
_PIPED_WIDTH = 200  # rich would fold tables at 80 columns where there is no terminal

app = typer.Typer(
    name="versions",
    help="Published versions of models: list, check, roll back, keep, prune, copy out.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

StoreUrl = Annotated[
    str, typer.Option("--store", envvar="TRIMTAB_STORE", help="Folder or fsspec URL (s3://bucket/path) of the store.")
]
Model = Annotated[str, typer.Argument(metavar="RUN/NAME", help="A model, for example run-1/policy.")]
Version = Annotated[
    str, typer.Argument(metavar="RUN/NAME[@STEP]", help="A version, for example run-1/policy@40; current by default.")
]
ExactVersion = Annotated[str, typer.Argument(metavar="RUN/NAME@STEP", help="A version, for example run-1/policy@40.")]


@app.command("list")
def list_versions(
    model: Annotated[
        str, typer.Argument(metavar="[RUN[/NAME]]", help="Only this run, or this model of it.", show_default=False)
    ] = "",
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """List versions by run, model and step; an arrow marks the current one, * a pinned one."""
    opened = _open(store)
    run_id, _, name = model.partition("/")
    manifests = opened.versions(run_id or None, name or None)
    if not manifests:
        raise CommandError(f"no versions{f' of {model}' if model else ''} in {store}")
    models = {(manifest.version.run_id, manifest.version.name) for manifest in manifests}
    current = {opened.current_version(*model) for model in models}
    pinned = {(*model, step) for model in models for step in opened.pinned_steps(*model)}
    table = _table("", "version", "size", "published (UTC)", "digest", "metrics")
    for manifest in manifests:
        version = manifest.version
        is_pinned = (version.run_id, version.name, version.step) in pinned
        table.add_row(
            f"{'→' if version in current else ' '}{'*' if is_pinned else ' '}",
            str(version),
            _size(manifest),
            f"{manifest.created_at:%Y-%m-%d %H:%M:%S}",
            version.digest.removeprefix("blake3:")[:12],
            _numbers(manifest, limit=4),
        )
    _print(table)


@app.command()
def show(
    version: Version,
    store: StoreUrl = DEFAULT_STORE,
    as_json: Annotated[bool, typer.Option("--json", help="The manifest as JSON.")] = False,
) -> None:
    """Show one version: digest, lineage, metrics and files."""
    opened = _open(store)
    manifest = _find(opened, version)
    if as_json:
        typer.echo(manifest.to_json().decode(), nl=False)
        return
    model = (manifest.version.run_id, manifest.version.name)
    is_current = opened.current_version(*model) == manifest.version
    is_pinned = manifest.version.step in opened.pinned_steps(*model)
    facts = _table("version", str(manifest.version))
    facts.add_row("digest", manifest.version.digest)
    facts.add_row("published", f"{manifest.created_at:%Y-%m-%d %H:%M:%S} UTC")
    facts.add_row("kind", manifest.kind)
    facts.add_row("current", "yes" if is_current else "no")
    facts.add_row("pinned", "yes" if is_pinned else "no")
    if manifest.parent:
        facts.add_row("parent", manifest.parent)
    for key, value in sorted(manifest.lineage.items()):
        facts.add_row(f"lineage {key}", value)
    for key, number in sorted(manifest.metrics.items()):
        facts.add_row(f"metric {key}", f"{number:.6g}")
    files = _table("file", "size", "digest")
    for entry in manifest.files:
        files.add_row(entry.name, _bytes(entry.size_bytes), entry.digest)
    files.add_row(f"{len(manifest.files)} files", _size(manifest), "")
    _print(facts, files)


@app.command()
def verify(
    version: Annotated[
        str, typer.Argument(metavar="[RUN/NAME[@STEP]]", help="One version; all of the store by default.")
    ] = "",
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Read every byte of one version, or of all, and compare with what was published. Exits 1 if any differs."""
    from trimtab.weights.errors import CorruptVersionError

    opened = _open(store)
    manifests = [_find(opened, version)] if version else opened.versions()
    damaged = 0
    for manifest in manifests:
        try:
            opened.verify(manifest)
        except CorruptVersionError as error:
            damaged += 1
            typer.echo(f"DAMAGED  {error}")
        else:
            typer.echo(f"ok       {manifest.version}  {_size(manifest)}")
    if damaged:
        raise CommandError(f"{damaged} of {len(manifests)} versions are damaged: roll back to a whole one")


@app.command()
def rollback(version: Version, store: StoreUrl = DEFAULT_STORE, audit_file: AuditFile = None) -> None:
    """Make an earlier version current, the one before the current by default. It is verified first."""
    from trimtab.runtime.audit import operator
    from trimtab.weights.sources import parse_reference

    opened = _open(store)
    log = open_audit(audit_file, None if "://" in store else Path(store) / ".audit.jsonl")
    reference = parse_reference(version)
    before = opened.current_version(reference.run_id, reference.name)
    step = reference.step
    if step is None:
        if before is None:
            raise CommandError(f"{reference} has no current version in {store}: name a step, RUN/NAME@STEP")
        earlier = [m for m in opened.versions(reference.run_id, reference.name) if m.version.step < before.step]
        if not earlier:
            raise CommandError(f"there is no version of {reference} before step {before.step}")
        step = earlier[-1].version.step
    manifest = opened.verify(opened.get(reference.run_id, reference.name, step))
    opened.set_current(reference.run_id, reference.name, step)
    log.act(who=operator(), what="versions rollback", target=f"{manifest.version} in {store}")
    was = f" (was @{before.step})" if before else ""
    typer.echo(f"current is {manifest.version}{was}")


@app.command()
def pin(
    version: ExactVersion,
    store: StoreUrl = DEFAULT_STORE,
    reason: Annotated[str, typer.Option(help="Why, for those who find the pin later.")] = "",
) -> None:
    """Keep a version for good: prune passes it over."""
    opened = _open(store)
    found = _find_exact(opened, version).version
    opened.pin(found.run_id, found.name, found.step, reason)
    typer.echo(f"pinned {found}")


@app.command()
def unpin(version: ExactVersion, store: StoreUrl = DEFAULT_STORE) -> None:
    """Give a pinned version back to retention."""
    opened = _open(store)
    found = _find_exact(opened, version).version
    opened.unpin(found.run_id, found.name, found.step)
    typer.echo(f"unpinned {found}")


@app.command()
def prune(
    model: Model,
    store: StoreUrl = DEFAULT_STORE,
    keep_last: Annotated[int, typer.Option(min=1, help="How many of the newest to keep.")] = 3,
    best_metric: Annotated[str | None, typer.Option(help="Keep the best by this metric, too.")] = None,
    keep_best: Annotated[int, typer.Option(min=1, help="How many of the best to keep.")] = 1,
    lower_is_better: Annotated[bool, typer.Option(help="The best has the lowest value of the metric.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only say what would go.")] = False,
) -> None:
    """Remove old versions. The newest, the current, the pinned and the best stay."""
    from trimtab.weights.sources import parse_reference

    reference = parse_reference(model)
    if reference.step is not None:
        raise CommandError(f"prune works on a model, not on one version: write {reference.run_id}/{reference.name}")
    gone = _open(store).prune(
        reference.run_id,
        reference.name,
        keep_last,
        best_metric=best_metric,
        keep_best=keep_best,
        higher_is_better=not lower_is_better,
        dry_run=dry_run,
    )
    for manifest in gone:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {manifest.version}  {_size(manifest)}")
    if not gone:
        typer.echo("nothing to remove")


@app.command()
def pull(
    version: Version,
    folder: Annotated[Path, typer.Argument(help="A new folder; it holds what from_pretrained needs.")],
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Copy a version out of the store, verified, as a plain Hugging Face folder; an adapter as peft's."""
    opened = _open(store)
    manifest = opened.pull(_find(opened, version), folder)
    typer.echo(f"{manifest.version} is in {folder}  {_size(manifest)}")


@app.command()
def merge(
    version: Version,
    folder: Annotated[Path, typer.Argument(help="A new folder; it holds what from_pretrained needs.")],
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Copy a version out of the store, an adapter merged into its base, as a plain Hugging Face folder."""
    opened = _open(store)
    manifest = opened.merge(_find(opened, version), folder)
    base = f", merged into {manifest.parent}" if manifest.kind == "adapter" else ""
    typer.echo(f"{manifest.version} is in {folder}{base}")


def _open(url: str) -> Store:
    from trimtab.weights.store import open_store

    return open_store(url)


def _find(store: Store, version: str) -> Manifest:
    from trimtab.weights.sources import parse_reference, resolve_reference

    return resolve_reference(parse_reference(version.removeprefix("version:")), store)


def _find_exact(store: Store, version: str) -> Manifest:
    if "@" not in version:
        raise CommandError(f"{version} names no step: write {version}@STEP")
    return _find(store, version)


def _numbers(manifest: Manifest, limit: int) -> str:
    numbers = [f"{key}={number:.4g}" for key, number in sorted(manifest.metrics.items())]
    return " ".join(numbers[:limit]) + (" …" if len(numbers) > limit else "")


def _size(manifest: Manifest) -> str:
    return _bytes(manifest.size_bytes)


def _bytes(size: int) -> str:
    from rich.filesize import decimal

    return decimal(size)


def _table(*headers: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header == "size" else "left", overflow="fold")
    return table


def _print(*tables: Table) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=_PIPED_WIDTH)
    for table in tables:
        console.print(table)
