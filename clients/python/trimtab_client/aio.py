"""The asyncio clients of the four services: the same calls as `clients`, awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

from trimtab_client import requests
from trimtab_client.channel import Addresses, ChannelOptions
from trimtab_client.messages import Completion, LogProbs, ModelInfo, RunStatus, Sampling, Scores, StepMetrics
from trimtab_client.ragged import RaggedTokens
from trimtab_client.transport import AsyncTransport
from trimtab_client.versions import ModelVersion, VersionPin

DEFAULTS = ChannelOptions()
DEFAULT_SAMPLING = Sampling()
WATCH_TIMEOUT_S = 30 * 24 * 3600.0


class AsyncClient:
    """What all clients share: addresses, deadlines, closing. Every call raises a TrimtabError."""

    def __init__(self, addresses: Addresses, options: ChannelOptions = DEFAULTS) -> None:
        self._transport = AsyncTransport(addresses, options)

    async def close(self) -> None:
        """Close the channels."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncModelClient(AsyncClient):
    """What the three model services share."""

    def __init__(self, addresses: Addresses, options: ChannelOptions = DEFAULTS) -> None:
        super().__init__(addresses, options)
        self._info: ModelInfo | None = None

    async def get_model(self, timeout_s: float | None = None) -> ModelInfo:
        """What is being served now."""
        self._info = await self._transport.unary(requests.get_model(), timeout_s)
        return self._info

    async def load_version(self, version: ModelVersion, timeout_s: float | None = None) -> ModelInfo:
        """Swap to a published version; returns once it serves."""
        return await self._transport.unary(requests.load_version(version), timeout_s)

    async def _limits(self) -> ModelInfo:
        return self._info or await self.get_model()


class AsyncGeneratorClient(AsyncModelClient):
    """Samples completions."""

    def generate(
        self,
        prompts: Sequence[requests.Prompt],
        sampling: Sampling = DEFAULT_SAMPLING,
        seeds: Sequence[Sequence[int]] | None = None,
        version: VersionPin | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Completion]:
        """Yield each completion as it finishes, in no fixed order.

        Args:
            prompts: text, token ids or chat messages.
            seeds: one list of `sampling.n` seeds a prompt.
        """
        call = requests.generate(prompts, sampling, seeds, version)
        return self._transport.stream(call, timeout_s)


class AsyncRewardClient(AsyncModelClient):
    """Scores sequences; batches beyond the server's limits are split over the addresses."""

    async def score_tokens(
        self,
        tokens: RaggedTokens,
        tokenizer_digest: str,
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
    ) -> Scores:
        """Score token ids made by the tokenizer with that digest."""
        calls = requests.score_tokens(tokens, tokenizer_digest, version, truncate, await self._limits())
        return requests.merge_scores(await self._transport.many(calls, timeout_s))

    async def score_texts(
        self,
        pairs: Sequence[tuple[str, str]],
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
    ) -> Scores:
        """Score (prompt, response) texts by the server's own tokenizer."""
        calls = requests.score_texts(pairs, version, truncate, await self._limits())
        return requests.merge_scores(await self._transport.many(calls, timeout_s))

    async def score_chats(
        self,
        conversations: Sequence[Sequence[requests.Message]],
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
    ) -> Scores:
        """Score conversations through the server's own chat template."""
        calls = requests.score_chats(conversations, version, truncate, await self._limits())
        return requests.merge_scores(await self._transport.many(calls, timeout_s))


class AsyncReferenceClient(AsyncModelClient):
    """Log-probs of response tokens under the frozen reference."""

    async def logprobs(
        self,
        tokens: RaggedTokens,
        tokenizer_digest: str,
        temperature: float = 1.0,
        lse: bool = False,
        entropy: bool = False,
        hidden: bool = False,
        version: VersionPin | None = None,
        timeout_s: float | None = None,
    ) -> LogProbs:
        """`tokens` needs prompt_lengths; one value a response token comes back."""
        info = await self._limits()
        calls = requests.logprobs(
            tokens,
            tokenizer_digest,
            temperature=temperature,
            lse=lse,
            entropy=entropy,
            hidden=hidden,
            version=version,
            info=info,
        )
        return requests.merge_logprobs(await self._transport.many(calls, timeout_s))


class AsyncTrainerClient(AsyncClient):
    """Starts, watches and controls training runs; `run_id` "" is the newest."""

    async def start(self, run_id: str, config: Any, timeout_s: float | None = None) -> RunStatus:
        """Begin a run with an SftConfig, RewardModelConfig or PpoConfig message; again is harmless."""
        return await self._transport.unary(requests.start(run_id, config), timeout_s)

    async def status(self, run_id: str = "", timeout_s: float | None = None) -> RunStatus:
        """Where the run is."""
        return await self._transport.unary(requests.status(run_id), timeout_s)

    def watch(
        self, run_id: str = "", after_step: int = 0, timeout_s: float = WATCH_TIMEOUT_S
    ) -> AsyncIterator[StepMetrics | RunStatus]:
        """Yield the metrics of each step after `after_step` and each change of status, until the run ends."""
        call = requests.watch(run_id, after_step)
        return self._transport.stream(call, timeout_s)

    async def pause(self, run_id: str = "", timeout_s: float | None = None) -> RunStatus:
        """Hold after the current step."""
        return await self._transport.unary(requests.pause(run_id), timeout_s)

    async def resume(self, run_id: str = "", timeout_s: float | None = None) -> RunStatus:
        """Go on."""
        return await self._transport.unary(requests.resume(run_id), timeout_s)

    async def checkpoint(self, run_id: str = "", timeout_s: float | None = None) -> tuple[ModelVersion, ...]:
        """Publish the weights after the current step; returns the versions."""
        return await self._transport.unary(requests.checkpoint(run_id), timeout_s)

    async def stop(self, run_id: str = "", timeout_s: float | None = None) -> RunStatus:
        """End after the current step; what was published stays."""
        return await self._transport.unary(requests.stop(run_id), timeout_s)
