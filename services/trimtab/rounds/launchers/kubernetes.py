"""A cluster as the launcher of rounds sees it: one namespace through the official client, with deadlines and retries.

What is made there is in kubernetes_jobs, what is watched in kubernetes_watch, the model services in
kubernetes_services.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes import client, config
from urllib3.exceptions import HTTPError

from trimtab.rounds.launchers.process import LaunchError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CALL_TIMEOUT_S = (5, 30)  # to connect, to answer
PATIENCE_S = 300.0  # an API server that is upgraded is away for minutes
RETRIED = frozenset({429, 500, 502, 503, 504})


class ClusterError(LaunchError):
    """The cluster refused, or could not be reached; the message says what and where."""


@dataclass(frozen=True)
class Cluster:
    """The API of one namespace."""

    namespace: str
    core: client.CoreV1Api
    batch: client.BatchV1Api
    apps: client.AppsV1Api
    custom: client.CustomObjectsApi
    patience_s: float = PATIENCE_S

    @classmethod
    def connect(cls, namespace: str = "", kubeconfig: str | None = None, context: str | None = None) -> Cluster:
        """The cluster this pod runs in, else the kubeconfig's. ClusterError where there is neither."""
        settings = client.Configuration()
        own = ""
        try:
            if kubeconfig is None and (ACCOUNT / "token").is_file():
                config.load_incluster_config(client_configuration=settings)
                own = (ACCOUNT / "namespace").read_text().strip()
            else:
                config.load_kube_config(kubeconfig, context, client_configuration=settings)
        except (config.ConfigException, OSError, TypeError) as error:
            raise ClusterError(f"no cluster: {error}; run in a pod, or give a kubeconfig (KUBECONFIG)") from error
        return cls.of(settings, namespace or own or "trimtab")

    @classmethod
    def of(cls, settings: client.Configuration, namespace: str, patience_s: float = PATIENCE_S) -> Cluster:
        """The API that `settings` lead to."""
        api = client.ApiClient(settings)
        return cls(
            namespace,
            client.CoreV1Api(api),
            client.BatchV1Api(api),
            client.AppsV1Api(api),
            client.CustomObjectsApi(api),
            patience_s,
        )

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Call a method of the client, again and again while the server is away; the API's own JSON.

        The client's models are passed over: they refuse what a newer server, or an older one, may well answer.
        ClusterError for a refusal.

        404 and 409 are raised as they are (`kubernetes.client.ApiException`): callers make something of them.
        """
        deadline, wait_s = time.monotonic() + self.patience_s, 0.25
        while True:
            try:
                return json.loads(self.open(method, *args, _request_timeout=CALL_TIMEOUT_S, **kwargs).data)
            except client.ApiException as error:
                if error.status in (404, 409):
                    raise
                problem = f"{error.status} {error.reason}: {message_of(error)}"
                if error.status not in RETRIED or time.monotonic() + wait_s > deadline:
                    raise ClusterError(f"the cluster refused {method.__name__}: {problem}") from error
            except HTTPError as error:
                if time.monotonic() + wait_s > deadline:
                    raise ClusterError(f"the cluster does not answer {method.__name__}: {error}") from error
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, 10.0)

    def open(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The open answer of one call, to be read; `kubernetes.client.ApiException` for a refusal."""
        answer = method(*args, _preload_content=False, **kwargs)
        if not 200 <= answer.status <= 299:
            refusal = client.ApiException(status=answer.status, reason=answer.reason)
            refusal.body = answer.data.decode(errors="replace")
            raise refusal
        return answer

    def find(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """`call`, with None for what is not there."""
        try:
            return self.call(method, *args, **kwargs)
        except client.ApiException as error:
            if error.status == 404:
                return None
            raise


def message_of(error: client.ApiException) -> str:
    """The API's own words in an error's body, else the body."""
    try:
        return str(json.loads(error.body or "{}").get("message", ""))
    except (TypeError, ValueError):
        return str(error.body or "")[:200]
