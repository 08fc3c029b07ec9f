"""Every overlay with every node pool renders by kubectl alone, and keeps to three minor versions of Kubernetes."""

from functools import cache

import kubernetes_validate
import pytest

from tests.unit.k8s.manifests import MANIFESTS, installations, label, rendered
from trimtab.deploy.render import Installation, RenderError, find, image_entry, render

MINORS = ("1.34", "1.36", "1.37")
OWN_KINDS = {"batch", "apps", "policy", "networking.k8s.io", "rbac.authorization.k8s.io", "scheduling.k8s.io"}
OWN_KINDS |= {"autoscaling", "v1"}
CUSTOM = {"JobSet", "Certificate", "Issuer", "Gateway", "HTTPRoute", "GRPCRoute", "BackendTLSPolicy"}
CUSTOM |= {"ResourceFlavor", "ClusterQueue", "LocalQueue", "PodMonitor", "PrometheusRule"}


def built_in(one):
    return one["apiVersion"].partition("/")[0] in OWN_KINDS


@pytest.fixture(autouse=True)
def schemas_are_read_once(monkeypatch):
    """The validator reads its definitions, 1.6 MB, anew for every object."""
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", schema_contents)


schema_contents = cache(kubernetes_validate.utils.schema_contents)


@pytest.mark.parametrize("minor", MINORS)
def test_every_object_keeps_to_the_strict_schema(minor):
    version = next(v for v in kubernetes_validate.utils.all_versions() if v.startswith(f"{minor}."))
    seen = set()
    for installation in installations():
        for one in rendered(installation):
            if built_in(one) and repr(one) not in seen:
                seen.add(repr(one))
                kubernetes_validate.validate(one, version, strict=True)
    assert len(seen) > 100


def test_a_misspelt_field_is_refused_by_the_strict_schema():
    deployment = dict(find(rendered(installations()[0]), "Deployment", "reward")[0])
    deployment["spec"] = deployment["spec"] | {"replica": 2}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.36", strict=True)


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_no_object_is_there_twice_and_kinds_are_known(installation):
    objects = rendered(installation)
    names = [(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names))
    assert {one["kind"] for one in objects if not built_in(one)} <= CUSTOM
    if not installation.components:
        assert all(built_in(one) for one in objects), "an overlay alone needs nothing but Kubernetes"


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_everything_lies_in_one_namespace_that_enforces_restricted(installation):
    objects = rendered(installation)
    (namespace,) = find(objects, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    cluster_wide = {"Namespace", "PriorityClass", "ClusterQueue", "ResourceFlavor"}
    for one in objects:
        expected = None if one["kind"] in cluster_wide else "trimtab"
        assert one["metadata"].get("namespace") == expected, one["metadata"]["name"]


def test_images_are_set_by_digest():
    digest = "sha256:" + "a" * 64
    images = (f"trimtab/model-server=registry.example/trimtab/model-server@{digest}",)
    objects = render(Installation("gpu", "gke", ("jobset",), images), MANIFESTS)
    (reward,) = find(objects, "Deployment", "reward")
    image = reward["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == f"registry.example/trimtab/model-server@{digest}"


def test_an_unknown_component_overlay_or_image_is_refused_by_name():
    with pytest.raises(RenderError, match=r"no component 'jobsets'; there are .*jobset"):
        render(Installation("gpu", components=("jobsets",)), MANIFESTS)
    with pytest.raises(RenderError, match=r"no overlay 'prod': give one of dev, gpu"):
        render(Installation("prod"), MANIFESTS)
    with pytest.raises(RenderError, match="write NAME=REGISTRY"):
        image_entry("trimtab/web")
