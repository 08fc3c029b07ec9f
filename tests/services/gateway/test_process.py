"""The gateway as a command: `trimtab serve gateway`, and as an entry of `trimtab up`'s file."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import httpx2
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from trimtab.cli.errors import CommandError
from trimtab.cli.up_config import load_up_config, process_specs
from trimtab.gateway.config import GatewayConfig


def up_file(folder: Path, text: str) -> Path:
    path = folder / "up.yaml"
    path.write_text(f"folder: {folder}\n{text}")
    return path


def test_it_serves_until_sigterm_and_is_probed_over_grpc(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    settings = ["reward=127.0.0.1:1", "http_port=0", "metrics_port=0", f"ready_file={ready}"]
    flags = [part for one in settings for part in ("--set", one)]
    command = [sys.executable, "-m", "trimtab", "serve", "gateway", "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        give_up = time.monotonic() + 60
        while not ready.exists() and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.05)
        ports = json.loads(ready.read_text())
        url = f"http://127.0.0.1:{ports['http_port']}"
        assert httpx2.get(f"{url}/healthz", timeout=10).json() == {"status": "serving"}
        with grpc.insecure_channel(f"127.0.0.1:{ports['port']}") as channel:
            request = health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        metrics = httpx2.get(f"http://127.0.0.1:{ports['metrics_port']}/metrics", timeout=10).text
        assert 'trimtab_requests_total{code="200",method="/healthz",service="http"} 1.0' in metrics
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def test_up_puts_a_gateway_before_the_services_of_its_file(tmp_path: Path) -> None:
    text = "threads: 2\ngenerator: {model: m}\nreward: {model: r, port: 7202}\ngateway:\n"
    specs = {spec.name: spec for spec in process_specs(load_up_config(up_file(tmp_path, text)))}
    assert specs["gateway"].address == "127.0.0.1:7105"
    settings = yaml.safe_load((tmp_path / "gateway.yaml").read_text())
    assert (settings["reward"], settings["generator"]) == ("127.0.0.1:7202", "127.0.0.1:7101")
    elsewhere = up_file(tmp_path, "gateway: {reward: 'far:1'}\n")
    process_specs(load_up_config(elsewhere))
    assert yaml.safe_load((tmp_path / "gateway.yaml").read_text())["reward"] == "far:1"


def test_a_gateway_before_nothing_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="gateway: reward: give the address of a reward service"):
        load_up_config(up_file(tmp_path, "reference: {model: m}\ngateway: {}\n"))


def test_a_gateway_beside_a_trainer_shows_that_trainer(tmp_path: Path) -> None:
    config = load_up_config(up_file(tmp_path, "trainer: {port: 7999}\ngateway: {}\n"))
    assert config.sections["gateway"]["trainer"] == "127.0.0.1:7999"


@pytest.mark.parametrize("page", ["http://page:7110", "http://10.0.0.1:7110"])
def test_a_lead_s_token_is_not_sent_to_another_machine_without_tls(tmp_path: Path, page: str) -> None:
    settings = {"labeling": page, "labeling_token_file": str(tmp_path / "lead.token")}
    with pytest.raises(CommandError, match=r"gateway: labeling: .* give its https:// address"):
        load_up_config(up_file(tmp_path, f"trainer: {{}}\ngateway: {json.dumps(settings)}\n"))
    GatewayConfig(trainer="t:1", **settings | {"labeling": page.replace("http:", "https:")})
    GatewayConfig(trainer="t:1", **settings | {"labeling": "http://127.0.0.1:7110"})
