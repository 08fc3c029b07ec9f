"""Why a model could not be loaded."""

from __future__ import annotations


class ModelLoadError(Exception):
    """A model folder or hub id cannot be used.

    Attributes:
        field: what is wrong: "model", "weights", "tokenizer", "config".
        reason: what to do about it, one line.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class OtherModelError(ModelLoadError):
    """A sound folder that holds another kind of model: parameters are missing or have other shapes."""
