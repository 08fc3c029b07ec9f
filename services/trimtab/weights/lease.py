"""The lease of a run: at most one publisher counts, and whoever lost the lease finds out before it changes anything.

Each holder has a file of its own, ``RUN/.lease/token-000000000007.json``, made only if absent; the highest number
holds the lease. Publishing and moving the pointer under a lease ask for that number at the moment they take effect:

- in a folder, under the lock that taking the lease needs too;
- on S3, taking the lease also rewrites the run's pointers, and a pointer moves only if it is the one that was read
  before the number was asked for, so a holder that slept through both moves nothing. Files that it had
  written become a version that the pointer never reached, which a later holder may replace;
- on other object stores the number is asked for just before the pointer is written: a holder that is stopped between
  these two requests can still move it once.

Expiry is read from clocks, and says only when another may take over. What keeps two publishers apart is the number.
"""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel, ValidationError

from trimtab.weights.backend import Backend, storage_errors
from trimtab.weights.errors import CorruptVersionError, LeaseHeldError, LeaseLostError, StoreUnavailableError
from trimtab.weights.layout import lease_folder, token_name, token_of

_KEPT_TOKENS = 8
_LONGEST_PAUSE_S = 1.0


class LeaseRecord(BaseModel):
    """What a holder's file says; ``nonce`` tells two holders of one name apart."""

    owner: str
    nonce: str
    acquired_at: datetime
    expires_at: datetime
    released: bool = False

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "LeaseRecord":
        """Reads a record. Raises CorruptVersionError naming ``where``."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise CorruptVersionError(f"{where} is not a lease: remove it once no trainer runs") from error

    def to_json(self) -> bytes:
        """The bytes of the record."""
        return self.model_dump_json(indent=2).encode() + b"\n"


class Lease:
    """The right to publish versions of one run. ``token`` grows by one with every holder.

    Methods block; they may be called from any thread. Every one may raise StoreUnavailableError.
    """

    def __init__(self, backend: Backend, run_id: str, token: int, ttl_s: float, record: LeaseRecord) -> None:
        self.run_id = run_id
        self.token = token
        self.ttl_s = ttl_s
        self._backend = backend
        self._record = record
        self._lock = threading.Lock()

    @property
    def owner(self) -> str:
        """The name it was acquired under."""
        return self._record.owner

    @property
    def expires_at(self) -> datetime:
        """When another may take over, unless it is renewed before."""
        return self._record.expires_at

    def check(self) -> None:
        """Returns while nobody else has taken the lease, even if it has expired; raises LeaseLostError otherwise."""
        with storage_errors("reading the lease in", self._backend.url):
            newest = newest_token(self._backend, self.run_id)
        if newest != self.token:
            raise LeaseLostError(self.run_id, self.token, newest)

    def renew(self) -> None:
        """Moves the expiry to ``ttl_s`` from now. Raises LeaseLostError."""
        with self._lock:
            self.check()
            self._write(self._record.model_copy(update={"expires_at": _now() + timedelta(seconds=self.ttl_s)}))
        self.check()

    def release(self) -> None:
        """Lets the next one in at once. A lease that is lost already, or released, stays as it is."""
        with self._lock:
            if not self._record.released:
                self._write(self._record.model_copy(update={"expires_at": _now(), "released": True}))

    @contextmanager
    def kept_alive(self) -> Iterator["Lease"]:
        """Renews in a thread, three times per ``ttl_s``, then releases.

        A store that does not answer, or a lost lease, does not interrupt the work: the next publish tells.
        """
        done = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(done,), name=f"lease-{self.run_id}", daemon=True)
        keeper.start()
        try:
            yield self
        finally:
            done.set()
            keeper.join()
            self.release()

    def _keep(self, done: threading.Event) -> None:
        while not done.wait(self.ttl_s / 3):
            try:
                self.renew()
            except LeaseLostError:
                return
            except StoreUnavailableError:
                continue  # tried again a third of the time to live later

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Nobody takes the lease inside this context, where the storage has locks. Raises LeaseLostError."""
        with self._backend.exclusive(lease_folder(self.run_id)):
            self.check()
            yield

    def _write(self, record: LeaseRecord) -> None:
        with storage_errors("writing the lease in", self._backend.url):
            self._backend.write(f"{lease_folder(self.run_id)}/{token_name(self.token)}", record.to_json())
        self._record = record


def acquire(backend: Backend, run_id: str, owner: str, ttl_s: float, wait_s: float) -> Lease:
    """Takes the lease of a run once it is free, expired, released, or held under the same ``owner``.

    Raises LeaseHeldError if another still holds it after ``wait_s``, ValueError, InvalidNameError, OSError.
    """
    if ttl_s <= 0 or not owner:
        raise ValueError(f"a lease needs an owner and a time to live above 0 s, not {owner!r} and {ttl_s}")
    deadline = time.monotonic() + wait_s
    while True:
        newest = newest_token(backend, run_id)
        holder = live_record(backend, run_id, newest)
        if holder is None or holder.owner == owner:
            lease = _take(backend, run_id, newest + 1, owner, ttl_s)
            if lease is not None:
                return lease
            continue  # another was faster: look again
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise LeaseHeldError(run_id, holder.owner, holder.expires_at)
        expires_in_s = (holder.expires_at - _now()).total_seconds()
        time.sleep(min(left_s, max(expires_in_s, 0.01), _LONGEST_PAUSE_S))


def _take(backend: Backend, run_id: str, token: int, owner: str, ttl_s: float) -> Lease | None:
    folder, now = lease_folder(run_id), _now()
    record = LeaseRecord(
        owner=owner, nonce=uuid.uuid4().hex, acquired_at=now, expires_at=now + timedelta(seconds=ttl_s)
    )
    path = f"{folder}/{token_name(token)}"
    with backend.exclusive(folder):
        try:
            backend.create(path, record.to_json())
        except FileExistsError:  # also after a repeated request whose first answer was lost
            if LeaseRecord.from_json(backend.read(path), path).nonce != record.nonce:
                return None
        if newest_token(backend, run_id) != token:
            return None
        if token > _KEPT_TOKENS:
            backend.remove(f"{folder}/{token_name(token - _KEPT_TOKENS)}")
    return Lease(backend, run_id, token, ttl_s, record)


def newest_token(backend: Backend, run_id: str) -> int:
    """The number of the lease's latest holder, 0 if nobody ever took it."""
    tokens = [token for entry in backend.names(lease_folder(run_id)) if (token := token_of(entry)) is not None]
    return max(tokens, default=0)


def live_record(backend: Backend, run_id: str, token: int) -> LeaseRecord | None:
    """The record of a holder whose lease has neither expired nor been released, None otherwise."""
    if token == 0:
        return None
    path = f"{lease_folder(run_id)}/{token_name(token)}"
    try:
        record = LeaseRecord.from_json(backend.read(path), f"{backend.url}/{path}")
    except FileNotFoundError:  # swept after many later holders
        return None
    return None if record.released or record.expires_at <= _now() else record


def refuse_if_held(backend: Backend, run_id: str) -> None:
    """Raises LeaseHeldError if somebody holds the lease of a run now: publishing there needs it."""
    holder = live_record(backend, run_id, newest_token(backend, run_id))
    if holder is not None:
        raise LeaseHeldError(run_id, holder.owner, holder.expires_at)


def _now() -> datetime:
    return datetime.now(UTC)
