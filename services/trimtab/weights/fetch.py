"""Brings a version to this machine's disk, verified: where it lies if the store is local, else as a cached copy.

A copy is downloaded aside, checked, and appears by one rename, so that a half-done download is never loaded. The
few versions used last are kept per model, older ones go.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from trimtab.weights.adapters import merge
from trimtab.weights.backend import Backend
from trimtab.weights.catalog import Catalog
from trimtab.weights.chain import base_of, chain_of
from trimtab.weights.delta_apply import Layer, rebuild
from trimtab.weights.delta_file import DELTA_FILE, DeltaReader
from trimtab.weights.errors import CorruptVersionError
from trimtab.weights.folder import check_readable, verify_files, verify_folder
from trimtab.weights.layout import STAGING, check_name, step_name, version_folder
from trimtab.weights.manifest import FORMAT, Manifest
from trimtab.weights.staging import discard, locked, staging_folder

KEPT_VERSIONS = 3
MERGED = ".merged.json"  # beside merged files: what they are, for the next fetch to verify


def default_cache_dir() -> Path:
    """``$TRIMTAB_CACHE``, else ``trimtab/versions`` in the user's cache folder."""
    if configured := os.environ.get("TRIMTAB_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "versions"


def fetch(backend: Backend, manifest: Manifest, cache_dir: Path | None) -> Path:
    """A local folder with the version's files, every byte verified now; of an adapter, merged into its base.

    Raises CorruptVersionError if they are not what the manifest says, OSError.
    """
    folder = _own_folder(backend, manifest)
    if folder is None:
        return _cached_copy(backend, manifest, cache_dir or default_cache_dir())
    verify_folder(folder, manifest)
    return folder


def adopt(backend: Backend, manifest: Manifest, folder: Path, cache_dir: Path | None) -> None:
    """Keeps a folder that was just published as the cached copy of its version, by links where it can. Raises OSError.

    The next delta is compared with it; ``fetch`` verifies it like any copy.
    """
    if _own_folder(backend, manifest) is not None:
        return
    target, area = _cache_place(manifest, cache_dir or default_cache_dir())
    with staging_folder(area) as copy:
        for entry in manifest.plain.files:
            path = copy / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.hardlink_to((folder / entry.name).resolve())
            except OSError:  # another disk, or one without links
                shutil.copyfile(folder / entry.name, path)
        with locked(area):
            if not target.exists():
                copy.rename(target)
    _forget_old_copies(target.parent, area)


def _own_folder(backend: Backend, manifest: Manifest) -> Path | None:
    """The folder in a local store that is the version as it is, None for a delta and for other stores."""
    return backend.local_folder(files_path(manifest)) if manifest.kind == "full" else None


def verify(backend: Backend, manifest: Manifest) -> None:
    """Reads every byte of the version in the store, through a temporary copy if it is not local. Raises like fetch."""
    folder = _own_folder(backend, manifest)
    if folder is not None:
        verify_folder(folder, manifest)
        return
    if manifest.kind == "adapter":
        base_of(Catalog(backend), manifest)
    with tempfile.TemporaryDirectory(prefix="trimtab-verify-") as copy:
        _make_copy(backend, manifest, Path(copy), None)


def pull(backend: Backend, manifest: Manifest, target: Path) -> None:
    """Makes ``target``, which must be absent or an empty folder, a plain copy of the version's files.

    Raises FileExistsError if something is there, CorruptVersionError, OSError.
    """
    _appear(target, lambda folder: _make_copy(backend, manifest, folder, None))


def merge_out(backend: Backend, manifest: Manifest, target: Path) -> None:
    """As ``pull``, with an adapter merged into its base: a folder for from_pretrained.

    Raises FileExistsError if something is there, CorruptVersionError, OSError.
    """
    _appear(target, lambda folder: _make_plain(backend, manifest, folder, None))


def _appear(target: Path, fill: Callable[[Path], None]) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(target)
    area = target.parent / f".{target.name}{STAGING}"
    try:
        with staging_folder(area) as folder:
            fill(folder)
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
    target, area = _cache_place(manifest, cache_dir)
    if target.is_dir():
        try:
            _verify_copy(target, manifest)
        except CorruptVersionError:
            with locked(area):
                if target.is_dir():
                    discard(area, target)
    if not target.is_dir():
        with staging_folder(area) as folder:
            _make_plain(backend, manifest, folder, cache_dir)
            with locked(area):
                if not target.exists():
                    folder.rename(target)
    os.utime(target)  # used just now
    _forget_old_copies(target.parent, area)
    return target


def _cache_place(manifest: Manifest, cache_dir: Path) -> tuple[Path, Path]:
    """Where a version's copy lies in the cache, and its model's staging area."""
    version = manifest.version
    model = cache_dir / check_name("run id", version.run_id) / check_name("model name", version.name)
    return model / f"{step_name(version.step)}-{version.digest.removeprefix('blake3:')[:16]}", model / STAGING


def _forget_old_copies(model: Path, area: Path) -> None:
    with locked(area):
        copies = [path for path in model.iterdir() if not path.name.startswith(".")]
        for old in sorted(copies, key=lambda path: path.stat().st_mtime_ns)[:-KEPT_VERSIONS]:
            discard(area, old)


def _verify_copy(folder: Path, manifest: Manifest) -> None:
    """Raises CorruptVersionError unless a copy in the cache is what was put there."""
    if manifest.kind != "adapter":
        verify_folder(folder, manifest.plain)
        return
    try:
        merged = Manifest.from_json((folder / MERGED).read_bytes(), str(folder / MERGED))
    except FileNotFoundError as error:
        raise CorruptVersionError(f"{folder} has no {MERGED}") from error
    verify_files(folder, merged)


def _make_plain(backend: Backend, manifest: Manifest, folder: Path, cache_dir: Path | None) -> None:
    """Fills an empty folder with what from_pretrained takes: an adapter is merged into its base."""
    if manifest.kind != "adapter":
        _make_copy(backend, manifest, folder, cache_dir)
        return
    base = base_of(Catalog(backend), manifest)
    with tempfile.TemporaryDirectory(prefix=".base-", dir=folder) as scratch:
        adapter, whole = Path(scratch) / "adapter", Path(scratch) / "base"
        adapter.mkdir()
        _copy_files(backend, manifest, adapter)
        if cache_dir is not None:
            whole = fetch(backend, base, cache_dir)
        elif (own := _own_folder(backend, base)) is not None:
            verify_folder(own, base)
            whole = own
        else:
            whole.mkdir()
            _make_plain(backend, base, whole, None)
        files = merge(whole, adapter, folder, manifest.version)
    merged = replace(manifest, kind="full", files=files, parent_digest=None, files_folder="", format=FORMAT)
    (folder / MERGED).write_bytes(merged.to_json())


def _make_copy(backend: Backend, manifest: Manifest, folder: Path, cache_dir: Path | None) -> None:
    """Fills an empty folder with a version's plain files, verified; a delta is rebuilt, with what the cache has."""
    if manifest.kind != "delta":
        _copy_files(backend, manifest, folder)
        return
    chain = chain_of(Catalog(backend), manifest)
    if cache_dir is not None:
        for position in range(len(chain) - 2, -1, -1):
            base, _ = _cache_place(chain[position], cache_dir)
            if base.is_dir():
                try:
                    _rebuild(backend, chain[position:], base, folder)
                    os.utime(base)
                    return
                except (CorruptVersionError, FileNotFoundError):  # a damaged copy: begin with the store's own
                    shutil.rmtree(folder)
                    folder.mkdir()
                    break
    with tempfile.TemporaryDirectory(prefix=".base-", dir=folder) as scratch:
        base = _own_folder(backend, chain[0])
        if base is None:
            base = Path(scratch) if cache_dir is None else fetch(backend, chain[0], cache_dir)
            if cache_dir is None:
                _copy_files(backend, chain[0], base)
        _rebuild(backend, chain, base, folder)


def _rebuild(backend: Backend, chain: list[Manifest], base: Path, folder: Path) -> None:
    with layers_of(backend, chain[1:], folder) as layers:
        rebuild(base, [entry.name for entry in chain[0].plain.files], layers, folder)


@contextmanager
def layers_of(backend: Backend, deltas: list[Manifest], scratch: Path) -> Iterator[list[Layer]]:
    """The deltas of a chain, verified and open; downloaded into ``scratch`` meanwhile if the store is not local.

    Raises CorruptVersionError, OSError.
    """
    with ExitStack() as stack:
        layers = []
        for manifest in deltas:
            own = backend.local_folder(files_path(manifest))
            if own is None:
                own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".delta-", dir=scratch)))
                _download(backend, manifest, own)
            verify_files(own, manifest)
            delta = stack.enter_context(DeltaReader(own / DELTA_FILE, manifest.version))
            layers.append(Layer(manifest, own, delta))
        yield layers


def _copy_files(backend: Backend, manifest: Manifest, folder: Path) -> None:
    _download(backend, manifest, folder)
    verify_folder(folder, manifest)


def _download(backend: Backend, manifest: Manifest, folder: Path) -> None:
    check_readable(manifest)
    for entry in manifest.files:
        target = folder / entry.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            backend.download(f"{files_path(manifest)}/{entry.name}", target)
        except FileNotFoundError as error:
            raise CorruptVersionError(f"{manifest.version}: {entry.name} is missing; publish it again") from error
