"""A store of published versions: what trainers publish to and services load from.

A reader sees a whole version or none, and one pointer per model says which is current. Nothing here knows what the
weights mean; models loads them from the folder that ``fetch`` returns.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from trimtab.weights import fetch as fetching
from trimtab.weights import lease as leases
from trimtab.weights.backend import Backend, storage_errors
from trimtab.weights.catalog import Catalog, Model
from trimtab.weights.changes import Changes
from trimtab.weights.changes import changes as changing
from trimtab.weights.delta_publish import Deltas
from trimtab.weights.errors import (
    CorruptVersionError,
    InvalidNameError,
    StoreUnavailableError,
    VersionConflictError,
    VersionNotFoundError,
)
from trimtab.weights.layout import PINS, PRUNED, step_name
from trimtab.weights.lease import Lease
from trimtab.weights.local_files import LocalFiles
from trimtab.weights.manifest import Manifest
from trimtab.weights.object_files import ObjectFiles
from trimtab.weights.publish import Publication, fence_pointers, move_pointer, publish
from trimtab.weights.retention import Retention, versions_to_prune
from trimtab.weights.small_files import probe, read_file
from trimtab_client import ModelVersion


def open_store(url: str) -> "Store":
    """Opens a store: a folder path, or an fsspec URL such as s3://bucket/path. Nothing is read or made yet.

    Raises StoreUnavailableError if the URL's filesystem is not known or its package (s3fs, gcsfs) is not installed.
    """
    try:
        filesystem, root = fsspec.url_to_fs(url, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise StoreUnavailableError(f"cannot open the store {url}: {error}") from error
    if isinstance(filesystem, LocalFileSystem):
        return Store(LocalFiles(Path(root), url))
    return Store(ObjectFiles(filesystem, str(root), url))


class Store:
    """Versions of models under one root. Methods block; call them in a thread from asyncio.

    Every method may raise StoreUnavailableError, and CorruptVersionError for a record that cannot be read.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._catalog = Catalog(backend)

    @property
    def url(self) -> str:
        """As given to ``open_store``."""
        return self._backend.url

    def publish(
        self,
        folder: Path,
        *,
        run_id: str,
        name: str,
        step: int,
        lineage: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        parent: str | None = None,
        set_current: bool = True,
        lease: Lease | None = None,
        deltas: Deltas | None = None,
        base: ModelVersion | None = None,
    ) -> Manifest:
        """Publishes a folder of safetensors, config and tokenizer as run_id/name@step and makes it current.

        The same content at the same step again is a no-op. With ``deltas`` only what changed since the current
        version goes into the store, where that is smaller. With ``base`` the folder is peft's, with adapters on that
        version, which is pinned. Raises VersionConflictError for other content at a step
        that is taken, StepOrderError for a step below the highest published, RefusedFileError for what is not to be
        published, InvalidNameError, StoreFullError (the version before stays current, nothing visible changed),
        LeaseLostError if ``lease`` is stale, LeaseHeldError without one while somebody holds the run's.
        """
        publication = Publication(
            Path(folder),
            Model(run_id, name),
            step,
            parent,
            lineage or {},
            metrics or {},
            set_current,
            lease,
            deltas,
            base,
        )
        if base is not None and base.step not in self.pinned_steps(base.run_id, base.name):
            self.pin(base.run_id, base.name, base.step, f"base of {run_id}/{name}")
        with self._doing("publishing to"):
            return publish(self._catalog, publication)

    def current(self, run_id: str, name: str) -> Manifest | None:
        """The current version, None before the first publish. Raises VersionNotFoundError if its files are gone."""
        model = Model(run_id, name)
        with self._doing("reading"):
            pointer = self._catalog.pointer(model)
            return self._catalog.get(model, pointer.step) if pointer else None

    def current_version(self, run_id: str, name: str) -> ModelVersion | None:
        """What the pointer says, by reading nothing but the pointer: cheap enough to poll."""
        with self._doing("reading"):
            pointer = self._catalog.pointer(Model(run_id, name))
        return ModelVersion(run_id=run_id, name=name, step=pointer.step, digest=pointer.digest) if pointer else None

    def set_current(self, run_id: str, name: str, step: int, *, lease: Lease | None = None) -> Manifest:
        """Moves the pointer, forward or back (a roll back). Raises VersionNotFoundError, LeaseLostError.

        Without a lease it moves whoever holds one: that is a person's hand on the rudder.
        """
        with self._writing(Model(run_id, name), "moving the pointer in") as model:
            manifest = self._catalog.get(model, step)
            with lease.guarding() if lease is not None else nullcontext():
                move_pointer(self._catalog, manifest, lease)
            return manifest

    def read_file(self, version: ModelVersion | Manifest, name: str) -> bytes:
        """One small file of a version (config.json), verified, without fetching its weights.

        Raises VersionNotFoundError, also for a name that it does not have; CorruptVersionError, ParentMissingError.
        """
        manifest = self._resolve(version)
        with self._doing("reading"):
            return read_file(self._catalog, manifest, name)

    def probe(self) -> None:
        """Write a few bytes, read and remove them again: whether a run could publish here. Raises StoreFullError."""
        with self._doing("writing to"):
            probe(self._backend)

    def acquire_lease(self, run_id: str, owner: str, ttl_s: float, *, wait_s: float = 0.0) -> Lease:
        """Takes the right to publish versions of a run, with a token above all before.

        It comes at once if nobody holds it, if its holder has let it expire or released it, or bears the same name
        (a trainer that comes back). Else LeaseHeldError after ``wait_s``.
        """
        with self._doing("taking a lease in"):
            lease = leases.acquire(self._backend, run_id, owner, ttl_s, wait_s)
            fence_pointers(self._catalog, lease)
        return lease

    def versions(self, run_id: str | None = None, name: str | None = None) -> list[Manifest]:
        """All versions, or those of one run or model name, sorted by run id, name and step."""
        with self._doing("listing"):
            return [
                manifest for model in self._catalog.models(run_id, name) for manifest in self._catalog.manifests(model)
            ]

    def get(self, run_id: str, name: str, step: int) -> Manifest:
        """One version's manifest. Raises VersionNotFoundError."""
        with self._doing("reading"):
            return self._catalog.get(Model(run_id, name), step)

    def fetch(self, version: ModelVersion | Manifest, cache_dir: Path | None = None) -> Path:
        """A local folder with the version's files, every byte verified; ``from_pretrained(folder)`` works on it.

        In a local store a full version is its own folder: read it, never write to it. Else a copy, of a delta
        rebuilt from its parent, of an adapter merged into its base, in ``cache_dir``
        (default ``$TRIMTAB_CACHE`` or the user's cache folder), of which the last few per model are kept.
        Raises VersionNotFoundError, VersionConflictError if ``version`` carries another digest, CorruptVersionError,
        StoreFullError if the cache's disk is full.
        """
        manifest = self._resolve(version)
        try:
            with self._doing("fetching from"):
                return fetching.fetch(self._backend, manifest, cache_dir)
        except (CorruptVersionError, StoreUnavailableError):
            self._resolve(manifest)  # pruned while it was being read: then it is not found rather than corrupt
            raise

    @contextmanager
    def changes(self, served: ModelVersion, version: ModelVersion | Manifest) -> Iterator[Changes | None]:
        """What turns ``served``, held in memory, into ``version``; None where only the whole folder will do.

        Everything in it was verified. Raises like ``fetch``, ParentMissingError for a delta that came too early.
        """
        manifest = self._resolve(version)
        with self._doing("reading changes in"), changing(self._backend, served, manifest) as found:
            yield found

    def verify(self, version: ModelVersion | Manifest) -> Manifest:
        """Reads every byte of a version in the store (not of a cached copy) against its manifest and digest.

        Raises CorruptVersionError naming the file, VersionNotFoundError.
        """
        manifest = self._resolve(version)
        with self._doing("verifying"):
            fetching.verify(self._backend, manifest)
        return manifest

    def pull(self, version: ModelVersion | Manifest, folder: Path) -> Manifest:
        """Makes ``folder`` (absent or empty) a plain copy of the version's files. Raises InvalidNameError if not."""
        manifest = self._resolve(version)
        with self._doing("pulling from"):
            try:
                fetching.pull(self._backend, manifest, folder)
            except FileExistsError as error:
                raise InvalidNameError(f"{folder} is there and not empty: name a new folder") from error
        return manifest

    def merge(self, version: ModelVersion | Manifest, folder: Path) -> Manifest:
        """Makes ``folder`` (absent or empty) what from_pretrained takes: an adapter is merged into its base.

        Raises InvalidNameError if something is there, MergeError.
        """
        manifest = self._resolve(version)
        with self._doing("merging from"):
            try:
                fetching.merge_out(self._backend, manifest, folder)
            except FileExistsError as error:
                raise InvalidNameError(f"{folder} is there and not empty: name a new folder") from error
        return manifest

    def pin(self, run_id: str, name: str, step: int, reason: str = "") -> None:
        """Keeps a version for good, until ``unpin``. Pinning twice is pinning once. Raises VersionNotFoundError."""
        with self._writing(Model(run_id, name), "pinning in") as model:
            self._catalog.get(model, step)
            note = f"{datetime.now(UTC).isoformat()} {reason}\n"
            self._backend.write(f"{model.folder}/{PINS}/{step_name(step)}", note.encode())

    def unpin(self, run_id: str, name: str, step: int) -> None:
        """Gives a version back to retention; a version that is not pinned stays as it is."""
        with self._writing(Model(run_id, name), "unpinning in") as model:
            self._backend.remove(f"{model.folder}/{PINS}/{step_name(step)}")

    def pinned_steps(self, run_id: str, name: str) -> frozenset[int]:
        """Steps of the pinned versions of one model."""
        with self._doing("reading"):
            return self._catalog.pins(Model(run_id, name))

    def prune(
        self,
        run_id: str,
        name: str,
        keep_last: int = 3,
        *,
        best_metric: str | None = None,
        keep_best: int = 1,
        higher_is_better: bool = True,
        dry_run: bool = False,
    ) -> list[Manifest]:
        """Removes what retention lets go and returns it, oldest first; ``dry_run`` only returns it.

        Kept: the ``keep_last`` newest, the current, the pinned, and the ``keep_best`` best by ``best_metric``. The
        manifests of removed versions stay, so that their steps are never taken by other content.
        Raises ValueError for a policy that would keep nothing.
        """
        policy = Retention(keep_last, best_metric, keep_best, higher_is_better)
        if dry_run:
            with self._doing("reading"):
                return self._prunable(Model(run_id, name), policy)
        with self._writing(Model(run_id, name), "pruning") as model:
            prunable = self._prunable(model, policy)
            for manifest in prunable:
                step = step_name(manifest.version.step)
                self._backend.write(f"{model.folder}/{PRUNED}/{step}.json", manifest.to_json())
                self._backend.remove_version(model.folder, f"{model.folder}/{step}")
            self._remove_leftovers(model)
            return prunable

    def _prunable(self, model: Model, policy: Retention) -> list[Manifest]:
        pointer = self._catalog.pointer(model)
        return versions_to_prune(
            self.versions(model.run_id, model.name),
            policy,
            current_step=pointer.step if pointer else None,
            pinned_steps=self._catalog.pins(model),
        )

    def _remove_leftovers(self, model: Model) -> None:
        """Removes unfinished versions that can never be finished, because a later step was published."""
        highest = step_name(max(self._catalog.highest_step(model), 0))
        for folder in self._catalog.incomplete_folders(model):
            if folder.rpartition("/")[2] < highest:
                self._backend.remove_version(model.folder, folder)

    def _resolve(self, version: ModelVersion | Manifest) -> Manifest:
        """The store's own manifest of a version; a digest that was asked for must be its digest."""
        wanted = version.version if isinstance(version, Manifest) else version
        manifest = self.get(wanted.run_id, wanted.name, wanted.step)
        if wanted.digest and wanted.digest != manifest.version.digest:
            raise VersionConflictError(
                f"{manifest.version} has digest {manifest.version.digest} in {self.url}, not {wanted.digest}"
            )
        return manifest

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        with storage_errors(what, self.url):
            yield

    @contextmanager
    def _writing(self, model: Model, what: str) -> Iterator[Model]:
        with self._doing(what):
            if not self._catalog.models(model.run_id, model.name):
                raise VersionNotFoundError(f"nothing was published as {model} in {self.url}")
            with self._backend.exclusive(model.folder):
                yield model
