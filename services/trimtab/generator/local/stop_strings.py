"""The text of a response, and the stop strings in it while it grows token by token.

Text is decoded behind the last few prompt tokens, so that a space at the border is kept. Watching is incremental: each
push decodes a short tail, held back while it ends in half a character, so a long response costs no more a token than a
short one.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from trimtab.models.tokenizers import decode, decode_continuation

REPLACEMENT = "�"
# Prompt tokens that a response is decoded behind.
BORDER_TOKENS = 8


class StopStrings:
    """Watches one sequence for its stop strings (none empty)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], prompt_ids: np.ndarray) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._longest = max(len(stop) for stop in stops)
        self._border = prompt_ids[-BORDER_TOKENS:]
        self._context_start = 0
        self._read = len(self._border)
        self._tail = ""

    def push(self, token_ids: np.ndarray) -> bool:
        """Whether the newest of the response's tokens so far (ids [n], one more each time) completes a stop string."""
        ids = np.concatenate([self._border, token_ids])
        known = decode(self._tokenizer, ids[self._context_start : self._read])
        text = decode(self._tokenizer, ids[self._context_start :])
        fresh = text[len(known) :]
        seen = self._tail + fresh
        # Half a character: its bytes come with the next tokens.
        if not text.endswith(REPLACEMENT):
            self._context_start, self._read = self._read, len(ids)
            # One character short of a match: what is found next time holds something new.
            self._tail = seen[max(0, len(seen) - self._longest + 1) :]
        return any(stop in seen for stop in self._stops)


def response_text(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: np.ndarray, token_ids: np.ndarray, stops: Sequence[str]
) -> str:
    """Text of a finished response, cut before the stop string that its last token completed, if any."""
    border = prompt_ids[-BORDER_TOKENS:]
    text = decode_continuation(tokenizer, border, token_ids)
    if not stops:
        return text
    before = decode_continuation(tokenizer, border, token_ids[:-1]).rstrip(REPLACEMENT)
    earliest = max(0, len(before) - max(len(stop) for stop in stops) + 1)
    found = [position for position in (text.find(stop, earliest) for stop in stops) if position >= 0]
    return text[: min(found)] if found else text
