"""What an exception becomes on the wire."""

import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from trimtab.models.errors import ModelLoadError
from trimtab.runtime import errors
from trimtab.weights import errors as store_errors
from trimtab_client.ragged import RaggedError


def unpacked(error: errors.ServiceError) -> tuple[status_pb2.Status, dict[str, object]]:
    status = status_pb2.Status.FromString(errors.status_details(error) or b"")
    found = {}
    for detail in status.details:
        for kind in (error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if detail.Is(kind.DESCRIPTOR):
                found[kind.__name__] = kind.FromString(detail.value)
    return status, found


def test_an_invalid_field_travels_as_a_field_violation():
    status, found = unpacked(errors.invalid("tokens.lengths", "the batch is empty"))
    assert status.code == StatusCode.INVALID_ARGUMENT.value[0]
    assert found["BadRequest"].field_violations[0].field == "tokens.lengths"
    assert "RetryInfo" not in found


def test_the_time_to_retry_travels_as_retry_info():
    _, found = unpacked(errors.exhausted("full", retry_after_s=1.25))
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == 1250


def test_an_error_without_details_sends_none():
    assert errors.status_details(errors.exhausted("too large for ever", retry_after_s=None)) is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (store_errors.VersionNotFoundError("x"), StatusCode.NOT_FOUND),
        (store_errors.VersionConflictError("x"), StatusCode.FAILED_PRECONDITION),
        (store_errors.StepOrderError("x"), StatusCode.FAILED_PRECONDITION),
        (store_errors.CorruptVersionError("x"), StatusCode.DATA_LOSS),
        (store_errors.StoreFullError("x"), StatusCode.RESOURCE_EXHAUSTED),
        (store_errors.StoreUnavailableError("x"), StatusCode.UNAVAILABLE),
        (store_errors.InvalidNameError("x"), StatusCode.INVALID_ARGUMENT),
        (ModelLoadError("weights", "x"), StatusCode.FAILED_PRECONDITION),
        (RaggedError("lengths", "x"), StatusCode.INVALID_ARGUMENT),
        (errors.internal("x"), StatusCode.INTERNAL),
    ],
)
def test_errors_of_the_neighbour_rooms_have_their_codes(error, code):
    refusal = errors.as_service_error(error)
    assert refusal is not None
    assert refusal.code == code


def test_an_unknown_exception_is_a_defect_of_ours():
    assert errors.as_service_error(KeyError("secret")) is None
