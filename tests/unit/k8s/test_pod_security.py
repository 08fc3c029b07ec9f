"""Every pod keeps to the Pod Security level "restricted", and to what trimtab asks beyond it."""

import re

import pytest

from tests.unit.k8s.manifests import OURS, Pod, installations, label, pods, rendered
from trimtab.deploy.render import find

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SECRET_WORDS = re.compile(r"password|secret|token|access_key", re.IGNORECASE)
POSTGRES_UID = 70


def every_pod():
    return [pytest.param(i, pod, id=f"{label(i)}-{pod.owner}") for i in installations() for pod in pods(rendered(i))]


def violations(pod: Pod) -> list[str]:
    """What Pod Security "restricted" would refuse (kubernetes.io/docs/concepts/security/pod-security-standards)."""
    spec, found = pod.spec, []
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            found.append(field)
    for volume in spec.get("volumes", []):
        kinds = set(volume) - {"name"}
        if not kinds <= VOLUMES:
            found.append(f"volume {volume['name']}: {kinds}")
    of_pod = spec.get("securityContext", {})
    for one in pod.containers:
        own = one.get("securityContext", {})
        if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
            found.append(f"{one['name']}: allowPrivilegeEscalation")
        if "ALL" not in own.get("capabilities", {}).get("drop", []):
            found.append(f"{one['name']}: capabilities")
        if own.get("capabilities", {}).get("add", []):
            found.append(f"{one['name']}: added capabilities")
        if not own.get("runAsNonRoot", of_pod.get("runAsNonRoot")):
            found.append(f"{one['name']}: runAsNonRoot")
        if own.get("runAsUser", of_pod.get("runAsUser")) in (None, 0):
            found.append(f"{one['name']}: runAsUser")
        profile = own.get("seccompProfile", of_pod.get("seccompProfile", {})).get("type")
        if profile not in ("RuntimeDefault", "Localhost"):
            found.append(f"{one['name']}: seccompProfile")
        if any("hostPort" in port for port in one.get("ports", [])):
            found.append(f"{one['name']}: hostPort")
    return found


@pytest.mark.parametrize(("installation", "pod"), every_pod())
def test_a_pod_is_restricted(installation, pod):
    assert violations(pod) == []


def test_a_pod_that_is_not_restricted_is_seen():
    bare = Pod("Pod/x", "Pod", "x", "trimtab", 1, {}, {"containers": [{"name": "c"}], "hostNetwork": True}, {})
    assert len(violations(bare)) == 6


@pytest.mark.parametrize(("installation", "pod"), every_pod())
def test_root_is_read_only_and_what_is_written_to_lies_on_volumes(installation, pod):
    for one in pod.containers:
        assert one["securityContext"]["readOnlyRootFilesystem"] is True
        mounts = {mount["mountPath"]: mount for mount in one["volumeMounts"]}
        assert "/tmp" in mounts
        if one["name"] != "trimtab":
            continue
        writable = [path for path, mount in mounts.items() if not mount.get("readOnly")]
        for variable in one["env"]:
            if variable["name"] in ("HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
                assert any(variable["value"].startswith(path) for path in writable), variable
        assert all(mounts[path].get("readOnly") for path in mounts if path.startswith("/etc/"))


@pytest.mark.parametrize(("installation", "pod"), every_pod())
def test_ours_run_as_the_user_of_the_image(installation, pod):
    expected = POSTGRES_UID if pod.name == "postgres" else 10001
    assert pod.spec["securityContext"]["runAsUser"] == pod.spec["securityContext"]["fsGroup"] == expected


@pytest.mark.parametrize(("installation", "pod"), every_pod())
def test_only_rounds_holds_a_token_of_the_cluster(installation, pod):
    objects = rendered(installation)
    (account,) = find(objects, "ServiceAccount", pod.spec["serviceAccountName"])
    assert account["automountServiceAccountToken"] is False
    assert pod.spec["automountServiceAccountToken"] is (pod.name == "rounds")
    assert pod.spec["enableServiceLinks"] is False


@pytest.mark.parametrize(("installation", "pod"), every_pod())
def test_no_secret_is_in_the_environment(installation, pod):
    for one in pod.containers:
        assert all("secretRef" not in source for source in one.get("envFrom", []))
        for variable in one.get("env", []):
            assert "secretKeyRef" not in variable.get("valueFrom", {}), variable
            value = variable.get("value", "/")
            if SECRET_WORDS.search(variable["name"]):
                assert value.startswith("/"), f"{variable} is not a path"


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_only_dev_brings_a_secret_of_its_own(installation):
    names = [one["metadata"]["name"] for one in find(rendered(installation), "Secret")]
    assert names == (["store"] if installation.overlay == "dev" else [])


@pytest.mark.parametrize(("installation", "pod"), every_pod())
def test_images_of_others_are_pinned_by_digest_and_ours_are_known_names(installation, pod):
    for one in pod.containers:
        assert one["image"] in OURS or re.search(r":[\w.-]+@sha256:[0-9a-f]{64}$", one["image"]), one["image"]


@pytest.mark.parametrize(("installation", "pod"), every_pod())
def test_requests_and_limits_are_set_for_all(installation, pod):
    for one in pod.containers:
        for kind in ("requests", "limits"):
            assert {"cpu", "memory", "ephemeral-storage"} <= set(one["resources"][kind]), one["name"]
    assert pod.spec["priorityClassName"] in {
        found["metadata"]["name"] for found in find(rendered(installation), "PriorityClass")
    }


@pytest.mark.parametrize(("installation", "pod"), every_pod())
def test_an_image_that_a_node_was_given_is_not_asked_for_again(installation, pod):
    """Without a tag the default is "Always": nodes that were handed the images would still look for a registry."""
    for one in pod.containers:
        assert one["image"] not in OURS or one["imagePullPolicy"] == "IfNotPresent"
