"""How threads of one process take turns while one of them makes a version ready beside the one that samples.

Sampling gives the interpreter away in every one of a step's thousand operations, and a thread that runs plain Python
keeps it for the interpreter's switch interval, 5 ms as a rule: a step could take seconds. vLLM's worker imports it too.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

TURN_S = 2e-5


@contextmanager
def quick_turns() -> Iterator[None]:
    """Within the block (one at a time), every thread that asks for the interpreter gets it at once, or nearly so."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)
