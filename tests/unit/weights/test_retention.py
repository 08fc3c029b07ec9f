import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pytest

from trimtab.weights.errors import VersionConflictError, VersionNotFoundError
from trimtab.weights.manifest import FileEntry, Manifest
from trimtab.weights.retention import Retention, versions_to_prune
from trimtab.weights.store import Store, open_store
from trimtab_client import ModelVersion

MakeFolder = Callable[..., Path]
REWARDS = {1: 0.1, 2: 0.9, 3: 0.2, 4: float("nan"), 5: 0.3, 6: 0.4}


@pytest.fixture
def full_store(store: Store, make_folder: MakeFolder) -> Store:
    """r/policy@1…6 with the metric 'reward'."""
    for step, reward in REWARDS.items():
        store.publish(make_folder(seed=step), run_id="r", name="policy", step=step, metrics={"reward": reward})
    return store


def steps(manifests: list[Manifest]) -> list[int]:
    return [manifest.version.step for manifest in manifests]


def left(store: Store) -> list[int]:
    return steps(store.versions("r", "policy"))


def test_prune_keeps_the_last_the_current_the_pinned_and_the_best(full_store: Store) -> None:
    full_store.pin("r", "policy", 1, reason="paper")
    full_store.set_current("r", "policy", 3)
    planned = full_store.prune("r", "policy", keep_last=1, best_metric="reward", dry_run=True)
    assert steps(planned) == [4, 5]
    assert left(full_store) == [1, 2, 3, 4, 5, 6]
    assert steps(full_store.prune("r", "policy", keep_last=1, best_metric="reward")) == [4, 5]
    assert left(full_store) == [1, 2, 3, 6]
    for manifest in full_store.versions():
        full_store.verify(manifest)


def test_best_may_mean_lowest(full_store: Store) -> None:
    full_store.prune("r", "policy", keep_last=1, best_metric="reward", higher_is_better=False, keep_best=2)
    assert left(full_store) == [1, 3, 6]


def test_an_unpinned_version_may_go(full_store: Store) -> None:
    full_store.pin("r", "policy", 1)
    full_store.pin("r", "policy", 1)
    assert full_store.pinned_steps("r", "policy") == {1}
    full_store.unpin("r", "policy", 1)
    full_store.unpin("r", "policy", 1)
    full_store.prune("r", "policy", keep_last=2)
    assert left(full_store) == [5, 6]


def test_only_what_exists_can_be_pinned(full_store: Store) -> None:
    with pytest.raises(VersionNotFoundError):
        full_store.pin("r", "policy", 77)
    assert full_store.pinned_steps("r", "policy") == frozenset()


def test_a_pruned_step_keeps_its_content(full_store: Store, make_folder: MakeFolder) -> None:
    gone = full_store.get("r", "policy", 1)
    full_store.prune("r", "policy", keep_last=1)
    with pytest.raises(VersionNotFoundError, match="r/policy@1 was pruned"):
        full_store.get("r", "policy", 1)
    assert full_store.publish(make_folder(seed=1), run_id="r", name="policy", step=1).version == gone.version
    assert left(full_store) == [6]
    with pytest.raises(VersionConflictError):
        full_store.publish(make_folder(seed=9), run_id="r", name="policy", step=1)
    current = full_store.current("r", "policy")
    assert current is not None and current.version.step == 6


def test_prune_removes_what_an_upload_that_died_left(make_folder: MakeFolder) -> None:
    root = f"/{uuid.uuid4().hex}"
    store = open_store(f"memory:/{root}")
    filesystem = fsspec.filesystem("memory")
    for step in (1, 3):
        filesystem.pipe_file(f"{root}/r/policy/step-{step:012d}/files-aa/model.safetensors", b"half")
    store.publish(make_folder(), run_id="r", name="policy", step=2)
    assert left(store) == [2]
    store.prune("r", "policy")
    assert not filesystem.exists(f"{root}/r/policy/step-{1:012d}")
    assert filesystem.exists(f"{root}/r/policy/step-{3:012d}"), "step 3 may still be on its way"


@pytest.mark.parametrize(("keep_last", "keep_best"), [(0, 1), (-1, 1), (1, -1)])
def test_a_policy_that_keeps_nothing_is_refused(keep_last: int, keep_best: int) -> None:
    with pytest.raises(ValueError, match="keep_"):
        Retention(keep_last=keep_last, keep_best=keep_best)


def test_the_chain_under_a_kept_delta_is_kept() -> None:
    def version(step: int, parent: int | None) -> Manifest:
        return Manifest(
            version=ModelVersion(run_id="r", name="policy", step=step, digest="blake3:" + "0" * 64),
            files=(FileEntry("model.safetensors", 1, "blake3:" + "0" * 64),),
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
            parent=None if parent is None else f"r/policy@{parent}",
            kind="full" if parent is None else "delta",
        )

    chain = [version(1, None), version(2, 1), version(3, 2), version(4, None), version(5, 4), version(6, 5)]
    gone = versions_to_prune(chain, Retention(keep_last=1), current_step=None, pinned_steps=[])
    assert steps(gone) == [1, 2, 3]
    gone = versions_to_prune(chain, Retention(keep_last=1), current_step=4, pinned_steps=[3])
    assert steps(gone) == []
