"""Run by test_lease: takes a lease, publishes, stops itself with SIGSTOP at a given moment, and goes on when woken.

Prints one JSON line before it stops and one with what the store answered afterwards.
"""

import json
import os
import signal
import sys
from pathlib import Path

from trimtab.weights.backend import Staged
from trimtab.weights.errors import StoreError
from trimtab.weights.store import open_store


def sleep_before(owner: type, method: str) -> None:
    """Makes this process stop once, just before ``owner.method`` runs."""
    original = getattr(owner, method)

    def stopping(*arguments: object, **named: object) -> object:
        setattr(owner, method, original)
        print(json.dumps({"stopping": method}), flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        return original(*arguments, **named)

    setattr(owner, method, stopping)


def main(url: str, first: Path, second: Path, moment: str) -> None:
    store = open_store(url)
    lease = store.acquire_lease("r", "sleeper", ttl_s=0.5)
    store.publish(first, run_id="r", name="policy", step=1, lease=lease)
    sleepers: dict[str, tuple[type, str]] = {
        "between two publishes": (type(store), "publish"),
        "before the manifest": (staged_class(store.url), "commit"),
        "before the pointer": (type(store._backend), "write"),
        "before a renewal": (type(lease), "renew"),
    }
    sleep_before(*sleepers[moment])
    try:
        if moment == "before a renewal":
            lease.renew()
        store.publish(second, run_id="r", name="policy", step=2, lease=lease)
        answer = "published"
    except StoreError as error:
        answer = type(error).__name__
    try:
        store.set_current("r", "policy", 1, lease=lease)
        moved = "moved"
    except StoreError as error:
        moved = type(error).__name__
    print(json.dumps({"publish": answer, "set_current": moved, "token": lease.token}), flush=True)


def staged_class(url: str) -> type[Staged]:
    from trimtab.weights import local_files, object_files

    return object_files._StagedObjects if url.startswith("s3:") else local_files._StagedFolder


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
