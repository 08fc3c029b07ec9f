"""`trimtab deploy` against a real API server, with real controllers."""

import json

import pytest
from typer.testing import CliRunner

from tests.k8s.stand_in_nodes import StandInNodes
from tests.unit.k8s.node_profiles import Node
from trimtab.cli.main import app

SMALL = {"cpu": 4.0, "memory": float(16 * 2**30), "ephemeral-storage": float(100 * 2**30), "pods": 110.0}


def deploy(*arguments):
    result = CliRunner().invoke(app, ["deploy", *arguments], env={"COLUMNS": "160"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_dev_comes_up_on_one_small_node_and_a_second_time_changes_nothing(run, controllers, kubeconfig):
    with StandInNodes(kubeconfig, [Node("small-0", {}, (), SMALL)]):
        code, said = deploy("dev", "--yes", "--timeout", "300")
        assert code == 0 and "7 workloads are up" in said, said
        found = json.loads(run("-n", "trimtab", "get", "deployments", "-o", "json").stdout)["items"]
        assert all(one["status"]["availableReplicas"] == one["spec"]["replicas"] == 1 for one in found)
        code, said = deploy("dev", "--diff")
        assert code == 0 and "nothing changes" in said, said


def test_check_names_what_the_cluster_lacks(run, namespace, kinds, kubeconfig):
    code, said = deploy("gpu", "--nodes", "gke", "--with", "postgres", "--check")
    assert code == 1 and "no Secret postgres" in said, said
    if "JobSet.jobset.x-k8s.io" not in kinds:
        code, said = deploy("gpu", "--with", "jobset", "--check")
        assert code == 1 and "install JobSet" in said


def test_a_field_that_another_owns_is_told_and_taken_by_force(run, controllers, kubeconfig):
    with StandInNodes(kubeconfig, [Node("small-0", {}, (), SMALL)]):
        deploy("dev", "--yes", "--timeout", "300")
        env = [{"name": "TRIMTAB_MODEL", "value": "version:a/b@1"}]
        patch = {"spec": {"template": {"spec": {"containers": [{"name": "trimtab", "env": env}]}}}}
        run("-n", "trimtab", "patch", "deployment", "reward", "-p", json.dumps(patch), "--field-manager=rounds")
        with pytest.raises(Exception, match="--force takes the field over"):
            deploy("dev", "--yes")
        code, said = deploy("dev", "--yes", "--force", "--timeout", "300")
        assert code == 0, said
        code, said = deploy("dev", "--diff")
        assert "nothing changes" in said
