"""The YAML file of a training stage, as the protobuf config that TrainerService.Start takes.

Keys are the field names of protos/trimtab/v1/trainer.proto. Those of StageConfig (model, seed, optimizer, …)
stand at the top beside the stage's own:

    model: HuggingFaceTB/SmolLM2-135M-Instruct
    data: stories.jsonl
    epochs: 2
    optimizer: {learning_rate: 2e-3}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from trimtab.cli.errors import CommandError
from trimtab_client.v1 import trainer_pb2

StageMessage = trainer_pb2.SftConfig | trainer_pb2.RewardModelConfig | trainer_pb2.PpoConfig
STAGES: Mapping[str, type[StageMessage]] = {
    "sft": trainer_pb2.SftConfig,
    "reward": trainer_pb2.RewardModelConfig,
    "ppo": trainer_pb2.PpoConfig,
}
FLOATS = frozenset({FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT})


def stage_config(stage: str, values: Mapping[str, Any], source: str) -> StageMessage:
    """Build the config of `stage` ("sft", "reward", "ppo"); CommandError naming `source` and the key."""
    config = STAGES[stage]()
    shared = set(trainer_pb2.StageConfig.DESCRIPTOR.fields_by_name)
    own = set(config.DESCRIPTOR.fields_by_name) - {"stage"}
    for key, value in values.items():
        if key not in shared | own:
            raise CommandError(f"{source}: {unknown_key(str(key), shared | own)}")
        target = config.stage if key in shared else config
        _set(target, key, value, f"{source}: {key}")
    return config


def unknown_key(key: str, known: set[str]) -> str:
    """One line that names an unknown key and what was probably meant."""
    close = difflib.get_close_matches(key, sorted(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
    return f"unknown key {key!r}; {hint}"


def _set(message: Message, key: str, value: Any, where: str) -> None:
    field = message.DESCRIPTOR.fields_by_name[key]
    if value is None:
        return  # `key:` with nothing behind it leaves the default
    if field.message_type is not None:
        if not isinstance(value, Mapping):
            raise CommandError(f"{where}: expected a mapping, got {value!r}")
        child, known = getattr(message, key), set(field.message_type.fields_by_name)
        for name, inner in value.items():
            if name not in known:
                raise CommandError(f"{where}: {unknown_key(str(name), known)}")
            _set(child, name, inner, f"{where}.{name}")
        return
    if field.is_repeated:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CommandError(f"{where}: expected a list of names, got {value!r}")
        getattr(message, key).extend(value)
        return
    try:
        # YAML 1.1 reads 2e-3 (no dot) as text
        setattr(message, key, float(value) if field.type in FLOATS and isinstance(value, str) else value)
    except (TypeError, ValueError) as error:
        kind = {FieldDescriptor.TYPE_STRING: "text", FieldDescriptor.TYPE_BOOL: "true or false"}.get(field.type)
        kind = kind or ("a number" if field.type in FLOATS else "a whole number from 0")
        raise CommandError(f"{where}: expected {kind}, got {value!r}") from error
