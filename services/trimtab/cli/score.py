"""`trimtab score`: score responses with a running reward model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli.connection import TlsCa, TlsCert, TlsFlag, TlsKey, TokenFile, channel_options
from trimtab.cli.errors import CommandError
from trimtab.cli.rows import read_rows


def score(
    responses: Annotated[list[str] | None, typer.Argument(help="Responses to --prompt; none: JSON rows.")] = None,
    prompt: Annotated[str, typer.Option(help="The prompt that the responses answer.")] = "",
    file: Annotated[
        Path | None,
        typer.Option(
            help='JSONL rows {"prompt", "response"}, {"messages", "response"} or {"messages"} with the answer at their '
            'end, with a "reference" for verifiers; - is stdin.'
        ),
    ] = None,
    address: Annotated[str, typer.Option(help="HOST:PORT of the service; several by commas.")] = "127.0.0.1:7102",
    chat: Annotated[bool, typer.Option("--chat", help="Send --prompt as a chat message of a user.")] = False,
    scorer: Annotated[str, typer.Option(help="Which of the server's scorers; none: its default one.")] = "",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Bitwise the same scores in any company, at a lower rate.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON row a response.")] = False,
    tls: TlsFlag = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Score responses with a running reward model: the raw score, and normalised by its own mean and deviation."""
    from trimtab_client import RewardClient

    asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    rows: list[dict[str, Any]] = [{**asked, "response": text} for text in responses or []]
    rows = rows or read_rows(file, None)
    chats = ["messages" in row for row in rows]
    if any(chats) and not all(chats):
        raise CommandError('either all rows have "messages" or none has')
    options = channel_options(address, tls, tls_ca, tls_cert, tls_key, token_file)
    references = [str(row.get("reference", "")) for row in rows]
    asks: dict[str, Any] = {
        "scorer": scorer,
        "deterministic": deterministic,
        "references": references if any(references) else None,
    }
    with RewardClient(address, options) as client:
        if all(chats):
            scores = client.score_chats([_conversation(row) for row in rows], **asks)
        else:
            scores = client.score_texts([_pair(row) for row in rows], **asks)
    for row, raw, normalized in zip(rows, scores.scores, scores.normalized_scores, strict=True):
        if as_json:
            result = {**row, "score": float(raw), "normalized_score": float(normalized), "version": str(scores.version)}
            typer.echo(json.dumps(result, ensure_ascii=False))
        else:
            shown = row["response"] if "response" in row else row["messages"][-1].get("content", "")
            typer.echo(f"{raw:.4f}\t{normalized:.4f}\t{' '.join(str(shown).split())}")


def _conversation(row: dict[str, Any]) -> list[dict[str, str]]:
    """The row's messages with its response, if it has one of its own (as `trimtab generate --json` writes), behind."""
    answer = [{"role": "assistant", "content": str(row["response"])}] if "response" in row else []
    return [*row["messages"], *answer]


def _pair(row: dict[str, Any]) -> tuple[str, str]:
    if "response" not in row:
        raise CommandError(f'a row needs "prompt" and "response", or "messages"; got the keys {sorted(row)}')
    return str(row.get("prompt", "")), str(row["response"])
