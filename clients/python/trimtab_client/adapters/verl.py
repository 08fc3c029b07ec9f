"""A reward function for verl: `custom_reward_function.path=my_reward.py` with, in that file,

>>> from trimtab_client.adapters.verl import VerlReward
>>> compute_score = VerlReward("127.0.0.1:7102").compute_score

Through the gateway verl's own reward-model client works as it is: it asks `/classify`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab_client.channel import Addresses, ChannelOptions
from trimtab_client.conversations import ChatMessage
from trimtab_client.models import DEFAULTS
from trimtab_client.reward import AsyncRewardClient


class VerlReward:
    """`compute_score(data_source, solution_str, ground_truth, extra_info)`, a coroutine function as verl prefers.

    verl hands over the response alone; the prompt is read from `extra_info[prompt_key]`, a text or chat messages, which
    the data set's `extra_info` column must hold.

    Args:
        addresses: of the reward service, "host:port" or several.
        prompt_key: where in `extra_info` the prompt is.
        normalized: scores by the version's own mean and deviation instead of the bare logits.
        scorer: one of the service's, where that has several. A ground truth that is a text is a verifier's reference.
    """

    def __init__(
        self,
        addresses: Addresses,
        options: ChannelOptions = DEFAULTS,
        *,
        prompt_key: str = "prompt",
        normalized: bool = False,
        scorer: str = "",
    ) -> None:
        self._client = AsyncRewardClient(addresses, options)
        self._prompt_key = prompt_key
        self._normalized = normalized
        self._scorer = scorer

    async def compute_score(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: Any = None,
        extra_info: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> dict[str, float]:
        """{"score": …, "raw_score": …, "normalized_score": …}. KeyError where `extra_info` holds no prompt."""
        prompt = (extra_info or {}).get(self._prompt_key)
        if prompt is None:
            raise KeyError(
                f"extra_info[{self._prompt_key!r}] is missing: verl passes the response alone, so the data set must "
                "hold the prompt there"
            )
        references = [ground_truth] if isinstance(ground_truth, str) and ground_truth else None
        if isinstance(prompt, str):
            pairs = [(prompt, solution_str)]
            found = await self._client.score_texts(pairs, scorer=self._scorer, references=references)
        else:
            chats = [_conversation(prompt, solution_str)]
            found = await self._client.score_chats(chats, scorer=self._scorer, references=references)
        raw, normalized = float(found.scores[0]), float(found.normalized_scores[0])
        return {"score": normalized if self._normalized else raw, "raw_score": raw, "normalized_score": normalized}


def _conversation(prompt: Sequence[Mapping[str, Any]], response: str) -> list[ChatMessage]:
    asked: list[ChatMessage] = [{"role": str(one["role"]), "content": str(one["content"])} for one in prompt]
    return [*asked, {"role": "assistant", "content": response}]
