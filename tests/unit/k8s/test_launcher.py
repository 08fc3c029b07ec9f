"""The launcher of rounds on Kubernetes, through the official client, against a real HTTP server that speaks the API."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tests.unit.k8s.kubernetes_api import serving_api
from tests.unit.k8s.manifests import MANIFESTS, rendered
from trimtab.deploy.render import Installation, find, render
from trimtab.rounds.launchers import kubernetes_rounds
from trimtab.rounds.launchers.kubernetes import Cluster, ClusterError
from trimtab.rounds.launchers.kubernetes_jobs import TrainingJobs, job_name, run_digest
from trimtab.rounds.launchers.kubernetes_rounds import ClusterPlace, KubernetesRoundServices
from trimtab.rounds.launchers.kubernetes_services import BEFORE, ModelServices
from trimtab.rounds.launchers.services import free_ports
from trimtab.rounds.launchers.trainer_job import RunFile
from trimtab.weights.store import open_store
from trimtab_client import ModelVersion
from trimtab_client.v1 import model_pb2, model_pb2_grpc, trainer_pb2

PENDING = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu. preemption: 0/4 nodes are available: 4 No victims."
MODEL = MANIFESTS.parent / "examples/models/stories260K-hf"


@pytest.fixture(scope="module")
def objects():
    return render(Installation("gpu", "gke"), MANIFESTS)


@pytest.fixture
def world(objects, tmp_path):
    """(api, cluster, place): a cluster on which trimtab is deployed, and what the Role of rounds allows there."""
    with serving_api() as (api, settings):
        (role,) = find(objects, "Role", "rounds")
        api.rules = role["rules"]
        for kind, plural in (("CronJob", "cronjobs"), ("Deployment", "deployments")):
            for one in find(objects, kind):
                api.put(plural, {"metadata": one["metadata"], "spec": one["spec"]})
        place = ClusterPlace(
            "stories", open_store(str(tmp_path / "store")), f"file://{tmp_path}/data", tmp_path / "runs"
        )
        yield api, Cluster.of(settings, "trimtab", patience_s=5.0), place


@pytest.fixture
def config(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    config = trainer_pb2.SftConfig(data=str(tmp_path / "rows.jsonl"), epochs=1)
    config.stage.model, config.stage.seed = "some/model", 2**63 + 1
    return config


class Died(Exception):
    """A launcher's death while it follows a Job."""


def die(waits):
    raise Died


class Trained(threading.Thread):
    """`services.train` on a thread, with what it says and waits for; with `dies`, until it has seen its Job."""

    def __init__(self, cluster, place, run_id, config, stage="sft", *, dies=False):
        super().__init__(daemon=True)
        self.said, self.waits, self.result, self.error = [], [], None, None
        self._services = KubernetesRoundServices(
            cluster, place, gold=lambda source: "", waiting=die if dies else self.waits.append, say=self.said.append
        )
        self._work = (stage, run_id, config)
        self.start()

    def run(self):
        try:
            self.result = self._services.train(*self._work)
        except Exception as error:
            self.error = error
            _told.append(repr(error))

    def end(self):
        self.join(30)
        assert not self.is_alive()
        return self


_told = []


def until(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, _told
        time.sleep(0.02)


def pod(api, job, number, phase, *, rank=0, created="2026-01-01T00:00:00Z", labels=None, **status):
    name = f"{job}-{rank}-{number}"
    meta = {"name": name, "labels": labels or {"job-name": job}, "creationTimestamp": created}
    meta["annotations"] = {"batch.kubernetes.io/job-completion-index": str(rank)}
    api.put("pods", {"metadata": meta, "spec": {}, "status": {"phase": phase} | status})
    return name


def line(second, **record):
    return f"2026-01-01T00:00:{second:02}.000000000Z {json.dumps(record)}"


def say(api, pod_name, *lines):
    with api.changed:
        api.logs.setdefault(pod_name, []).extend(lines)
        api.changed.notify_all()


def publish(place, run_id):
    """What the trainer of the Job would do."""
    return place.store.publish(MODEL, run_id=run_id, name="policy", step=1).version


def complete(api, job):
    api.status("jobs", job, conditions=[{"type": "Complete", "status": "True"}], succeeded=1)


def test_a_stage_is_a_job_of_the_template_and_leaves_nothing_behind(world, config):
    api, cluster, place = world
    trained = Trained(cluster, place, "stories-r0-sft", config)
    job = api.wait_for("jobs", "stories-r0-sft")
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == [
        "job",
        "--config",
        "/etc/trimtab/config/trainer.yaml",
        "--run",
        "/etc/trimtab/run/run.yaml",
    ]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "TRIMTAB_KEEP_VERSIONS", "value": "5"} in container["env"]
    given = api.wait_for("configmaps", "stories-r0-sft-run")
    assert given["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    run = RunFile.model_validate(json.loads(given["data"]["run.yaml"]))
    assert run.message.stage.seed == 2**63 + 1
    data = Path(run.message.data.removeprefix("file://")).read_text()
    assert json.loads(data) == {"prompt": "a", "response": "b"}
    unscheduled = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": PENDING}]
    pod(api, "stories-r0-sft", 1, "Pending", conditions=unscheduled)
    until(lambda: "4 Insufficient nvidia.com/gpu" in trained.waits)
    name = pod(api, "stories-r0-sft", 1, "Running")
    say(api, name, line(1, event="step", step=1, total_steps=2, loss=1.5), line(2, event="activity"))
    until(lambda: "step 1/2 loss=1.5" in trained.said)
    say(api, name, line(3, event="step", step=2, total_steps=2, loss=1.25))
    version = publish(place, "stories-r0-sft")
    pod(api, "stories-r0-sft", 1, "Succeeded")
    complete(api, "stories-r0-sft")
    trained.end()
    assert trained.error is None
    assert trained.result.run_id == "stories-r0-sft" and trained.result.published == (version,)
    assert trained.waits[-1] == ""
    steps = [json.loads(row) for row in (place.runs / "stories-r0-sft" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.25}]
    assert api.objects["jobs"] == {}


@pytest.mark.parametrize("expire", [False, True])
def test_a_broken_watch_loses_nothing_and_no_line_is_told_twice(world, config, expire):
    api, cluster, place = world
    trained = Trained(cluster, place, "r", config)
    api.wait_for("jobs", "r")
    first = pod(api, "r", 1, "Running")
    say(api, first, line(1, event="step", step=1, total_steps=3, loss=3.0))
    until(lambda: len(trained.said) == 1)
    api.cut_watches(expire=expire)
    # Evicted while nobody watched: the pod is gone without a DELETED that anyone saw, and another has come.
    api.remove("pods", first)
    second = pod(api, "r", 2, "Running", created="2026-01-01T00:01:00Z")
    say(api, second, line(11, event="step", step=2, total_steps=3, loss=2.0))
    until(lambda: len(trained.said) == 2)
    api.cut_watches(expire=expire)
    say(api, second, line(12, event="step", step=3, total_steps=3, loss=1.0))
    until(lambda: len(trained.said) == 3)
    publish(place, "r")
    pod(api, "r", 2, "Succeeded", created="2026-01-01T00:01:00Z")
    complete(api, "r")
    assert trained.end().error is None
    assert [text.split()[1] for text in trained.said] == ["1/3", "2/3", "3/3"]


def test_after_its_own_death_the_launcher_goes_on_with_the_job_that_is_there(world, config):
    api, cluster, place = world
    dead = Trained(cluster, place, "stories-r1-sft", config, dies=True)
    uid = api.wait_for("jobs", "stories-r1-sft")["metadata"]["uid"]
    assert isinstance(dead.end().error, Died)
    again = Trained(cluster, place, "stories-r1-sft-attempt2", config)
    until(lambda: "going on with run stories-r1-sft" in again.said)
    pod(api, "stories-r1-sft", 1, "Succeeded")
    version = publish(place, "stories-r1-sft")
    complete(api, "stories-r1-sft")
    again.end()
    assert again.error is None and again.result.published == (version,)
    posted = [request for request in api.requests if request == "POST /apis/batch/v1/namespaces/trimtab/jobs"]
    assert len(posted) == 1 and uid == "uid-stories-r1-sft"


def test_two_lives_of_a_launcher_see_the_same_end_although_one_of_them_cleans_up(world, config):
    api, cluster, place = world
    trained = Trained(cluster, place, "r", config)
    job = api.wait_for("jobs", "r")
    until(lambda: trained.waits)
    version = publish(place, "r")
    with api.changed:  # the watch tells both at once
        complete(api, "r")
        api.remove("jobs", job["metadata"]["name"])
    assert trained.end().error is None and trained.result.published == (version,)


def test_a_job_that_someone_removed_before_its_end_is_an_error(world, config):
    api, cluster, place = world
    trained = Trained(cluster, place, "r", config)
    api.wait_for("jobs", "r")
    until(lambda: trained.waits)
    api.remove("jobs", "r")
    assert "removed by someone else" in str(trained.end().error)


def test_a_failed_job_is_told_with_its_trainers_last_words_and_made_anew_next_time(world, config):
    api, cluster, place = world
    trained = Trained(cluster, place, "r", config)
    api.wait_for("jobs", "r")
    name = pod(api, "r", 1, "Failed")
    say(api, name, line(1, event="run r failed at step 3: out of memory", level="error"), line(2, event="drained"))
    api.status("jobs", "r", conditions=[{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}])
    trained.end()
    assert isinstance(trained.error, ClusterError)
    assert "BackoffLimitExceeded" in str(trained.error) and "out of memory" in str(trained.error)
    made = api.objects["jobs"]["r"]["metadata"]["resourceVersion"]
    Trained(cluster, place, "r", config)
    until(lambda: api.objects["jobs"].get("r", {}).get("metadata", {}).get("resourceVersion") not in (None, made))
    until(lambda: "status" not in api.objects["jobs"].get("r", {"status": 1}))


def test_with_the_jobset_template_a_stage_is_a_jobset_that_waits_for_its_queue(world, config):
    api, cluster, place = world
    (template,) = find(rendered(Installation("gpu", "gke", ("jobset", "kueue"))), "JobSet", "trainer")
    api.put("jobsets", template)
    trained = Trained(cluster, place, "r", config)
    job = api.wait_for("jobsets", "r")
    assert api.objects["jobs"] == {}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] and job["spec"]["suspend"] is True
    (replicated,) = job["spec"]["replicatedJobs"]
    inside = replicated["template"]["spec"]["template"]["spec"]
    assert inside["containers"][0]["args"][-2:] == ["--run", "/etc/trimtab/run/run.yaml"]
    given = api.wait_for("configmaps", "r-run")
    assert given["metadata"]["ownerReferences"][0]["kind"] == "JobSet"
    until(lambda: any("suspended" in text for text in trained.waits))
    api.put("jobsets", job | {"spec": job["spec"] | {"suspend": False}})
    of_set = {"jobset.sigs.k8s.io/jobset-name": "r"}
    names = [pod(api, "r-rank-0", 1, "Running", rank=rank, labels=of_set) for rank in (0, 1)]
    say(api, names[1], line(1, event="step", step=9, total_steps=9, loss=9.0))
    say(api, names[0], line(1, event="step", step=1, total_steps=1, loss=1.5))
    until(lambda: trained.said == ["step 1/1 loss=1.5"])
    version = publish(place, "r")
    for rank in (0, 1):
        pod(api, "r-rank-0", 1, "Succeeded", rank=rank, labels=of_set)
    api.status("jobsets", "r", conditions=[{"type": "Completed", "status": "True"}])
    assert trained.end().error is None and trained.result.published == (version,)
    assert set(api.objects["jobsets"]) == {"trainer"}, "the template stays"


def test_another_run_of_the_same_name_is_refused(world, config):
    _, cluster, _ = world
    jobs = TrainingJobs(cluster)
    jobs.ensure(RunFile.of("r", "sft", config), {})
    config.epochs = 7
    with pytest.raises(ClusterError, match="another run of the name r"):
        jobs.ensure(RunFile.of("r", "sft", config), {})


def test_an_api_server_that_is_away_is_waited_for_and_a_refusal_is_told(world, config):
    api, cluster, _ = world
    jobs = TrainingJobs(cluster)
    api.refusals = [503, 429, 500]
    assert jobs.read("r") is None
    api.refusals = [403]
    with pytest.raises(ClusterError, match="403"):
        jobs.read("r")


def roll(api, name, replicas, *, ready=True, network="10.0.0"):
    """What the Deployment's controller would do."""
    one = api.objects["deployments"][name]
    for held in [p for p in list(api.objects["pods"]) if p.startswith(f"{name}-")]:
        api.remove("pods", held)
    for number in range(replicas):
        status = {"phase": "Running", "podIP": f"{network}.{number + 1}"}
        status["conditions"] = [{"type": "Ready", "status": "True" if ready else "False"}]
        meta = {"name": f"{name}-{number}", "labels": {"app.kubernetes.io/name": name}}
        api.put("pods", {"metadata": meta, "spec": {}, "status": status})
    counts = dict.fromkeys(("updatedReplicas", "replicas", "availableReplicas"), replicas)
    api.status("deployments", name, observedGeneration=one["metadata"].get("generation", 0), **counts)


def test_a_generator_lends_its_gpus_and_gets_them_back_whoever_died(world):
    api, cluster, _ = world
    waits = []
    roll(api, "generator", 2)
    inside = threading.Event()
    leave = threading.Event()

    def borrow():
        with ModelServices(cluster, waits.append).lent(["generator"]):
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=borrow, daemon=True)
    thread.start()
    until(lambda: api.objects["deployments"]["generator"]["spec"]["replicas"] == 0)
    assert api.objects["deployments"]["generator"]["metadata"]["annotations"][BEFORE] == "2"
    assert not inside.wait(0.3), "pods still hold their GPUs"
    roll(api, "generator", 0)
    assert inside.wait(20)
    # The launcher dies here; its next life finds the note and gives back what was there before.
    ModelServices(cluster, waits.append).give_back("generator", wait=False)
    assert api.objects["deployments"]["generator"]["spec"]["replicas"] == 2
    assert BEFORE not in api.objects["deployments"]["generator"]["metadata"]["annotations"]
    roll(api, "generator", 2)
    leave.set()
    thread.join(20)
    assert not thread.is_alive()


class Replica(model_pb2_grpc.ModelServiceServicer):
    """A generator pod's LoadVersion, on an address of loopback."""

    def __init__(self, address):
        self.loaded = []
        self.server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, self.server)
        self.server.add_insecure_port(address)
        self.server.start()

    def LoadVersion(self, request, context):
        self.loaded.append(ModelVersion.from_proto(request.version))
        return model_pb2.LoadVersionResponse(model=model_pb2.ModelInfo(version=request.version))


def test_a_model_is_put_before_all_replicas_and_each_is_told_to_serve_it(world, monkeypatch):
    api, cluster, place = world
    (port,) = free_ports(1)
    monkeypatch.setitem(kubernetes_rounds.PORTS, "generator", port)
    replicas = [Replica(f"127.0.3.{number}:{port}") for number in (1, 2)]
    waits, found = [], []
    services = KubernetesRoundServices(cluster, place, gold=lambda s: "", waiting=waits.append, say=lambda text: None)
    version = ModelVersion("stories", "policy", 3, "blake3:x")
    thread = threading.Thread(target=lambda: found.append(services.generator(version)), daemon=True)
    thread.start()

    def served():
        (container,) = api.objects["deployments"]["generator"]["spec"]["template"]["spec"]["containers"]
        return next(one for one in container["env"] if one["name"] == "TRIMTAB_MODEL")

    until(lambda: served() == {"name": "TRIMTAB_MODEL", "value": "version:stories/policy@3"})
    until(lambda: "generator: 0 of 2 replicas ready" in waits)
    assert found == []
    roll(api, "generator", 2, network="127.0.3")
    thread.join(20)
    assert found == [f"127.0.3.1:{port},127.0.3.2:{port}"]
    # A pod that PPO had moved on while it ran serves the wanted version again, though its Deployment did not change.
    assert services.generator(version) == found[0]
    assert [replica.loaded for replica in replicas] == [[version, version]] * 2
    for replica in replicas:
        replica.server.stop(None)


def test_a_run_calls_services_by_name_for_their_pods_come_and_go(world, tmp_path):
    _, cluster, place = world
    (tmp_path / "prompts.jsonl").write_text("{}")
    services = KubernetesRoundServices(cluster, place, gold=lambda s: "", waiting=print, say=print)
    config = trainer_pb2.PpoConfig(prompts=str(tmp_path / "prompts.jsonl"))
    config.generator_address, config.reward_address = "10.0.0.1:7101,10.0.0.2:7101", "10.0.0.3:7102"
    reachable = services._reachable("ppo", config)
    assert reachable.generator_address == "dns:///generator.trimtab.svc:7101"
    assert reachable.reward_address == "dns:///reward.trimtab.svc:7102"
    assert reachable.reference_address == ""
    config.generator_address = "10.0.0.9:7101"
    again = services._reachable("ppo", config)
    assert run_digest(RunFile.of("r", "ppo", again)) == run_digest(RunFile.of("r", "ppo", reachable))


def test_names_of_jobs_are_names_that_kubernetes_takes():
    assert job_name("stories-r1-ppo") == "stories-r1-ppo"
    assert job_name("a_b") != job_name("a-b")
    long = "Stories_With.A-very-long-name-of-a-recipe-r12-reward-attempt2"
    for run_id in (long, "a" * 41, "a" * 60, "2026-11-stories", "-x", "_", "Ä"):
        pod_of_a_jobset = f"{job_name(run_id)}-rank-0-999-abcde"
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", pod_of_a_jobset) and len(pod_of_a_jobset) <= 63, run_id
