"""A store in a local folder. A version is staged aside, made durable, and appears by one rename.

The pointer's new bytes are on disk before that rename, so a full disk is met while nothing visible has changed.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from trimtab.weights.backend import Backend, PointerMove, Staged
from trimtab.weights.digests import digest_file
from trimtab.weights.errors import RefusedFileError
from trimtab.weights.layout import MANIFEST, POINTER, STAGING, step_name
from trimtab.weights.manifest import FileEntry, Manifest
from trimtab.weights.staging import discard, fsync_folder, locked, staging_folder


class LocalFiles(Backend):
    """``root`` need not exist; it is made by the first write."""

    def __init__(self, root: Path, url: str) -> None:
        self.root = root
        self.url = url

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(entry.name for entry in (self.root / folder).iterdir() if not entry.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def stamp(self, path: str) -> str:
        return ""  # writers hold the lock

    def write(self, path: str, data: bytes, stamp: str = "") -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with _prepared(target, data) as prepared:
            prepared.replace(target)
            fsync_folder(target.parent)

    def create(self, path: str, data: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with _prepared(target, data) as prepared:
            target.hardlink_to(prepared)
            fsync_folder(target.parent)

    def remove(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def exclusive(self, model: str) -> AbstractContextManager[None]:
        return locked(self.root / model / STAGING)

    @contextmanager
    def stage(self, model: str, source: Path, manifest: Manifest) -> Iterator[Staged]:
        with staging_folder(self.root / model / STAGING) as folder:
            for entry in manifest.files:
                _copy_durably(source / entry.name, folder / entry.name, entry)
            _write_durably(folder / MANIFEST, manifest.to_json())
            for parent, _, _ in os.walk(folder):
                fsync_folder(Path(parent))
            yield _StagedFolder(folder, self.root / model, manifest)

    def remove_version(self, model: str, folder: str) -> None:
        discard(self.root / model / STAGING, self.root / folder)

    def local_folder(self, folder: str) -> Path | None:
        return self.root / folder

    def download(self, path: str, target: Path) -> None:
        shutil.copyfile(self.root / path, target)


@dataclass(frozen=True)
class _StagedFolder(Staged):
    folder: Path
    model: Path
    manifest: Manifest

    def commit(self, pointer: PointerMove | None, replacing: str | None = None) -> Manifest:
        target = self.model / step_name(self.manifest.version.step)
        if replacing is None and target.exists():
            raise FileExistsError(target)
        if pointer is None:
            self._appear(target)
            return self.manifest
        with _prepared(self.model / POINTER, pointer.data) as prepared:
            self._appear(target)
            prepared.replace(self.model / POINTER)
            fsync_folder(self.model)
        return self.manifest

    def _appear(self, target: Path) -> None:
        if target.exists():
            discard(self.folder.parent, target)
        self.folder.rename(target)
        fsync_folder(self.model)


@contextmanager
def _prepared(target: Path, data: bytes) -> Iterator[Path]:
    """A durable file with ``data`` beside ``target``, to be moved over it; removed if that does not happen."""
    path = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        _write_durably(path, data)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy_durably(source: Path, target: Path, entry: FileEntry) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("r+b") as copy:
        os.fsync(copy.fileno())
    if digest_file(target) != entry.digest:
        raise RefusedFileError(f"{entry.name} changed while it was being published: publish a folder at rest")
