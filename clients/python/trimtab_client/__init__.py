"""trimtab SDK: generate, score, log-probs and training over gRPC, without torch.

>>> from trimtab_client import RewardClient
>>> with RewardClient("127.0.0.1:7102") as reward:
...     reward.score_texts([("Tell me a story.", "Once upon a time ...")]).scores

A name is imported from its module when it is first used, so that importing the package alone costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab_client.channel import (
        ChannelOptions,
        Tls,
    )
    from trimtab_client.conversations import (
        ChatMessage,
        Prompt,
    )
    from trimtab_client.errors import (
        AlreadyExists,
        Cancelled,
        DataLoss,
        DeadlineExceeded,
        FailedPrecondition,
        Internal,
        InvalidArgument,
        NotFound,
        PermissionDenied,
        ResourceExhausted,
        TrimtabError,
        Unauthenticated,
        Unavailable,
    )
    from trimtab_client.generator import (
        AsyncGeneratorClient,
        GeneratorClient,
    )
    from trimtab_client.labeling import (
        LabelingClient,
    )
    from trimtab_client.messages import (
        Completion,
        LogProbs,
        ModelInfo,
        PartScores,
        RunStatus,
        Sample,
        Sampling,
        ScorerInfo,
        Scores,
        StepMetrics,
        VersionRun,
    )
    from trimtab_client.models import (
        AsyncModelClient,
        ModelClient,
    )
    from trimtab_client.ragged import (
        RaggedError,
        RaggedFloats,
        RaggedTokens,
        decode_floats,
        decode_ids,
        encode_floats,
        encode_ids,
    )
    from trimtab_client.reference import (
        AsyncReferenceClient,
        ReferenceClient,
    )
    from trimtab_client.reward import (
        AsyncRewardClient,
        RewardClient,
    )
    from trimtab_client.score_many import (
        RowScore,
    )
    from trimtab_client.trainer import (
        AsyncTrainerClient,
        TrainerClient,
    )
    from trimtab_client.versions import (
        AtLeast,
        ModelVersion,
        VersionPin,
    )

__version__ = "0.1.0"

_MODULES = {
    "channel": "ChannelOptions Tls",
    "conversations": "ChatMessage Prompt",
    "errors": "AlreadyExists Cancelled DataLoss DeadlineExceeded FailedPrecondition Internal InvalidArgument NotFound "
    "PermissionDenied ResourceExhausted TrimtabError Unauthenticated Unavailable",
    "generator": "AsyncGeneratorClient GeneratorClient",
    "labeling": "LabelingClient",
    "messages": "Completion LogProbs ModelInfo PartScores RunStatus Sample Sampling ScorerInfo Scores StepMetrics "
    "VersionRun",
    "models": "AsyncModelClient ModelClient",
    "ragged": "RaggedError RaggedFloats RaggedTokens decode_floats decode_ids encode_floats encode_ids",
    "reference": "AsyncReferenceClient ReferenceClient",
    "reward": "AsyncRewardClient RewardClient",
    "score_many": "RowScore",
    "trainer": "AsyncTrainerClient TrainerClient",
    "versions": "AtLeast ModelVersion VersionPin",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "AlreadyExists",
    "AsyncGeneratorClient",
    "AsyncModelClient",
    "AsyncReferenceClient",
    "AsyncRewardClient",
    "AsyncTrainerClient",
    "AtLeast",
    "Cancelled",
    "ChannelOptions",
    "ChatMessage",
    "Completion",
    "DataLoss",
    "DeadlineExceeded",
    "FailedPrecondition",
    "GeneratorClient",
    "Internal",
    "InvalidArgument",
    "LabelingClient",
    "LogProbs",
    "ModelClient",
    "ModelInfo",
    "ModelVersion",
    "NotFound",
    "PartScores",
    "PermissionDenied",
    "Prompt",
    "RaggedError",
    "RaggedFloats",
    "RaggedTokens",
    "ReferenceClient",
    "ResourceExhausted",
    "RewardClient",
    "RowScore",
    "RunStatus",
    "Sample",
    "Sampling",
    "ScorerInfo",
    "Scores",
    "StepMetrics",
    "Tls",
    "TrainerClient",
    "TrimtabError",
    "Unauthenticated",
    "Unavailable",
    "VersionPin",
    "VersionRun",
    "decode_floats",
    "decode_ids",
    "encode_floats",
    "encode_ids",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
