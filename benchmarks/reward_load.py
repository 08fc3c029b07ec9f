"""Load on a reward server: so many clients, each sending its next text as its last one is answered.

    python -m benchmarks.reward_load --dialect trimtab --address 127.0.0.1:7102 --texts texts.jsonl --clients 64

It prints one JSON object: requests a second, p50 and p99 of the latency in milliseconds, and the scores by text. The
HTTP dialects go over one kept-alive connection a client, written by hand so that the client costs next to nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

Ask = Callable[[str], Awaitable[float]]


@dataclass(frozen=True)
class LoadRun:
    """One closed loop. Latencies in milliseconds; `client_cores`: what the clients kept busy themselves.

    `requests` are those that were measured, `all_requests` also those of the warm-up.
    """

    clients: int
    requests: int
    all_requests: int
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    client_cores: float
    scores: dict[str, float]


class HttpClient:
    """HTTP/1.1 on one connection: POST a JSON body, read the JSON answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
        self._reader = reader
        self._writer = writer
        self._path = path

    async def post(self, body: dict) -> dict:
        payload = json.dumps(body).encode()
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
        )
        self._writer.write(head.encode() + b"\r\n\r\n" + payload)
        answer_head = await self._reader.readuntil(b"\r\n\r\n")
        if not answer_head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer_head.decode().splitlines()[0])
        size = next(line for line in answer_head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return json.loads(await self._reader.readexactly(int(size.partition(b":")[2])))


async def open_client(dialect: str, address: str, model: str, stack: AsyncExitStack) -> Ask:
    """A client of its own; `ask(text)` is the text's score."""
    if dialect == "trimtab":
        from trimtab_client import AsyncRewardClient

        client = await stack.enter_async_context(AsyncRewardClient(address))

        async def ask(text: str) -> float:
            return float((await client.score_texts([("", text)])).scores[0])

        return ask
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    stack.callback(writer.close)
    if dialect == "openrlhf":
        http = HttpClient(reader, writer, "/get_reward")

        async def ask_openrlhf(text: str) -> float:
            return float((await http.post({"query": [text]}))["rewards"][0])

        return ask_openrlhf
    http = HttpClient(reader, writer, "/classify")

    async def ask_vllm(text: str) -> float:
        answer = await http.post({"model": model, "input": text, "use_activation": False})
        return float(answer["data"][0]["probs"][0])

    return ask_vllm


async def run_load(
    dialect: str, address: str, model: str, texts: list[str], *, clients: int, seconds: float, warm_up_s: float
) -> LoadRun:
    """Warm up, then measure for `seconds`."""
    latencies_ms: list[float] = []
    scores: dict[str, float] = {}
    turn = itertools.cycle(range(len(texts)))
    begins = ends = 0.0
    asked = [0]

    async def one(ask: Ask) -> None:
        while (sent := time.perf_counter()) < ends:
            index = next(turn)
            score = await ask(texts[index])
            done = time.perf_counter()
            asked[0] += 1
            if begins <= done <= ends:
                latencies_ms.append((done - sent) * 1e3)
                scores[str(index)] = score

    async def cpu() -> float:
        await asyncio.sleep(warm_up_s)
        before = time.process_time()
        await asyncio.sleep(seconds)
        return (time.process_time() - before) / seconds

    async with AsyncExitStack() as stack:
        asks = [await open_client(dialect, address, model, stack) for _ in range(clients)]
        begins = time.perf_counter() + warm_up_s
        ends = begins + seconds
        cores, *_ = await asyncio.gather(cpu(), *(one(ask) for ask in asks))
    if not latencies_ms:
        raise RuntimeError(f"no request of {clients} clients ended within {seconds} s")
    p50, p99 = np.percentile(latencies_ms, [50, 99])
    count = len(latencies_ms)
    return LoadRun(clients, count, asked[0], count / seconds, float(p50), float(p99), cores, scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialect", choices=["trimtab", "openrlhf", "vllm"], required=True)
    parser.add_argument("--address", required=True, help="HOST:PORT")
    parser.add_argument("--model", default="", help="what vLLM calls its model")
    parser.add_argument("--texts", type=Path, required=True, help="JSONL, a text a line")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--warm-up", type=float, default=1.0)
    args = parser.parse_args()
    texts = [json.loads(line) for line in args.texts.read_text().splitlines()]
    load = run_load(
        args.dialect,
        args.address,
        args.model,
        texts,
        clients=args.clients,
        seconds=args.seconds,
        warm_up_s=args.warm_up,
    )
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    print(json.dumps(asdict(asyncio.run(load))))


if __name__ == "__main__":
    main()
