"""Decides whether a version goes into the store as a delta, and makes the folder that is uploaded if so."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trimtab.weights.catalog import Catalog, Model
from trimtab.weights.chain import chain_of
from trimtab.weights.delta_file import DELTA_FILE
from trimtab.weights.delta_make import MappedWeights, make_delta
from trimtab.weights.digests import SAFETENSORS, TensorDigest, digest_file
from trimtab.weights.errors import StoreError
from trimtab.weights.fetch import fetch
from trimtab.weights.manifest import DELTA_FORMAT, FileEntry, Manifest


@dataclass(frozen=True)
class Deltas:
    """How versions are published as deltas on the current one.

    Attributes:
        full_every: a full version at least so often, so a reader applies at most ``full_every`` − 1 deltas.
        max_share: a delta whose weights exceed this share of the full ones is published full (float32 training is).
        cache_dir: where the publisher keeps its newest versions, to compare with; the default is fetch's.
    """

    full_every: int = 16
    max_share: float = 0.5
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.full_every < 1:
            raise ValueError(f"full_every is {self.full_every}: 1 publishes every version full")
        if not 0 < self.max_share <= 1:
            raise ValueError(f"max_share is {self.max_share}: it must lie above 0 and at most at 1")


def delta_on_current(
    catalog: Catalog, full: Manifest, tensors: Sequence[TensorDigest], source: Path, deltas: Deltas, folder: Path
) -> Manifest | None:
    """Fills ``folder`` with the delta's files and returns its manifest; None if it goes full.

    A parent that cannot be read is no reason to fail: the version goes full then. Raises OSError.
    """
    model = Model(full.version.run_id, full.version.name)
    pointer = catalog.pointer(model)
    parent = catalog.find(model, pointer.step) if pointer else None
    if parent is None or parent.kind == "adapter" or parent.version.step >= full.version.step:
        return None
    try:
        if len(chain_of(catalog, parent)) >= deltas.full_every:
            return None
        parent_folder = fetch(catalog.backend, parent, deltas.cache_dir)
    except StoreError:
        return None
    weights = sum(entry.size_bytes for entry in full.files if entry.name.endswith(SAFETENSORS))
    made = make_delta(
        MappedWeights(parent_folder, [entry.name for entry in parent.plain.files]),
        parent.version.digest,
        MappedWeights(source, [entry.name for entry in full.files]),
        {(tensor.folder, tensor.name): tensor for tensor in tensors},
        folder / DELTA_FILE,
        int(weights * deltas.max_share),
    )
    if not made:
        return None
    delta_path = folder / DELTA_FILE
    entries = [FileEntry(DELTA_FILE, delta_path.stat().st_size, digest_file(delta_path))]
    inherited = set(parent.plain.files)
    for entry in full.files:
        if not entry.name.endswith(SAFETENSORS) and entry not in inherited:
            (folder / entry.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / entry.name, folder / entry.name)
            entries.append(entry)
    return replace(
        full,
        kind="delta",
        format=DELTA_FORMAT,
        parent=str(parent.version),
        parent_digest=parent.version.digest,
        files=tuple(sorted(entries, key=lambda entry: entry.name)),
        content=full.files,
    )
