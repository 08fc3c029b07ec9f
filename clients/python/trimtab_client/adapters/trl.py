"""A reward function for TRL's trainers:

>>> from trimtab_client.adapters.trl import TrlReward
>>> trainer = GRPOTrainer(model=..., reward_funcs=TrlReward("127.0.0.1:7102"), train_dataset=...)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab_client.adapters.scoring import Rewards
from trimtab_client.channel import Addresses, ChannelOptions
from trimtab_client.conversations import ChatMessage
from trimtab_client.models import DEFAULTS

Text = str | Sequence[ChatMessage]


class TrlReward(Rewards):
    """`reward_func(prompts, completions, **columns)` as TRL calls it: texts, or conversations, one score each.

    Args:
        addresses: of the reward service, "host:port" or several.
        normalized: scores by the version's own mean and deviation instead of the bare logits.
        name: how TRL's logs name this reward.
        scorer: one of the service's, where that has several.
        reference_column: the data set's column that a verifier compares completions with.
    """

    def __init__(
        self,
        addresses: Addresses,
        options: ChannelOptions = DEFAULTS,
        *,
        normalized: bool = False,
        name: str = "trimtab_reward",
        scorer: str = "",
        reference_column: str | None = None,
    ) -> None:
        super().__init__(addresses, options, normalized=normalized, scorer=scorer)
        self._reference_column = reference_column
        self.__name__ = name

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """The score of each completion, in order. KeyError where the reference's column is not there."""
        references = None
        if self._reference_column is not None:
            references = [str(reference) for reference in columns[self._reference_column]]
        if any(not isinstance(prompt, str) for prompt in prompts):
            both = zip(prompts, completions, strict=True)
            return self.chats([[*_messages(prompt), *_messages(completion)] for prompt, completion in both], references)
        return self.texts([(str(p), _text(c)) for p, c in zip(prompts, completions, strict=True)], references)


def _messages(text: Text) -> list[ChatMessage]:
    return [{"role": "assistant", "content": text}] if isinstance(text, str) else [_plain(one) for one in text]


def _plain(message: Mapping[str, Any]) -> ChatMessage:
    return {"role": str(message["role"]), "content": str(message["content"])}


def _text(completion: Text) -> str:
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)
