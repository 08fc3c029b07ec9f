"""Where things lie inside a store, and the names it accepts. No input or output here.

    ROOT/RUN/NAME/step-000000000012/   one version: its files and manifest.json
    ROOT/RUN/NAME/current.json         the pointer
    ROOT/RUN/NAME/pins/                one file per pinned version
    ROOT/RUN/NAME/pruned/              manifests of versions whose files are gone
    ROOT/RUN/NAME/.staging/            versions being written (local stores only)
    ROOT/RUN/.lease/                   one file per holder of the run's lease, the highest number holds it

Every part of a path is checked against one pattern, so that no name, whoever sent it, leads outside the root.
"""

import re

from trimtab.weights.errors import InvalidNameError

MANIFEST = "manifest.json"
POINTER = "current.json"
PINS = "pins"
PRUNED = "pruned"
STAGING = ".staging"
LEASE = ".lease"

MAX_NAME_LENGTH = 128
MAX_STEP = 10**12 - 1

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\Z")
_FILE_PART = re.compile(r"[^/\\\x00-\x1f\x7f.][^/\\\x00-\x1f\x7f]*\Z")
_STEP_FOLDER = re.compile(r"step-(\d{12})(?:\.json)?\Z")
_TOKEN_FILE = re.compile(r"token-(\d{12})\.json\Z")
_RESERVED = {PINS, PRUNED}


def check_name(kind: str, name: str) -> str:
    """Returns ``name`` if it may be a run id or model name; raises InvalidNameError naming ``kind`` otherwise."""
    if not _NAME.match(name) or ".." in name or len(name) > MAX_NAME_LENGTH or name in _RESERVED:
        raise InvalidNameError(
            f"{kind} {name[:MAX_NAME_LENGTH]!r} is not allowed: use 1 to {MAX_NAME_LENGTH} of A-Z a-z 0-9 . _ -, "
            "not starting with '.', without '..'"
        )
    return name


def check_step(step: int) -> int:
    """Returns ``step`` if it lies in 0..10^12 − 1; raises InvalidNameError otherwise."""
    if not 0 <= step <= MAX_STEP:
        raise InvalidNameError(f"step {step} is not allowed: it must lie between 0 and {MAX_STEP}")
    return step


def check_file_name(name: str) -> str:
    """Returns ``name`` if it is a plain relative path ('adapter/b.json'); raises InvalidNameError otherwise."""
    parts = name.split("/")
    if not all(_FILE_PART.match(part) for part in parts) or name == MANIFEST:
        raise InvalidNameError(f"file name {name!r} is not allowed inside a version")
    return name


def model_folder(run_id: str, name: str) -> str:
    """Folder of all versions of one model, relative to the root."""
    return f"{check_name('run id', run_id)}/{check_name('model name', name)}"


def step_name(step: int) -> str:
    """'step-000000000012' for 12: sorts by step."""
    return f"step-{check_step(step):012d}"


def step_of(entry: str) -> int | None:
    """The step that an entry of a folder stands for ('step-000000000012' or the same with '.json'), or None."""
    match = _STEP_FOLDER.match(entry)
    return int(match.group(1)) if match else None


def version_folder(run_id: str, name: str, step: int) -> str:
    """Folder of one version, relative to the root."""
    return f"{model_folder(run_id, name)}/{step_name(step)}"


def lease_folder(run_id: str) -> str:
    """Folder of the lease of one run, relative to the root. No model name starts with a dot."""
    return f"{check_name('run id', run_id)}/{LEASE}"


def token_name(token: int) -> str:
    """'token-000000000007.json' for 7: sorts by token."""
    return f"token-{token:012d}.json"


def token_of(entry: str) -> int | None:
    """The token that a file of a lease's folder stands for, or None."""
    match = _TOKEN_FILE.match(entry)
    return int(match.group(1)) if match else None
