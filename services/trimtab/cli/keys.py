"""`trimtab keys`: who may call, as names, roles and hashes in a file that servers read again when it changes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.auditing import AuditFile, open_audit

app = typer.Typer(
    name="keys",
    help="Keys of callers: make, list and revoke them. Servers take `auth.keys_file` of the same file.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

KeysFile = Annotated[Path, typer.Option("--file", envvar="TRIMTAB_AUTH__KEYS_FILE", help="The file of keys.")]
DEFAULT_FILE = Path("keys.yaml")


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Who calls, for example trainer or anna@example.")],
    role: Annotated[list[str], typer.Option(help="score, generate, logprobs, train, label or admin; repeatable.")],
    file: KeysFile = DEFAULT_FILE,
    days: Annotated[float | None, typer.Option(min=0, help="It expires after so many days; default: never.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the token to this new file, which its owner alone can read.")
    ] = None,
    audit_file: AuditFile = None,
) -> None:
    """Make a key and print its token, which is kept nowhere: this is the one time it is shown."""
    from trimtab.cli.errors import CommandError
    from trimtab.runtime.audit import operator
    from trimtab.runtime.keys import add_key

    if out is not None and out.exists():
        raise CommandError(f"{out} exists; a token is never written over another file")
    log = open_audit(audit_file, file.with_suffix(".audit.jsonl"))
    expires = None if days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    key, token = add_key(file, name, role, expires=expires)
    log.act(who=operator(), what="keys add", target=f"{key.name} ({key.id}): {' '.join(key.roles)}")
    until = f" until {key.expires:%Y-%m-%d %H:%M} UTC" if key.expires else ""
    typer.echo(f"{key.name} ({key.id}) may {', '.join(key.roles)}{until}", err=True)
    if out is None:
        typer.echo(token)
    else:
        out.touch(mode=0o600)
        out.write_text(token + "\n")


@app.command("list")
def list_keys(file: KeysFile = DEFAULT_FILE) -> None:
    """List the keys of a file, a line each: id, name, roles, made, expires."""
    from trimtab.runtime.keys import read_keys

    for key in read_keys(file).values():
        expires = "never expires" if key.expires is None else f"expires {key.expires:%Y-%m-%d %H:%M}"
        ended = " (expired)" if key.expired() else ""
        typer.echo(f"{key.id}\t{key.name}\t{','.join(key.roles)}\tmade {key.created:%Y-%m-%d %H:%M}\t{expires}{ended}")


@app.command()
def revoke(
    which: Annotated[str, typer.Argument(metavar="ID|NAME", help="The key's id or name.")],
    file: KeysFile = DEFAULT_FILE,
    audit_file: AuditFile = None,
) -> None:
    """Take a key out of its file; servers refuse it from their next call on."""
    from trimtab.runtime.audit import operator
    from trimtab.runtime.keys import revoke_key

    log = open_audit(audit_file, file.with_suffix(".audit.jsonl"))
    for key in revoke_key(file, which):
        log.act(who=operator(), what="keys revoke", target=f"{key.name} ({key.id})")
        typer.echo(f"revoked {key.name} ({key.id})", err=True)
