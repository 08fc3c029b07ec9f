"""Publishing: all files, then the manifest, then one move of the pointer.

Equal content at the same step again is a no-op, so a trainer that resumes may publish what it published before it was
killed, even after that version was pruned. The pointer then moves only if it never stood so far: it finishes a publish
that was cut off, and never undoes a roll back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from trimtab.weights.catalog import Catalog, Model
from trimtab.weights.digests import folder_content_digest
from trimtab.weights.errors import StepOrderError, VersionConflictError
from trimtab.weights.folder import publishable_files
from trimtab.weights.layout import POINTER, check_step, model_folder
from trimtab.weights.manifest import Manifest, Pointer
from trimtab_client import ModelVersion


@dataclass(frozen=True)
class Publication:
    """One folder to publish as ``model`` at ``step``."""

    folder: Path
    model: Model
    step: int
    parent: str | None = None
    lineage: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    set_current: bool = True


def publish(catalog: Catalog, publication: Publication) -> Manifest:
    """Publishes, or finds that it was published already; returns the manifest in the store.

    Raises RefusedFileError, VersionConflictError, StepOrderError, InvalidNameError, OSError.
    """
    backend, model = catalog.backend, publication.model
    manifest = _describe(publication)
    with backend.exclusive(model.folder):
        known = _known(catalog, manifest, publication)
    if known is not None:
        return known
    with backend.stage(model.folder, publication.folder, manifest) as staged, backend.exclusive(model.folder):
        known = _known(catalog, manifest, publication)  # another publisher may have been faster
        if known is not None:
            return known
        pointer = _moved(catalog, manifest) if publication.set_current else None
        try:
            return staged.commit(pointer)
        except FileExistsError as error:
            raise VersionConflictError(
                f"{manifest.version} has appeared while it was being published: try again"
            ) from error


def _describe(publication: Publication) -> Manifest:
    check_step(publication.step)
    model = publication.model
    _ = model.folder  # refuses bad names before any file is read
    files = publishable_files(publication.folder)
    digest = folder_content_digest(publication.folder, [entry.name for entry in files])
    return Manifest(
        version=ModelVersion(run_id=model.run_id, name=model.name, step=publication.step, digest=digest),
        files=tuple(files),
        created_at=datetime.now(UTC),
        parent=publication.parent,
        lineage=dict(publication.lineage),
        metrics={name: float(value) for name, value in publication.metrics.items()},
    )


def _known(catalog: Catalog, manifest: Manifest, publication: Publication) -> Manifest | None:
    """The version already in the store, None if this one may be added. Call under ``exclusive``."""
    model, step = publication.model, publication.step
    present = catalog.find(model, step)
    known = present or catalog.find_pruned(model, step)
    if known is None:
        highest = catalog.highest_step(model)
        if step < highest:
            raise StepOrderError(
                f"{model}@{step} comes after @{highest}, and steps only grow: publish at {highest + 1} or later"
            )
        return None
    if known.version.digest != manifest.version.digest:
        raise VersionConflictError(
            f"{model}@{step} was published with digest {known.version.digest}, not {manifest.version.digest}: "
            "a step keeps its content; publish at a later step or under another run id"
        )
    if present is not None and publication.set_current:
        pointer = catalog.pointer(model)
        if pointer is None or pointer.highest_step < step:
            move_pointer(catalog, present)
    return known


def _moved(catalog: Catalog, manifest: Manifest) -> bytes:
    version = manifest.version
    before = catalog.pointer(Model(version.run_id, version.name))
    return Pointer(
        step=version.step,
        digest=version.digest,
        highest_step=max(version.step, before.highest_step if before else -1),
        moved_at=datetime.now(UTC),
    ).to_json()


def move_pointer(catalog: Catalog, manifest: Manifest) -> None:
    """Makes a version current, forward or back. Call under ``exclusive``."""
    version = manifest.version
    catalog.backend.write(f"{model_folder(version.run_id, version.name)}/{POINTER}", _moved(catalog, manifest))
