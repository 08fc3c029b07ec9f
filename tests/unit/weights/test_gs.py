"""The store on Google Cloud Storage, spoken to an emulator by gcsfs.

The emulator ignores conditions of a put, so what two writers at once see is shown on S3 (test_lease), not here.
"""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.unit.weights.delta_folders import changed_bits, files_of, random_bits, write_folder
from trimtab.weights.delta_publish import Deltas
from trimtab.weights.errors import LeaseHeldError
from trimtab.weights.store import Store, open_store

pytest.importorskip("gcp_storage_emulator")


@pytest.fixture
def gs_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    command = ["gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", *command, "--in-memory", "--default-bucket", "bucket"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 60
            while not answers(port):
                assert server.poll() is None and time.monotonic() < deadline, "the GCS emulator did not start"
                time.sleep(0.1)
            gcsfs.GCSFileSystem.clear_instance_cache()
            yield open_store("gs://bucket/store")
        finally:
            server.kill()


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_versions_deltas_and_leases_live_on_gs(
    gs_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    bits = random_bits(rng, "BF16", (200, 64))
    lease = gs_store.acquire_lease("r", "one", ttl_s=60)
    folders = []
    for step in range(3):
        folders.append(write_folder(tmp_path / f"s{step}", {"model.safetensors": {"w": bits}}))
        gs_store.publish(folders[-1], run_id="r", name="p", step=step, lease=lease, deltas=Deltas())
        bits = changed_bits(rng, bits, 0.02)
    reader = open_store(gs_store.url)
    assert [manifest.kind for manifest in reader.versions()] == ["full", "delta", "delta"]
    assert reader.current("r", "p") == reader.versions()[-1]
    for step in (2, 1):
        reader.pull(reader.get("r", "p", step), tmp_path / f"p{step}")
        assert files_of(tmp_path / f"p{step}") == files_of(folders[step])
    with pytest.raises(LeaseHeldError):
        reader.acquire_lease("r", "two", ttl_s=60)
    lease.release()
    assert reader.acquire_lease("r", "two", ttl_s=60).token == 2
    assert [manifest.version.step for manifest in reader.prune("r", "p", keep_last=1)] == []
