"""Looks at a folder of files: what of it may be published, and whether it still is what a manifest says.

Weights are safetensors and nothing else: a pickle runs code when it is read, so none is published and none fetched.
"""

import stat
from collections.abc import Iterator
from pathlib import Path

from trimtab.weights.delta_file import DELTA_FILE
from trimtab.weights.digests import SAFETENSORS, digest_file, folder_content_digest
from trimtab.weights.errors import CorruptVersionError, InvalidNameError, RefusedFileError
from trimtab.weights.layout import MANIFEST, check_file_name
from trimtab.weights.manifest import FileEntry, Manifest

REFUSED_SUFFIXES = frozenset(
    (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".h5", ".msgpack")
)
_PICKLE_STARTS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
_ZIP_START = b"PK\x03\x04"  # torch.save writes a zip of pickles


def is_refused(name: str) -> bool:
    """Whether a file of this name is never published nor fetched."""
    return Path(name).suffix.lower() in REFUSED_SUFFIXES


def publishable_files(folder: Path) -> list[FileEntry]:
    """Every file under ``folder`` with size and digest, sorted by name; dot files and manifest.json are left out.

    Links to files are followed (a Hugging Face snapshot consists of them). Raises RefusedFileError for a pickle, a
    link to a folder, a special file, a name the store cannot hold, or a folder without safetensors.
    """
    if not folder.is_dir():
        raise RefusedFileError(f"{folder} is not a folder")
    entries = []
    for name in sorted(file_names(folder)):
        path = folder / name
        try:
            check_file_name(name)
        except InvalidNameError as error:
            raise RefusedFileError(str(error)) from error
        if name == DELTA_FILE:
            raise RefusedFileError(f"{name} is a delta, not weights: publish a plain folder")
        if is_refused(name) or (not name.endswith(SAFETENSORS) and _looks_pickled(path)):
            raise RefusedFileError(
                f"{name} is not safetensors: save with save_pretrained(..., safe_serialization=True) and remove it"
            )
        entries.append(FileEntry(name, path.stat().st_size, digest_file(path)))
    if not any(entry.name.endswith(SAFETENSORS) for entry in entries):
        raise RefusedFileError(f"{folder} holds no *.safetensors file: there are no weights to publish")
    return entries


def file_names(folder: Path) -> Iterator[str]:
    """Names of all files under ``folder``, relative, without dot files and the top manifest.json."""
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name == MANIFEST:
            continue
        yield from _names_below(path, path.name)


def _names_below(path: Path, name: str) -> Iterator[str]:
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        yield name
    elif stat.S_ISDIR(mode) and not path.is_symlink():
        for child in path.iterdir():
            if not child.name.startswith("."):
                yield from _names_below(child, f"{name}/{child.name}")
    else:
        raise RefusedFileError(f"{name} is neither a file nor a folder of its own")


def _looks_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
    return start.startswith(_PICKLE_STARTS) or start == _ZIP_START


def check_readable(manifest: Manifest) -> None:
    """Raises CorruptVersionError for a manifest that lists what is never read: pickled weights."""
    refused = [entry.name for entry in manifest.files if is_refused(entry.name)]
    if refused:
        raise CorruptVersionError(
            f"{manifest.version}: its manifest lists {refused[0]}, and only safetensors weights are read"
        )


def verify_folder(folder: Path, manifest: Manifest) -> None:
    """Reads every byte and returns if the folder holds exactly what the manifest says.

    Raises CorruptVersionError naming the first file that is absent, foreign, of another size or of another digest.
    """
    verify_files(folder, manifest)
    where = str(manifest.version)
    try:
        known = {entry.name: entry.digest for entry in manifest.files}
        digest = folder_content_digest(folder, known, known)
    except RefusedFileError as error:
        raise CorruptVersionError(f"{where}: {error}") from error
    if digest != manifest.version.digest:
        raise CorruptVersionError(f"{where}: its content has digest {digest}, not {manifest.version.digest}")


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Reads every byte and returns if the folder holds exactly the manifest's files, whatever they mean.

    Raises CorruptVersionError like ``verify_folder``.
    """
    check_readable(manifest)
    where = str(manifest.version)
    expected = {entry.name for entry in manifest.files}
    try:
        present = set(file_names(folder)) if folder.is_dir() else set()
    except RefusedFileError as error:
        raise CorruptVersionError(f"{where}: {error}") from error
    for name in sorted(expected - present):
        raise CorruptVersionError(f"{where}: {name} is missing; publish it again")
    for name in sorted(present - expected):
        raise CorruptVersionError(f"{where}: {name} lies in its folder but is not part of the version; remove it")
    for entry in manifest.files:
        verify_file(folder / entry.name, entry, where)


def verify_file(path: Path, entry: FileEntry, where: str) -> None:
    """Returns if the file's size and bytes are the entry's; CorruptVersionError begins with ``where``."""
    size = path.stat().st_size
    if size != entry.size_bytes:
        raise CorruptVersionError(f"{where}: {entry.name} has {size} bytes instead of {entry.size_bytes}")
    if digest_file(path) != entry.digest:
        raise CorruptVersionError(f"{where}: the bytes of {entry.name} have changed since it was published")
