"""What can go wrong with a store of versions, one class per answer a caller can give.

A service maps these to gRPC codes: VersionNotFoundError to NOT_FOUND, VersionConflictError, LeaseHeldError and
LeaseLostError to FAILED_PRECONDITION, CorruptVersionError to DATA_LOSS, StoreFullError to RESOURCE_EXHAUSTED,
StoreUnavailableError to UNAVAILABLE and the rest to INVALID_ARGUMENT.
"""

from datetime import datetime

from trimtab_client import ModelVersion


class StoreError(Exception):
    """Base of all errors of the store; its message is one line that says what to do."""


class InvalidNameError(StoreError, ValueError):
    """A run id, model name, step, file name or source string that the store does not accept."""


class VersionNotFoundError(StoreError, LookupError):
    """No such version: never published, or pruned since."""


class VersionConflictError(StoreError):
    """The step holds, or would hold, other content than the one asked for.

    ``known`` is the version that the step stands for, where that is what is in the way; its files may be pruned.
    """

    def __init__(self, message: str, known: ModelVersion | None = None) -> None:
        super().__init__(message)
        self.known = known


class StepOrderError(VersionConflictError):
    """A new version must have a larger step than every version published before it."""


class RefusedFileError(StoreError, ValueError):
    """A folder holds something that is never published: pickled weights, a broken safetensors file, a linked folder."""


class CorruptVersionError(StoreError):
    """A version's files are not what its manifest says. It must not be served."""


class ParentMissingError(VersionNotFoundError):
    """A delta has arrived before the version that it is to be applied to."""


class WrongParentError(CorruptVersionError):
    """A delta was made for other content than what it would be applied to."""


class StoreFullError(StoreError):
    """The disk or quota of the store (or of the cache) is full. Nothing visible has changed."""


class StoreUnavailableError(StoreError):
    """The storage did not answer, or denied access. Trying again later may help."""


class LeaseHeldError(StoreError):
    """Another holds the lease of the run: ``owner``, until ``expires_at`` unless it is renewed."""

    def __init__(self, run_id: str, owner: str, expires_at: datetime) -> None:
        super().__init__(
            f"run {run_id} is being published to by {owner}, whose lease ends at {expires_at:%Y-%m-%d %H:%M:%S} UTC "
            "unless renewed: stop that trainer or wait"
        )
        self.owner = owner
        self.expires_at = expires_at


class LeaseLostError(StoreError):
    """Somebody took the lease after this holder, which must publish nothing more. ``token`` is the lost one."""

    def __init__(self, run_id: str, token: int, newest: int) -> None:
        super().__init__(
            f"the lease of run {run_id} was lost: token {token} is stale, {newest} holds it now; stop this trainer"
        )
        self.token = token
