"""Bytes that are no request: the answer names the field where they stop being one."""

import pytest

from trimtab.runtime.wire_faults import fault_in
from trimtab_client.v1 import reward_pb2, tokens_pb2

SCORE = "/trimtab.v1.RewardService/Score"


def pairs(*responses: str) -> bytes:
    items = [reward_pb2.TextPair(prompt="p", response=text) for text in responses]
    return reward_pb2.ScoreRequest(texts=reward_pb2.TextBatch(items=items)).SerializeToString()


def lengths() -> bytes:
    tokens = tokens_pb2.RaggedTokens(token_ids=b"", lengths=[300])
    return reward_pb2.ScoreRequest(tokens=reward_pb2.TokenBatch(tokens=tokens)).SerializeToString()


@pytest.mark.parametrize(
    ("payload", "field", "reason"),
    [
        (pairs("good", "bad!").replace(b"bad!", b"\xff\xfe\xc0!"), "texts.items[1].response", "not UTF-8"),
        (pairs("good")[:-2], "texts", "ends too early"),
        (lengths().replace(b"\xac\x02", b"\xac\xac"), "tokens.tokens.lengths", "ends too early"),
        (b"\x00", "request", "number 0"),
        (b"\x0b", "tokens", "wire type 3"),
        (b"\x28" + b"\xff" * 11, "truncate", "more than 10 bytes"),
        (b"\x0a\xff\xff\xff\xff\x0f", "tokens", "ends too early"),
    ],
)
def test_the_field_at_fault_is_named(payload, field, reason):
    found, why = fault_in(SCORE, payload)
    assert (found, reason in why) == (field, True), why


def test_fixed_values_in_a_row_are_whole():
    prompt = bytes([0x22, 7, *range(7)])  # seeds, packed: 7 bytes where one takes 8
    field, reason = fault_in("/trimtab.v1.GeneratorService/Generate", bytes([0x0A, len(prompt), *prompt]))
    assert (field, "8-byte" in reason) == ("prompts[0].seeds", True)


def test_what_has_no_contract_is_named_as_a_whole():
    assert fault_in("/no.Such/Method", b"\xff") == ("request", "the 1 bytes are not a request of Method")
