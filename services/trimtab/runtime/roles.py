"""Which role each method of the wire needs: the one table. What is not in it is refused to everybody.

`auth` finds out who calls and what roles they have, `calls` asks this table before a request is read. Routes over HTTP
have tables of their own in their rooms, with the same roles.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["score", "generate", "logprobs", "train", "label", "admin"]
ROLES: frozenset[str] = frozenset(get_args(Role))

ANY = "any"  # any caller who is known, whatever their roles
PUBLIC = "public"  # everybody; carries no request data


@dataclass(frozen=True)
class Rule:
    """What a method needs: a role, `ANY` or `PUBLIC`; `audited` ones leave a line in the audit log at each call."""

    needs: str
    audited: bool = False


RULES: dict[str, Rule] = {
    "/trimtab.v1.GeneratorService/Generate": Rule("generate"),
    "/trimtab.v1.RewardService/Score": Rule("score"),
    "/trimtab.v1.ReferenceService/LogProbs": Rule("logprobs"),
    "/trimtab.v1.ModelService/GetModel": Rule(ANY),
    "/trimtab.v1.ModelService/LoadVersion": Rule("admin", audited=True),
    "/trimtab.v1.TrainerService/Start": Rule("train", audited=True),
    "/trimtab.v1.TrainerService/Status": Rule("train"),
    "/trimtab.v1.TrainerService/Watch": Rule("train"),
    "/trimtab.v1.TrainerService/Samples": Rule("train"),
    "/trimtab.v1.TrainerService/Pause": Rule("train", audited=True),
    "/trimtab.v1.TrainerService/Resume": Rule("train", audited=True),
    "/trimtab.v1.TrainerService/Checkpoint": Rule("train", audited=True),
    "/trimtab.v1.TrainerService/Stop": Rule("train", audited=True),
    # The gateway's Open Inference Protocol.
    "/inference.GRPCInferenceService/ServerLive": Rule(ANY),
    "/inference.GRPCInferenceService/ServerReady": Rule(ANY),
    "/inference.GRPCInferenceService/ServerMetadata": Rule(ANY),
    "/inference.GRPCInferenceService/ModelReady": Rule(ANY),
    "/inference.GRPCInferenceService/ModelMetadata": Rule(ANY),
    "/inference.GRPCInferenceService/ModelInfer": Rule("score"),
    # Standard services.
    "/grpc.health.v1.Health/Check": Rule(PUBLIC),
    "/grpc.health.v1.Health/Watch": Rule(PUBLIC),
    "/grpc.health.v1.Health/List": Rule(PUBLIC),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Rule(ANY),
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Rule(ANY),
}


def rule_of(method: str) -> Rule | None:
    """The rule of "/package.Service/Method"; None: nobody may call it."""
    return RULES.get(method)
