"""ReferenceService: log-probs of response tokens under the frozen SFT policy.

Immutable by construction: the model is loaded at start and never changes, so LoadVersion is refused.
"""

import asyncio
import math
from collections.abc import Sequence
from functools import partial

import grpc.aio
import numpy as np

from trimtab.kernels.selfcheck import KernelMismatchError, check_selected_logprobs
from trimtab.models.errors import ModelLoadError
from trimtab.models.policy import Policy
from trimtab.reference.config import ReferenceConfig
from trimtab.reference.forward import ReferenceItem, ReferenceResult, respond
from trimtab.runtime import model_service
from trimtab.runtime.batcher import Batcher
from trimtab.runtime.calls import deadline_of
from trimtab.runtime.config import RequestLimits
from trimtab.runtime.errors import StartError, internal, invalid
from trimtab.runtime.limits import check_prompt_lengths, check_sequences, check_tokenizer_digest, read_tokens
from trimtab.runtime.model_service import ModelServicer, Served, ServedModel, describe, pinned
from trimtab.runtime.server import ServerContext, Service, serve
from trimtab.weights.errors import StoreError
from trimtab.weights.sources import resolve_source
from trimtab.weights.store import Store, open_store
from trimtab_client.ragged import RaggedFloats
from trimtab_client.v1 import reference_pb2, reference_pb2_grpc

LABEL = "reference"
SERVICE_NAME = "trimtab.v1.ReferenceService"
SERVICES = (SERVICE_NAME, model_service.SERVICE_NAME)

MESSAGE_OVERHEAD_BYTES = 8192
"""Of an answer: its version, tags and field lengths."""
BYTES_PER_LENGTH = 3 * 5
"""Of one sequence in the three ragged columns, at most."""


def main(config: ReferenceConfig) -> int:
    """Serve until SIGTERM; the process's exit code."""
    return serve(LABEL, config, services=SERVICES, load=load)


async def load(context: ServerContext) -> Sequence[Service]:
    """Load the policy, check the kernels; what `RunningServer` serves. Raises StartError."""
    config = context.config
    assert isinstance(config, ReferenceConfig)
    try:
        store = await asyncio.to_thread(open_store, config.store) if config.store is not None else None
        first = await context.worker.run(_load, config, store)
    except (StoreError, ModelLoadError, KernelMismatchError) as error:
        raise StartError(str(error)) from error
    served = ServedModel(first, metrics=context.metrics)
    batcher = Batcher(
        partial(_respond_all, first.model),
        context.worker,
        max_tokens_per_batch=config.batch_tokens,
        queue_limit=config.queue_limit,
        metrics=context.metrics,
    )
    context.on_close(batcher.close)
    servicer = ReferenceServicer(served, batcher, config)
    add = reference_pb2_grpc.add_ReferenceServiceServicer_to_server
    return [Service(SERVICE_NAME, add, servicer), ModelServicer(served).as_service()]


class ReferenceServicer(reference_pb2_grpc.ReferenceServiceServicer):
    """trimtab.v1.ReferenceService."""

    def __init__(
        self,
        served: ServedModel[Policy],
        batcher: Batcher[ReferenceItem, ReferenceResult],
        config: ReferenceConfig,
    ) -> None:
        self._served = served
        self._batcher = batcher
        self._limits = config.limits

    async def LogProbs(
        self, request: reference_pb2.LogProbsRequest, context: grpc.aio.ServicerContext
    ) -> reference_pb2.LogProbsResponse:
        """Log-probs of each response token, and what else was asked for, in the order of the request."""
        served = await pinned(self._served, request.version, context)
        items = self._items(request, served)
        sizes = [len(item.token_ids) for item in items]
        results = await self._batcher.submit_all(items, sizes, deadline_of(context))
        response = reference_pb2.LogProbsResponse(
            logprobs=RaggedFloats.from_sequences([result.logprobs for result in results]).to_proto(),
            version=served.version.to_proto(),
        )
        if request.include_lse:
            response.lse.CopyFrom(RaggedFloats.from_sequences([result.lse for result in results]).to_proto())
        if request.include_entropy:
            response.entropy.CopyFrom(RaggedFloats.from_sequences([result.entropy for result in results]).to_proto())
        if request.include_hidden:
            response.hidden = b"".join(result.hidden for result in results)
            response.hidden_size = _hidden_size(served.model)
        return response

    def _items(self, request: reference_pb2.LogProbsRequest, served: Served[Policy]) -> list[ReferenceItem]:
        policy = served.model
        temperature = request.temperature or 1.0
        if not (math.isfinite(temperature) and temperature > 0):
            raise invalid("temperature", f"{temperature} is not a positive number")
        tokens = read_tokens(request.tokens, self._limits)
        check_tokenizer_digest(request.tokenizer_digest, policy.tokenizer_digest)
        check_sequences(tokens, self._limits, policy.vocab_size, served.info.max_length)
        prompt_lengths_B = check_prompt_lengths(tokens)
        if request.include_hidden:
            responses, most = int((tokens.lengths - prompt_lengths_B).sum()), served.info.max_hidden_tokens
            if responses > most:
                raise invalid(
                    "include_hidden",
                    f"{responses} response tokens, but a message may hold the hidden states of {most}; "
                    "send fewer sequences a call",
                )
        return [
            ReferenceItem(token_ids, int(prompt_length), temperature, request.include_hidden, position)
            for position, (token_ids, prompt_length) in enumerate(
                zip(tokens.sequences(), prompt_lengths_B, strict=True)
            )
        ]


def _respond_all(policy: Policy, items: list[ReferenceItem]) -> list[ReferenceResult | Exception]:
    """`respond`, with an INTERNAL error in place of a result that holds what is not finite."""
    return [
        result if _is_finite(result) else _not_finite(item)
        for item, result in zip(items, respond(policy, items), strict=True)
    ]


def _not_finite(item: ReferenceItem) -> Exception:
    return internal(f"sequence {item.position}: the reference's log-probs are not finite; its weights are at fault")


def _is_finite(result: ReferenceResult) -> bool:
    return all(bool(np.isfinite(values).all()) for values in (result.logprobs, result.lse, result.entropy))


def _load(config: ReferenceConfig, store: Store | None) -> Served[Policy]:
    if config.self_check:
        check_selected_logprobs(config.device)
    source = resolve_source(config.model, store)
    policy = Policy.load(source.path_or_id, dtype=config.dtype, device=config.device)
    max_length = policy.max_length if config.max_length is None else min(config.max_length, policy.max_length)
    info = describe(policy, source.version, max_length=max_length, limits=config.limits)
    info.max_hidden_tokens = most_hidden_tokens(_hidden_size(policy), config.limits)
    return Served(source.version, policy, info)


def most_hidden_tokens(hidden_size: int, limits: RequestLimits) -> int:
    """Response tokens whose hidden states, log-probs, lse and entropy, with all lengths, fit into one message."""
    overhead = MESSAGE_OVERHEAD_BYTES + limits.max_sequences * BYTES_PER_LENGTH
    return max(0, limits.max_message_bytes - overhead) // (2 * hidden_size + 3 * 4)


def _hidden_size(policy: Policy) -> int:
    return int(policy.head.weight_VD.shape[1])
