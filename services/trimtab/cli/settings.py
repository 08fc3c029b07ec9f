"""What commands read from YAML files and from `--set key=value`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from trimtab.cli.errors import CommandError


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; CommandError with the place of a syntax error, FileNotFoundError."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise CommandError(f"{path}{place}: {getattr(error, 'problem', None) or error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise CommandError(f"{path}: expected `key: value` lines, found a {type(values).__name__}")
    return values


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`["a.b=1", "c=x"]` → `{"a": {"b": 1}, "c": "x"}`; values are read as YAML. A usage error otherwise."""
    import yaml

    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise typer.BadParameter(f"{assignment!r} is not key=value", param_hint="--set")
        *parents, last = key.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise typer.BadParameter(f"{key!r}: {parent!r} was already set to a value", param_hint="--set")
        try:
            target[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise typer.BadParameter(f"{assignment!r} is not valid YAML after `=`", param_hint="--set") from error
    return values


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` laid on it, mappings key by key."""
    result = dict(base)
    for key, value in over.items():
        present = result.get(key)
        both = isinstance(present, dict) and isinstance(value, dict)
        result[key] = merged(present, value) if both else value  # type: ignore[arg-type]
    return result
