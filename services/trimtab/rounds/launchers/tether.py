"""Tie a process to its parent, then become the command: `python tether.py PARENT_PID COMMAND…`.

The kernel kills the process the moment its parent is gone, even if the parent was SIGKILLed and could
tidy up nothing (Linux PR_SET_PDEATHSIG, which survives exec). It is a script of its own, because running
Python between fork and exec inside a parent with threads can deadlock. Elsewhere than on Linux it only execs.

The command finds its own process id in TETHERED_PID, and so do its children: they see whether it is still their parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> int:
    """Exec argv[2:]; returns 1 if the parent died before the tie was made."""
    parent_pid = int(sys.argv[1])
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        return 1
    os.environ["TETHERED_PID"] = str(os.getpid())
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
