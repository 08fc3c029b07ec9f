"""LoRA (arXiv:2106.09685, by peft) inside a loaded model: adapters that train, a base that stays as it is.

The model keeps its class and its packed forward; peft puts its layers in place of the linear ones. A folder that is
saved is a plain model's, the adapters merged; `save_adapter` writes peft's own. Shards of several ranks are not known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trimtab.models.errors import ModelLoadError
from trimtab_client import ModelVersion

ADAPTER = "default"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft puts before a model's own names
SCALAR_HEAD = "score"
_CONFIG = "lora_config"


def attach(
    model: torch.nn.Module, *, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int, field: str
) -> None:
    """Put adapters on linear layers of a model's body and freeze all but them and a scalar head.

    They start as nothing (B is 0); A is drawn by `seed`. `dropout` is only noted: `input_dropout` does it.

    Raises:
        ModelLoadError: `targets` fit no layer, or others than linear ones of the body; peft is not installed. `field`
            is where the settings come from.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ModelLoadError(field, f"LoRA needs peft: install trimtab[trainer] ({error})") from error
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]: any number multiplies
        target_modules=list(targets) or "all-linear",
        exclude_modules=[SCALAR_HEAD] if hasattr(model, SCALAR_HEAD) and not targets else None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % (1 << 63))
        try:
            inject_adapter_in_model(config, model, ADAPTER)
        except ValueError as error:
            raise ModelLoadError(f"{field}.target_modules", str(error).partition(". ")[0]) from error
    body: Any = model.base_model
    inside = {id(module) for module in body.modules()}
    for name, layer in adapted_layers(model).items():
        if ADAPTER not in layer.lora_A or id(layer) not in inside:
            raise ModelLoadError(f"{field}.target_modules", f"{name} is no linear layer of the model's body")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(f"{SCALAR_HEAD}."))
    config.lora_dropout = dropout
    setattr(model, _CONFIG, config)


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether `attach` was here."""
    return hasattr(model, _CONFIG)


def adapted_layers(model: torch.nn.Module) -> Mapping[str, Any]:
    """peft's layers, by the names of those whose place they took."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def plain_state(model: torch.nn.Module, *, merged: bool = True) -> dict[str, torch.Tensor]:
    """The state dict of the model that was loaded: with the adapters in its weights, or as it was."""
    layers, state = adapted_layers(model), {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if module.partition(".lora_")[0] in layers and ".lora_" in module:
            continue
        place = module.removesuffix(".base_layer")
        if merged and leaf == "weight" and place != module:
            tensor = _merged(tensor, layers[place])
        state[f"{place}.{leaf}" if place else leaf] = tensor.detach()
    return state


def _merged(weight: torch.Tensor, layer: Any) -> torch.Tensor:
    """W + scaling · B A in W's dtype, added in float32: what `weights.adapters` makes of the same adapter's files."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    a_RI, b_OR = layer.lora_A[ADAPTER].weight.to(wide), layer.lora_B[ADAPTER].weight.to(wide)
    delta = (b_OR @ a_RI).mul_(layer.scaling[ADAPTER])
    return (weight.to(wide) + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)


def save_adapter(model: torch.nn.Module, folder: Path, base: ModelVersion) -> None:
    """Write peft's folder: the adapters in the model's dtype, and settings that name the base and its digest."""
    from safetensors.torch import save_file

    tensors = {
        f"{PREFIX}{name}.lora_{part}.weight": getattr(layer, f"lora_{part}")[ADAPTER].weight.detach().cpu().contiguous()
        for name, layer in adapted_layers(model).items()
        for part in "AB"
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config: dict[str, Any] = getattr(model, _CONFIG).to_dict()
    del config["peft_version"]  # the same adapters have the same digest under another release
    config |= {"base_model_name_or_path": f"version:{base}", "revision": base.digest, "inference_mode": True}
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


@contextmanager
def input_dropout(model: torch.nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Drop out what goes into the adapters, as their settings say, by masks of `generator`."""
    probability = getattr(model, _CONFIG).lora_dropout if is_adapted(model) else 0.0
    if probability == 0:
        yield
        return

    def drop(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        keep = torch.rand(inputs[0].shape, generator=generator).to(inputs[0].device) >= probability
        return (inputs[0] * keep / (1 - probability), *inputs[1:])

    layers = adapted_layers(model).values()
    handles = [layer.lora_A[ADAPTER].register_forward_pre_hook(drop) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
