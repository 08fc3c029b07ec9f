"""The model services of a cluster, from rounds: put a model before one, wait for it, and lend its GPUs to a trainer.

What a Deployment serves is its variable TRIMTAB_MODEL, so a pod that comes later serves the same. How many replicas one
had before its GPUs were lent stands in its annotation: whoever comes after this program's death can give them back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from trimtab.rounds.launchers.kubernetes import Cluster, ClusterError
from trimtab.rounds.launchers.kubernetes_states import is_ready, rollout_waits_for
from trimtab.rounds.launchers.kubernetes_watch import Watched

BEFORE = "trimtab.dev/replicas-before"
MODEL = "TRIMTAB_MODEL"
CONTAINER = "trimtab"

Say = Callable[[str], None]


class ModelServices:
    """The Deployments generator, reward and reference. `waiting` is told what is waited for, "" once it is there."""

    def __init__(self, cluster: Cluster, waiting: Say) -> None:
        self.cluster = cluster
        self._waiting = waiting

    def serve(self, **models: str) -> None:
        """Have each named Deployment serve a model ("version:RUN/NAME@STEP"), all at once; returns when they do."""
        for name, model in models.items():
            self.give_back(name, wait=False)
            env = [{"name": MODEL, "value": model}]
            container = {"name": CONTAINER, "env": env}
            self._patch(name, {"spec": {"template": {"spec": {"containers": [container]}}}})
        for name in models:
            self.wait_rolled_out(name)

    def addresses(self, name: str, port: int) -> str:
        """Every ready replica by its own address: a version is loaded at each, which a name for all cannot say."""
        label = f"app.kubernetes.io/name={name}"
        page = self.cluster.call(self.cluster.core.list_namespaced_pod, self.cluster.namespace, label_selector=label)
        ready = [pod["status"]["podIP"] for pod in page["items"] if is_ready(pod)]
        if not ready:
            raise ClusterError(f"deployment {name} has no ready pod")
        return ",".join(f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in sorted(ready))

    def wait_rolled_out(self, name: str) -> None:
        """Return once every replica is the newest and ready. ClusterError where the rollout stands still."""
        apps, core, changed = self.cluster.apps, self.cluster.core, threading.Event()
        field, label = f"metadata.name={name}", f"app.kubernetes.io/name={name}"
        with ExitStack() as stack:
            mine = stack.enter_context(
                Watched(self.cluster, apps.list_namespaced_deployment, changed, field_selector=field)
            )
            pods = stack.enter_context(Watched(self.cluster, core.list_namespaced_pod, changed, label_selector=label))
            told = None
            while True:
                changed.clear()
                found = mine.now()
                if not found:
                    raise ClusterError(f"deployment {name} is not there: deploy first")
                waits = rollout_waits_for(found[0], pods.now())
                if waits is None:
                    self._waiting("")
                    return
                if waits.startswith("no progress"):
                    raise ClusterError(f"deployment {name}: {waits}")
                if waits != told:
                    told = waits
                    self._waiting(f"{name}: {waits}")
                changed.wait(5.0)

    @contextmanager
    def lent(self, names: Sequence[str]) -> Iterator[None]:
        """Their GPUs free inside the block: no replicas, and again as many as before behind it."""
        for name in names:
            self._lend(name)
        for name in names:
            self.wait_rolled_out(name)
            self._wait_pods_gone(name)
        try:
            yield
        finally:
            for name in names:
                self.give_back(name, wait=False)
        for name in names:
            self.wait_rolled_out(name)

    def give_back(self, name: str, *, wait: bool = True) -> None:
        """Scale a Deployment that was lent to what it had before; any other is left as it is."""
        before = self._read(name)["metadata"].get("annotations", {}).get(BEFORE)
        if before is None:
            return
        self._patch(name, {"metadata": {"annotations": {BEFORE: None}}, "spec": {"replicas": int(before)}})
        if wait:
            self.wait_rolled_out(name)

    def _lend(self, name: str) -> None:
        found = self._read(name)
        if BEFORE in found["metadata"].get("annotations", {}):
            return  # by this program's other life
        replicas = str(found["spec"].get("replicas", 1))
        self._patch(name, {"metadata": {"annotations": {BEFORE: replicas}}, "spec": {"replicas": 0}})

    def _wait_pods_gone(self, name: str) -> None:
        changed = threading.Event()
        label = f"app.kubernetes.io/name={name}"
        lister = self.cluster.core.list_namespaced_pod
        with Watched(self.cluster, lister, changed, label_selector=label) as pods:
            while left := pods.now():
                self._waiting(f"{name}: {len(left)} pods still hold their GPUs")
                changed.clear()
                changed.wait(5.0)
        self._waiting("")

    def _read(self, name: str) -> dict[str, Any]:
        found = self.cluster.find(self.cluster.apps.read_namespaced_deployment, name, self.cluster.namespace)
        if found is None:
            raise ClusterError(f"deployment {name} is not in namespace {self.cluster.namespace}: deploy first")
        return found

    def _patch(self, name: str, body: dict[str, Any]) -> None:
        self.cluster.call(self.cluster.apps.patch_namespaced_deployment, name, self.cluster.namespace, body)
