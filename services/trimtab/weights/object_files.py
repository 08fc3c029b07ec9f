"""A store on any other fsspec filesystem (s3://, gs://, az://, memory://): no rename, but each put is atomic.

Files go into a folder named by their digests, so that two publishers never mix; the manifest is put last and only if
absent where the filesystem can say so (S3, GCS and memory can), and makes the version. There are no locks: a run's
lease keeps publishers apart, and on S3 the pointer is only replaced if it is the one that was read.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.weights.backend import ABSENT, Backend, ChangedMeanwhileError, PointerMove, Staged
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
        protocol = filesystem.protocol
        self._compares = "s3" in (protocol if isinstance(protocol, tuple) else (protocol,))

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

    def stamp(self, path: str) -> str:
        if not self._compares:
            return ""
        try:
            self.filesystem.invalidate_cache(self.path(path))
            return str(self.filesystem.info(self.path(path))["ETag"])
        except FileNotFoundError:
            return ABSENT

    def write(self, path: str, data: bytes, stamp: str = "") -> None:
        if stamp == ABSENT:
            try:
                self.create(path, data)
            except FileExistsError as error:
                raise ChangedMeanwhileError(f"{path} has appeared") from error
            return
        condition = {"IfMatch": stamp} if stamp else {}
        try:
            self.filesystem.pipe_file(self.path(path), data, **condition)
        except OSError as error:
            if condition and (isinstance(error, FileNotFoundError) or _is_refused_condition(error)):
                raise ChangedMeanwhileError(f"{path} has changed") from error
            raise

    def create(self, path: str, data: bytes) -> None:
        self.filesystem.makedirs(self.path(path).rpartition("/")[0], exist_ok=True)
        try:
            self.filesystem.pipe_file(self.path(path), data, mode="create")
        except OSError as error:
            if _is_refused_condition(error):
                raise FileExistsError(path) from error
            raise

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

    def commit(self, pointer: PointerMove | None, replacing: str | None = None) -> Manifest:
        path = f"{self.version}/{MANIFEST}"
        if replacing is None:
            self.backend.create(path, self.manifest.to_json())
        else:
            self.backend.write(path, self.manifest.to_json(), replacing)
        if pointer is not None:
            self.backend.write(f"{self.model}/{POINTER}", pointer.data, pointer.stamp)
        return self.manifest


def _is_refused_condition(error: OSError) -> bool:
    """Whether S3 refused a conditional put: 412, or 409 where another put of the same object was under way."""
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("Error", {}).get("Code") in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
