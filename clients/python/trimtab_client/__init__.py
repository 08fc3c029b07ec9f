"""trimtab SDK: generate, score, log-probs and training over gRPC, without torch.

>>> from trimtab_client import RewardClient
>>> with RewardClient("127.0.0.1:7102") as reward:
...     reward.score_texts([("Tell me a story.", "Once upon a time ...")]).scores
"""

from trimtab_client.aio import AsyncGeneratorClient, AsyncReferenceClient, AsyncRewardClient, AsyncTrainerClient
from trimtab_client.channel import ChannelOptions, Tls
from trimtab_client.clients import GeneratorClient, ReferenceClient, RewardClient, TrainerClient
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
from trimtab_client.messages import (
    Completion,
    LogProbs,
    ModelInfo,
    RunStatus,
    Sampling,
    Scores,
    StepMetrics,
    VersionRun,
)
from trimtab_client.ragged import RaggedError, RaggedFloats, RaggedTokens
from trimtab_client.versions import AtLeast, ModelVersion, VersionPin

__version__ = "0.1.0"

__all__ = [
    "AlreadyExists",
    "AsyncGeneratorClient",
    "AsyncReferenceClient",
    "AsyncRewardClient",
    "AsyncTrainerClient",
    "AtLeast",
    "Cancelled",
    "ChannelOptions",
    "Completion",
    "DataLoss",
    "DeadlineExceeded",
    "FailedPrecondition",
    "GeneratorClient",
    "Internal",
    "InvalidArgument",
    "LogProbs",
    "ModelInfo",
    "ModelVersion",
    "NotFound",
    "PermissionDenied",
    "RaggedError",
    "RaggedFloats",
    "RaggedTokens",
    "ReferenceClient",
    "ResourceExhausted",
    "RewardClient",
    "RunStatus",
    "Sampling",
    "Scores",
    "StepMetrics",
    "Tls",
    "TrainerClient",
    "TrimtabError",
    "Unauthenticated",
    "Unavailable",
    "VersionPin",
    "VersionRun",
]
