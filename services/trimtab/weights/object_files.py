"""A store on any other fsspec filesystem (s3://, gs://, az://, memory://): no rename, but each put is atomic.

Files go into a folder named by their digests, so that two publishers never mix; the manifest is put last and only if
absent where the filesystem can say so (S3, GCS and memory can), and makes the version. There are no locks: one run
has one publisher.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.weights.backend import Backend, Staged
from trimtab.weights.digests import digest_bytes
from trimtab.weights.errors import RefusedFileError
from trimtab.weights.layout import MANIFEST, POINTER, step_name
from trimtab.weights.manifest import Manifest


class ObjectFiles(Backend):
    """``filesystem`` is an fsspec filesystem, ``root`` its path of the store."""

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.url = url

    def path(self, path: str) -> str:
        """The filesystem's own path of something inside the store."""
        return f"{self.root}/{path}"

    def names(self, folder: str) -> list[str]:
        path = self.path(folder).rstrip("/")
        self.filesystem.invalidate_cache(path)
        try:
            found = self.filesystem.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {entry.rstrip("/").rpartition("/")[2] for entry in found if entry.rstrip("/") != path}
        return sorted(name for name in names if not name.startswith("."))

    def read(self, path: str) -> bytes:
        self.filesystem.invalidate_cache(self.path(path))
        return self.filesystem.cat_file(self.path(path))

    def write(self, path: str, data: bytes) -> None:
        self.filesystem.pipe_file(self.path(path), data)

    def remove(self, path: str) -> None:
        if self.filesystem.exists(self.path(path)):
            self.filesystem.rm_file(self.path(path))

    def exclusive(self, model: str) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def stage(self, model: str, source: Path, manifest: Manifest) -> Iterator[Staged]:
        fingerprint = digest_bytes("".join(f"{e.name}\n{e.digest}\n" for e in manifest.files).encode())
        files_folder = f"files-{fingerprint.removeprefix('blake3:')[:16]}"
        version = f"{model}/{step_name(manifest.version.step)}"
        staged = _StagedObjects(self, model, version, replace(manifest, files_folder=files_folder))
        try:
            for entry in manifest.files:
                self._upload(source / entry.name, f"{version}/{files_folder}/{entry.name}")
            yield staged
        finally:
            if not self._is_part_of_version(version, files_folder):
                self._remove_tree(f"{version}/{files_folder}")

    def _is_part_of_version(self, version: str, files_folder: str) -> bool:
        try:
            manifest = Manifest.from_json(self.read(f"{version}/{MANIFEST}"), version)
        except FileNotFoundError:
            return False
        return manifest.files_folder == files_folder

    def _upload(self, source: Path, path: str) -> None:
        before = source.stat()
        self.filesystem.makedirs(self.path(path).rpartition("/")[0], exist_ok=True)
        self.filesystem.put_file(str(source), self.path(path))
        after = source.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise RefusedFileError(f"{source.name} changed while it was being published: publish a folder at rest")

    def remove_version(self, model: str, folder: str) -> None:
        self.remove(f"{folder}/{MANIFEST}")
        self._remove_tree(folder)

    def _remove_tree(self, folder: str) -> None:
        self.filesystem.invalidate_cache(self.path(folder))
        if self.filesystem.exists(self.path(folder)):
            self.filesystem.rm(self.path(folder), recursive=True)

    def local_folder(self, folder: str) -> Path | None:
        return None

    def download(self, path: str, target: Path) -> None:
        self.filesystem.get_file(self.path(path), str(target))


@dataclass(frozen=True)
class _StagedObjects(Staged):
    backend: ObjectFiles
    model: str
    version: str
    manifest: Manifest

    def commit(self, pointer: bytes | None) -> Manifest:
        filesystem, path = self.backend.filesystem, self.backend.path(f"{self.version}/{MANIFEST}")
        filesystem.pipe_file(path, self.manifest.to_json(), mode="create")
        if pointer is not None:
            self.backend.write(f"{self.model}/{POINTER}", pointer)
        return self.manifest
