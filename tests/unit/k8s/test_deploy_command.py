"""`trimtab deploy` with the real kubectl against a server that speaks the API: check, diff, apply, wait."""

import pytest
from typer.testing import CliRunner

from tests.unit.k8s.cluster_api import plural, rolled_out, serving_cluster
from tests.unit.k8s.manifests import rendered
from trimtab.cli.errors import is_expected, one_line
from trimtab.cli.main import app
from trimtab.deploy import rollout
from trimtab.deploy.objects import FIELD_MANAGER
from trimtab.deploy.render import Installation

OBJECTS = rendered(Installation("dev"))
CLAIM = "PersistentVolumeClaim"
DEFAULT_CLASS = {"name": "disks", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}
KINDS = {(one["apiVersion"], one["kind"]) for one in OBJECTS}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster that the kubeconfig leads to, whose controllers are quick."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(rollout, "PERIOD_S", 0.1)
    with serving_cluster(tmp_path, KINDS) as (api, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        api.controller = rolled_out
        yield api


def deploy(*arguments, answer=""):
    """(exit code, what a person reads): a failure's one line as the command prints it."""
    result = CliRunner().invoke(app, ["deploy", *arguments], input=answer, env={"COLUMNS": "120"})
    failure = result.exception if isinstance(result.exception, Exception) else None
    assert failure is None or is_expected(failure), failure
    return result.exit_code, result.output + (one_line(failure) if failure else "")


def installed(api):
    """What an earlier `trimtab deploy dev` has left."""
    for one in OBJECTS:
        meta = one["metadata"]
        key = (one["apiVersion"], plural(one["kind"]), meta.get("namespace", ""), meta["name"])
        rolled_out(api.apply(key, one, FIELD_MANAGER, force=False, dry=False))


def pending(api):
    """Pods of reward that no node takes."""
    message = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu."
    conditions = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]
    meta = {"name": "reward-1", "namespace": "trimtab", "labels": {"app.kubernetes.io/name": "reward"}}
    status = {"phase": "Pending", "conditions": conditions}
    api.put({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {}, "status": status})
    api.controller = lambda one: None if one["metadata"]["name"] == "reward" else rolled_out(one)


def test_a_new_cluster_gets_all_and_a_second_time_nothing_changes(cluster):
    code, text = deploy("dev", "--yes")
    assert code == 0, text
    assert "new objects" in text and "serverside-applied" in text and "7 workloads are up" in text
    assert cluster.find("Deployment", "reward")["spec"]["replicas"] == 1
    code, text = deploy("dev", "--yes")
    assert code == 0, text
    assert "nothing changes" in text and "serverside-applied" not in text


def test_what_changes_is_shown_and_not_applied_without_consent(cluster):
    installed(cluster)
    cluster.find("Deployment", "reward")["spec"]["replicas"] = 4
    code, text = deploy("dev", answer="n\n")
    assert code == 1 and "-  replicas: 4" in text and "+  replicas: 1" in text
    assert cluster.find("Deployment", "reward")["spec"]["replicas"] == 4


@pytest.mark.slow
def test_a_field_of_another_owner_is_told_and_taken_only_by_force(cluster):
    installed(cluster)
    key = next(key for key in cluster.objects if key[1] == "deployments" and key[3] == "reward")
    cluster.objects[key]["spec"]["replicas"], cluster.owners[key][".spec.replicas"] = 3, "rounds"
    code, text = deploy("dev", "--yes")
    assert code == 1 and 'conflict with "rounds": .spec.replicas; --force takes the field over' in text
    code, text = deploy("dev", "--yes", "--force")
    assert code == 0, text
    assert cluster.find("Deployment", "reward")["spec"]["replicas"] == 1


def test_what_a_rollout_waits_for_is_told_in_the_schedulers_words(cluster):
    pending(cluster)
    code, text = deploy("dev", "--yes", "--timeout", "1")
    assert code == 1
    assert "Deployment/reward is not up within 1 s: 4 Insufficient nvidia.com/gpu" in text


@pytest.mark.slow
def test_a_template_that_cannot_be_changed_is_made_anew(cluster):
    """A JobSet's spec is immutable: new digests would end every later deploy."""
    cluster.kinds |= {("jobset.x-k8s.io/v1alpha2", "jobsets"): "JobSet", ("v1", plural(CLAIM)): CLAIM}
    cluster.immutable.add("JobSet")
    cluster.put({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": DEFAULT_CLASS})
    arguments = ("dev", "--with", "jobset", "--yes")
    code, text = deploy(*arguments)
    assert code == 0, text
    image = "trimtab/trainer=registry.example/trimtab/trainer@sha256:" + "a" * 64
    code, text = deploy(*arguments, "--image", image)
    assert code == 0 and "JobSet/trainer is made anew" in text, text
    (job,) = cluster.find("JobSet", "trainer")["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["template"]["spec"]["containers"][0]["image"].startswith("registry.example/")
    code, text = deploy(*arguments, "--image", image)
    assert code == 0 and "nothing changes" in text, text


def test_check_lists_what_is_missing_and_fails(cluster):
    assert deploy("dev", "--check")[0] == 0
    code, text = deploy("gpu", "--nodes", "gke", "--with", "tls", "--with", "jobset", "--check")
    assert code == 1
    assert "missing  no kind Certificate, Issuer: install cert-manager" in text
    assert "missing  no kind JobSet" in text
    assert "no default StorageClass" in text
    assert not cluster.objects, "a check changes nothing"


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with serving_cluster(tmp_path, KINDS) as (_, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    code, text = deploy("dev", "--check")
    assert code == 1 and "refused" in text and "\n" not in text.strip()
