"""A pod comes up when it can serve, goes without losing a call, and a rollout never waits for a GPU that it holds."""

import re

import pytest

from tests.unit.k8s.manifests import installations, label, matches, pods, rendered
from trimtab.deploy.render import find, pod_template
from trimtab_client.channel import LOOKUP_S

# How long a cluster's caches tell an address after it is gone (CoreDNS's default).
DNS_S = 30
MARGIN_S = 10
HTTP_ONLY = {"labeling", "store", "postgres"}


def every_pod(*kinds):
    return [
        pytest.param(i, pod, id=f"{label(i)}-{pod.owner}")
        for i in installations()
        for pod in pods(rendered(i))
        if not kinds or pod.kind in kinds
    ]


def settings_of(installation, pod):
    import yaml

    names = [v["configMap"]["name"] for v in pod.spec["volumes"] if "configMap" in v]
    maps = [one for one in find(rendered(installation), "ConfigMap") if one["metadata"]["name"] in names]
    return yaml.safe_load(next(iter(maps[0]["data"].values()))) if maps else {}


@pytest.mark.parametrize(("installation", "pod"), every_pod("Deployment", "StatefulSet"))
def test_every_server_has_three_probes_and_no_initial_delay(installation, pod):
    (one,) = pod.spec["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert "initialDelaySeconds" not in one[probe]
        if pod.name not in HTTP_ONLY:
            service = probe.removesuffix("Probe")
            health = next(port for port in one["ports"] if port["name"] == "health")
            assert one[probe]["grpc"] == {"port": health["containerPort"], "service": service}
            assert health["containerPort"] == settings_of(installation, pod)["health_port"]


@pytest.mark.parametrize(("installation", "pod"), every_pod("Deployment"))
def test_startup_is_long_enough_for_a_model_and_liveness_patient(installation, pod):
    (one,) = pod.spec["containers"]
    startup = one["startupProbe"].get("periodSeconds", 10) * one["startupProbe"]["failureThreshold"]
    if "trimtab.dev/pool" in pod.labels:
        assert startup >= 1800
        assert pod.name == "trainer" or pod.workload["spec"]["progressDeadlineSeconds"] > startup
    patience = one["livenessProbe"]["periodSeconds"] * one["livenessProbe"].get("failureThreshold", 3)
    assert patience >= 45


@pytest.mark.parametrize(("installation", "pod"), every_pod("Deployment"))
def test_grace_is_more_than_pre_stop_and_drain(installation, pod):
    (one,) = pod.spec["containers"]
    sleep = one.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    drain = settings_of(installation, pod).get("grace_s", 0)
    assert pod.spec["terminationGracePeriodSeconds"] >= sleep + drain + MARGIN_S
    if pod.name in ("generator", "reward", "reference", "gateway"):
        age = 1.1 * settings_of(installation, pod)["connection_age_s"]  # gRPC ends one within a tenth of its age
        assert sleep > DNS_S + age + LOOKUP_S, "clients would still call an address that no longer listens"


@pytest.mark.parametrize(("installation", "pod"), every_pod("Deployment"))
def test_a_rollout_of_gpu_pods_frees_a_gpu_before_it_asks_for_one(installation, pod):
    if any("nvidia.com/gpu" in one["resources"]["limits"] for one in pod.containers):
        assert pod.workload["spec"]["strategy"] == {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
        }


def test_gpu_overlay_gives_each_model_server_and_trainer_a_gpu_and_the_edge_none():
    (installation,) = [i for i in installations() if label(i) == "gpu"]
    with_gpu = {
        pod.name for pod in pods(rendered(installation)) if "nvidia.com/gpu" in pod.containers[0]["resources"]["limits"]
    }
    assert with_gpu == {"generator", "reward", "reference", "trainer"}


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_budgets_stand_only_before_several_replicas_and_let_one_go(installation):
    objects = rendered(installation)
    budgets = find(objects, "PodDisruptionBudget")
    scaled = {one["spec"]["scaleTargetRef"]["name"]: one["spec"] for one in find(objects, "HorizontalPodAutoscaler")}
    for budget in budgets:
        assert budget["spec"]["maxUnavailable"] == 1
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        (pod,) = [p for p in pods(objects) if p.kind != "CronJob" and matches(budget["spec"]["selector"], p.labels)]
        least = scaled[pod.name]["minReplicas"] if pod.name in scaled else pod.replicas
        assert least > 1, pod.owner
    covered = {budget["metadata"]["name"] for budget in budgets}
    for pod in pods(objects):
        if pod.kind == "Deployment" and pod.replicas > 1:
            assert pod.name in covered


@pytest.mark.parametrize(("installation", "pod"), every_pod("Deployment"))
def test_replicas_spread_over_zones_and_each_rollout_is_spread_by_itself(installation, pod):
    if pod.replicas > 1:
        constraints = pod.spec["topologySpreadConstraints"]
        assert "topology.kubernetes.io/zone" in {one["topologyKey"] for one in constraints}
        for one in constraints:
            assert one["matchLabelKeys"] == ["pod-template-hash"]
            assert matches(one["labelSelector"], pod.labels)


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_a_scaled_deployment_states_no_replicas_of_its_own(installation):
    objects = rendered(installation)
    for scaler in find(objects, "HorizontalPodAutoscaler"):
        (target,) = find(objects, "Deployment", scaler["spec"]["scaleTargetRef"]["name"])
        assert "replicas" not in target["spec"]
        assert scaler["spec"]["metrics"][0]["external"]["metric"]["name"] == "trimtab_queue_depth"


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_a_run_that_is_evicted_is_replaced_and_one_with_wrong_settings_is_not(installation):
    for kind in ("CronJob", "JobSet"):
        for one in find(rendered(installation), kind, "trainer"):
            assert one["spec"]["suspend"] is True, "a template makes no pods by itself"
            inner = one["spec"]
            job = inner["jobTemplate"]["spec"] if kind == "CronJob" else inner["replicatedJobs"][0]["template"]["spec"]
            rules = job["podFailurePolicy"]["rules"]
            disruption = next(rule for rule in rules if "onPodConditions" in rule)
            assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            template = pod_template(one)
            assert template is not None
            assert template["spec"]["restartPolicy"] == "Never"
            assert job["podReplacementPolicy"] == "Failed"
            if kind == "CronJob":
                assert disruption["action"] == "Ignore"
                assert next(rule for rule in rules if "onExitCodes" in rule)["onExitCodes"]["values"] == [42]
            else:
                assert disruption["action"] == "FailJob"
                (rule,) = inner["failurePolicy"]["rules"]
                assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
                assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]), (
                    "JobSet's webhook refuses it"
                )
                assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_runs_carry_the_queue_of_kueue():
    (installation,) = [i for i in installations() if label(i) == "gpu-gke-everything"]
    objects = rendered(installation)
    (queue,) = find(objects, "LocalQueue")
    (template,) = find(objects, "CronJob", "trainer")
    job = template["spec"]["jobTemplate"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    assert job["spec"]["suspend"] is True
    (set_of_jobs,) = find(objects, "JobSet", "trainer")
    assert set_of_jobs["metadata"]["annotations"]["trimtab.dev/queue-name"] == queue["metadata"]["name"]
