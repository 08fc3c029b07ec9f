"""Publishing: all files, then the manifest, then one move of the pointer.

Equal content at the same step again is a no-op, so a trainer that resumes may publish what it published before it was
killed, even after that version was pruned. The pointer then moves only if it never stood so far: it finishes a publish
that was cut off, and never undoes a roll back.

Under a lease nothing takes effect once another holds it (lease.py says how). A version that an earlier holder wrote and
the pointer never reached is no version yet: the run may publish that step with other content, which replaces it.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from trimtab.weights.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from trimtab.weights.backend import ChangedMeanwhileError, PointerMove, Staged
from trimtab.weights.catalog import Catalog, Model
from trimtab.weights.chain import base_of, chain_of
from trimtab.weights.delta_publish import Deltas, delta_on_current
from trimtab.weights.digests import TensorDigest, content_digest, folder_digests
from trimtab.weights.errors import (
    LeaseLostError,
    RefusedFileError,
    StepOrderError,
    StoreUnavailableError,
    VersionConflictError,
)
from trimtab.weights.fetch import adopt
from trimtab.weights.folder import publishable_files
from trimtab.weights.layout import MANIFEST, POINTER, check_step, step_name
from trimtab.weights.lease import Lease, refuse_if_held
from trimtab.weights.manifest import ADAPTER_FORMAT, FORMAT, Kind, Manifest, Pointer
from trimtab_client import ModelVersion

_POINTER_ATTEMPTS = 16


@dataclass(frozen=True)
class Publication:
    """One folder to publish as ``model`` at ``step``; with ``base`` it holds adapters on that version."""

    folder: Path
    model: Model
    step: int
    parent: str | None = None
    lineage: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    set_current: bool = True
    lease: Lease | None = None
    deltas: Deltas | None = None
    base: ModelVersion | None = None

    def __post_init__(self) -> None:
        if self.lease is not None and self.lease.run_id != self.model.run_id:
            raise ValueError(f"the lease of run {self.lease.run_id} does not let {self.model.run_id} be published")


def publish(catalog: Catalog, publication: Publication) -> Manifest:
    """Publishes, or finds that it was published already; returns the manifest in the store.

    Raises RefusedFileError, VersionConflictError, StepOrderError, InvalidNameError, LeaseHeldError, LeaseLostError,
    OSError; for adapters what `base_of` raises.
    """
    full, tensors = _describe(publication)
    if full.kind == "adapter":
        base_of(catalog, full)
    with _taking_effect(catalog, publication.model, publication.lease):
        known = _known(catalog, full, publication)
    if known is not None:
        return known
    if publication.deltas is None or full.kind == "adapter":
        return _publish_folder(catalog, publication, publication.folder, full)
    with tempfile.TemporaryDirectory(prefix="trimtab-delta-") as scratch:
        delta = delta_on_current(catalog, full, tensors, publication.folder, publication.deltas, Path(scratch))
        source = publication.folder if delta is None else Path(scratch)
        published = _publish_folder(catalog, publication, source, delta or full)
    adopt(catalog.backend, published, publication.folder, publication.deltas.cache_dir)
    return published


def _publish_folder(catalog: Catalog, publication: Publication, source: Path, manifest: Manifest) -> Manifest:
    """Uploads a folder, the version's own or its delta's, and makes it a version."""
    with (
        catalog.backend.stage(publication.model.folder, source, manifest) as staged,
        _taking_effect(catalog, publication.model, publication.lease),
    ):
        replacing = _replaceable(catalog, manifest, publication)
        known = _known(catalog, manifest, publication)  # another publisher may have been faster
        return known or _commit(catalog, staged, manifest, publication, replacing)


def _commit(
    catalog: Catalog, staged: Staged, manifest: Manifest, publication: Publication, replacing: str | None
) -> Manifest:
    if manifest.kind == "delta":
        chain_of(catalog, manifest)  # nobody has pruned its parent meanwhile
    pointer = _moved(catalog, manifest, publication.lease) if publication.set_current else None
    try:
        return staged.commit(pointer, replacing)
    except FileExistsError as error:
        raise VersionConflictError(
            f"{manifest.version} has appeared while it was being published: try again"
        ) from error
    except ChangedMeanwhileError:  # the manifest it would have replaced, or the pointer
        written = catalog.get(publication.model, publication.step)
        if written.version != manifest.version:
            raise VersionConflictError(f"{written.version} was published by another while this one was") from None
        move_pointer(catalog, written, publication.lease)
        return written


@contextmanager
def _taking_effect(catalog: Catalog, model: Model, lease: Lease | None) -> Iterator[None]:
    """Where the storage has locks, no other publisher changes the model and nobody takes the run's lease meanwhile."""
    with catalog.backend.exclusive(model.folder):
        if lease is None:
            refuse_if_held(catalog.backend, model.run_id)
            yield
            return
        with lease.guarding():
            yield


def _describe(publication: Publication) -> tuple[Manifest, list[TensorDigest]]:
    """The manifest of a full version or an adapter, and its tensors' identities."""
    check_step(publication.step)
    model = publication.model
    _ = model.folder  # refuses bad names before any file is read
    files = publishable_files(publication.folder)
    known = {entry.name: entry.digest for entry in files}
    tensors, others = folder_digests(publication.folder, known, known)
    digest = content_digest(tensors, others)
    kind: Kind = "full"
    if publication.base is not None:
        kind = "adapter"
        if not (publication.folder / ADAPTER_CONFIG).is_file() or not (publication.folder / ADAPTER_WEIGHTS).is_file():
            raise RefusedFileError(f"{publication.folder} is no peft folder: it needs {ADAPTER_CONFIG} and its weights")
    manifest = Manifest(
        version=ModelVersion(run_id=model.run_id, name=model.name, step=publication.step, digest=digest),
        files=tuple(files),
        created_at=datetime.now(UTC),
        parent=publication.parent if publication.base is None else str(publication.base),
        parent_digest=publication.base.digest if publication.base else None,
        kind=kind,
        format=FORMAT if publication.base is None else ADAPTER_FORMAT,
        lineage=dict(publication.lineage),
        metrics={name: float(value) for name, value in publication.metrics.items()},
        lease_token=publication.lease.token if publication.lease and publication.set_current else 0,
    )
    return manifest, tensors


def _known(catalog: Catalog, manifest: Manifest, publication: Publication) -> Manifest | None:
    """The version already in the store, None if this one may be added. Call under ``_taking_effect``."""
    model, step = publication.model, publication.step
    present = catalog.find(model, step)
    known = present or catalog.find_pruned(model, step)
    if known is None:
        highest = _highest_step(catalog, publication)
        if step < highest:
            raise StepOrderError(
                f"{model}@{step} comes after @{highest}, and steps only grow: publish at {highest + 1} or later"
            )
        return None
    if known.version.digest != manifest.version.digest:
        if present is not None and _is_unreached(catalog, present, publication):
            return None
        raise VersionConflictError(
            f"{model}@{step} was published with digest {known.version.digest}, not {manifest.version.digest}: "
            "a step keeps its content; publish at a later step or under another run id",
            known.version,
        )
    if present is not None and publication.set_current:
        pointer = catalog.pointer(model)
        if pointer is None or pointer.highest_step < step:
            move_pointer(catalog, present, publication.lease)
    return known


def _highest_step(catalog: Catalog, publication: Publication) -> int:
    """The largest step published, without those that an earlier holder of the lease wrote for nothing."""
    highest = catalog.highest_step(publication.model)
    if publication.lease is None:
        return highest
    pointer = catalog.pointer(publication.model)
    reached = pointer.highest_step if pointer else -1
    above = catalog.manifests(publication.model, above=reached)
    counted = [m.version.step for m in above if not _is_unreached(catalog, m, publication)]
    return max([min(reached, highest), *counted])


def _is_unreached(catalog: Catalog, present: Manifest, publication: Publication) -> bool:
    """Whether an earlier holder of the lease wrote it, to be current, and it never became so."""
    lease = publication.lease
    if lease is None or not 0 < present.lease_token < lease.token:
        return False
    pointer = catalog.pointer(publication.model)
    return pointer is None or pointer.highest_step < present.version.step


def _replaceable(catalog: Catalog, manifest: Manifest, publication: Publication) -> str | None:
    """The stamp of a version that this one may take the place of, None if there is none."""
    model, step = publication.model, publication.step
    stamp = catalog.backend.stamp(f"{model.folder}/{step_name(step)}/{MANIFEST}")
    present = catalog.find(model, step)
    if present is None or present.version.digest == manifest.version.digest:
        return None
    return stamp if _is_unreached(catalog, present, publication) else None


def _moved(catalog: Catalog, manifest: Manifest, lease: Lease | None) -> PointerMove:
    """The pointer on its new place. Raises LeaseLostError."""
    version = manifest.version
    model = Model(version.run_id, version.name)
    stamp = catalog.backend.stamp(f"{model.folder}/{POINTER}")
    before = catalog.pointer(model)
    token = before.lease_token if before else 0
    if lease is not None:
        lease.check()  # after the stamp: whoever takes the lease from here on changes the pointer's stamp
        if token > lease.token:
            raise LeaseLostError(lease.run_id, lease.token, token)
        token = lease.token
    pointer = Pointer(
        step=version.step,
        digest=version.digest,
        highest_step=max(version.step, before.highest_step if before else -1),
        lease_token=token,
        moved_at=datetime.now(UTC),
    )
    return PointerMove(pointer.to_json(), stamp)


def move_pointer(catalog: Catalog, manifest: Manifest, lease: Lease | None = None) -> None:
    """Makes a version current, forward or back. Call under ``exclusive``. Raises LeaseLostError."""
    path = f"{Model(manifest.version.run_id, manifest.version.name).folder}/{POINTER}"
    for _ in range(_POINTER_ATTEMPTS):
        move = _moved(catalog, manifest, lease)
        try:
            catalog.backend.write(path, move.data, move.stamp)
        except ChangedMeanwhileError:
            continue
        return
    raise StoreUnavailableError(f"{path} in {catalog.backend.url} keeps moving: try again when it rests")


def fence_pointers(catalog: Catalog, lease: Lease) -> None:
    """Writes the new holder's token into every pointer of the run, so that a move begun before misses. Moves none."""
    for model in catalog.models(lease.run_id):
        with catalog.backend.exclusive(model.folder):
            for _ in range(_POINTER_ATTEMPTS):
                path = f"{model.folder}/{POINTER}"
                stamp = catalog.backend.stamp(path)
                pointer = catalog.pointer(model)
                if pointer is None or pointer.lease_token >= lease.token:
                    break
                fenced = pointer.model_copy(update={"lease_token": lease.token})
                try:
                    catalog.backend.write(path, fenced.to_json(), stamp)
                except ChangedMeanwhileError:
                    continue
                break
