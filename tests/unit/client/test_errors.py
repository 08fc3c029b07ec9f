"""gRPC statuses with google.rpc details as typed exceptions."""

import pickle

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

import trimtab_client
from trimtab_client.errors import Internal, InvalidArgument, ResourceExhausted, TrimtabError, from_rpc_error


def failure(
    code: grpc.StatusCode, *details, raw: bytes | None = None, says: str = "what to do"
) -> grpc.aio.AioRpcError:
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    data = status_pb2.Status(code=code.value[0], details=packed).SerializeToString() if raw is None else raw
    metadata = grpc.aio.Metadata(("other", "x"), ("grpc-status-details-bin", data))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details=says)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_code_has_a_typed_exception(code):
    error = from_rpc_error(failure(code))
    name = "".join(part.capitalize() for part in code.name.split("_"))
    assert type(error) is getattr(trimtab_client, name, InvalidArgument if name == "OutOfRange" else Internal)
    assert isinstance(error, TrimtabError) and error.code == code.name
    assert (error.message, str(error)) == ("what to do", f"{code.name}: what to do")
    assert error.field is None and error.retry_after_s is None


@pytest.mark.parametrize("says", ["Deadline Exceeded", "Stream removed (Deadline Exceeded)"])
def test_a_deadline_that_passed_on_this_side_is_told_in_words(says):
    error = from_rpc_error(failure(grpc.StatusCode.DEADLINE_EXCEEDED, says=says))
    assert error.message == "no answer came before the call's deadline"


def test_bad_request_names_the_field():
    violation = error_details_pb2.BadRequest.FieldViolation(field="tokens.lengths", description="no")
    bad = error_details_pb2.BadRequest(field_violations=[violation])
    error = from_rpc_error(failure(grpc.StatusCode.INVALID_ARGUMENT, bad))
    assert isinstance(error, InvalidArgument) and error.field == "tokens.lengths"


def test_retry_info_says_when():
    delay = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2, nanos=500_000_000))
    help_text = error_details_pb2.Help()
    error = from_rpc_error(failure(grpc.StatusCode.RESOURCE_EXHAUSTED, help_text, delay))
    assert isinstance(error, ResourceExhausted) and error.retry_after_s == 2.5


def test_unreadable_details_do_not_hide_the_error():
    error = from_rpc_error(failure(grpc.StatusCode.UNAVAILABLE, raw=b"\xff\xff\xff"))
    assert error.code == "UNAVAILABLE" and error.message == "what to do"


def test_an_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ResourceExhausted("RESOURCE_EXHAUSTED", "full", field="f", retry_after_s=1.5)))
    assert type(error) is ResourceExhausted and str(error) == "RESOURCE_EXHAUSTED: full"
    assert (error.field, error.retry_after_s) == ("f", 1.5)
