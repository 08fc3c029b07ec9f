"""The recipe of `trimtab rounds`: one YAML file from the model to the last round, checked before anything is started.

The sections sft, reward and ppo hold the keys of the training stages (protos/trimtab/v1/trainer.proto), less those that
the rounds fill in: models, addresses, and the reward model's data. Paths are relative to the recipe's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trimtab.rounds.scorers import check_spec, spec_with_paths
from trimtab.trainer.stages import PpoConfig, Stage, StageConfig, parse_stage
from trimtab.weights.layout import check_name
from trimtab_client.clear_text import check_token_may_travel_to

FILLED_IN = {
    "sft": ("model", "seed"),
    "reward": ("model", "seed", "data", "validation_data", "normalization_data", "generator_address"),
    "ppo": ("model", "seed", "value_model", "generator_address", "reward_address", "reference_address"),
}
ScorerSpec = Annotated[str, Field(min_length=1)]


class RecipeError(ValueError):
    """The recipe cannot be run, or is not the one that a folder was begun with; one line says what to change."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SampleSection(_Section):
    """What is ranked in a round: K answers of the best policy so far to each of `sets` prompts."""

    prompts: str
    sets: Annotated[int, Field(ge=2)]
    k: Annotated[int, Field(ge=4, le=9)] = 6


class FileRanking(_Section):
    """Rankings that people make elsewhere and put into a JSONL file; `{round}` in its name is the round's number.

    Attributes:
        minimum: rankings by different labelers that each set needs.
        held_out: share of the sets whose rankings check the reward model instead of training it.
    """

    source: Literal["file"]
    file: str
    minimum: Annotated[int, Field(ge=1)] = 1
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    poll_s: Annotated[float, Field(gt=0)] = 5.0


class PeopleRanking(_Section):
    """Rankings by people on the labeling page at `address`; `token_file` holds a lead's access token.

    Attributes:
        address: https://HOST:PORT, or http:// on this machine.
        minimum: people that rank each set.
        guideline: a Markdown file that tells them what to go by; "" is the page's own text.
        held_out: share of the sets whose rankings check the reward model instead of training it.
    """

    source: Literal["people"]
    address: str
    token_file: str
    minimum: Annotated[int, Field(ge=1, le=100)] = 1
    guideline: str = ""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    poll_s: Annotated[float, Field(gt=0)] = 5.0

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str) -> str:
        check_token_may_travel_to(address)
        return address


class SimulatedRanking(_Section):
    """A simulated labeler: `gold` scores the answers, `noise` (in the gold score's own units) spoils their order.

    Attributes:
        tie_within: answers whose noisy scores are this near to the best of their rank tie with it.
        labelers: simulated labelers that rank each set.
    """

    source: Literal["simulated"]
    gold: ScorerSpec
    noise: Annotated[float, Field(ge=0)] = 0.0
    tie_within: Annotated[float, Field(ge=0)] = 0.0
    labelers: Annotated[int, Field(ge=1)] = 1
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1


class EvaluateSection(_Section):
    """Held-out prompts, and the judge whose win rate against SFT chooses the version that is published as best.

    Attributes:
        samples: answers of each version to each prompt.
        checkpoints: versions of a PPO run that are evaluated, evenly spaced, the last among them. All versions of the
            run are kept in the store until then, unless it is 1.
    """

    prompts: str
    judge: ScorerSpec
    samples: Annotated[int, Field(ge=1)] = 2
    checkpoints: Annotated[int, Field(ge=1)] = 3


class PpoSection(BaseModel):
    """Keys of the PPO stage, and where a round's policy starts."""

    model_config = ConfigDict(frozen=True, extra="allow")

    start: Literal["sft", "best"] = "sft"

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of the PPO stage, as they were given."""
        return dict(self.model_extra or {})

    @property
    def stage(self) -> PpoConfig:
        """The PPO stage with its defaults, but for the model and the addresses."""
        stage = _parsed("ppo", self.settings)
        assert isinstance(stage, PpoConfig)
        return stage


class Recipe(_Section):
    """Everything that decides what comes out; `rounds` alone may grow after a run was begun."""

    name: str
    model: str
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    rounds: Annotated[int, Field(ge=1)]
    sft: dict[str, Any]
    sample: SampleSection
    rank: Annotated[FileRanking | PeopleRanking | SimulatedRanking, Field(discriminator="source")]
    reward: dict[str, Any] = {}
    ppo: PpoSection
    evaluate: EvaluateSection

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        return check_name("name", name)

    @property
    def scorers(self) -> dict[str, str]:
        """The scorers it names, by the key that names them."""
        specs = {"evaluate.judge": self.evaluate.judge}
        return specs | ({"rank.gold": self.rank.gold} if isinstance(self.rank, SimulatedRanking) else {})

    def resolved(self, folder: Path) -> Recipe:
        """The recipe with paths that hold wherever it is run from; what is no path under `folder` stays as it is."""
        update: dict[str, Any] = {
            "model": located(folder, self.model),
            "sft": self.sft | {k: located(folder, self.sft[k]) for k in ("data", "validation_data") if k in self.sft},
            "sample": self.sample.model_copy(update={"prompts": located(folder, self.sample.prompts)}),
            "ppo": self.ppo.model_copy(update={"prompts": located(folder, self.ppo.settings["prompts"])}),
            "evaluate": self.evaluate.model_copy(
                update={
                    "prompts": located(folder, self.evaluate.prompts),
                    "judge": spec_with_paths(self.evaluate.judge, folder),
                }
            ),
        }
        if isinstance(self.rank, FileRanking):
            update["rank"] = self.rank.model_copy(update={"file": str((folder / self.rank.file).resolve())})
        elif isinstance(self.rank, PeopleRanking):
            files = {name: getattr(self.rank, name) for name in ("token_file", "guideline")}
            found = {name: str((folder / file).resolve()) for name, file in files.items() if file}
            update["rank"] = self.rank.model_copy(update=found)
        else:
            update["rank"] = self.rank.model_copy(update={"gold": spec_with_paths(self.rank.gold, folder)})
        return self.model_copy(update=update)

    def data_files(self) -> dict[str, Path]:
        """Files that decide what comes out, by the key that names them; folders and hub ids are not among them."""
        named = {
            "sft.data": self.sft.get("data", ""),
            "sft.validation_data": self.sft.get("validation_data", ""),
            "sample.prompts": self.sample.prompts,
            "ppo.prompts": self.ppo.settings["prompts"],
            "evaluate.prompts": self.evaluate.prompts,
        } | {key: spec.partition(":")[2] for key, spec in self.scorers.items()}
        return {key: Path(value) for key, value in named.items() if value and Path(value).is_file()}


def parse_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Check a recipe's values; RecipeError names `where` and the first bad key."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise RecipeError(f"{where}: {place}: {first['msg']}") from error
    for key, spec in recipe.scorers.items():
        try:
            check_spec(spec)
        except ValueError as error:
            raise RecipeError(f"{where}: {key}: {error}") from error
    for section, keys in FILLED_IN.items():
        settings = recipe.ppo.settings if section == "ppo" else getattr(recipe, section)
        for key in keys:
            if key in settings:
                raise RecipeError(f"{where}: {section}.{key}: the rounds fill it in; leave it out")
    _check_stages(recipe, where)
    return recipe


def _check_stages(recipe: Recipe, where: str) -> None:
    """The stages' own checks, with stand-ins for what is filled in later."""
    for section, settings in {"sft": recipe.sft, "reward": recipe.reward, "ppo": recipe.ppo.settings}.items():
        try:
            _parsed(section, settings)
        except ValueError as error:
            raise RecipeError(f"{where}: {section}.{str(error).removeprefix('stage.')}") from error


def _parsed(section: str, settings: dict[str, Any]) -> Stage:
    """A stage's section by the stage's own rules; "-" stands for what is filled in later. Raises StageConfigError."""
    given = {key: value for key, value in settings.items() if value is not None}
    shared = {key: given.pop(key) for key in StageConfig.model_fields if key in given}
    later = {"data": "-"} if section == "reward" else {}
    kind = "reward_model" if section == "reward" else section
    return parse_stage(kind, given | later | {"stage": shared | {"model": "-"}})


def check_unchanged(recipe: Recipe, begun_with: dict[str, Any], digests: dict[str, str], begun_digests: dict[str, str]):
    """Refuse to go on with another recipe or other data than a run was begun with; RecipeError names what differs."""
    now, before = flat(recipe.model_dump(mode="json")), flat(begun_with)
    for key in sorted(now.keys() | before.keys()):
        if key != "rounds" and now.get(key) != before.get(key):
            raise RecipeError(
                f"{key} was {before.get(key)!r} when this run was begun and is {now.get(key)!r} now: "
                "put it back, or give a new --folder"
            )
    for key in sorted(digests.keys() | begun_digests.keys()):
        if digests.get(key) != begun_digests.get(key):
            raise RecipeError(
                f"{key}: the file is not what it was when this run was begun: put it back, or give a new --folder"
            )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def file_digest(path: Path) -> str:
    """ "blake3:…" of a file's bytes."""
    hasher = blake3()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return f"blake3:{hasher.hexdigest()}"


def located(folder: Path, value: str) -> str:
    """The absolute path of what lies under `folder` by this name; anything else (a hub id, a version) as it is."""
    path = folder / Path(value).expanduser()
    return str(path.resolve()) if value and path.exists() else value
