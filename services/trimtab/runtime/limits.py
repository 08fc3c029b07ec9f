"""The one place where the size and sense of a request's token batch are checked.

Every refusal is a `ServiceError` that names the field. Text is checked by its tokens once it is encoded.
Suffixes: B sequences, N tokens of all of them.
"""

import numpy as np

from trimtab.runtime.config import RequestLimits
from trimtab.runtime.errors import invalid, precondition
from trimtab_client.ragged import RaggedError, RaggedTokens
from trimtab_client.v1 import tokens_pb2


def read_tokens(message: tokens_pb2.RaggedTokens, limits: RequestLimits, *, field: str = "tokens") -> RaggedTokens:
    """The batch of a request; INVALID_ARGUMENT with its full field where the message contradicts itself.

    Counts are checked before anything is made of them: millions of lengths cost nothing.
    """
    for name, values in (("lengths", message.lengths), ("prompt_lengths", message.prompt_lengths)):
        if len(values) > limits.max_sequences:
            raise invalid(f"{field}.{name}", f"{len(values)} sequences, but a request may hold {limits.max_sequences}")
    try:
        return RaggedTokens.from_proto(message)
    except RaggedError as error:
        raise invalid(f"{field}.{error.field}", str(error).removeprefix(f"{error.field}: ")) from error


def check_batch_size(batch_size: int, limits: RequestLimits, *, field: str) -> None:
    """INVALID_ARGUMENT for an empty batch or one of more sequences than the server takes."""
    if batch_size == 0:
        raise invalid(field, "the batch is empty")
    if batch_size > limits.max_sequences:
        raise invalid(field, f"{batch_size} sequences, but a request may hold {limits.max_sequences}")


def check_sequences(
    tokens: RaggedTokens,
    limits: RequestLimits,
    vocab_size: int,
    max_length: int,
    *,
    field: str = "tokens",
    allow_longer: bool = False,
) -> None:
    """INVALID_ARGUMENT unless every sequence of a token batch can go through the model.

    Checks the number of sequences and of tokens, that no sequence is empty or longer than `max_length` (unless
    `allow_longer`: the caller cuts them) and that every id is in [0, vocab_size).
    """
    check_lengths(tokens.lengths, limits, max_length, field=f"{field}.lengths", allow_longer=allow_longer)
    outside_N = (tokens.token_ids < 0) | (tokens.token_ids >= vocab_size)
    if outside_N.any():
        position = int(np.argmax(outside_N))
        index = int(np.searchsorted(np.cumsum(tokens.lengths), position, side="right"))
        raise invalid(
            f"{field}.token_ids",
            f"id {int(tokens.token_ids[position])} in sequence {index} is outside the vocabulary of {vocab_size}",
        )


def check_lengths(
    lengths_B: np.ndarray, limits: RequestLimits, max_length: int, *, field: str, allow_longer: bool = False
) -> None:
    """`check_sequences` without the ids, for what this server encoded itself; `field` is what it came in."""
    check_batch_size(len(lengths_B), limits, field=field)
    if (lengths_B == 0).any():
        raise invalid(field, f"sequence {int(np.argmin(lengths_B))} has no tokens")
    total = int(lengths_B.sum())
    if total > limits.max_tokens:
        raise invalid(field, f"{total} tokens, but a request may hold {limits.max_tokens}")
    if not allow_longer and int(lengths_B.max()) > max_length:
        index = int(np.argmax(lengths_B > max_length))
        raise invalid(field, f"sequence {index} has {int(lengths_B[index])} tokens, the model takes {max_length}")


def check_prompt_lengths(tokens: RaggedTokens, *, field: str = "tokens") -> np.ndarray:
    """The prompt lengths [B], each at least 1; INVALID_ARGUMENT otherwise."""
    if tokens.prompt_lengths is None:
        raise invalid(f"{field}.prompt_lengths", "required: one entry a sequence, each at least 1")
    without_B = tokens.prompt_lengths < 1
    if without_B.any():
        index = int(np.argmax(without_B))
        raise invalid(
            f"{field}.prompt_lengths", f"sequence {index} has no prompt token; the first token has no log-prob"
        )
    return tokens.prompt_lengths


def check_tokenizer_digest(given: str, served: str, *, field: str = "tokenizer_digest") -> None:
    """INVALID_ARGUMENT where the digest is missing, FAILED_PRECONDITION where it is another tokenizer's."""
    if not given:
        raise invalid(field, f"required with token ids; this server's is {served}")
    if given != served:
        raise precondition(
            f"{field}: the ids were made by tokenizer {given}, this server's is {served}; "
            "send text instead, or use the server's tokenizer",
            field=field,
        )
