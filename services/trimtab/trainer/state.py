"""All that a resume needs, in one place: what a stage is at a step, on disk as one folder.

`state.json` holds numbers, RNG states and queues, one safetensors file a model holds its float32 master weights and
Adam's moments; with several ranks one file a rank holds its shards of all. Never pickle. A checkpoint appears whole or
not at all; the one before it goes once it is there. What came after it is the journal's (PPO) or is computed again from
seed and step (SFT and reward model).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from trimtab.models.sharded import spread
from trimtab.trainer.durable import ASIDE, folder_aside, read_json, show_folder, write_folder, write_json
from trimtab.trainer.optimizer import MasterWeightOptimizer
from trimtab.trainer.ranks import ALONE, Ranks
from trimtab.trainer.sharded_state import FILES, read_shards, write_shards

FORMAT = 1
STATE = "state.json"
Tensors = dict[str, torch.Tensor]


class StateError(Exception):
    """A checkpoint that cannot be used; the message names the file and what to do."""


@dataclass(frozen=True)
class TrainingState:
    """A stage after `step` steps.

    Attributes:
        values: whatever JSON holds: counters, β, RNG states, the prompt sampler.
        tensors: by file ("policy", "value", "ema", …), then by name.
    """

    step: int
    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensors] = field(default_factory=dict)


class Checkpoints:
    """The newest durable state of a run, in a folder of its own that all ranks see."""

    def __init__(self, folder: Path, ranks: Ranks = ALONE) -> None:
        self._folder = folder
        self._ranks = ranks

    def save(self, state: TrainingState) -> None:
        """Make a state durable and drop the older ones; the same step again is a no-op."""
        target = self._folder / f"{state.step:012d}"
        if self._ranks.told(target.exists):
            return
        if self._ranks.world == 1:
            write_folder(target, lambda folder: _write(folder, state))
        else:
            aside = self._ranks.told(lambda: folder_aside(target))
            numbers, files = _apart(state.tensors)
            write_shards(aside, files, self._ranks)
            self._ranks.told(lambda: _show_shards(aside, target, state, numbers))
        if self._ranks.leads:
            for older in self._folder.iterdir():
                if older != target:
                    shutil.rmtree(older)

    def newest(self) -> TrainingState | None:
        """The last state that was saved; None before the first. Raises StateError where its files are damaged."""
        newest = self._ranks.told(self._newest_folder)
        return None if newest is None else _read(newest, self._ranks)

    def _newest_folder(self) -> Path | None:
        if not self._folder.is_dir():
            return None
        whole = sorted(entry for entry in self._folder.iterdir() if re.fullmatch(r"\d{12}", entry.name))
        for leftover in self._folder.glob(f"{ASIDE}*"):
            shutil.rmtree(leftover)
        return whole[-1] if whole else None

    def clear(self) -> None:
        """Remove all: the run has ended well and needs them no more."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _write(folder: Path, state: TrainingState) -> None:
    digests = {}
    for name, tensors in state.tensors.items():
        path = folder / f"{name}.safetensors"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
        digests[path.name] = _digest(path)
    write_json(folder / STATE, {"format": FORMAT, "step": state.step, "files": digests, "values": dict(state.values)})


def _apart(files: Mapping[str, Tensors]) -> tuple[dict[str, dict[str, float]], dict[str, Tensors]]:
    """The single numbers among the tensors, and the tensors without them."""
    numbers = {file: {n: float(t) for n, t in named.items() if not t.dim()} for file, named in files.items()}
    return numbers, {file: {n: t for n, t in named.items() if t.dim()} for file, named in files.items()}


def _show_shards(aside: Path, target: Path, state: TrainingState, numbers: dict[str, dict[str, float]]) -> None:
    """Finish a checkpoint whose shards lie in `aside`."""
    digests = {path.name: _digest(path) for path in sorted(aside.glob(FILES))}
    head = {"format": FORMAT, "step": state.step, "files": digests, "numbers": numbers, "values": dict(state.values)}
    write_json(aside / STATE, head)
    show_folder(aside, target)


def _read(folder: Path, ranks: Ranks) -> TrainingState:
    head = ranks.told(lambda: _checked_head(folder))
    if "numbers" in head:
        tensors = read_shards(folder, ranks)
        for file, numbers in head["numbers"].items():
            tensors.setdefault(file, {}).update({name: torch.tensor(number) for name, number in numbers.items()})
    else:
        tensors = {}
        for file in head["files"]:
            whole = load_file(folder / file)
            tensors[Path(file).stem] = {
                name: ranks.part(tensor).clone() for name, tensor in whole.items()
            }  # off the file
    return TrainingState(head["step"], head["values"], tensors)


def _checked_head(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint whose files are what was saved. StateError."""
    try:
        head = read_json(folder / STATE)
    except ValueError as error:
        raise StateError(f"{folder / STATE} is no JSON ({error}); restore the folder from a copy") from error
    if head is None or head.get("format") != FORMAT:
        found = "missing" if head is None else f"of format {head.get('format')}, this trimtab reads {FORMAT}"
        raise StateError(f"{folder / STATE} is {found}; restore it, or start the run under another run id")
    for file, digest in head["files"].items():
        path = folder / file
        if not path.exists() or _digest(path) != digest:
            raise StateError(f"{path} is not what was saved; restore it, or start the run under another run id")
    return head


def _digest(path: Path) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return hasher.hexdigest()


def trained_tensors(model: torch.nn.Module, optimizer: MasterWeightOptimizer) -> Tensors:
    """A model's master weights and Adam's moments, as "KIND/PARAMETER"; of a sharded model distributed tensors."""
    state = optimizer.state_dict()
    tensors: Tensors = {}
    named = zip(trained_names(model), state["masters"], optimizer.parameters, strict=True)
    for index, (name, master, parameter) in enumerate(named):
        tensors[f"master/{name}"] = spread(master, parameter)
        for kind, moment in state["adam"]["state"].get(index, {}).items():
            tensors[f"{kind}/{name}"] = spread(moment, parameter) if moment.dim() else moment
    return tensors


def restore_trained(model: torch.nn.Module, optimizer: MasterWeightOptimizer, tensors: Tensors) -> None:
    """Put back what `trained_tensors` gave, into the model too. Raises StateError for another model's."""
    names = trained_names(model)
    fresh = optimizer.state_dict()
    for name, master in zip(names, fresh["masters"], strict=True):
        saved = tensors.get(f"master/{name}")
        if saved is None or saved.shape != master.shape:
            raise StateError(f"the checkpoint is of another model: {name} has another shape, or is not in it")
    place = {name: index for index, name in enumerate(names)}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind != "master":
            moments.setdefault(place[name], {})[kind] = tensor
    optimizer.load_state_dict(
        {
            "masters": [tensors[f"master/{name}"] for name in names],
            "adam": {"state": moments, "param_groups": fresh["adam"]["param_groups"]},
        }
    )


def trained_names(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that train, in the optimizer's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
