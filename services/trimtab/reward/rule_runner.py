"""Runs one rule in processes of its own: a queue in front, a limit on the time of each response behind.

A regular expression that backtracks for ever, or a function that never returns, holds the interpreter it runs in; so
rules have interpreters of their own, which are killed and started again. Only the response at fault fails.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimtab.reward.rules import Response
from trimtab.runtime.errors import ServiceError, StartError, deadline_exceeded, exhausted, internal, unavailable
from trimtab.runtime.logs import get_logger

log = get_logger(__name__)

START_S = 60.0
AT_ONCE = 32
"""Responses that are sent to a process together; it answers them one by one."""


@dataclass
class _Waiting:
    item: Response
    deadline: float | None
    future: asyncio.Future[float]


class RuleRunner:
    """`score` of many calls through a bounded queue. `settings`: a rule's, as JSON; the rest is `RuleSettings`."""

    def __init__(
        self, name: str, settings: Mapping[str, Any], *, timeout_s: float, queue_limit: int, processes: int
    ) -> None:
        self._name = name
        self._settings = json.dumps(settings)
        self._timeout_s = timeout_s
        self._queue_limit = queue_limit
        self._count = processes
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Condition()
        self._pumps: list[asyncio.Task[None]] = []
        self._seconds_per_item = 0.0

    async def start(self) -> None:
        """Start its processes; StartError where the rule cannot be made."""
        first = await asyncio.gather(*(self._spawn() for _ in range(self._count)))
        loop = asyncio.get_running_loop()
        self._pumps = [loop.create_task(self._pump(process), name=f"rule-{self._name}") for process in first]

    async def score(self, items: Sequence[Response], deadline: float | None) -> list[float]:
        """One number a response, in order; `deadline` in `time.monotonic()` seconds.

        RESOURCE_EXHAUSTED with RetryInfo where the queue is full, DEADLINE_EXCEEDED where a response took longer than
        the rule's time-out, INTERNAL where the rule failed.
        """
        if not self._pumps:
            raise unavailable("the server is draining")
        if self._queue and len(self._queue) + len(items) > self._queue_limit:
            raise exhausted(
                f"the queue of scorer {self._name} holds {len(self._queue)} of {self._queue_limit} responses",
                retry_after_s=min(30.0, max(0.1, self._seconds_per_item * len(self._queue))),
            )
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(item, deadline, loop.create_future()) for item in items]
        self._queue.extend(waiting)
        async with self._arrived:
            self._arrived.notify(min(len(items), self._count))
        try:
            return list(await asyncio.gather(*(entry.future for entry in waiting)))
        finally:
            for entry in waiting:
                entry.future.cancel()

    async def close(self) -> None:
        """End its processes; what waits fails with UNAVAILABLE."""
        pumps, self._pumps = self._pumps, []
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for entry in self._queue:
            _settle(entry, unavailable("the server is draining"))
        self._queue.clear()

    async def _pump(self, process: Process | None) -> None:
        batch: list[_Waiting] = []
        try:
            while True:
                async with self._arrived:
                    await self._arrived.wait_for(lambda: len(self._queue) > 0)
                batch = self._take()
                if not batch:
                    continue
                try:
                    if process is None or process.returncode is not None:
                        process = await self._spawn()
                    started_s = time.monotonic()
                    left = await self._run(process, batch)
                    self._seconds_per_item = (time.monotonic() - started_s) / (len(batch) - len(left) or 1)
                except (StartError, OSError) as error:
                    for entry in batch:
                        _settle(entry, unavailable(f"scorer {self._name} cannot be started again: {error}"))
                    continue
                if left:
                    await self._end(process)
                    process = None
                    self._queue.extendleft(reversed(left[1:]))
        finally:
            for entry in batch:
                _settle(entry, unavailable("the server is draining"))
            if process is not None:
                await self._end(process)

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while self._queue and len(batch) < AT_ONCE:
            entry = self._queue.popleft()
            if entry.future.done():
                continue
            if entry.deadline is not None and entry.deadline <= time.monotonic():
                _settle(entry, deadline_exceeded("the deadline passed while the response waited"))
                continue
            batch.append(entry)
        return batch

    async def _run(self, process: Process, batch: list[_Waiting]) -> list[_Waiting]:
        """Score a batch; the rest of it, from the one at fault on, where the process has to end."""
        assert process.stdin is not None and process.stdout is not None
        lines = [json.dumps(asdict(entry.item)) for entry in batch]
        sending = asyncio.get_running_loop().create_task(self._send(process, lines))
        try:
            for position, entry in enumerate(batch):
                try:
                    line = await asyncio.wait_for(process.stdout.readline(), self._timeout_s)
                except TimeoutError:
                    log.warning("rule took too long", scorer=self._name, timeout_s=self._timeout_s)
                    _settle(entry, deadline_exceeded(f"scorer {self._name} took longer than {self._timeout_s:g} s"))
                    return batch[position:]
                if not line.endswith(b"\n"):
                    code = await process.wait()
                    log.warning("rule ended its process", scorer=self._name, exit_code=code)
                    _settle(entry, internal(f"scorer {self._name} ended its process (exit code {code})"))
                    return batch[position:]
                answer = json.loads(line)
                if "error" in answer:
                    _settle(entry, internal(f"scorer {self._name} failed: {answer['error']}"))
                elif not entry.future.done():
                    entry.future.set_result(answer["score"])
        finally:
            sending.cancel()
        return []

    async def _send(self, process: Process, lines: list[str]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write("".join(f"{line}\n" for line in lines).encode())
            await process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            return  # the reader of its answers sees the end too, and says so

    async def _spawn(self) -> Process:
        command = (sys.executable, "-m", "trimtab.reward.rule_process", self._settings)
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_S)
        except TimeoutError:
            line = b""
        answer = json.loads(line) if line.endswith(b"\n") else {"error": "its process did not start"}
        if "error" in answer:
            await self._end(process)
            raise StartError(f"scorers.{self._name}: {answer['error']}")
        return process

    async def _end(self, process: Process) -> None:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _settle(entry: _Waiting, error: ServiceError) -> None:
    if not entry.future.done():
        entry.future.set_exception(error)
