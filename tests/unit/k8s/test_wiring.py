"""What one object says of another is so: selectors, ports, names of ConfigMaps, Secrets, claims and accounts."""

import json
from fnmatch import fnmatchcase

import pytest

from tests.unit.k8s.manifests import installations, label, matches, pods, rendered
from trimtab.deploy.render import find

GIVEN_FROM_OUTSIDE = {"store", "postgres", "rounds-recipe"}


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_services_select_pods_and_name_ports_that_these_have(installation):
    objects = rendered(installation)
    for service in find(objects, "Service"):
        chosen = [pod for pod in pods(objects) if matches({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        assert chosen, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            for pod in chosen:
                named = {p["name"]: p["containerPort"] for c in pod.containers for p in c.get("ports", [])}
                assert named[port["targetPort"]] == port["port"]


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_workloads_select_their_own_pods_and_no_others(installation):
    everyone = pods(rendered(installation))
    for pod in everyone:
        selector = pod.workload["spec"].get("selector")
        if selector:
            chosen = {other.owner for other in everyone if matches(selector, other.labels) and other.kind == pod.kind}
            assert chosen == {pod.owner}


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_every_name_that_a_pod_mentions_is_there(installation):
    objects = rendered(installation)
    maps = {one["metadata"]["name"]: one.get("data", {}) for one in find(objects, "ConfigMap")}
    secrets = {one["metadata"]["name"] for one in find(objects, "Secret")}
    secrets |= {one["spec"]["secretName"] for one in find(objects, "Certificate")}
    claims = {one["metadata"]["name"] for one in find(objects, "PersistentVolumeClaim")}
    for pod in pods(objects):
        assert find(objects, "ServiceAccount", pod.spec["serviceAccountName"]), pod.owner
        for volume in pod.spec["volumes"]:
            if "configMap" in volume and volume["configMap"]["name"] not in GIVEN_FROM_OUTSIDE:
                assert volume["configMap"]["name"] in maps, (pod.owner, volume)
            if "secret" in volume and not volume["secret"].get("optional"):
                assert volume["secret"]["secretName"] in secrets | GIVEN_FROM_OUTSIDE, (pod.owner, volume)
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims, pod.owner
        named = {volume["name"] for volume in pod.spec["volumes"]}
        named |= {claim["metadata"]["name"] for claim in pod.workload["spec"].get("volumeClaimTemplates", [])}
        for one in pod.containers:
            assert {mount["name"] for mount in one["volumeMounts"]} <= named
            for variable in one.get("env", []):
                reference = variable.get("valueFrom", {}).get("configMapKeyRef")
                if reference:
                    assert reference["key"] in maps[reference["name"]], (pod.owner, variable)


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_every_claim_is_mounted_by_someone(installation):
    objects = rendered(installation)
    mounted = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods(objects)
        for volume in pod.spec["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert {one["metadata"]["name"] for one in find(objects, "PersistentVolumeClaim")} == mounted


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_routes_lead_to_ports_of_services_that_are_there(installation):
    objects = rendered(installation)
    for kind in ("HTTPRoute", "GRPCRoute"):
        for route in find(objects, kind):
            for reference in [ref for rule in route["spec"]["rules"] for ref in rule["backendRefs"]]:
                (service,) = find(objects, "Service", reference["name"])
                assert reference["port"] in {port["port"] for port in service["spec"]["ports"]}
                assert find(objects, "BackendTLSPolicy", route["metadata"]["name"])
    for route in find(objects, "HTTPRoute", "gateway"):
        streaming = route["spec"]["rules"][0]
        assert streaming["timeouts"] == {"request": "0s", "backendRequest": "0s"}


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_the_ingress_shows_reward_a_certificate_that_opens_nothing_and_callers_show_keys(installation):
    objects = rendered(installation)
    for gateway in find(objects, "Gateway"):
        shown = gateway["spec"]["tls"]["backend"]["clientCertificateRef"]["name"]
        (certificate,) = [one for one in find(objects, "Certificate") if one["spec"]["secretName"] == shown]
        assert certificate["spec"]["usages"] == ["client auth"]
        (settings,) = [one for one in find(objects, "ConfigMap") if "callers" in one["data"]]
        patterns = json.loads(settings["data"]["callers"])["certificates"]
        assert not any(fnmatchcase(name, p) for name in certificate["spec"]["dnsNames"] for p in patterns)
        (reward,) = [pod for pod in pods(objects) if pod.owner == "Deployment/reward"]
        variables = {one["name"]: one.get("value") for one in reward.containers[0]["env"]}
        mounts = {one["mountPath"]: one["name"] for one in reward.containers[0]["volumeMounts"]}
        assert variables["TRIMTAB_AUTH__KEYS_FILE"].rpartition("/")[0] in mounts


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_certificates_name_the_services_that_carry_them(installation):
    objects = rendered(installation)
    wanted = {
        volume["secret"]["secretName"]
        for pod in pods(objects)
        for volume in pod.spec["volumes"]
        if "secret" in volume and volume["secret"]["secretName"].endswith("-tls")
    }
    if not find(objects, "Certificate"):
        return
    for secret in wanted:
        (certificate,) = [one for one in find(objects, "Certificate") if one["spec"]["secretName"] == secret]
        service = secret.removesuffix("-tls")
        assert {service, f"{service}.trimtab.svc", f"{service}.trimtab.svc.cluster.local"} <= set(
            certificate["spec"]["dnsNames"]
        )


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_the_pods_of_all_owners_are_hardened_alike(installation):
    ours = [pod for pod in pods(rendered(installation)) if pod.spec["containers"][0]["name"] == "trimtab"]
    first = next(pod for pod in ours if pod.name == "reward")
    for pod in ours:
        own, model = pod.spec["containers"][0], first.spec["containers"][0]
        assert pod.spec["securityContext"] == first.spec["securityContext"]
        assert own["securityContext"] == model["securityContext"]
        homes = [one for one in model["env"] if "value" in one and not one["name"].startswith("TRIMTAB_")]
        assert [variable for variable in homes if variable not in own["env"]] == [], pod.owner


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_the_variable_that_rounds_write_is_stated_as_a_value(installation):
    """Else it has no owner before, no conflict is seen, and value and valueFrom together are refused."""
    for pod in pods(rendered(installation)):
        if pod.name in ("generator", "reward", "reference"):
            (model,) = [one for one in pod.spec["containers"][0]["env"] if one["name"] == "TRIMTAB_MODEL"]
            assert model == {"name": "TRIMTAB_MODEL", "value": "$(DEPLOYED_MODEL)"}
