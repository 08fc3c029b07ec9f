"""Load the policy at start, stage later versions of it in host memory, and say what is being served.

Everything here blocks and runs in a thread beside the engine; only the engine copies weights into the live model.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoModelForCausalLM

from trimtab.generator.config import GeneratorConfig
from trimtab.generator.engine import StagedPatches, StagedWeights
from trimtab.generator.local import selfcheck
from trimtab.generator.patches import stage_patches
from trimtab.generator.turns import quick_turns
from trimtab.models.errors import ModelLoadError, OtherModelError
from trimtab.models.folders import load_pretrained
from trimtab.models.policy import Policy
from trimtab.models.tokenizers import load_tokenizer, tokenizer_digest
from trimtab.runtime.errors import ServiceError, StartError, data_loss, exhausted, not_found, precondition, unavailable
from trimtab.weights import errors as store_errors
from trimtab.weights.sources import resolve_source
from trimtab.weights.store import Store
from trimtab_client.v1 import model_pb2
from trimtab_client.versions import ModelVersion

T = TypeVar("T")

STORE_ATTEMPTS = 4
FIRST_PAUSE_S = 0.25


@dataclass(frozen=True)
class LoadedPolicy:
    """The policy, the version it holds at start, and the folder or Hugging Face id it came from.

    For the local engine it is the live one; beside another engine it stays in host memory, and gives tokenizer, checks
    and what the engine's log-probs are compared with.
    """

    policy: Policy
    version: ModelVersion
    source: str


def load_policy(config: GeneratorConfig, store: Store | None) -> LoadedPolicy:
    """Load the configured model with an attention the engine can use. Raises StartError with one line."""
    try:
        source = resolve_source(config.model, store)
        # transformers' own attention, not the packed one: decoding reads a cache.
        model = load_pretrained(AutoModelForCausalLM, source.path_or_id, dtype=config.dtype, attention=None)
        local = config.engine == "local"
        model = in_own_memory(model.to(config.device if local else "cpu"))  # type: ignore[arg-type]
        policy = Policy(model, load_tokenizer(source.path_or_id), config.model)  # type: ignore[arg-type]
        if config.self_check and local:
            selfcheck.prepare(policy.model)
    except ModelLoadError as error:  # names its field itself
        raise StartError(str(error)) from error
    except (store_errors.StoreError, ValueError) as error:
        raise StartError(f"model: {error}") from error
    return LoadedPolicy(policy, source.version, source.path_or_id)


def in_own_memory(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its tensors out of the mapped file: writing there costs a page fault every 4 KB during a swap."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model


def max_length_of(config: GeneratorConfig, policy: Policy) -> int:
    """Prompt and response together, tokens."""
    return policy.max_length if config.max_length is None else min(config.max_length, policy.max_length)


def model_info(config: GeneratorConfig, policy: Policy, version: ModelVersion) -> model_pb2.ModelInfo:
    """What GetModel answers while `version` is served."""
    return model_pb2.ModelInfo(
        version=version.to_proto(),
        tokenizer_digest=policy.tokenizer_digest,
        vocab_size=policy.vocab_size,
        max_length=max_length_of(config, policy),
        dtype=policy.dtype,
        architecture=policy.architecture,
        parameter_count=policy.parameter_count,
        eos_token_ids=policy.eos_token_ids,
        has_chat_template=bool(policy.tokenizer.chat_template),
        max_sequences=config.limits.max_sequences,
        max_tokens=config.limits.max_tokens,
    )


def stage_weights(
    store: Store, version: ModelVersion, policy: Policy, served: ModelVersion | None = None
) -> StagedWeights | StagedPatches:
    """Read a version, verified, into host memory: what differs from `served`, or tensors for the live state dict.

    Raises ServiceError: NOT_FOUND, DATA_LOSS for broken files or weights that are not finite, FAILED_PRECONDITION for
    another digest, architecture or tokenizer, UNAVAILABLE where the store did not answer four times.
    """
    with quick_turns():
        return _staged(store, version, policy, served)


def _staged(
    store: Store, version: ModelVersion, policy: Policy, served: ModelVersion | None
) -> StagedWeights | StagedPatches:
    try:
        manifest = _retried(lambda: store.get(version.run_id, version.name, version.step))
        if version.digest and version.digest != manifest.version.digest:
            raise precondition(
                f"{version} has digest {manifest.version.digest} in the store, not {version.digest}",
                field="version.digest",
            )
        if served is not None:
            staged = _retried(lambda: stage_patches(store, served, manifest, policy.model.state_dict()))
            if staged is not None:
                return staged
        folder = _retried(lambda: store.fetch(manifest))
        return StagedWeights(manifest.version, _read(folder, manifest.version, policy), folder)
    except store_errors.StoreError as error:
        raise _refusal(error) from error
    except OtherModelError as error:
        raise precondition(f"{version} is no model for this server: {error}", field="version") from error
    except ModelLoadError as error:
        raise data_loss(f"{version} cannot be loaded: {error}") from error


def _read(folder: Path, version: ModelVersion, policy: Policy) -> dict[str, torch.Tensor]:
    if tokenizer_digest(load_tokenizer(str(folder))) != policy.tokenizer_digest:
        raise precondition(f"{version} has another tokenizer than the served policy; start a generator for it")
    # Always read as float32: reading in another dtype would change torch's default dtype under the running engine.
    model = load_pretrained(AutoModelForCausalLM, str(folder), dtype="float32", attention=None)
    if type(model) is not type(policy.model):
        raise precondition(f"{version} is a {type(model).__name__}, the served policy a {policy.architecture}")
    live = policy.model.state_dict()
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise data_loss(f"{version} is broken: {name} holds numbers that are not finite")
    return {name: tensor.to(live[name].dtype if name in live else None, copy=True) for name, tensor in tensors.items()}


def let_go(staged: StagedWeights | StagedPatches) -> None:
    """Free what the engine gave back, a tensor at a time: freeing one holds the interpreter, and so the engine."""
    if isinstance(staged, StagedWeights):
        while staged.tensors:
            staged.tensors.popitem()


def _retried(read: Callable[[], T]) -> T:
    """`read()`, tried again after a pause where the store did not answer."""
    pause_s = FIRST_PAUSE_S
    for _ in range(STORE_ATTEMPTS - 1):
        try:
            return read()
        except store_errors.StoreUnavailableError:
            time.sleep(pause_s)
            pause_s *= 2
    return read()


def _refusal(error: store_errors.StoreError) -> ServiceError:
    """The status that a store's error stands for."""
    message = str(error)
    match error:
        case store_errors.VersionNotFoundError():
            return not_found(message, field="version")
        case store_errors.CorruptVersionError():
            return data_loss(message)
        case store_errors.StoreFullError():
            return exhausted(message, retry_after_s=None)
        case store_errors.StoreUnavailableError():
            return unavailable(message)
        case _:
            return precondition(message, field="version")
