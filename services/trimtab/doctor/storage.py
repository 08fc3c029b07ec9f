"""Whether versions can be published, with room for them and for checkpoints, and whether the stages' data is there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from trimtab.doctor.finding import Finding, failed, ok, skipped
from trimtab.doctor.memory import DTYPE_BYTES, adapter_parameters
from trimtab.doctor.placement import in_gib, stage_shapes
from trimtab.doctor.plan import Plan, Planned, StageConfig
from trimtab.doctor.shapes import ModelShape, UnknownShapeError
from trimtab.trainer.data import DataError
from trimtab.trainer.data.source import HUB_ID, SUFFIXES, read_rows
from trimtab.trainer.stages import LoraConfig, PpoConfig, RewardModelConfig
from trimtab.weights.errors import StoreError
from trimtab.weights.store import Store

ROWS_READ = 100
DATA = ("data", "validation_data", "prompts", "ptx_data", "normalization_data")


@dataclass(frozen=True)
class DiskPart:
    """What comes to lie in a folder, which need not be there yet."""

    what: str
    folder: Path
    size_bytes: int
    holds: str

    @property
    def place(self) -> Path:
        """The folder, or the one that it will be made in."""
        return next(parent for parent in (self.folder, *self.folder.resolve().parents) if parent.exists())


def store_findings(plan: Plan, store: Store | None) -> list[Finding]:
    """A write into the store."""
    if store is None:
        return [skipped("store", "the files name none; give --store, or the file of `trimtab up`")]
    local = _local(store)
    made = local is not None and not local.exists()
    try:
        store.probe()
    except (StoreError, OSError) as error:
        return [failed(f"store {store.url}", str(error), "give a store that this user may write to, with room on it")]
    finally:
        if made and local is not None and local.is_dir() and not any(local.iterdir()):
            local.rmdir()
    return [ok(f"store {store.url}", "written to, read again, removed")]


def data_findings(plan: Plan) -> list[Finding]:
    """The first rows of everything that a stage reads."""
    return [
        _data(planned, name, source)
        for planned in plan.stages
        for name in DATA
        if (source := getattr(planned.config, name, "")) and f"{planned.name}.{name}" not in plan.own_data
    ]


def disk_findings(plan: Plan, store: Store | None) -> list[Finding]:
    """Room on this machine's disks: for the versions that stay, in the store, and for checkpoints, beside the run.

    Stages come one after another, so the largest counts; where both lie on one disk, both together.
    """
    largest: dict[str, DiskPart] = {}
    for planned in plan.stages:
        kept = plan.trainer.keep_versions
        if isinstance(planned.config, PpoConfig):
            kept = max(kept, planned.config.least_versions)
        try:
            policy, value = stage_shapes(plan, planned, store)
        except UnknownShapeError:
            continue  # said where its memory is reckoned
        versions = versions_bytes(planned.config, policy, kept)
        checkpoints = 2 * checkpoint_bytes(planned.config, policy, value)
        parts = [DiskPart("the runs", plan.runs, checkpoints, "a checkpoint and the next one")]
        if store is not None and (folder := _local(store)) is not None:
            parts.insert(0, DiskPart("the store", folder, versions, f"{kept} versions and one more"))
        for part in parts:
            if part.what not in largest or part.size_bytes > largest[part.what].size_bytes:
                largest[part.what] = part
    by_disk: dict[int, list[DiskPart]] = {}
    for part in largest.values():
        by_disk.setdefault(part.place.stat().st_dev, []).append(part)
    return [_fits(sharing) for sharing in by_disk.values()]


def checkpoint_bytes(stage: StageConfig, policy: ModelShape, value: ModelShape | None) -> int:
    """Of all that a stage trains: float32 master weights and two moments (12 bytes), 4 of a moving average."""
    scalar = isinstance(stage, RewardModelConfig)
    lora = None if scalar else stage.lora
    average = isinstance(stage, PpoConfig) and stage.ema_decay is not None
    size = (16 if average else 12) * _trained(policy, lora, scalar=scalar)
    if isinstance(stage, PpoConfig) and value is not None:
        size += 12 * _trained(value, stage.value_lora, scalar=True)
    return size


def versions_bytes(stage: StageConfig, policy: ModelShape, kept: int) -> int:
    """Of the versions that stay and one being written, all whole: deltas are smaller. A moving average has its own.

    Adapters alone are published on a base, which lies in the store too.
    """
    c = DTYPE_BYTES[stage.stage.compute_dtype]
    names = 2 if isinstance(stage, PpoConfig) and stage.ema_decay is not None else 1
    if isinstance(stage, RewardModelConfig):
        return (kept + 1) * c * policy.scalar_parameters
    if stage.publish == "adapter":
        return (names * kept + 1) * c * _trained(policy, stage.lora) + c * policy.parameters
    return (names * kept + 1) * c * policy.parameters


def _trained(shape: ModelShape, lora: LoraConfig | None, *, scalar: bool = False) -> int:
    if lora is not None:
        return adapter_parameters(shape, lora.rank, scalar=scalar)
    return shape.scalar_parameters if scalar else shape.parameters


def _fits(parts: list[DiskPart]) -> Finding:
    check = f"disk of {' and '.join(part.what for part in parts)}"
    free, needed = shutil.disk_usage(parts[0].place).free, sum(part.size_bytes for part in parts)
    listed = ", ".join(f"{part.holds} {in_gib(part.size_bytes)}" for part in parts)
    detail = f"{in_gib(needed)} of {in_gib(free)} GiB free: {listed}"
    if needed <= free:
        return ok(check, detail)
    return failed(check, detail, "free some, let the trainer keep fewer versions (keep_versions), or give another disk")


def _local(store: Store) -> Path | None:
    """The folder of a store on this machine."""
    path = store.url.removeprefix("file://")
    return None if "://" in path else Path(path)


def _data(planned: Planned, name: str, source: str) -> Finding:
    check = f"{planned.name}: {name}"
    if HUB_ID.fullmatch(source) and not source.endswith(SUFFIXES) and not Path(source).exists():
        return skipped(check, f"{source} is on the Hugging Face hub; it is read when the run starts")
    try:
        rows = [row.fields() for row in islice(read_rows(source), ROWS_READ)]
    except DataError as error:
        return failed(check, str(error), f"correct {name}; paths are those of where the trainer is started")
    if not rows:
        return failed(check, f"{source} holds no row", f"correct {name}")
    return ok(check, f"{source} can be read (trimtab data check {source} looks at every row)")
