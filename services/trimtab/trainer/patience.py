"""Waiting for a service that is away: the reason goes on screen, what came so far is kept, and there is a deadline.

A service that comes back within its time delays a run and changes nothing else. One that does not ends the run, which
can be started again from where it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from trimtab.trainer.run import RunFailedError
from trimtab_client.errors import DeadlineExceeded, TrimtabError
from trimtab_client.retries import FIRST_DELAY_S, may_repeat

T = TypeVar("T")
LONGEST_DELAY_S = 1.0


class ServiceLostError(RunFailedError):
    """A service did not come back in time; what it had answered so far is kept."""


@dataclass(frozen=True)
class Patience:
    """Tries again for up to `timeout_s` without progress.

    Attributes:
        say: told (service, why it is waited for), once for each reason, and "" when it goes on.
    """

    timeout_s: float
    say: Callable[[str, str], None]

    async def until_answered(
        self, service: str, attempt: Callable[[], Awaitable[T]], progress: Callable[[], int] = lambda: 0
    ) -> T:
        """What `attempt` returns, at last; `service` is its name and address for people.

        `progress` is a number that grows while parts of the answer come in.

        Raises:
            ServiceLostError: no answer and no progress in time.
            TrimtabError: an answer that trying again does not change.
        """
        away_since: float | None = None
        told, delay_s = "", FIRST_DELAY_S
        while True:
            before = progress()
            try:
                answer = await attempt()
            except TrimtabError as error:
                moved, now = progress() != before, time.monotonic()
                if not (may_repeat(error) or isinstance(error, DeadlineExceeded)):
                    raise
                if moved or away_since is None:
                    away_since, delay_s = now, FIRST_DELAY_S
                if now - away_since >= self.timeout_s or (isinstance(error, DeadlineExceeded) and not moved):
                    raise ServiceLostError(
                        f"the {service} did not answer within {self.timeout_s:g} s ({error}); nothing is lost: once it "
                        "serves, start the run again with the same run id and config, and it goes on"
                    ) from error
                reason = f"waiting for the {service}, {self.timeout_s:g} s at most: {error}"
                if reason != told:
                    told = reason
                    self.say(service, reason)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, LONGEST_DELAY_S)
            else:
                if told:
                    self.say(service, "")
                return answer
