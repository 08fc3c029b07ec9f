"""The files that `trimtab doctor` is given, read as the commands that run them read them, put together as one plan.

A file is the YAML of `trimtab train`, `trimtab up`, `trimtab rounds run` or `trimtab job --run`; which it is shows in
its keys.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.cli.errors import CommandError
from trimtab.cli.settings import read_yaml
from trimtab.cli.stage_config import STAGES, stage_config
from trimtab.cli.up_config import UpConfig, load_up_config
from trimtab.doctor.plan import Plan, Planned
from trimtab.rounds.launchers.services import SERVICES
from trimtab.rounds.recipe import FILLED_IN, Recipe, parse_recipe
from trimtab.runtime.config import ServiceConfig, load_config
from trimtab.trainer.stages import stage_from_proto
from trimtab_client.v1 import trainer_pb2

KINDS = {"sft": "sft", "reward": "reward_model", "ppo": "ppo"}
MODELS = ("generator", "reward", "reference")


def read_plan(paths: list[Path], stage: str | None, over: Mapping[str, Any]) -> Plan:
    """The plan of all files together; `over` is laid over each stage's settings.

    Raises CommandError, ConfigError, RecipeError, StageConfigError, RunFileError: one line that names file and key.
    """
    plan = Plan()
    for path in paths:
        values = read_yaml(path)
        if "rank" in values and "rounds" in values:
            plan = _with_rounds(plan, path, values)
        elif values.keys() & SERVICES.keys() and values.keys() <= UpConfig.model_fields.keys():
            plan = _with_services(plan, path)
        elif values.keys() == {"run_id", "stage", "config"}:
            plan = _with_stage(plan, path, str(values["stage"]), values["config"] | dict(over))
        else:
            plan = _with_stage(plan, path, stage or _stage_of(path, values), values | dict(over))
    ppo = plan.ppo
    if ppo is None or plan.own_data:
        return plan
    started = {f"{config.host}:{config.port}" for config in plan.services.values()}
    addresses = {name: getattr(ppo, f"{name}_address") for name in MODELS}
    return replace(plan, called={name: where for name, where in addresses.items() if where not in started})


def torchrun_ranks(arguments: str) -> tuple[int, int]:
    """Processes in all and on each node, as torchrun's arguments have them; CommandError."""
    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--nnodes", default="1")
    parser.add_argument("--nproc-per-node", "--nproc_per_node", default="1")
    try:
        known, _ = parser.parse_known_args(shlex.split(arguments))
        nodes, local = int(known.nnodes.partition(":")[2] or known.nnodes), int(known.nproc_per_node)
    except (argparse.ArgumentError, ValueError) as error:
        raise CommandError(f"--torchrun: {error}; for example --torchrun '--nproc-per-node 8'") from error
    return nodes * local, local


def _with_stage(plan: Plan, path: Path, name: str, values: Mapping[str, Any]) -> Plan:
    if name not in STAGES:
        raise CommandError(f"{path}: stage: {name!r} is none of {', '.join(STAGES)}")
    values = {key: value for key, value in values.items() if key != "stage"} | dict(values.get("stage") or {})
    config = stage_from_proto(KINDS[name], stage_config(name, values, str(path)))
    return replace(plan, stages=(*plan.stages, Planned(name, config)))


def _with_services(plan: Plan, path: Path) -> Plan:
    up = load_up_config(path)
    services = {name: _service(name, section) for name, section in up.sections.items()}
    stores = [config.store for config in services.values() if config.store]
    return replace(plan, services={**plan.services, **services}, store=plan.store or next(iter(stores), None))


def _with_rounds(plan: Plan, path: Path, values: dict[str, Any]) -> Plan:
    """The rounds start their services on this machine and fill in models and addresses; a round's PPO is the most."""
    recipe = parse_recipe(values, str(path)).resolved(path.resolve().parent)
    sections = {"sft": recipe.sft, "reward": recipe.reward, "ppo": recipe.ppo.settings}
    stages = tuple(_round_stage(recipe, name, section, path) for name, section in sections.items())
    services = {name: _service(name, {"model": recipe.model, "port": 0}) for name in MODELS}
    filled = {f"{name}.{key}" for name, keys in FILLED_IN.items() for key in keys}
    folder = Path("runs") / recipe.name
    plan = replace(plan, stages=stages, services=services, own_data=frozenset(filled))
    return replace(plan, store=str(folder / "store"), folder=folder / "runs")


def _round_stage(recipe: Recipe, name: str, section: Mapping[str, Any], path: Path) -> Planned:
    filled = {"model": recipe.model, "data": "-"} if name == "reward" else {"model": recipe.model}
    config = stage_config(name, {**section, **filled}, f"{path}: {name}")
    return Planned(name, stage_from_proto(KINDS[name], config))


def _service(name: str, section: Mapping[str, Any]) -> ServiceConfig:
    kind = SERVICES[name]
    config_class = getattr(importlib.import_module(kind.config_module), kind.config_class)
    return load_config(config_class, None, {"port": kind.default_port, **section})


def _stage_of(path: Path, values: Mapping[str, Any]) -> str:
    """The one stage that has all these keys; where several have, the one that the file is named after."""
    shared = set(trainer_pb2.StageConfig.DESCRIPTOR.fields_by_name)
    fitting = [
        name for name, message in STAGES.items() if values.keys() <= shared | set(message.DESCRIPTOR.fields_by_name)
    ]
    named = [name for name in fitting if name in path.stem]
    if len(fitting) == 1 or len(named) == 1:
        return (named or fitting)[0]
    if "prompts" in values or "generator_address" in values:
        return "ppo"  # a wrong key in it is told with the stage's own keys
    raise CommandError(f"{path}: which stage is it? give --stage {', '.join(STAGES)}")
