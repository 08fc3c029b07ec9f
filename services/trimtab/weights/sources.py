"""Where a model comes from, as people write it: a folder, a Hugging Face id, or ``version:RUN/NAME[@STEP]``."""

import re
from dataclasses import dataclass
from pathlib import Path

from trimtab.weights.errors import InvalidNameError, VersionNotFoundError
from trimtab.weights.layout import check_name, check_step
from trimtab.weights.manifest import Manifest
from trimtab.weights.store import Store
from trimtab_client import ModelVersion

PREFIX = "version:"
_REFERENCE = re.compile(r"(?P<run_id>[^/@]+)/(?P<name>[^/@]+)(?:@(?P<step>\d{1,12}))?\Z", re.ASCII)


@dataclass(frozen=True)
class VersionReference:
    """One version of a model in a store; ``step`` None means whichever is current."""

    run_id: str
    name: str
    step: int | None

    def __str__(self) -> str:
        return f"{self.run_id}/{self.name}" + (f"@{self.step}" if self.step is not None else "")


@dataclass(frozen=True)
class PlainSource:
    """A folder or a Hugging Face id, which from_pretrained takes as it is."""

    path_or_id: str


@dataclass(frozen=True)
class ResolvedSource:
    """What to load (``path_or_id`` for from_pretrained) and the version that replies will name.

    A model that was never published has run_id '', its source as name, step 0 and no digest; ``manifest`` is None.
    """

    path_or_id: str
    version: ModelVersion
    manifest: Manifest | None = None


def parse_reference(text: str) -> VersionReference:
    """Reads 'RUN/NAME' or 'RUN/NAME@STEP'. Raises InvalidNameError."""
    match = _REFERENCE.match(text)
    if match is None:
        raise InvalidNameError(f"{text!r} is not a version: write RUN/NAME or RUN/NAME@STEP")
    step = match["step"]
    return VersionReference(
        run_id=check_name("run id", match["run_id"]),
        name=check_name("model name", match["name"]),
        step=check_step(int(step)) if step is not None else None,
    )


def parse_source(source: str) -> VersionReference | PlainSource:
    """Reads a model source. Raises InvalidNameError for an empty one or a 'version:' that is not RUN/NAME[@STEP]."""
    if not source.strip():
        raise InvalidNameError("the model source is empty: give a folder, a Hugging Face id or version:RUN/NAME[@STEP]")
    if source.startswith(PREFIX):
        return parse_reference(source.removeprefix(PREFIX))
    return PlainSource(source)


def resolve_reference(reference: VersionReference, store: Store) -> Manifest:
    """The manifest that a reference stands for now. Raises VersionNotFoundError."""
    if reference.step is not None:
        return store.get(reference.run_id, reference.name, reference.step)
    manifest = store.current(reference.run_id, reference.name)
    if manifest is None:
        raise VersionNotFoundError(f"nothing is current under {reference} in {store.url}: publish it or name a step")
    return manifest


def resolve_source(source: str, store: Store | None, cache_dir: Path | None = None) -> ResolvedSource:
    """Makes a source loadable: a published version is fetched and verified, anything else passes through.

    Raises InvalidNameError, also for a version where there is no store; VersionNotFoundError, CorruptVersionError and
    the other errors of ``Store.fetch``.
    """
    parsed = parse_source(source)
    if isinstance(parsed, PlainSource):
        return ResolvedSource(_expanded(parsed.path_or_id), ModelVersion(run_id="", name=source, step=0, digest=""))
    if store is None:
        raise InvalidNameError(f"{source} needs a store: give its folder or URL (--store or TRIMTAB_STORE)")
    manifest = resolve_reference(parsed, store)
    return ResolvedSource(str(store.fetch(manifest, cache_dir)), manifest.version, manifest)


def _expanded(path_or_id: str) -> str:
    return str(Path(path_or_id).expanduser()) if path_or_id.startswith("~") else path_or_id
