"""Typed errors of the servers and the one place where they become gRPC statuses.

A handler raises `ServiceError` (or lets a `RaggedError` of the codec through); `calls.CallInterceptor` turns it into a
canonical code with `google.rpc` details: BadRequest names the field, RetryInfo says when to come again. This module
knows nothing of models or stores.
"""

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from trimtab_client.ragged import RaggedError

STATUS_DETAILS_KEY = "grpc-status-details-bin"
LONGEST_MESSAGE_BYTES = 1000
LONGEST_FIELD_BYTES = 300

# What the errors of trimtab.weights and trimtab.models mean to a client; an error's nearest ancestor decides.
NEIGHBOURS = {
    "VersionNotFoundError": StatusCode.NOT_FOUND,
    "VersionConflictError": StatusCode.FAILED_PRECONDITION,
    "LeaseHeldError": StatusCode.FAILED_PRECONDITION,
    "LeaseLostError": StatusCode.FAILED_PRECONDITION,
    "CorruptVersionError": StatusCode.DATA_LOSS,
    "StoreFullError": StatusCode.RESOURCE_EXHAUSTED,
    "StoreUnavailableError": StatusCode.UNAVAILABLE,
    "StoreError": StatusCode.INVALID_ARGUMENT,
    "ModelLoadError": StatusCode.FAILED_PRECONDITION,
}


class ServiceError(Exception):
    """A refusal with a canonical code, what to do about it, and where known the field and a time to retry after.

    `field` names the request's field with dots ("tokens.lengths"); `retry_after_s` travels as RetryInfo.
    """

    def __init__(
        self, code: StatusCode, message: str, *, field: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


def invalid(field: str, message: str) -> ServiceError:
    """INVALID_ARGUMENT for one field of the request."""
    return ServiceError(StatusCode.INVALID_ARGUMENT, f"{field}: {message}", field=field)


def exhausted(message: str, *, retry_after_s: float | None) -> ServiceError:
    """RESOURCE_EXHAUSTED; with None it must not be retried, with seconds it may be."""
    return ServiceError(StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=retry_after_s)


def precondition(message: str, *, field: str | None = None) -> ServiceError:
    """FAILED_PRECONDITION: this server can never do that as it stands."""
    return ServiceError(StatusCode.FAILED_PRECONDITION, message, field=field)


def unavailable(message: str, *, retry_after_s: float = 1.0) -> ServiceError:
    """UNAVAILABLE: come again, here or at another replica."""
    return ServiceError(StatusCode.UNAVAILABLE, message, retry_after_s=retry_after_s)


def deadline_exceeded(message: str) -> ServiceError:
    """DEADLINE_EXCEEDED: the work was dropped before it was computed."""
    return ServiceError(StatusCode.DEADLINE_EXCEEDED, message)


def data_loss(message: str) -> ServiceError:
    """DATA_LOSS: a checksum or a file's content is wrong."""
    return ServiceError(StatusCode.DATA_LOSS, message)


def not_found(message: str, *, field: str | None = None) -> ServiceError:
    """NOT_FOUND: no such version, run or file."""
    return ServiceError(StatusCode.NOT_FOUND, message, field=field)


def internal(message: str) -> ServiceError:
    """INTERNAL: the server (or its model) is at fault, and the caller should know how."""
    return ServiceError(StatusCode.INTERNAL, message)


class StartError(Exception):
    """A server that cannot start: port in use, unreadable certificate. The message is one line for the operator."""


def as_service_error(error: Exception) -> ServiceError | None:
    """The refusal that an exception stands for, or None where it is a defect of ours.

    Errors of the store and of model loading are known by class name: runtime imports neither room.
    """
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, RaggedError):
        return invalid(error.field, str(error))
    for ancestor in type(error).__mro__:
        if ancestor.__name__ in NEIGHBOURS and ancestor.__module__.startswith("trimtab."):
            retry_after_s = 1.0 if ancestor.__name__ == "StoreUnavailableError" else None
            return ServiceError(NEIGHBOURS[ancestor.__name__], str(error), retry_after_s=retry_after_s)
    return None


def status_details(error: ServiceError) -> bytes | None:
    """The serialised `google.rpc.Status` of an error, or None where it has no details."""
    details: list[any_pb2.Any] = []
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    if not details:
        return None
    return status_pb2.Status(code=error.code.value[0], message=error.message, details=details).SerializeToString()


async def abort(context: grpc.aio.ServicerContext, error: ServiceError) -> None:
    """End the call with the error's status and details; always raises.

    A message that repeats a long input is cut: a status travels in headers, of which peers take 8 KiB.
    """
    short = ServiceError(
        error.code,
        cut(error.message),
        field=None if error.field is None else cut(error.field, LONGEST_FIELD_BYTES),
        retry_after_s=error.retry_after_s,
    )
    details = status_details(short)
    trailing = ((STATUS_DETAILS_KEY, details),) if details is not None else ()
    await context.abort(short.code, short.message, trailing)


def cut(text: str, most_bytes: int = LONGEST_MESSAGE_BYTES) -> str:
    """Text of at most so many bytes of UTF-8, with … where its end was cut."""
    data = text.encode("utf-8", "replace")
    return text if len(data) <= most_bytes else data[: most_bytes - 3].decode("utf-8", "ignore") + "…"


def _packed(message: error_details_pb2.BadRequest | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
