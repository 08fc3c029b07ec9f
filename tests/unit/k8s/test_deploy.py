"""`trimtab deploy`: what it finds missing in a cluster, and what it prints."""

import json
from dataclasses import replace

import pytest
import yaml
from typer.testing import CliRunner

from tests.unit.k8s.manifests import installations, label, rendered
from tests.unit.k8s.node_profiles import GPU, cluster
from trimtab.cli.main import app
from trimtab.deploy.check import ClusterFacts, check
from trimtab.deploy.objects import _kind_of
from trimtab.deploy.render import find

CORE = {"Namespace", "ServiceAccount", "ConfigMap", "Secret", "Service", "PersistentVolumeClaim"}
SECRETS = {f"{name}-tls" for name in ("generator", "reward", "reference", "trainer", "labeling", "gateway", "rounds")}


def installation(name):
    return next(one for one in installations() if label(one) == name)


def facts(objects, kind="gke", roles=False, **changes):
    kinds = {
        f"{one['kind']}.{one['apiVersion'].partition('/')[0] if '/' in one['apiVersion'] else ''}" for one in objects
    }
    nodes = [
        {
            "metadata": {"labels": node.labels},
            "spec": {"taints": list(node.taints)},
            "status": {"allocatable": {GPU: str(int(node.capacity.get(GPU, 0)))}},
        }
        for node in cluster(kind, roles=roles)
    ]
    default = {"storageclass.kubernetes.io/is-default-class": "true"}
    classes = [{"metadata": {"name": "standard", "annotations": default}}]
    kinds |= {"ExternalMetricValueList.external.metrics.k8s.io"}
    whole = ClusterFacts((1, 36), frozenset(kinds), nodes, classes, frozenset(SECRETS | {"store", "gateway-keys"}))
    return replace(whole, **changes)


@pytest.mark.parametrize("kind", ["gke", "aks", "on-prem"])
def test_a_cluster_that_has_all_lacks_nothing(kind):
    objects = rendered(installation(f"gpu-{kind}"))
    (unpinned,) = check(objects, facts(objects, kind, roles=True))
    assert unpinned.text.startswith("no registry and digest for trimtab/generator, trimtab/model-server, trimtab/")
    assert not unpinned.fatal
    text = json.dumps(objects).replace('"image": "trimtab/', '"image": "registry.example/trimtab/')
    assert check(json.loads(text), facts(objects, kind, roles=True)) == []


def test_what_is_missing_is_named_with_what_to_do():
    objects = rendered(installation("gpu-gke-everything"))
    here = facts(objects)
    kinds = frozenset(kind for kind in here.kinds if "." + kind.partition(".")[2] in (".", ".apps", ".batch"))
    bare = replace(here, version=(1, 27), kinds=kinds, storage_classes=[], secrets=frozenset())
    text = "\n".join(finding.text for finding in check(objects, bare))
    assert "Kubernetes 1.27 is too old: 1.30 or newer" in text
    assert "no kind JobSet: install JobSet (https://jobset.sigs.k8s.io)" in text
    assert "no kind Certificate, Issuer: install cert-manager" in text
    assert "install Kueue" in text and "install Gateway API" in text
    assert "PersistentVolumeClaim/trainer: no default StorageClass" in text
    assert "Deployment/labeling: no Secret postgres" in text
    assert "generator-tls" not in text, "cert-manager's certificates will make it"


def test_a_disk_for_one_node_is_no_place_for_a_run_on_several():
    objects = rendered(installation("gpu-gke-everything"))
    default = {"storageclass.kubernetes.io/is-default-class": "true"}
    disk = {"metadata": {"name": "gp3", "annotations": default}, "provisioner": "ebs.csi.aws.com"}
    files = {"metadata": {"name": "files"}, "provisioner": "efs.csi.aws.com"}

    def told(objects, *classes):
        return [one.text for one in check(objects, facts(objects, storage_classes=classes)) if "Volume" in one.text]

    (found,) = told(objects, disk)
    assert found.startswith("PersistentVolumeClaim/trainer-nodes: volumes of StorageClass gp3 (ebs.csi.aws.com) are")
    (claim,) = find(objects, "PersistentVolumeClaim", "trainer-nodes")
    on_files = claim | {"spec": claim["spec"] | {"storageClassName": "files"}}
    own = [on_files if one is claim else one for one in objects]
    assert told(own, disk, files) == []
    assert told(own, disk) == ["PersistentVolumeClaim/trainer-nodes: no StorageClass files"]


def test_gpu_nodes_that_do_not_fit_are_told_apart():
    objects = rendered(installation("gpu-gke"))
    other = [one.text for one in check(objects, facts(objects, "aks"))]
    assert any("Deployment/reward: GPU nodes are there, but none has the labels" in text for text in other)
    bare = rendered(installation("gpu"))
    tainted = [one.text for one in check(bare, facts(bare, "aks"))]
    assert "Deployment/reward: GPU nodes are tainted sku=gpu:NoSchedule, which it does not tolerate" in tainted
    none = check(bare, replace(facts(bare), nodes=[]))
    assert {one.fatal for one in none} == {False}, "a pool that scales from zero has no node yet"


def test_missing_certificates_are_fatal_and_what_comes_later_is_not():
    objects = rendered(installation("gpu-gke"))
    found = check(objects, facts(objects, secrets=frozenset()))
    fatal = {one.text for one in found if one.fatal}
    assert any("no Secret reward-tls: add --with tls" in text for text in fatal)
    assert not any("gateway-keys" in text or "Secret store" in text for text in fatal)
    dev = rendered(installation("dev"))
    assert [one for one in check(dev, facts(dev, secrets=frozenset())) if one.fatal] == []


def test_render_prints_what_kubectl_would_apply():
    result = CliRunner().invoke(app, ["deploy", "gpu", "--nodes", "eks", "--with", "tls", "--render"])
    assert result.exit_code == 0, result.output
    objects = [one for one in yaml.safe_load_all(result.output) if one]
    assert len(find(objects, "Certificate")) == 9
    assert objects[0]["kind"] == "Namespace"


def test_kinds_are_read_from_kubectls_columns():
    line = "cronjobs    cj    batch/v1    true    CronJob    create,delete    all"
    assert _kind_of(line) == "CronJob.batch"
    assert _kind_of("bindings      v1   true   Binding   create") == "Binding."
