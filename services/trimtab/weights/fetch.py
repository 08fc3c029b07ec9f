"""Brings a version to this machine's disk, verified: where it lies if the store is local, else as a cached copy.

A copy is downloaded aside, checked, and appears by one rename, so that a half-done download is never loaded. The
few versions used last are kept per model, older ones go.
"""

import os
import shutil
import tempfile
from pathlib import Path

from trimtab.weights.backend import Backend
from trimtab.weights.errors import CorruptVersionError
from trimtab.weights.folder import check_readable, verify_folder
from trimtab.weights.layout import STAGING, check_name, step_name, version_folder
from trimtab.weights.manifest import Manifest
from trimtab.weights.staging import discard, locked, staging_folder

KEPT_VERSIONS = 3


def default_cache_dir() -> Path:
    """``$TRIMTAB_CACHE``, else ``trimtab/versions`` in the user's cache folder."""
    if configured := os.environ.get("TRIMTAB_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "versions"


def fetch(backend: Backend, manifest: Manifest, cache_dir: Path | None) -> Path:
    """A local folder with the version's files, every byte verified now.

    Raises CorruptVersionError if they are not what the manifest says, OSError.
    """
    folder = backend.local_folder(files_path(manifest))
    if folder is None:
        return _cached_copy(backend, manifest, cache_dir or default_cache_dir())
    verify_folder(folder, manifest)
    return folder


def verify(backend: Backend, manifest: Manifest) -> None:
    """Reads every byte of the version in the store, through a temporary copy if it is not local. Raises like fetch."""
    folder = backend.local_folder(files_path(manifest))
    if folder is not None:
        verify_folder(folder, manifest)
        return
    with tempfile.TemporaryDirectory(prefix="trimtab-verify-") as copy:
        _copy_files(backend, manifest, Path(copy))


def pull(backend: Backend, manifest: Manifest, target: Path) -> None:
    """Makes ``target``, which must be absent or an empty folder, a plain copy of the version's files.

    Raises FileExistsError if something is there, CorruptVersionError, OSError.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(target)
    area = target.parent / f".{target.name}{STAGING}"
    try:
        with staging_folder(area) as folder:
            _copy_files(backend, manifest, folder)
            folder.rename(target)
    finally:
        shutil.rmtree(area, ignore_errors=True)


def files_path(manifest: Manifest) -> str:
    """Folder of a version's files inside the store."""
    version = manifest.version
    folder = version_folder(version.run_id, version.name, version.step)
    return f"{folder}/{manifest.files_folder}" if manifest.files_folder else folder


def _cached_copy(backend: Backend, manifest: Manifest, cache_dir: Path) -> Path:
    """Folder with the version's files, verified now; downloaded if absent or damaged.

    Raises CorruptVersionError if the store's own files are not what the manifest says, OSError.
    """
    version = manifest.version
    model = cache_dir / check_name("run id", version.run_id) / check_name("model name", version.name)
    target = model / f"{step_name(version.step)}-{version.digest.removeprefix('blake3:')[:16]}"
    area = model / STAGING
    if target.is_dir():
        try:
            verify_folder(target, manifest)
        except CorruptVersionError:
            with locked(area):
                if target.is_dir():
                    discard(area, target)
    if not target.is_dir():
        with staging_folder(area) as folder:
            _copy_files(backend, manifest, folder)
            with locked(area):
                if not target.exists():
                    folder.rename(target)
    os.utime(target)
    with locked(area):
        for old in sorted(_copies(model), key=lambda path: path.stat().st_mtime_ns)[:-KEPT_VERSIONS]:
            discard(area, old)
    return target


def _copies(model: Path) -> list[Path]:
    return [path for path in model.iterdir() if not path.name.startswith(".")]


def _copy_files(backend: Backend, manifest: Manifest, folder: Path) -> None:
    check_readable(manifest)
    for entry in manifest.files:
        target = folder / entry.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            backend.download(f"{files_path(manifest)}/{entry.name}", target)
        except FileNotFoundError as error:
            raise CorruptVersionError(f"{manifest.version}: {entry.name} is missing; publish it again") from error
    verify_folder(folder, manifest)
