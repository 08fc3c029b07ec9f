"""What a client asks for, apart from how it is sent: both transports, blocking and asyncio, carry out the same.

A `Call` is one request with one answer. A `Program` yields batches of calls and is sent their answers, so that what
needs several steps is written once. A `Stream` is a request with many answers that may be asked for again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from trimtab_client.errors import TrimtabError, contradiction
from trimtab_client.ragged import RaggedError

T = TypeVar("T")

# Fields with one entry a sequence or prompt, as errors name them.
_PLACE = re.compile(
    r"^((?:texts\.items|conversations\.conversations|(?:tokens|conversations)\.references|prompts)\[)(\d+)(?=\])"
)


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and how its answer (or each message of a stream) is read.

    `stub` is the generated stub class, `method` its method; `repeatable` says whether a repeat is harmless. Of a part
    of a larger request `places` are the positions of its sequences or prompts in the whole.
    """

    stub: type
    method: str
    request: Any
    parse: Callable[[Any], T]
    repeatable: bool = True
    places: Sequence[int] | None = None

    def read(self, answer: Any) -> T:
        """The parsed answer; Internal where it contradicts itself."""
        try:
            return self.parse(answer)
        except RaggedError as error:
            raise contradiction(str(error)) from error

    def located(self, error: TrimtabError) -> TrimtabError:
        """The error, with the place that it names in the whole that the caller gave."""
        places, found = self.places, _PLACE.match(error.field or "")
        if places is None or found is None or error.field is None or int(found[2]) >= len(places):
            return error
        field = f"{found[1]}{places[int(found[2])]}{error.field[found.end() :]}"
        message = error.message.replace(error.field, field, 1)
        return type(error)(error.code, message, field=field, retry_after_s=error.retry_after_s)


Program = Generator[Sequence[Call[Any]], list[Any], T]
"""Yields calls, is sent their answers in the calls' order, returns its result."""


class Stream(Protocol[T]):
    """One server stream, and what is still to come of it."""

    def next_call(self) -> Call[T] | None:
        """What to ask for now, at first and after a stream ended or broke; None where nothing more is to come."""
        ...

    def accept(self, item: T) -> T:
        """Note that an item came; returns it as the caller shall see it."""
        ...

    def may_resume(self) -> bool:
        """Whether `next_call` may be sent after the stream broke."""
        ...

    def ended(self) -> None:
        """The server ended the stream; raises where something that was asked for did not come."""
        ...


def ready(result: T) -> Program[T]:
    """A program that needs no call."""
    return result
    yield []
