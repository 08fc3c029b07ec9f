"""Adapters (LoRA) in a run: which models train by them, which base they are published on, and that it is the same one.

A checkpoint holds what trains, the adapters; the base is loaded again from where it came.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from trimtab.models import lora
from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.context import StageContext
from trimtab.trainer.ranks import Ranks
from trimtab.trainer.stages import LoraConfig, PpoConfig, SftConfig, Stage, StageConfigError
from trimtab_client import ModelVersion

BASE = "base"
"""The name under which a run publishes its base, where that is no version yet."""


def check_adapters(stage: Stage, ranks: Ranks) -> None:
    """Raise StageConfigError where the stage asks for adapters that these ranks do not train."""
    for field in ("lora", "value_lora"):
        if ranks.world > 1 and getattr(stage, field, None) is not None:
            raise StageConfigError(
                field,
                f"adapters train on one process, and this trainer has {ranks.world}; leave {field} out, or torchrun",
            )


def attach_adapters(model: Policy | ScalarModel, config: LoraConfig, seed: int, field: str) -> None:
    """Put adapters on a loaded model; what does not train is frozen. Raises ModelLoadError naming the field."""
    lora.attach(
        model.model,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        targets=config.target_modules,
        seed=seed,
        field=field,
    )


def adapter_base(config: SftConfig | PpoConfig, policy: Policy, context: StageContext) -> ModelVersion | None:
    """The version that adapters are published on; None where whole models are published, or all of the policy trains.

    The policy's source is that version, or becomes one: RUN/base@0, in the compute dtype.
    Raises OtherDataError where a resumed run finds other weights under its adapters.
    """
    if config.lora is None:
        return None
    check_frozen("model", policy, context)
    if config.publish != "adapter":
        return None
    found = context.resolve(config.stage.model)
    if found.manifest is not None:
        return found.version
    with tempfile.TemporaryDirectory(prefix="trimtab-base-") as folder:
        policy.model.save_pretrained(folder, state_dict=lora.plain_state(policy.model, merged=False))
        policy.tokenizer.save_pretrained(folder)
        lineage = {"start": config.stage.model}
        run_id = context.run.snapshot.run_id
        return context.store.publish(
            Path(folder), run_id=run_id, name=BASE, step=0, lineage=lineage, lease=context.lease
        ).version


def check_frozen(name: str, model: Policy | ScalarModel, context: StageContext) -> None:
    """Note the weights that do not train at a run's start; raise OtherDataError where a resumed one has others."""
    frozen = (parameter.detach() for parameter in model.model.parameters() if not parameter.requires_grad)
    context.state.check_data(name, (weight.cpu().reshape(-1).view(torch.uint8).numpy() for weight in frozen))
