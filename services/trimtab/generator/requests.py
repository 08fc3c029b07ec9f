"""A GenerateRequest checked and turned into sequences; every refusal names the field.

The one place where the generator trusts nothing. What leaves here the engine can run.
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trimtab.generator.engine import Sampling, SequenceRequest
from trimtab.generator.local.philox import derive_seed
from trimtab.models.policy import Policy
from trimtab.models.tokenizers import encode_chat, encode_prompt
from trimtab.runtime.config import RequestLimits
from trimtab.runtime.errors import invalid
from trimtab_client.v1 import generator_pb2, model_pb2
from trimtab_client.versions import ModelVersion

# Colder than this is greedy in all but name, and its scaled logits overflow.
COLDEST = 1e-3
MOST_STOPS = 64
LONGEST_STOP = 1024


@dataclass(frozen=True)
class Bounds:
    """What a request may ask of this server; lengths in tokens."""

    limits: RequestLimits
    max_length: int
    default_max_tokens: int


@dataclass(frozen=True)
class Origin:
    """Which sample of which prompt a sequence is."""

    prompt_index: int
    sample_index: int


@dataclass(frozen=True)
class ParsedRequest:
    """The sequences of a call and, in the same order, where each came from."""

    requests: tuple[SequenceRequest, ...]
    origins: tuple[Origin, ...]


def parse_request(
    message: generator_pb2.GenerateRequest,
    policy: Policy,
    bounds: Bounds,
    *,
    next_id: Callable[[], int],
    deadline_s: float | None,
) -> ParsedRequest:
    """Check a request and encode its prompts.

    Raises ServiceError INVALID_ARGUMENT naming the field.
    """
    samples = max(message.sampling.n, 1)
    _check_count(len(message.prompts), samples, bounds.limits)
    sampling = parse_sampling(message.sampling, policy.vocab_size, bounds)
    accepts = accepts_of(message.version if message.HasField("version") else None)
    call_seed = message.sampling.seed if message.sampling.HasField("seed") else None
    requests: list[SequenceRequest] = []
    origins: list[Origin] = []
    held = 0
    for index, prompt in enumerate(message.prompts):
        prompt_ids = _prompt_ids(prompt, f"prompts[{index}]", policy, bounds)
        held += len(prompt_ids)
        if held > bounds.limits.max_tokens:
            raise invalid("prompts", f"more than {bounds.limits.max_tokens} prompt tokens in one request")
        seeds = _seeds(prompt, index, samples, call_seed)
        prompt_key = next_id()
        for sample, seed in enumerate(seeds):
            requests.append(SequenceRequest(next_id(), prompt_ids, prompt_key, seed, sampling, deadline_s, accepts))
            origins.append(Origin(index, sample))
    return ParsedRequest(tuple(requests), tuple(origins))


def parse_sampling(message: generator_pb2.SamplingParameters, vocab_size: int, bounds: Bounds) -> Sampling:
    """Check sampling parameters; INVALID_ARGUMENT naming the field."""
    temperature = message.temperature if message.HasField("temperature") else 1.0
    if not math.isfinite(temperature) or temperature < 0:
        raise invalid("sampling.temperature", f"{temperature:g} is not a finite number of at least 0")
    if 0 < temperature < COLDEST:
        raise invalid("sampling.temperature", f"{temperature:g} is below {COLDEST:g}; 0 samples greedily")
    top_p = message.top_p if message.HasField("top_p") else 1.0
    if not 0 < top_p <= 1:
        raise invalid("sampling.top_p", f"{top_p:g} is not in (0, 1]")
    max_tokens = message.max_tokens or bounds.default_max_tokens
    if message.min_tokens > max_tokens:
        raise invalid("sampling.min_tokens", f"{message.min_tokens} is more than max_tokens, {max_tokens}")
    for index, token in enumerate(message.stop_token_ids):
        if not 0 <= token < vocab_size:
            raise invalid(f"sampling.stop_token_ids[{index}]", f"{token} is outside the vocabulary of {vocab_size}")
    _check_stops(list(message.stop))
    return Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=message.top_k,
        min_tokens=message.min_tokens,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def accepts_of(pin: model_pb2.VersionPin | None) -> Callable[[ModelVersion], bool] | None:
    """Whether a version satisfies a pin; None without a pin. Empty fields of an exact pin match anything."""
    rule = pin.WhichOneof("rule") if pin is not None else None
    if pin is None or rule is None:
        return None
    if rule == "at_least_step":
        least = pin.at_least_step
        return lambda version: version.step >= least
    exact = ModelVersion.from_proto(pin.exact)
    wanted = {name: value for name in ("run_id", "name", "step", "digest") if (value := getattr(exact, name))}
    return lambda version: all(getattr(version, name) == value for name, value in wanted.items())


def _check_count(prompts: int, samples: int, limits: RequestLimits) -> None:
    if prompts == 0:
        raise invalid("prompts", "the batch is empty; send at least one prompt")
    if prompts * samples > limits.max_sequences:
        raise invalid(
            "prompts" if prompts > limits.max_sequences else "sampling.n",
            f"{prompts} prompts of {samples} samples each, but a request may hold {limits.max_sequences} sequences",
        )


def _check_stops(stops: list[str]) -> None:
    if len(stops) > MOST_STOPS:
        raise invalid("sampling.stop", f"{len(stops)} stop strings, at most {MOST_STOPS}")
    for index, stop in enumerate(stops):
        if not 0 < len(stop) <= LONGEST_STOP:
            raise invalid(f"sampling.stop[{index}]", f"has {len(stop)} characters; 1 to {LONGEST_STOP} are allowed")


def _prompt_ids(prompt: generator_pb2.Prompt, field: str, policy: Policy, bounds: Bounds) -> np.ndarray:
    """The prompt's ids, int32, checked against vocabulary and length."""
    kind = prompt.WhichOneof("content")
    if kind is None:
        raise invalid(field, "is empty: give token_ids, text or chat")
    if kind == "token_ids":
        if len(prompt.token_ids) % 4:
            raise invalid(f"{field}.token_ids", f"{len(prompt.token_ids)} bytes are not whole int32 ids")
        prompt_ids = np.frombuffer(prompt.token_ids, dtype="<i4").astype(np.int32)
    elif kind == "text":
        prompt_ids = encode_prompt(policy.tokenizer, prompt.text)
    else:
        messages = [{"role": message.role, "content": message.content} for message in prompt.chat.messages]
        if not messages:
            raise invalid(f"{field}.chat", "has no messages")
        try:
            prompt_ids = encode_chat(policy.tokenizer, messages, add_generation_prompt=True)
        except ValueError as error:
            raise invalid(f"{field}.chat", str(error)) from error
    if prompt_ids.size == 0:
        raise invalid(f"{field}.{kind}", "holds no token")
    if prompt_ids.size >= bounds.max_length:
        raise invalid(
            f"{field}.{kind}",
            f"{prompt_ids.size} tokens leave no room for a response; prompt and response may be {bounds.max_length}",
        )
    outside = (prompt_ids < 0) | (prompt_ids >= policy.vocab_size)
    if outside.any():
        raise invalid(
            f"{field}.{kind}",
            f"id {int(prompt_ids[np.argmax(outside)])} is outside the vocabulary of {policy.vocab_size}",
        )
    return prompt_ids


def _seeds(prompt: generator_pb2.Prompt, index: int, samples: int, call_seed: int | None) -> list[int]:
    """One uint64 a sample: the prompt's own, or derived from the call's seed, or drawn."""
    if prompt.seeds:
        if len(prompt.seeds) != samples:
            raise invalid(f"prompts[{index}].seeds", f"{len(prompt.seeds)} seeds for {samples} samples")
        return list(prompt.seeds)
    seed = secrets.randbits(64) if call_seed is None else call_seed
    return [derive_seed(seed, index, sample) for sample in range(samples)]
