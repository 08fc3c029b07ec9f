"""The containers of the dev overlay as processes of this machine: their own command lines, settings and probes.

What differs from the pods: ports (free ones), paths of volumes and of the image's models, and the object store, which
is moto's server instead of the overlay's image.
"""

import base64
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import grpc
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from moto.server import ThreadedMotoServer

from tests.unit.k8s.manifests import MANIFESTS, environment, pods
from trimtab.deploy.render import Installation, find, render
from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.rounds.launchers.services import free_ports
from trimtab_client import GeneratorClient, ReferenceClient, RewardClient, Sampling, TrainerClient
from trimtab_client.v1 import trainer_pb2

POLICY = MANIFESTS.parent / "examples/models/stories260K-hf"
SERVERS = ("generator", "reward", "reference", "trainer", "labeling")
START_S = 180


class Container:
    """One container of a pod, as a process."""

    def __init__(self, pod, objects, folder: Path, store: str) -> None:
        self.pod = pod
        (self.spec,) = pod.spec["containers"]
        names = [port["name"] for port in self.spec["ports"]]
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self._log = (folder / f"{pod.name}.log").open("wb")
        maps = {one["metadata"]["name"]: one["data"] for one in find(objects, "ConfigMap")}
        self._places = {
            "/opt/trimtab/models/stories260K-hf": str(POLICY),
            "/opt/trimtab/models/stories260K-reward": str(folder.parent / "reward-model"),
            "/etc/trimtab/config": str(folder),
            "/etc/trimtab/store": store,
            "/var/lib/trimtab": str(folder / "data"),
        }
        for volume in pod.spec["volumes"]:
            if volume["name"] == "config":
                for name, text in maps[volume["configMap"]["name"]].items():
                    (folder / name).write_text(self._placed(text))
        (folder / "data").mkdir(exist_ok=True)
        variables = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "OMP_NUM_THREADS": "1",
        }
        for name, value in environment(self.spec, objects).items():
            if name.startswith(("TRIMTAB_", "AWS_")):
                variables[name] = self._placed(value)
        variables |= {f"TRIMTAB_{self._setting(name)}": str(port) for name, port in self.ports.items()}
        arguments = [self._placed(argument) for argument in self.spec["args"]]
        command = [sys.executable, "-m", "trimtab", *arguments]
        self.process = subprocess.Popen(command, env=variables, stdout=self._log, stderr=self._log)

    def _setting(self, port: str) -> str:
        plain = "grpc" if self.pod.name != "labeling" else "http"
        return "PORT" if port == plain else f"{port.upper()}_PORT"

    def _placed(self, text: str) -> str:
        for place, here in self._places.items():
            text = re.sub(re.escape(place) + r"\b", here, text)
        return text

    def probe(self, name: str) -> bool:
        """What the kubelet would see."""
        probe = self.spec[f"{name}Probe"]
        if "httpGet" in probe:
            try:
                path = f"http://127.0.0.1:{self.ports['http']}{probe['httpGet']['path']}"
                return httpx2.get(path, timeout=5).status_code == 200
            except httpx2.HTTPError:
                return False
        with grpc.insecure_channel(f"127.0.0.1:{self.ports['health']}") as channel:
            try:
                request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
                reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
            except grpc.RpcError:
                return False
        return reply.status == health_pb2.HealthCheckResponse.SERVING

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports['grpc']}"


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """The dev overlay's servers, started and through their startup probes."""
    root = tmp_path_factory.mktemp("dev")
    model = ScalarModel.from_policy(Policy.load(str(POLICY)), seed=0)
    model.set_normalization(0.0, 1.0)
    model.save(root / "reward-model")
    objects = render(Installation("dev"), MANIFESTS)
    (secret,) = find(objects, "Secret", "store")
    store = root / "store"
    store.mkdir()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    for name, text in secret["data"].items():
        plain = base64.b64decode(text).decode().replace("http://store:9000", f"http://127.0.0.1:{port}")
        (store / name).write_text(plain)
    keys = {"aws_access_key_id": "trimtab-dev", "aws_secret_access_key": "only-for-the-dev-overlay"}
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1", **keys)
    client.create_bucket(Bucket="trimtab")
    running = {}
    try:
        for pod in pods(tuple(objects)):
            if pod.kind == "Deployment" and pod.name in SERVERS:
                folder = root / pod.name
                folder.mkdir()
                running[pod.name] = Container(pod, objects, folder, str(store))
        deadline = time.monotonic() + START_S
        for name, one in running.items():
            while not one.probe("startup"):
                log = (root / name / f"{name}.log").read_text()[-2000:]
                assert one.process.poll() is None and time.monotonic() < deadline, f"{name}: {log}"
                time.sleep(0.2)
        yield running
    finally:
        for one in running.values():
            one.process.kill()
            one.process.wait()
        server.stop()


@pytest.mark.slow
def test_every_server_is_ready_and_alive_by_its_own_probes(system):
    assert set(system) == set(SERVERS)
    for name, one in system.items():
        assert one.probe("readiness") and one.probe("liveness"), name


@pytest.mark.slow
def test_a_sample_goes_its_way_and_a_run_is_published_to_the_overlays_store(system, tmp_path):
    with GeneratorClient(system["generator"].address) as generator:
        completions = list(generator.generate(["Once upon a time"], Sampling(max_tokens=8, seed=1)))
    assert len(completions) == 1 and len(completions[0].token_ids) > 0
    with RewardClient(system["reward"].address) as reward:
        assert len(reward.score_texts([("Once upon a time", completions[0].text)]).scores) == 1
    with ReferenceClient(system["reference"].address) as reference:
        assert reference.get_model().vocab_size > 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Once", "response": " there was a cat."}\n' * 8)
    config = trainer_pb2.SftConfig(data=str(rows), epochs=1, batch_size=8)
    config.stage.model, config.stage.max_length = str(POLICY), 64
    with TrainerClient(system["trainer"].address) as trainer:
        trainer.start("dev", config)
        deadline = time.monotonic() + 120
        while not (status := trainer.status("dev")).finished:
            assert time.monotonic() < deadline, status
            time.sleep(0.2)
    assert status.state == "succeeded", status.error
    assert [str(version) for version in status.published] == ["dev/policy@1"]


@pytest.mark.slow
def test_servers_leave_within_their_grace(system):
    for one in system.values():
        one.process.send_signal(signal.SIGTERM)
    for name, one in system.items():
        assert one.process.wait(one.pod.spec["terminationGracePeriodSeconds"]) == 0, name
