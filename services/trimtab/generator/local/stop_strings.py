"""Find stop strings in text that grows token by token, and cut a finished text at the first of them.

Decoding is incremental: each push decodes a short tail, held back while it ends in half a character, so a long
response costs no more a token than a short one.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

REPLACEMENT = "�"


class StopStrings:
    """Watches one sequence for its stop strings (none empty)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._longest = max(len(stop) for stop in stops)
        self._context_start = 0
        self._read = 0
        self._tail = ""

    def push(self, token_ids: np.ndarray) -> bool:
        """Whether the text of all tokens so far (ids [n], one more than last time) now holds a stop string."""
        known = self._decode(token_ids[self._context_start : self._read])
        text = self._decode(token_ids[self._context_start :])
        fresh = text[len(known) :]
        found = self._holds_stop(self._tail + fresh)
        # Half a character: its bytes come with the next tokens.
        if not text.endswith(REPLACEMENT):
            self._context_start, self._read = self._read, len(token_ids)
            # One character short of a match: what is found next time holds something new.
            self._tail = (self._tail + fresh)[max(0, len(self._tail + fresh) - self._longest + 1) :]
        return found

    def _holds_stop(self, text: str) -> bool:
        return any(stop in text for stop in self._stops)

    def _decode(self, token_ids: np.ndarray) -> str:
        return str(self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))


def text_before_stop(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray, stops: Sequence[str]) -> str:
    """Text of a finished response (ids [n]), cut before the stop string that its last token completed, if any."""
    text = str(tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))
    if not stops:
        return text
    before = str(tokenizer.decode(token_ids[:-1].tolist(), skip_special_tokens=True)).rstrip(REPLACEMENT)
    earliest = max(0, len(before) - max(len(stop) for stop in stops) + 1)
    found = [position for position in (text.find(stop, earliest) for stop in stops) if position >= 0]
    return text[: min(found)] if found else text
