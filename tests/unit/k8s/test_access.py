"""What the pods may do at the Kubernetes API: rounds what their launcher does, the others nothing."""

import pytest

from tests.unit.k8s.manifests import installations, label, rendered
from trimtab.deploy.render import find

FORBIDDEN = {"secrets", "pods/exec", "pods/attach", "roles", "rolebindings", "serviceaccounts", "nodes", "*"}


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_one_role_for_one_account_in_this_namespace(installation):
    objects = rendered(installation)
    (role,) = find(objects, "Role")
    (binding,) = find(objects, "RoleBinding")
    assert not find(objects, "ClusterRole") and not find(objects, "ClusterRoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"] == "rounds"
    assert [(s["kind"], s["name"], s["namespace"]) for s in binding["subjects"]] == [
        ("ServiceAccount", "rounds", "trimtab")
    ]


@pytest.mark.parametrize("installation", installations(), ids=label)
def test_the_role_holds_no_wildcard_and_nothing_that_opens_more(installation):
    (role,) = find(rendered(installation), "Role")
    for rule in role["rules"]:
        assert not FORBIDDEN & set(rule["resources"])
        assert not {"*", "escalate", "bind", "impersonate", "deletecollection"} & set(rule["verbs"])
        assert "*" not in rule["apiGroups"]
        if set(rule["resources"]) & {"deployments", "cronjobs"}:
            assert set(rule["resourceNames"]) <= {"generator", "reward", "reference", "trainer"}
