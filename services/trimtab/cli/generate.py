"""`trimtab generate`: sample completions from a running generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.connection import TlsCa, TlsCert, TlsFlag, TlsKey, TokenFile, channel_options
from trimtab.cli.errors import CommandError
from trimtab.cli.rows import read_rows

if TYPE_CHECKING:
    from trimtab_client import Completion


def generate(
    texts: Annotated[list[str] | None, typer.Argument(help="Prompts; none: lines or JSON rows from stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help='JSONL rows {"prompt"} or {"messages"}; - is stdin.')] = None,
    address: Annotated[str, typer.Option(help="HOST:PORT of the generator; several by commas.")] = "127.0.0.1:7101",
    n: Annotated[int, typer.Option(help="Samples of each prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens; 0: the server's default.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends a completion.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same completions.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send texts as chat messages of a user.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON row a completion.")] = False,
    tls: TlsFlag = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Sample completions from a running generator. They are printed in the order of the prompts."""
    from trimtab_client import GeneratorClient, Sampling

    prompts: list[Any] = list(texts or []) or [_prompt(row) for row in read_rows(file, "prompt")]
    if chat:
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    sampling = Sampling(
        n=n, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=tuple(stop or ()), seed=seed
    )
    options = channel_options(address, tls, tls_ca, tls_cert, tls_key, token_file)
    with GeneratorClient(address, options) as client:
        completions = sorted(client.generate(prompts, sampling), key=lambda c: (c.prompt_index, c.sample_index))
    for completion in completions:
        prompt = prompts[completion.prompt_index]
        if as_json:
            typer.echo(json.dumps(_row(prompt, completion), ensure_ascii=False))
        else:
            typer.echo((prompt if isinstance(prompt, str) else "") + completion.text)


def _prompt(row: dict[str, Any]) -> Any:
    for key in ("messages", "prompt"):
        if key in row:
            return row[key]
    raise CommandError(f'a row needs "prompt" or "messages", got the keys {sorted(row)}')


def _row(prompt: Any, completion: Completion) -> dict[str, Any]:
    key = "prompt" if isinstance(prompt, str) else "messages"
    return {
        key: prompt,
        "response": completion.text,
        "sample_index": completion.sample_index,
        "finish_reason": completion.finish_reason,
        "token_ids": completion.token_ids.tolist(),
        "logprobs": completion.logprobs.tolist(),
        "versions": [[str(run.version), run.token_count] for run in completion.versions],
        "seed": completion.seed,
    }
