"""OpenRLHF's own kind of reward function, over gRPC: `--reward.remote_url my_reward.py` with, in that file,

>>> from trimtab_client.adapters.openrlhf import OpenRlhfReward
>>> reward_func = OpenRlhfReward("127.0.0.1:7102", strip_special=("<s>", "</s>"))

Through the gateway it needs no file: `--reward.remote_url http://gateway:7120/get_reward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab_client.adapters.scoring import Rewards
from trimtab_client.channel import Addresses, ChannelOptions
from trimtab_client.models import DEFAULTS


def split_query(query: str, prompt: str, strip_special: Sequence[str] = ()) -> tuple[str, str]:
    """(prompt, response) of OpenRLHF's decoded whole of both.

    `strip_special` are special tokens, as text, that are taken off both ends: the reward model's tokenizer adds its
    own. Where the rest does not begin with the prompt, all of it is the response.
    """
    query, prompt = _stripped(query, strip_special), _stripped(prompt, strip_special)
    if prompt and query.startswith(prompt):
        return prompt, query[len(prompt) :]
    return "", query


def labels_as_references(labels: Any, count: int) -> list[str] | None:
    """OpenRLHF's labels where they are one text a sequence, which a verifier compares responses with; else None."""
    texts = isinstance(labels, list) and len(labels) == count and all(isinstance(label, str) for label in labels)
    return list(labels) if texts and any(labels) else None


def _stripped(text: str, special: Sequence[str]) -> str:
    found = True
    while found:
        found = False
        for token in special:
            if token and (text.startswith(token) or text.endswith(token)):
                text, found = text.removeprefix(token).removesuffix(token), True
    return text


class OpenRlhfReward(Rewards):
    """`reward_func(queries, prompts, labels)` as OpenRLHF calls it; may be shared by threads.

    Args:
        addresses: of the reward service, "host:port" or several.
        strip_special: special tokens, as text, at the ends of queries (see `split_query`).
        normalized: scores by the version's own mean and deviation instead of the bare logits.
        scorer: one of the service's, where that has several. Labels that are texts are references of verifiers.
    """

    def __init__(
        self,
        addresses: Addresses,
        options: ChannelOptions = DEFAULTS,
        *,
        strip_special: Sequence[str] = (),
        normalized: bool = False,
        scorer: str = "",
    ) -> None:
        super().__init__(addresses, options, normalized=normalized, scorer=scorer)
        self._strip_special = tuple(strip_special)

    def __call__(self, queries: Sequence[str], prompts: Sequence[str], labels: Any = None) -> dict[str, Any]:
        """{"rewards": float32 tensor [B], "scores": the same, "extra_logs": {}}; needs torch, which OpenRLHF has."""
        import torch  # pyright: ignore[reportMissingImports]: the trainer's, not ours

        pairs = [split_query(q, p, self._strip_special) for q, p in zip(queries, prompts, strict=True)]
        rewards = torch.tensor(self.texts(pairs, labels_as_references(labels, len(pairs))), dtype=torch.float32)
        return {"rewards": rewards, "scores": rewards, "extra_logs": {}}
