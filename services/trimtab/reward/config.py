"""Settings of the reward server."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from trimtab.reward.scorer_config import ModelSettings, ScorerSettings, SumSettings
from trimtab.runtime.config import ServiceConfig

ScorerName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}$")]
MODEL = "model"


class RewardConfig(ServiceConfig):
    """One reward process: one model in a few words, or any number of scorers by name.

    `model` and the settings beside it are short for a scorer of that kind whose name is "model".
    """

    port: int = Field(default=7102, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    metrics_port: int | None = Field(default=9102, ge=0, le=65535, description="Prometheus port; empty: no metrics.")

    model: str | None = Field(default=None, min_length=1, description="Folder, hub id or version:RUN/NAME[@STEP].")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="What the model runs in.")
    follow: str | None = Field(default=None, description="RUN/NAME in the store whose pointer is followed.")
    poll_interval_s: float = Field(default=2.0, gt=0, description="How often the followed pointer is read.")
    max_length: int | None = Field(default=None, ge=1, description="Longest sequence, tokens; empty: the model's own.")
    batch_tokens: int = Field(default=16_384, ge=1, description="Most tokens of one packed forward.")
    deterministic: bool = Field(default=False, description="Scores are bitwise the same in any company.")
    own_process: bool = Field(default=False, description="The model computes in a process of its own.")
    text_encoding: Literal["auto", "trained", "plain"] = Field(default="auto", description="How texts become tokens.")
    timeout_s: float = Field(default=60.0, gt=0, description="A call of the model that takes longer is given up.")

    scorers: dict[ScorerName, ScorerSettings] = Field(
        default={}, description="By name, each with its kind: model, length, regex, answer, function or sum."
    )
    default: str | None = Field(default=None, description="The scorer of requests that name none.")

    def all_scorers(self) -> dict[str, ScorerSettings]:
        """Every scorer by name, the default one first."""
        found = dict(self.scorers)
        if self.model is not None:
            given = {name: getattr(self, name) for name in ModelSettings.model_fields if hasattr(self, name)}
            found = {MODEL: ModelSettings(**given), **found}
        first = self.default or next(iter(found))
        return {first: found[first], **found}

    @model_validator(mode="after")
    def _check_scorers(self) -> Self:
        if self.model is None and not self.scorers:
            raise ValueError("model: is required, or scorers")
        if self.model is not None and MODEL in self.scorers:
            raise ValueError(f"scorers.{MODEL}: is the name of the one that `model` sets; choose another")
        names = {*self.scorers, *([MODEL] if self.model is not None else [])}
        if self.default is not None and self.default not in names:
            raise ValueError(f"default: {self.default} is none of {', '.join(sorted(names))}")
        if self.default is None and len(names) > 1:
            raise ValueError(f"default: say which of {', '.join(sorted(names))} answers requests that name none")
        for name, settings in self.all_scorers().items():
            place = "" if name == MODEL and self.model is not None else f"scorers.{name}."
            if isinstance(settings, ModelSettings) and self.store is None:
                if settings.follow is not None:
                    raise ValueError(f"{place}follow: needs a store to follow a pointer in")
                if settings.model.startswith("version:"):
                    raise ValueError(f"{place}model: {settings.model} needs a store")
            if isinstance(settings, SumSettings):
                _check_sum(f"{place}weights", settings, self.scorers, names)
        return self


def _check_sum(place: str, settings: SumSettings, scorers: dict[str, ScorerSettings], names: set[str]) -> None:
    for part in settings.weights:
        if part not in names:
            raise ValueError(f"{place}: {part} is none of {', '.join(sorted(names))}")
        if isinstance(scorers.get(part), SumSettings):
            raise ValueError(f"{place}: {part} is a sum itself; name its parts")
