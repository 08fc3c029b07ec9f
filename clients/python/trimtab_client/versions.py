"""Which weights answered: a model version, and the pins that ask for one."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab_client.v1 import model_pb2


@dataclass(frozen=True)
class ModelVersion:
    """One published set of weights of one model.

    Attributes:
        run_id: the run that made it, "" for a model that was never published.
        name: "policy", "reward", …; for an unpublished model its folder or hub id.
        step: monotonic within run_id and name.
        digest: of the content, "blake3:<hex>".
    """

    run_id: str
    name: str
    step: int
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.run_id}/{self.name}@{self.step}" if self.run_id else self.name

    @classmethod
    def from_proto(cls, message: model_pb2.ModelVersion) -> ModelVersion:
        return cls(message.run_id, message.name, message.step, message.digest)

    def to_proto(self) -> model_pb2.ModelVersion:
        return model_pb2.ModelVersion(run_id=self.run_id, name=self.name, step=self.step, digest=self.digest)


@dataclass(frozen=True)
class AtLeast:
    """Asks for any version of the served run with at least this step."""

    step: int


VersionPin = ModelVersion | AtLeast
"""A version asks for exactly itself (empty fields match anything)."""


def pin_to_proto(pin: VersionPin | None) -> model_pb2.VersionPin | None:
    """The pin as it travels; None asks for any version."""
    if pin is None:
        return None
    if isinstance(pin, AtLeast):
        return model_pb2.VersionPin(at_least_step=pin.step)
    return model_pb2.VersionPin(exact=pin.to_proto())
