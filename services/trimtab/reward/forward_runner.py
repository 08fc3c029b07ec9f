"""A reward model in a process of its own, seen from the server: started, asked, ended.

What the process does is forward_process.py's.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import weakref
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from trimtab.models.errors import ModelLoadError
from trimtab.reward.forward_messages import Failure, ModelFacts, Order, Work
from trimtab.runtime.errors import unavailable
from trimtab.runtime.server import ServerContext

END_S = 5.0


class ProcessForward:
    """A `Forward` whose model is in another process, which ends when this is closed or nobody holds it any more.

    Made by `start`.
    """

    def __init__(self, connection: Connection, process: Process) -> None:
        self._connection = connection  # closes when it is collected
        self._process = process

    @classmethod
    async def start(cls, order: Order, context: ServerContext) -> tuple[ModelFacts, ProcessForward]:
        """Load the model in a new process. Raises ModelLoadError.

        Where the process ends by itself later, the server drains and ends too, for another to be started.
        """
        ours, theirs = socket.socketpair()
        command = (sys.executable, "-m", "trimtab.reward.forward_process", str(theirs.fileno()))
        with ours, theirs:
            process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, pass_fds=(theirs.fileno(),))
            forward = cls(Connection(ours.detach()), process)
        try:
            facts = await asyncio.to_thread(forward._ask, order)
        except (EOFError, ConnectionError) as error:
            await forward.close()  # it may still be writing why
            reason = f"{order.path_or_id}: its process ended with code {process.returncode}"
            raise ModelLoadError("model", reason) from error
        except BaseException:
            if process.returncode is None:
                process.kill()  # what waits for its answer is woken by the end of the socket
            await process.wait()
            raise
        if isinstance(facts, Failure):
            await forward.close()
            raise ModelLoadError(facts.field, facts.reason)
        context.background(_watch(weakref.ref(forward), process, order, context), name="forward-process")
        return facts, forward

    @property
    def is_closed(self) -> bool:
        """Whether it was let go."""
        return self._connection.closed

    def score(self, sequences: Sequence[np.ndarray], *, alone: bool) -> np.ndarray:
        """See `Forward`; the interpreter is free while it waits. UNAVAILABLE where the process has ended."""
        try:
            answer = self._ask(Work(list(sequences), alone))
        except (EOFError, OSError) as error:
            raise unavailable("the model's process has ended") from error
        if isinstance(answer, Failure):
            raise RuntimeError(answer.reason)
        return answer

    async def close(self) -> None:
        """Close the socket and see the process end. Nothing may be asked any more."""
        self._connection.close()
        try:
            await asyncio.wait_for(self._process.wait(), END_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _ask(self, question: Order | Work) -> Any:
        self._connection.send(question)
        return self._connection.recv()


async def _watch(held: weakref.ref[ProcessForward], process: Process, order: Order, context: ServerContext) -> None:
    code = await process.wait()
    forward = held()
    if forward is not None and not forward.is_closed:
        context.fail(f"the process of {order.path_or_id} ended with code {code}")
