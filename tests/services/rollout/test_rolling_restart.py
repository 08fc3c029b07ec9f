"""A rolling restart of three reward replicas under load from the SDK fails no call.

Callers know the replicas by a name, as behind a headless Service, and repeat nothing: what the numbers in k8s/ promise
holds before a client's retries help.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from tests.services.rollout.pods import Replica, Timing
from tests.services.rollout.restart import rolling_restart
from trimtab_client import channel

ROOT = Path(__file__).parents[3]
MANIFESTS = ROOT / "k8s" / "base" / "reward"
DNS_S = 30  # how long a cluster's caches tell an address after it is gone


def manifest_timing() -> Timing:
    """What k8s/base/reward says."""
    spec = yaml.safe_load((MANIFESTS / "deployment.yaml").read_text())["spec"]["template"]["spec"]
    settings = yaml.safe_load((MANIFESTS / "reward.yaml").read_text())
    return Timing(
        pre_stop_s=spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"],
        grace_s=spec["terminationGracePeriodSeconds"],
        connection_age_s=settings["connection_age_s"],
        stale_s=DNS_S,
        drain_s=settings["grace_s"],
    )


def may_make_networks() -> bool:
    tools = all(shutil.which(tool) for tool in ("ip", "unshare", "nsenter"))
    command = ["unshare", "--net", "ip", "link", "add", "pods", "type", "bridge"]
    return tools and subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_rolling_restart_fails_no_call_although_nothing_is_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(channel, "LOOKUP_S", 0.5)
    timing = Timing(pre_stop_s=8, grace_s=30, connection_age_s=0.5, stale_s=0.5)  # 6.5 s to spare: machines are busy
    outcome = rolling_restart(tmp_path, timing, Replica(small=True), retries=0)
    assert outcome.failed == {} and outcome.answered > 100
    assert outcome.exit_codes == [0, 0, 0]


@pytest.mark.slow
def test_without_the_pause_before_the_end_calls_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(channel, "LOOKUP_S", 0.5)
    timing = Timing(pre_stop_s=0, grace_s=30, connection_age_s=None, stale_s=3)
    outcome = rolling_restart(tmp_path, timing, Replica(small=True), retries=0)
    assert outcome.failed["UNAVAILABLE"] > 0


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_real_replicas_with_the_manifests_times_in_networks_of_their_own_fail_no_call(tmp_path):
    if not may_make_networks():
        pytest.skip("network namespaces need root and iproute2")
    command = ["unshare", "--net", sys.executable, "-m", "tests.services.rollout.restart", str(tmp_path)]
    command.append(json.dumps(asdict(manifest_timing())))
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["failed"] == {} and outcome["answered"] > 500
    assert outcome["exit_codes"] == [0, 0, 0]
