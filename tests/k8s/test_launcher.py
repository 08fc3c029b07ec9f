"""The launcher of rounds against real controllers and a real scheduler, as the ServiceAccount that it runs as."""

import json
import threading
import time

import pytest
import yaml
from kubernetes import client, config

from tests.k8s.stand_in_nodes import StandInNodes
from tests.unit.k8s.manifests import rendered
from tests.unit.k8s.node_profiles import Node, cluster
from trimtab.deploy.render import Installation
from trimtab.rounds.launchers.kubernetes import Cluster, ClusterError
from trimtab.rounds.launchers.kubernetes_jobs import TrainingJobs
from trimtab.rounds.launchers.kubernetes_services import BEFORE, ModelServices
from trimtab.rounds.launchers.kubernetes_states import JobState
from trimtab.rounds.launchers.trainer_job import RunFile

RUN = RunFile(run_id="stories-r0-sft", stage="sft", config={"data": "x", "stage": {"model": "m"}})
LABELS = {"trimtab.dev/rounds": "stories"}


@pytest.fixture
def nodes(run, disks, kubeconfig):
    """trimtab on a cluster of one's own whose trainer pool has no node yet."""
    present = [node for node in cluster("on-prem", roles=True) if not node.name.startswith("trainer")]
    with StandInNodes(kubeconfig, present) as stand_in:
        objects = rendered(Installation("gpu", "on-prem"))
        run("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(list(objects)))
        yield stand_in


@pytest.fixture
def as_rounds(run, nodes, kubeconfig):
    return seen_by_rounds(run, kubeconfig)


def seen_by_rounds(run, kubeconfig):
    """The cluster as the pod of rounds sees it: with the token of its account and no more than its Role allows."""
    settings = client.Configuration()
    config.load_kube_config(kubeconfig, client_configuration=settings)
    token = run("-n", "trimtab", "create", "token", "rounds").stdout.strip()
    settings.api_key, settings.api_key_prefix = {"BearerToken": f"Bearer {token}"}, {}
    settings.cert_file = settings.key_file = settings.refresh_api_key_hook = None
    return Cluster.of(settings, "trimtab", patience_s=30.0)


class Followed(threading.Thread):
    """A launcher's life: it makes sure of the run's Job and follows it to its end."""

    def __init__(self, cluster):
        super().__init__(daemon=True)
        self.jobs, self.told, self.ended, self.error = TrainingJobs(cluster, {"TRIED": "1"}), [], None, None
        self.start()

    def run(self):
        try:
            name = self.jobs.ensure(RUN, LABELS)
            self.ended = self.jobs.follow(name, self.told.append, lambda line: None)
        except ClusterError as error:
            self.error = error

    def end(self):
        self.join(120)
        assert not self.is_alive() and self.error is None, (self.error, self.told)
        return self.ended

    def has_told(self, state, detail=""):
        return any(one.state == state and detail in one.detail for one in self.told)


def until(condition, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def trainer_node():
    (one,) = [node for node in cluster("on-prem", roles=True) if node.name == "trainer-0"]
    return one


def running_pods(run, job="stories-r0-sft"):
    page = json.loads(run("-n", "trimtab", "get", "pods", "-l", f"job-name={job}", "-o", "json").stdout)["items"]
    return [pod["metadata"]["name"] for pod in page if pod["status"].get("phase") == "Running"]


def test_a_job_waits_in_the_schedulers_words_then_runs_and_leaves_nothing(run, nodes, as_rounds):
    followed = Followed(as_rounds)
    until(lambda: followed.has_told(JobState.WAITING, "node affinity"))
    nodes.add(trainer_node())
    until(lambda: followed.has_told(JobState.RUNNING))
    (pod,) = running_pods(run)
    spec = json.loads(run("-n", "trimtab", "get", "pod", pod, "-o", "json").stdout)["spec"]
    assert spec["nodeName"] == "trainer-0" and spec["containers"][0]["args"][-2:] == [
        "--run",
        "/etc/trimtab/run/run.yaml",
    ]
    given = json.loads(run("-n", "trimtab", "get", "configmap", "stories-r0-sft-run", "-o", "json").stdout)
    assert given["metadata"]["ownerReferences"][0]["name"] == "stories-r0-sft"
    assert RunFile.model_validate(json.loads(given["data"]["run.yaml"])) == RUN
    nodes.finish(pod, 0)
    assert followed.end().state == JobState.SUCCEEDED
    assert followed.jobs.adopt(RUN, LABELS) == RUN.run_id
    followed.jobs.remove("stories-r0-sft")
    until(lambda: "NotFound" in run("-n", "trimtab", "get", "job", "stories-r0-sft", check=False).stderr)
    until(lambda: "NotFound" in run("-n", "trimtab", "get", "configmap", "stories-r0-sft-run", check=False).stderr)
    assert followed.jobs.adopt(RUN, LABELS) is None


def test_no_gpu_left_is_said_as_the_scheduler_says_it(run, nodes, as_rounds):
    full = trainer_node()
    nodes.add(Node(full.name, full.labels, full.taints, full.capacity | {"nvidia.com/gpu": 0.0}))
    followed = Followed(as_rounds)
    until(lambda: followed.has_told(JobState.WAITING, "1 Insufficient nvidia.com/gpu"))
    followed.jobs.remove("stories-r0-sft")
    followed.join(60)
    assert "removed by someone else" in str(followed.error)


def test_eviction_costs_no_attempt_and_wrong_settings_end_a_job_at_once(run, nodes, as_rounds):
    nodes.add(trainer_node())
    followed = Followed(as_rounds)
    (first,) = until(lambda: running_pods(run))
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": first, "namespace": "trimtab"}}
    run("create", "--raw", f"/api/v1/namespaces/trimtab/pods/{first}/eviction", "-f", "-", stdin=json.dumps(body))
    (second,) = until(lambda: [name for name in running_pods(run) if name != first])
    status = json.loads(run("-n", "trimtab", "get", "job", "stories-r0-sft", "-o", "json").stdout)["status"]
    assert not status.get("failed")
    nodes.finish(second, 42)
    ended = followed.end()
    assert ended.state == JobState.FAILED and "rule at index 1" in ended.detail
    assert followed.jobs.adopt(RUN, LABELS) is None, "a job that failed is not gone on with"


def test_a_launcher_that_died_finds_its_job_and_makes_no_second_one(run, nodes, as_rounds):
    nodes.add(trainer_node())
    Followed(as_rounds)  # nobody asks it any more
    (pod,) = until(lambda: running_pods(run))
    again = Followed(as_rounds)
    until(lambda: again.has_told(JobState.RUNNING))
    assert again.jobs.adopt(RUN, LABELS) == RUN.run_id and running_pods(run) == [pod]
    other = RunFile(run_id=RUN.run_id, stage="sft", config={"data": "other", "stage": {"model": "m"}})
    with pytest.raises(ClusterError, match="is another run of the name"):
        again.jobs.ensure(other, LABELS)
    nodes.finish(pod, 0)
    assert again.end().state == JobState.SUCCEEDED


def test_where_runs_are_jobsets_the_cluster_takes_one_and_it_is_found_and_removed(
    run, controllers, everything, kubeconfig
):
    objects = rendered(Installation("gpu", "on-prem", ("jobset",)))
    run("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(list(objects)))
    jobs = TrainingJobs(seen_by_rounds(run, kubeconfig), {"TRIED": "1"})
    assert jobs.ensure(RUN, LABELS) == jobs.ensure(RUN, LABELS) == "stories-r0-sft"
    made = json.loads(run("-n", "trimtab", "get", "jobset", "stories-r0-sft", "-o", "json").stdout)
    assert made["spec"]["suspend"] is False
    given = json.loads(run("-n", "trimtab", "get", "configmap", "stories-r0-sft-run", "-o", "json").stdout)
    assert given["metadata"]["ownerReferences"][0]["kind"] == "JobSet"
    assert jobs.adopt(RUN, LABELS) == RUN.run_id
    jobs.remove("stories-r0-sft")
    until(lambda: "NotFound" in run("-n", "trimtab", "get", "configmap", "stories-r0-sft-run", check=False).stderr)
    assert jobs.adopt(RUN, LABELS) is None


def test_the_model_services_lend_their_gpus_and_take_them_back(run, nodes, as_rounds):
    waits = []
    services = ModelServices(as_rounds, waits.append)
    services.wait_rolled_out("generator")
    with services.lent(("generator", "reward")):
        assert deployment(run, "generator")["spec"]["replicas"] == 0
        assert of(run, "generator") == of(run, "reward") == [] and len(of(run, "reference")) == 2
    assert deployment(run, "generator")["spec"]["replicas"] == 2
    assert BEFORE not in deployment(run, "generator")["metadata"]["annotations"]
    assert len(services.addresses("reward", 7102).split(",")) == 2


def test_a_version_is_put_before_every_replica(run, nodes, as_rounds):
    services = ModelServices(as_rounds, lambda text: None)
    services.serve(generator="version:stories/policy@3", reference="version:stories/policy@1")
    for name, version in (("generator", "stories/policy@3"), ("reference", "stories/policy@1")):
        for pod in [one for one in of(run, name) if "deletionTimestamp" not in one["metadata"]]:
            (model,) = [one for one in pod["spec"]["containers"][0]["env"] if one["name"] == "TRIMTAB_MODEL"]
            assert model == {"name": "TRIMTAB_MODEL", "value": f"version:{version}"}


def deployment(run, name):
    return json.loads(run("-n", "trimtab", "get", "deployment", name, "-o", "json").stdout)


def of(run, name):
    """A Deployment's pods."""
    selector = f"app.kubernetes.io/name={name}"
    return json.loads(run("-n", "trimtab", "get", "pods", "-l", selector, "-o", "json").stdout)["items"]


def test_the_role_of_rounds_lets_it_do_its_work_and_nothing_else(run, namespace):
    run("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(list(rendered(Installation("dev")))))
    account = "--as=system:serviceaccount:trimtab:rounds"

    def may(*what):
        return run("-n", "trimtab", "auth", "can-i", *what, account, check=False).stdout.strip() == "yes"

    for allowed in (
        ("create", "jobs.batch"),
        ("get", "cronjobs.batch/trainer"),
        ("patch", "deployments.apps/generator"),
    ):
        assert may(*allowed), allowed
    for refused in (("get", "secrets"), ("patch", "deployments.apps/gateway"), ("create", "pods"), ("delete", "nodes")):
        assert not may(*refused), refused
