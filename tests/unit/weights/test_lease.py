"""At most one publisher of a run counts, however late the other wakes."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.weights.errors import LeaseHeldError, LeaseLostError, StoreUnavailableError, VersionConflictError
from trimtab.weights.store import Store, open_store

MakeFolder = Callable[..., Path]
SLEEPER = Path(__file__).with_name("lease_holder.py")


def test_one_holds_the_lease_until_it_lets_go(store: Store) -> None:
    first = store.acquire_lease("r", "one", ttl_s=60)
    with pytest.raises(LeaseHeldError, match="published to by one") as refusal:
        store.acquire_lease("r", "two", ttl_s=60)
    assert refusal.value.owner == "one"
    first.release()
    second = store.acquire_lease("r", "two", ttl_s=60)
    assert (first.token, second.token) == (1, 2)
    with pytest.raises(LeaseLostError, match="token 1 is stale, 2 holds it now"):
        first.renew()


def test_an_expired_lease_goes_to_whoever_waits_for_it(store: Store) -> None:
    store.acquire_lease("r", "one", ttl_s=0.3)
    began = time.monotonic()
    assert store.acquire_lease("r", "two", ttl_s=60, wait_s=30).token == 2
    assert 0.2 < time.monotonic() - began < 20


def test_a_trainer_that_comes_back_takes_its_own_lease_at_once(store: Store) -> None:
    before = store.acquire_lease("r", "trainer-0", ttl_s=60)
    after = store.acquire_lease("r", "trainer-0", ttl_s=60)
    with pytest.raises(LeaseLostError):
        before.check()
    after.check()


def test_a_lease_that_expired_unclaimed_is_still_good(store: Store, make_folder: MakeFolder) -> None:
    lease = store.acquire_lease("r", "one", ttl_s=0.01)
    time.sleep(0.05)
    assert store.publish(make_folder(), run_id="r", name="policy", step=1, lease=lease).lease_token == 1
    lease.renew()


def test_a_kept_lease_outlives_its_time_to_live_and_is_released_at_the_end(store: Store) -> None:
    with store.acquire_lease("r", "one", ttl_s=0.4).kept_alive():
        time.sleep(1.0)
        with pytest.raises(LeaseHeldError):
            store.acquire_lease("r", "two", ttl_s=60)
    assert store.acquire_lease("r", "two", ttl_s=60).token == 2


def test_of_many_who_want_it_one_gets_it(store: Store) -> None:
    won, lost = [], []

    def want(owner: int) -> None:
        try:
            won.append(open_store(store.url).acquire_lease("r", f"owner-{owner}", ttl_s=60))
        except LeaseHeldError:
            lost.append(owner)

    threads = [threading.Thread(target=want, args=(owner,)) for owner in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) >= 1 and len(won) + len(lost) == 8
    good = []
    for lease in won:
        try:
            lease.check()
        except LeaseLostError:
            continue
        good.append(lease)
    assert len(good) == 1


def test_nothing_is_published_beside_a_holder(store: Store, make_folder: MakeFolder) -> None:
    lease = store.acquire_lease("r", "one", ttl_s=60)
    with pytest.raises(LeaseHeldError):
        store.publish(make_folder(), run_id="r", name="policy", step=1)
    with pytest.raises(ValueError, match="lease of run r"):
        store.publish(make_folder(), run_id="other", name="policy", step=1, lease=lease)
    store.publish(make_folder(), run_id="other", name="policy", step=1)
    store.publish(make_folder(seed=1), run_id="r", name="policy", step=1, lease=lease)
    store.publish(make_folder(seed=2), run_id="r", name="policy", step=2, lease=lease)
    assert store.set_current("r", "policy", 1).version.step == 1  # a person's roll back needs no lease


def test_the_same_content_again_under_the_next_lease_is_a_no_op(store: Store, make_folder: MakeFolder) -> None:
    folder = make_folder()
    first = store.publish(folder, run_id="r", name="policy", step=1, lease=store.acquire_lease("r", "one", ttl_s=60))
    lease = store.acquire_lease("r", "one", ttl_s=60)
    assert store.publish(folder, run_id="r", name="policy", step=1, lease=lease) == first
    with pytest.raises(VersionConflictError):  # it was current: its content stands
        store.publish(make_folder(seed=5), run_id="r", name="policy", step=1, lease=lease)


MOMENTS = ("between two publishes", "before the manifest", "before the pointer")


@pytest.mark.parametrize("moment", [MOMENTS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS[1:])])
def test_a_holder_that_wakes_late_changes_nothing_on_s3(s3_store: Store, make_folder: MakeFolder, moment: str) -> None:
    check_late_waker(s3_store, make_folder, moment)


@pytest.mark.parametrize("moment", ("between two publishes", "before a renewal"))
def test_a_holder_that_wakes_late_changes_nothing_in_a_folder(
    local_store: Store, make_folder: MakeFolder, moment: str
) -> None:
    check_late_waker(local_store, make_folder, moment)


def check_late_waker(store: Store, make_folder: MakeFolder, moment: str) -> None:
    """A real process holds the lease, stops, is overtaken, and wakes with other content for the same step."""
    command = [sys.executable, str(SLEEPER), store.url, str(make_folder(seed=1)), str(make_folder(seed=2)), moment]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sleeper:
        assert sleeper.stdout is not None
        try:
            assert "stopping" in sleeper.stdout.readline()
            lease = store.acquire_lease("r", "successor", ttl_s=600, wait_s=60)
            mine = store.publish(make_folder(seed=3), run_id="r", name="policy", step=2, lease=lease)
            sleeper.send_signal(signal.SIGCONT)
            said = json.loads(sleeper.stdout.readline())
        finally:
            sleeper.kill()
    assert said["token"] < lease.token
    assert said["publish"] in ("LeaseLostError", "VersionConflictError") and said["set_current"] == "LeaseLostError"
    assert store.current("r", "policy") == store.verify(mine)
    assert [manifest.version.step for manifest in store.versions()] == [1, 2]
    third = store.publish(make_folder(seed=4), run_id="r", name="policy", step=3, lease=lease)
    assert store.current("r", "policy") == third


def test_a_late_publish_that_meets_no_version_yet_is_replaced(s3_store: Store, make_folder: MakeFolder) -> None:
    command = [sys.executable, str(SLEEPER), s3_store.url, str(make_folder(seed=1)), str(make_folder(seed=2))]
    with subprocess.Popen([*command, "before the manifest"], stdout=subprocess.PIPE, text=True) as sleeper:
        assert sleeper.stdout is not None
        try:
            assert "stopping" in sleeper.stdout.readline()
            lease = s3_store.acquire_lease("r", "successor", ttl_s=600, wait_s=60)
            sleeper.send_signal(signal.SIGCONT)
            said = json.loads(sleeper.stdout.readline())
        finally:
            sleeper.kill()
    assert said["publish"] == "LeaseLostError"
    current = s3_store.current("r", "policy")
    assert current is not None and current.version.step == 1, "the late one's version never became current"
    mine = s3_store.publish(make_folder(seed=3), run_id="r", name="policy", step=2, lease=lease)
    assert s3_store.current("r", "policy") == s3_store.verify(mine)


def test_a_holder_stopped_inside_its_commit_is_waited_for_and_then_named(
    local_store: Store, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.weights.staging._LOCK_PATIENCE_S", 1.0)
    command = [sys.executable, str(SLEEPER), local_store.url, str(make_folder(seed=1)), str(make_folder(seed=2))]
    with subprocess.Popen([*command, "before the manifest"], stdout=subprocess.PIPE, text=True) as sleeper:
        assert sleeper.stdout is not None
        try:
            assert "stopping" in sleeper.stdout.readline()
            with pytest.raises(StoreUnavailableError, match="another process holds"):
                local_store.acquire_lease("r", "successor", ttl_s=600, wait_s=60)
            sleeper.send_signal(signal.SIGCONT)
            assert json.loads(sleeper.stdout.readline())["publish"] == "published"
        finally:
            sleeper.kill()
    lease = local_store.acquire_lease("r", "successor", ttl_s=600, wait_s=60)
    assert lease.token == 2
    local_store.publish(make_folder(seed=2), run_id="r", name="policy", step=2, lease=lease)
