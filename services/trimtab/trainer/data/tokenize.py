"""Rows as token ids: prompt and response in one int32 array, ended with the model's end token.

A response too long for the model is cut or refused, as asked, and what happened is counted; nothing is lost in
silence. The trainer packs the result. Suffix T: tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar, overload

import numpy as np

from trimtab.trainer.data.errors import DataError
from trimtab.trainer.data.rows import Demonstration, Prompt, PromptRow, Ranking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnLong = Literal["truncate", "refuse"]
Item = TypeVar("Item")
RowT = TypeVar("RowT", Demonstration, PromptRow, Ranking)


class TokenSequence(NamedTuple):
    """`token_ids_T` (int32): prompt then response; the first `prompt_length` are the prompt's."""

    token_ids_T: np.ndarray
    prompt_length: int


class TokenizedRanking(NamedTuple):
    """K sequences that share a prompt, and their ranks (int64 [K], 1 best, equal ranks tie)."""

    sequences: tuple[TokenSequence, ...]
    ranks_K: np.ndarray
    labeler: str
    group: str


@dataclass(frozen=True)
class Tokenized(Sequence[Item], Generic[Item]):
    """The rows that fit, in the order they came, and how many did not fit whole.

    Attributes:
        items: what this sequence holds.
        truncated_count: responses (or prompts, for prompts) that were cut to `max_length` tokens.
        dropped_count: rows left out because their prompt alone leaves no room for a response.
    """

    items: tuple[Item, ...]
    truncated_count: int
    dropped_count: int

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)


def tokenize_demonstrations(
    rows: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    eos_token_id: int | None,
    on_long: OnLong = "truncate",
) -> Tokenized[TokenSequence]:
    """Prompt, response and end token of each row, at most `max_length` tokens.

    A cut response ends without the end token: it did not end there. With `eos_token_id` None none is ever added.

    Raises:
        DataError: a row does not fit and `on_long` is "refuse"; or a chat row and a tokenizer without a template.
    """
    encoder = _Encoder(tokenizer, max_length, eos_token_id, on_long)
    return encoder.all(rows, lambda row: encoder.response(row.prompt, row.response, "response"))


def tokenize_rankings(
    rows: Sequence[Ranking],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    eos_token_id: int | None,
    on_long: OnLong = "truncate",
) -> Tokenized[TokenizedRanking]:
    """The K sequences of each ranking, each as `tokenize_demonstrations` makes them, with their ranks.

    A response that its row says did not end gets no end token.

    Raises:
        DataError: a response does not fit and `on_long` is "refuse"; or a chat row and a tokenizer without a template.
    """
    encoder = _Encoder(tokenizer, max_length, eos_token_id, on_long)

    def encode(row: Ranking) -> TokenizedRanking:
        ended = row.ended or (True,) * len(row.responses)
        sequences = [
            encoder.response(row.prompt, text, f"responses[{i}]", ended[i]) for i, text in enumerate(row.responses)
        ]
        return TokenizedRanking(tuple(sequences), np.asarray(row.ranks, dtype=np.int64), row.labeler, row.group)

    return encoder.all(rows, encode)


def tokenize_prompts(
    rows: Sequence[PromptRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    on_long: Literal["drop", "refuse"] = "drop",
) -> Tokenized[np.ndarray]:
    """Ids (int32 [T]) of each prompt of at most `max_length` tokens; a longer one is dropped and counted, or refused.

    A prompt is never cut: its end is what the response must follow. Leave room for the response in `max_length`.

    Raises:
        DataError: a prompt does not fit and `on_long` is "refuse"; or a chat row and a tokenizer without a template.
    """
    encoder = _Encoder(tokenizer, max_length + 1, None, "refuse" if on_long == "refuse" else "truncate")
    return encoder.all(rows, lambda row: encoder.prompt(row.prompt))


class _DoesNotFit(Exception):
    """The prompt alone fills the model."""


class _Encoder:
    """Encodes one row after another and keeps the counts."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, eos_token_id: int | None, on_long: OnLong
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length must leave room for a prompt and a response: at least 2, found {max_length}")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.end = np.asarray([] if eos_token_id is None else [eos_token_id], dtype=np.int32)
        self.on_long = on_long
        self.row_number = 0
        self.truncated_count = 0

    def all(self, rows: Sequence[RowT], encode: Callable[[RowT], Item]) -> Tokenized[Item]:
        items: list[Item] = []
        dropped_count = 0
        for self.row_number, row in enumerate(rows, start=1):
            try:
                items.append(encode(row))
            except _DoesNotFit:
                dropped_count += 1
        return Tokenized(tuple(items), self.truncated_count, dropped_count)

    def prompt(self, prompt: Prompt) -> np.ndarray:
        # Here, not at the top: `trimtab data check` reads this package and needs no transformers.
        from trimtab.models.tokenizers import encode_chat, encode_prompt

        if isinstance(prompt, str):
            ids_T = encode_prompt(self.tokenizer, prompt)
        else:
            try:
                messages = [message.as_dict() for message in prompt]
                ids_T = encode_chat(self.tokenizer, messages, add_generation_prompt=True)
            except ValueError as error:
                raise DataError("rows", self.row_number, "messages", str(error)) from error
        self._check_room(len(ids_T), "prompt")
        return ids_T

    def response(self, prompt: Prompt, response: str, field: str, ended: bool = True) -> TokenSequence:
        from trimtab.models.tokenizers import encode_continuation

        if isinstance(prompt, str):
            ids_T, prompt_length = encode_continuation(self.tokenizer, prompt, response)
            self._check_room(prompt_length, "prompt")
        else:
            head = self.prompt(prompt)
            tail = np.asarray(self.tokenizer.encode(response, add_special_tokens=False), dtype=np.int32)
            ids_T, prompt_length = np.concatenate([head, tail]), len(head)
        if ended:
            ids_T = np.concatenate([ids_T, self.end])
        if not len(ids_T):
            raise DataError("rows", self.row_number, field, "gives no token: prompt and response are empty")
        if len(ids_T) > self.max_length:
            if self.on_long == "refuse":
                reason = f"{len(ids_T)} tokens with its prompt, more than the {self.max_length} allowed"
                raise DataError("rows", self.row_number, field, reason)
            self.truncated_count += 1
            ids_T = ids_T[: self.max_length]
        return TokenSequence(ids_T, prompt_length)

    def _check_room(self, prompt_length: int, field: str) -> None:
        if prompt_length < self.max_length:
            return
        if self.on_long == "refuse":
            reason = f"{prompt_length} tokens, which leaves no room for a response within {self.max_length}"
            raise DataError("rows", self.row_number, field, reason)
        raise _DoesNotFit
