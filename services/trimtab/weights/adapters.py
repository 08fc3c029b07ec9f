"""Adapters (LoRA): a version that is a peft folder alone, and the plain folder that it makes with the base it is on.

A merged weight is W + alpha / rank · B A, added in float32 and rounded to W's own dtype. Whoever loads a version gets
that folder; the adapter itself is what is published, and what `pull` copies out.
"""

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.weights.digests import SAFETENSORS, digest_file
from trimtab.weights.errors import CorruptVersionError, StoreError
from trimtab.weights.folder import file_names
from trimtab.weights.manifest import FileEntry
from trimtab_client import ModelVersion

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft puts before a model's own names
_A, _B = ".lora_A.weight", ".lora_B.weight"


class MergeError(StoreError):
    """Adapters that cannot be merged here; the message says why."""


def merged_weight(
    weight: "torch.Tensor", a_RI: "torch.Tensor", b_OR: "torch.Tensor", scaling: float, *, transposed: bool = False
) -> "torch.Tensor":
    """W + scaling · B A in W's dtype, [O, I], or [I, O] where the layer keeps its weight `transposed`."""
    import torch

    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = (b_OR.to(wide) @ a_RI.to(wide)).mul_(scaling)
    return (weight.to(wide) + (delta.T if transposed else delta)).to(weight.dtype)


def merge(base: Path, adapter: Path, out: Path, version: ModelVersion) -> tuple[FileEntry, ...]:
    """Fill the empty folder `out` with `base`'s files, the adapters merged into its weights; one file at a time.

    Raises CorruptVersionError for adapters that are none of the base's, MergeError for kinds that are not merged here.
    """
    try:
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file
    except ImportError as error:
        raise MergeError(f"{version}: merging adapters needs torch: install trimtab[model] ({error})") from error
    scaling, transposed = _settings(json.loads((adapter / ADAPTER_CONFIG).read_text()), version)
    pairs = _pairs(load_file(adapter / ADAPTER_WEIGHTS), version)
    entries: list[FileEntry] = []
    for name in sorted(file_names(base)):
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith(SAFETENSORS):
            shutil.copyfile(base / name, target)
        else:
            with safe_open(base / name, framework="pt") as file:
                metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            for key in tensors.keys() & pairs.keys():
                a_RI, b_OR = pairs.pop(key)
                shape = (a_RI.shape[1], b_OR.shape[0]) if transposed else (b_OR.shape[0], a_RI.shape[1])
                if tuple(tensors[key].shape) != shape:
                    raise CorruptVersionError(f"{version}: its adapter of {key} is for {shape}, its base has another")
                tensors[key] = merged_weight(tensors[key], a_RI, b_OR, scaling, transposed=transposed)
            save_file(tensors, target, metadata=metadata)
        entries.append(FileEntry(name, target.stat().st_size, digest_file(target)))
    if pairs:
        raise CorruptVersionError(f"{version}: its base has no {min(pairs)}; it was trained on another model")
    return tuple(entries)


def _settings(config: dict[str, Any], version: ModelVersion) -> tuple[float, bool]:
    """alpha / rank (alpha / √rank with rsLoRA), and whether weights are kept transposed."""
    unknown = [
        key for key in ("rank_pattern", "alpha_pattern", "use_dora", "alora_invocation_tokens") if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or config.get("modules_to_save"):
        unknown.append("peft_type, bias or modules_to_save")
    if unknown:
        raise MergeError(f"{version}: {ADAPTER_CONFIG} has {unknown[0]}; plain LoRA on linear layers is merged here")
    rank = config["r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank), bool(
        config["fan_in_fan_out"]
    )


def _pairs(tensors: "dict[str, torch.Tensor]", version: ModelVersion) -> "dict[str, tuple[torch.Tensor, torch.Tensor]]":
    """A and B of each adapted weight, by its name in the base."""
    modules = {key.removesuffix(_A) for key in tensors if key.endswith(_A)}
    if {f"{module}{part}" for module in modules for part in (_A, _B)} != tensors.keys():
        raise MergeError(f"{version}: {ADAPTER_WEIGHTS} holds other tensors than pairs of lora_A and lora_B")
    return {f"{module.removeprefix(PREFIX)}.weight": (tensors[module + _A], tensors[module + _B]) for module in modules}
