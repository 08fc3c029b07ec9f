"""Small files of a store, without their version's weights: a version's config, and a probe of whether one may write."""

import uuid

from blake3 import blake3

from trimtab.weights.backend import Backend
from trimtab.weights.catalog import Catalog
from trimtab.weights.chain import base_of, chain_of
from trimtab.weights.errors import CorruptVersionError, StoreUnavailableError, VersionNotFoundError
from trimtab.weights.fetch import files_path
from trimtab.weights.manifest import Manifest


def read_file(catalog: Catalog, manifest: Manifest, name: str) -> bytes:
    """One file as the version's plain folder has it, verified; of a delta, from wherever in its chain it lies whole,
    of an adapter from its base where it is none of its own.

    Raises VersionNotFoundError for a name that the version does not have, CorruptVersionError, and for deltas what
    `chain_of` raises.
    """
    wanted = next((entry for entry in manifest.plain.files if entry.name == name), None)
    if wanted is None and manifest.kind == "adapter":
        return read_file(catalog, base_of(catalog, manifest), name)
    if wanted is None:
        raise VersionNotFoundError(f"{manifest.version} has no file {name}")
    for link in reversed(chain_of(catalog, manifest)):
        if any(entry.name == name and entry.digest == wanted.digest for entry in link.files):
            data = catalog.backend.read(f"{files_path(link)}/{name}")
            if f"blake3:{blake3(data).hexdigest()}" == wanted.digest:
                return data
            break
    raise CorruptVersionError(f"{manifest.version}: {name} is not what the manifest says: publish the version again")


def probe(backend: Backend) -> None:
    """Write a few bytes at the store's root, read them again, and remove them.

    Raises StoreUnavailableError for other bytes than were written, and what the storage raises.
    """
    name, data = f".probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
    try:
        backend.write(name, data)
        if backend.read(name) != data:
            raise StoreUnavailableError(f"{backend.url} gives back other bytes than were written")
    finally:
        backend.remove(name)
