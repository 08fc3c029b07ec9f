"""What the adapters share: a reward client that opens late, so that it may be pickled into a trainer's workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab_client.channel import Addresses, ChannelOptions
from trimtab_client.conversations import ChatMessage
from trimtab_client.messages import Scores
from trimtab_client.models import DEFAULTS
from trimtab_client.reward import RewardClient


class Rewards:
    """Scores as plain lists of floats. Raises TrimtabError where the service does.

    References, one a sequence, are what a verifier compares the responses with.
    """

    def __init__(
        self, addresses: Addresses, options: ChannelOptions = DEFAULTS, *, normalized: bool = False, scorer: str = ""
    ) -> None:
        self._addresses = addresses
        self._options = options
        self._normalized = normalized
        self._scorer = scorer
        self._client = RewardClient(addresses, options)

    def texts(self, pairs: Sequence[tuple[str, str]], references: Sequence[str] | None = None) -> list[float]:
        """One score a (prompt, response) pair."""
        if not pairs:
            return []
        return self._chosen(self._client.score_texts(pairs, scorer=self._scorer, references=references))

    def chats(
        self, conversations: Sequence[Sequence[ChatMessage]], references: Sequence[str] | None = None
    ) -> list[float]:
        """One score a conversation, whose last message is the response."""
        if not conversations:
            return []
        return self._chosen(self._client.score_chats(conversations, scorer=self._scorer, references=references))

    def close(self) -> None:
        """Close the channels."""
        self._client.close()

    def _chosen(self, scores: Scores) -> list[float]:
        return (scores.normalized_scores if self._normalized else scores.scores).tolist()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_client"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._client = RewardClient(self._addresses, self._options)
