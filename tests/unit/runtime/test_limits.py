"""Bad token batches are refused with the field that is wrong."""

import numpy as np
import pytest
from grpc import StatusCode

from trimtab.runtime.config import RequestLimits
from trimtab.runtime.errors import ServiceError
from trimtab.runtime.limits import (
    check_lengths,
    check_prompt_lengths,
    check_sequences,
    check_tokenizer_digest,
    read_tokens,
)
from trimtab_client.ragged import RaggedTokens
from trimtab_client.v1 import tokens_pb2

LIMITS = RequestLimits(max_sequences=3, max_tokens=10)


def refusal(call, *args, **kwargs) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        call(*args, **kwargs)
    return caught.value


@pytest.mark.parametrize(
    ("sequences", "field", "reason"),
    [
        ([], "tokens.lengths", "empty"),
        ([[1], [2], [3], [4]], "tokens.lengths", "4 sequences, but a request may hold 3"),
        ([[1], [], [3]], "tokens.lengths", "sequence 1 has no tokens"),
        ([[1] * 4, [1] * 4, [1] * 4], "tokens.lengths", "12 tokens, but a request may hold 10"),
        ([[1, 2], [1] * 6], "tokens.lengths", "sequence 1 has 6 tokens, the model takes 5"),
        ([[1, 2], [3, 9]], "tokens.token_ids", "id 9 in sequence 1 is outside the vocabulary of 9"),
        ([[1, 2], [3], [-1]], "tokens.token_ids", "id -1 in sequence 2"),
    ],
)
def test_a_bad_batch_is_refused_by_field(sequences, field, reason):
    error = refusal(check_sequences, RaggedTokens.from_sequences(sequences), LIMITS, vocab_size=9, max_length=5)
    assert (error.code, error.field) == (StatusCode.INVALID_ARGUMENT, field)
    assert reason in error.message


def test_a_batch_at_every_limit_passes():
    check_sequences(RaggedTokens.from_sequences([[0] * 5, [8] * 4, [1]]), LIMITS, vocab_size=9, max_length=5)


def test_longer_sequences_pass_where_the_caller_cuts_them():
    check_sequences(RaggedTokens.from_sequences([[1] * 7]), LIMITS, vocab_size=9, max_length=5, allow_longer=True)


def test_texts_are_blamed_and_not_tokens():
    error = refusal(check_lengths, np.array([2, 6]), LIMITS, 5, field="texts.items")
    assert error.field == "texts.items"


def test_a_message_that_contradicts_itself_is_refused_with_its_full_field():
    message = tokens_pb2.RaggedTokens(token_ids=b"\1\0\0\0", lengths=[2])
    assert refusal(read_tokens, message, LIMITS, field="tokens.tokens").field == "tokens.tokens.lengths"
    message = tokens_pb2.RaggedTokens(token_ids=b"\1\0\0", lengths=[1])
    assert refusal(read_tokens, message, LIMITS).field == "tokens.token_ids"


def test_prompts_are_required_and_not_empty():
    assert refusal(check_prompt_lengths, RaggedTokens.from_sequences([[1]])).field == "tokens.prompt_lengths"
    tokens = RaggedTokens.from_sequences([[1, 2], [1, 2]], [1, 0])
    assert "sequence 1" in refusal(check_prompt_lengths, tokens).message


def test_a_foreign_tokenizer_is_a_failed_precondition_and_none_an_invalid_argument():
    assert refusal(check_tokenizer_digest, "blake3:aa", "blake3:bb").code == StatusCode.FAILED_PRECONDITION
    assert refusal(check_tokenizer_digest, "", "blake3:bb").code == StatusCode.INVALID_ARGUMENT
    check_tokenizer_digest("blake3:bb", "blake3:bb")


def test_more_sequences_than_a_request_may_hold_are_refused_before_they_are_read():
    lengths = refusal(read_tokens, tokens_pb2.RaggedTokens(lengths=[0] * 4), LIMITS)
    prompts = refusal(read_tokens, tokens_pb2.RaggedTokens(lengths=[0] * 3, prompt_lengths=[0] * 4), LIMITS)
    assert (lengths.field, prompts.field) == ("tokens.lengths", "tokens.prompt_lengths")
