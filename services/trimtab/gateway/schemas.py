"""What several routes take and answer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from trimtab_client import AtLeast, ModelVersion, VersionPin

INT32_MAX = 2**31 - 1
STEP_MAX = 2**53 - 1  # what every JSON reader holds exactly
SEEDS = 2**64  # a seed is taken modulo this

# A length, though bodies are limited anyway: pydantic looks into a text, and refuses lone surrogates, only for that.
Text = Annotated[str, Field(max_length=2**26)]

TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
# Lists are refused by their first wrong element (`fail_fast`): millions of complaints would take the gateway seconds.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
MOST_MESSAGES = 4096


class Body(BaseModel):
    """A request body: names that are not known are refused, not passed over, and `true` is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class ChatMessage(Body):
    """One message of a conversation."""

    role: str = Field(min_length=1, max_length=64, examples=["user"])
    content: Text = Field(examples=["How do I boil an egg?"])


Conversation = Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]


class Pin(Body):
    """Which weights must answer: these (what is left out matches anything), or none older than a step."""

    run_id: str = Field(default="", max_length=256, examples=["my-run"])
    name: str = Field(default="", max_length=256, examples=["reward"])
    step: int = Field(default=0, ge=0, le=STEP_MAX, examples=[200])
    digest: str = Field(default="", max_length=256)
    at_least_step: int | None = Field(default=None, ge=0, le=STEP_MAX, description="Instead of all others.")

    def rule(self) -> VersionPin:
        """The pin as the SDK takes it."""
        if self.at_least_step is not None:
            return AtLeast(self.at_least_step)
        return ModelVersion(self.run_id, self.name, self.step, self.digest)


class Version(BaseModel):
    """The weights that answered."""

    run_id: str = Field(description="Empty for a model that was never published.")
    name: str
    step: int
    digest: str

    @classmethod
    def of(cls, version: ModelVersion) -> Version:
        """The version as it is shown."""
        return cls(run_id=version.run_id, name=version.name, step=version.step, digest=version.digest)


def messages_of(conversation: list[ChatMessage]) -> list[dict[str, str]]:
    """A conversation as the SDK takes it."""
    return [{"role": message.role, "content": message.content} for message in conversation]


def which(*names: str) -> Any:
    """A discriminator of body forms by the one field that only each of them has: `which("items", "tokens")`.

    Branches are tagged "<items>", …; a body with none of the names is read as the first form, which then says what is
    missing.
    """

    def tag(value: Any) -> str:
        present = value if isinstance(value, dict) else {name: None for name in names if hasattr(value, name)}
        return next((f"<{name}>" for name in names if name in present), f"<{names[0]}>")

    return tag
