"""How commands fail: one clear line on stderr for what a user can put right, a traceback for what is a bug."""

from __future__ import annotations

import os
import sys

OWN_PACKAGES = frozenset({"trimtab", "trimtab_client"})


class CommandError(Exception):
    """A command cannot do what was asked; the message is one line that says what to change."""


def is_expected(error: BaseException) -> bool:
    """Whether the message of `error` alone tells the user enough.

    True for every exception class of trimtab itself (they are raised at boundaries and say what to do) and
    for files and sockets that the system refuses.
    """
    own = type(error).__module__.partition(".")[0] in OWN_PACKAGES
    return own or isinstance(error, OSError)


def one_line(error: BaseException) -> str:
    """The message without line breaks; the class name where there is no message."""
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return named
    return " ".join(str(error).split()) or type(error).__name__


def exit_with(error: Exception) -> None:
    """Exit 1 with one line for an expected error; raise any other, and all with TRIMTAB_DEBUG=1."""
    if os.environ.get("TRIMTAB_DEBUG") == "1" or not is_expected(error):
        raise error
    print(f"trimtab: {one_line(error)}", file=sys.stderr)
    sys.exit(1)
