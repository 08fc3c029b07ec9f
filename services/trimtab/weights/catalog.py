"""Reads what a store holds: manifests, the pointer, pins, and what was pruned. Changes nothing."""

from collections.abc import Iterator
from dataclasses import dataclass

from trimtab.weights.backend import Backend
from trimtab.weights.errors import CorruptVersionError, VersionNotFoundError
from trimtab.weights.layout import MANIFEST, PINS, POINTER, PRUNED, check_name, model_folder, step_name, step_of
from trimtab.weights.manifest import Manifest, Pointer


@dataclass(frozen=True)
class Model:
    """One model of one run: where all its versions lie."""

    run_id: str
    name: str

    @property
    def folder(self) -> str:
        """Its folder inside the store. Raises InvalidNameError."""
        return model_folder(self.run_id, self.name)

    def __str__(self) -> str:
        return f"{self.run_id}/{self.name}"


class Catalog:
    """The readings of one store. Methods raise CorruptVersionError for a record they cannot read, and OSError."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def models(self, run_id: str | None = None, name: str | None = None) -> list[Model]:
        """Models that have at least one version or had one, sorted; foreign folders in the store are passed over."""
        runs = [check_name("run id", run_id)] if run_id else self.backend.names("")
        found = []
        for run in runs:
            names = [check_name("model name", name)] if name else self.backend.names(run)
            found += [Model(run, each) for each in names if self._holds_versions(f"{run}/{each}")]
        return found

    def _holds_versions(self, folder: str) -> bool:
        return any(entry == PRUNED or step_of(entry) is not None for entry in self.backend.names(folder))

    def manifests(self, model: Model, above: int = -1) -> Iterator[Manifest]:
        """All whole versions beyond step ``above``, by ascending step."""
        for step in self._begun_steps(model):
            manifest = self.find(model, step) if step > above else None
            if manifest is not None:
                yield manifest

    def _begun_steps(self, model: Model) -> list[int]:
        return [step for entry in self.backend.names(model.folder) if (step := step_of(entry)) is not None]

    def _is_whole(self, model: Model, step: int) -> bool:
        return self._read(f"{model.folder}/{step_name(step)}/{MANIFEST}") is not None

    def incomplete_folders(self, model: Model) -> list[str]:
        """Folders of versions that were never finished (a publisher died on a store without rename)."""
        unfinished = [step for step in self._begun_steps(model) if not self._is_whole(model, step)]
        return [f"{model.folder}/{step_name(step)}" for step in unfinished]

    def find(self, model: Model, step: int) -> Manifest | None:
        """The manifest of a whole version, None if there is no such version."""
        return self._manifest(model, step, f"{model.folder}/{step_name(step)}/{MANIFEST}")

    def find_pruned(self, model: Model, step: int) -> Manifest | None:
        """The manifest of a version whose files were pruned."""
        return self._manifest(model, step, f"{model.folder}/{PRUNED}/{step_name(step)}.json")

    def get(self, model: Model, step: int) -> Manifest:
        """The manifest of a whole version. Raises VersionNotFoundError saying what there is instead."""
        manifest = self.find(model, step)
        if manifest is not None:
            return manifest
        if self.find_pruned(model, step) is not None:
            raise VersionNotFoundError(f"{model}@{step} was pruned from {self.backend.url}; a pin keeps one for good")
        steps = [step for step in self._begun_steps(model) if self._is_whole(model, step)]
        there = f"its steps are {', '.join(map(str, steps[-8:]))}" if steps else "nothing was published under that name"
        raise VersionNotFoundError(f"no version {model}@{step} in {self.backend.url}: {there}")

    def highest_step(self, model: Model) -> int:
        """The largest step ever published, −1 if none. It is there: retention never removes the newest version."""
        return next((step for step in reversed(self._begun_steps(model)) if self._is_whole(model, step)), -1)

    def pointer(self, model: Model) -> Pointer | None:
        """Where the pointer stands, None before the first publish."""
        path = f"{model.folder}/{POINTER}"
        data = self._read(path)
        return Pointer.from_json(data, path) if data is not None else None

    def pins(self, model: Model) -> frozenset[int]:
        """Steps of the pinned versions."""
        entries = self.backend.names(f"{model.folder}/{PINS}")
        return frozenset(step for entry in entries if (step := step_of(entry)) is not None)

    def _manifest(self, model: Model, step: int, path: str) -> Manifest | None:
        data = self._read(path)
        if data is None:
            return None
        manifest = Manifest.from_json(data, f"{self.backend.url}/{path}")
        version = manifest.version
        if (version.run_id, version.name, version.step) != (model.run_id, model.name, step):
            raise CorruptVersionError(f"{path} is the manifest of {version}: it was copied here, publish it instead")
        return manifest

    def _read(self, path: str) -> bytes | None:
        try:
            return self.backend.read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
