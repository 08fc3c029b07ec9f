"""What can go wrong on a call: one exception class a gRPC code, with the field and the time to retry after."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from trimtab_client.handshakes import explain

_DETAILS_KEY = "grpc-status-details-bin"


class TrimtabError(Exception):
    """A call failed.

    Attributes:
        code: the canonical gRPC code's name, for example "INVALID_ARGUMENT".
        message: what to do about it.
        field: the request field that is wrong, where the server named one.
        retry_after_s: when the server wants to be asked again, where it said so.
    """

    def __init__(
        self, code: str, message: str, *, field: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception must survive the way back from a worker process.
        state = {"field": self.field, "retry_after_s": self.retry_after_s}
        return type(self), (self.code, self.message), state


class InvalidArgument(TrimtabError):
    """The request is wrong; `field` says where."""


class NotFound(TrimtabError):
    """No such run or version."""


class AlreadyExists(TrimtabError):
    """The id is taken by something else."""


class FailedPrecondition(TrimtabError):
    """This server can never do that as it stands."""


class ResourceExhausted(TrimtabError):
    """A queue is full; with `retry_after_s` it may be tried again."""


class Unavailable(TrimtabError):
    """Not reachable, loading or draining."""


class DeadlineExceeded(TrimtabError):
    """The call's deadline passed."""


class DataLoss(TrimtabError):
    """A checksum does not fit."""


class PermissionDenied(TrimtabError):
    """The credentials do not allow it."""


class Unauthenticated(TrimtabError):
    """No valid credentials."""


class Cancelled(TrimtabError):
    """The call was cancelled."""


class Internal(TrimtabError):
    """The server is at fault: it failed, or answered what contradicts itself."""


_CLASSES: dict[grpc.StatusCode, type[TrimtabError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def from_rpc_error(error: grpc.RpcError) -> TrimtabError:
    """The typed exception of a failed call, with what its google.rpc details say.

    Codes without a class of their own (UNKNOWN, UNIMPLEMENTED, ABORTED) become `Internal` with their code's name.
    """
    code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
    message: str = error.details() or code.name.lower()  # type: ignore[attr-defined]
    if code == grpc.StatusCode.UNAVAILABLE:
        message = explain(message)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED and "Deadline Exceeded" in message:  # gRPC's own words, of this side
        message = "no answer came before the call's deadline"
    field, retry_after_s = None, None
    for key, value in error.trailing_metadata() or ():  # type: ignore[attr-defined]
        if key == _DETAILS_KEY:
            field, retry_after_s = _details(value)
    return _CLASSES.get(code, Internal)(code.name, message, field=field, retry_after_s=retry_after_s)


def contradiction(what: str) -> Internal:
    """The error of an answer that cannot be right."""
    return Internal("INTERNAL", f"the server's answer contradicts itself: {what}")


def _details(data: bytes) -> tuple[str | None, float | None]:
    field, retry_after_s = None, None
    try:
        for detail in status_pb2.Status.FromString(data).details:
            bad_request, retry_info = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
            if detail.Unpack(bad_request) and bad_request.field_violations:
                field = bad_request.field_violations[0].field
            elif detail.Unpack(retry_info):
                retry_after_s = retry_info.retry_delay.ToTimedelta().total_seconds()
    except DecodeError:
        # Details only add to code and message; a proxy's unreadable ones must not hide those.
        return field, retry_after_s
    return field, retry_after_s
