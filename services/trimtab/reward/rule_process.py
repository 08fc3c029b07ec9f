"""The process that one rule runs in: `python -m trimtab.reward.rule_process SETTINGS`, settings as JSON.

It reads responses as JSON lines from stdin and answers each on its former stdout, one line a response, in order:
{"score": 1.5} or {"error": "…"}; first of all {"ready": true} or {"error": "…"}. What a rule prints goes to stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any, TextIO

from trimtab.reward.rules import Response, checked, make_rule

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until stdin ends; the server's death ends it too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the server's to answer
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        rule = make_rule(json.loads(sys.argv[1]))
    except BaseException as error:
        tell(answers, {"error": reason(error)})
        return
    tell(answers, {"ready": True})
    for line in sys.stdin:
        try:
            answer = {"score": checked(rule(Response(**json.loads(line))))}
        except Exception as error:
            answer = {"error": reason(error)}
        tell(answers, answer)


def tell(answers: TextIO, answer: dict[str, Any]) -> None:
    """One line out, at once."""
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def reason(error: BaseException) -> str:
    """Kind and first line of an error, at most 300 characters."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


if __name__ == "__main__":
    main()
