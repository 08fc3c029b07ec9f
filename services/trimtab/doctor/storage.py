"""Whether versions can be published, and whether the data that the stages read is there."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

from trimtab.doctor.finding import Finding, failed, ok, skipped
from trimtab.doctor.memory import DTYPE_BYTES
from trimtab.doctor.placement import in_gib
from trimtab.doctor.plan import Plan, Planned
from trimtab.doctor.shapes import UnknownShapeError, shape_of
from trimtab.trainer.config import TrainerConfig
from trimtab.trainer.data import DataError
from trimtab.trainer.data.source import HUB_ID, SUFFIXES, read_rows
from trimtab.weights.errors import StoreError
from trimtab.weights.store import Store

ROWS_READ = 100
DATA = ("data", "validation_data", "prompts", "ptx_data", "normalization_data")


def store_findings(plan: Plan, store: Store | None, *, here: bool) -> list[Finding]:
    """A write into the store and, where the recipe runs `here`, room on its disk for the versions that stay."""
    if store is None:
        return [skipped("store", "the files name none; give --store, or the file of `trimtab up`")]
    local = Path(store.url.removeprefix("file://")) if "://" not in store.url.removeprefix("file://") else None
    made = local is not None and not local.exists()
    try:
        store.probe()
    except (StoreError, OSError) as error:
        return [failed(f"store {store.url}", str(error), "give a store that this user may write to, with room on it")]
    finally:
        if made and local is not None and local.is_dir() and not any(local.iterdir()):
            local.rmdir()
    written = ok(f"store {store.url}", "written to, read again, removed")
    return [written] if local is None or not here else [written, *_room(plan, store, local)]


def data_findings(plan: Plan) -> list[Finding]:
    """The first rows of everything that a stage reads."""
    return [
        _data(planned, name, source)
        for planned in plan.stages
        for name in DATA
        if (source := getattr(planned.config, name, "")) and f"{planned.name}.{name}" not in plan.own_data
    ]


def _room(plan: Plan, store: Store, folder: Path) -> list[Finding]:
    trainer = plan.services.get("trainer")
    kept = (trainer if isinstance(trainer, TrainerConfig) else TrainerConfig()).keep_versions
    sizes = []
    for planned in plan.stages:
        stage = planned.config.stage
        try:
            shape = shape_of(stage.model, store, plan.like)
        except UnknownShapeError:
            continue  # said where its memory is reckoned
        # the kept versions, one being written, and a checkpoint: master weights and two moments
        sizes.append(shape.parameters * ((kept + 1) * DTYPE_BYTES[stage.compute_dtype] + 12))
    if not sizes:
        return []
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free, needed = shutil.disk_usage(existing).free, max(sizes)
    detail = f"{in_gib(needed)} of {in_gib(free)} GiB free, for {kept} versions, one more and a checkpoint"
    if needed <= free:
        return [ok("disk of the store", detail)]
    return [failed("disk of the store", detail, "free some, or let the trainer keep fewer (keep_versions)")]


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
