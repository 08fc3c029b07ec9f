"""A small Kubernetes API over real HTTP, for the official client: objects, selectors, lists, watches, logs, patches.

It has no controllers: tests put pods and statuses there themselves. Watches can be cut and expired, calls refused, and
with a Role's rules whatever these do not allow is forbidden.
"""

from __future__ import annotations

import copy
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kubernetes import client

PATH = re.compile(r"/(api/v1|apis/[^/]+/[^/]+)/namespaces/([^/]+)/([^/]+)(?:/([^/]+))?(?:/([^/]+))?")
KINDS = {"jobs": "Job", "cronjobs": "CronJob", "pods": "Pod", "events": "Event", "configmaps": "ConfigMap"}
KINDS |= {"deployments": "Deployment", "jobsets": "JobSet"}
NAMESPACE = "trimtab"


class Api:
    """The objects, and the log of what happened to them."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.objects: dict[str, dict[str, dict[str, Any]]] = {plural: {} for plural in KINDS}
        self.history: list[tuple[int, str, str, dict[str, Any]]] = []
        self.logs: dict[str, list[str]] = {}
        self.version = 100
        self.oldest = 0
        self.cut = 0
        self.refusals: list[int] = []
        self.rules: list[dict[str, Any]] | None = None
        self.requests: list[str] = []

    def put(self, plural: str, one: dict[str, Any]) -> dict[str, Any]:
        """Create or replace an object."""
        with self.changed:
            group = {"jobs": "batch/v1", "cronjobs": "batch/v1", "deployments": "apps/v1"}.get(plural, "v1")
            one = {"apiVersion": group, "kind": KINDS[plural]} | one
            name = one["metadata"]["name"]
            event = "MODIFIED" if name in self.objects[plural] else "ADDED"
            self.version += 1
            defaults = {"namespace": NAMESPACE, "uid": f"uid-{name}", "creationTimestamp": "2026-01-01T00:00:00Z"}
            one["metadata"] = defaults | one["metadata"] | {"resourceVersion": str(self.version)}
            self.objects[plural][name] = one
            self.history.append((self.version, plural, event, copy.deepcopy(one)))
            self.changed.notify_all()
            return one

    def status(self, plural: str, name: str, **status: Any) -> None:
        """Replace an object's status."""
        self.put(plural, self.objects[plural][name] | {"status": status})

    def remove(self, plural: str, name: str) -> dict[str, Any]:
        """Delete an object, and with a Job its pods."""
        with self.changed:
            gone = self.objects[plural].pop(name)
            self.version += 1
            self.history.append((self.version, plural, "DELETED", gone))
            self.changed.notify_all()
        if plural == "jobs":
            for pod in list(self.objects["pods"].values()):
                if pod["metadata"].get("labels", {}).get("job-name") == name:
                    self.remove("pods", pod["metadata"]["name"])
        return gone

    def cut_watches(self, *, expire: bool = False) -> None:
        """Break every open watch and log stream; with `expire` what they had seen is too old to go on from."""
        with self.changed:
            self.cut += 1
            if expire:
                self.oldest = self.version + 1
                self.version += 1
            self.changed.notify_all()

    def wait_for(self, plural: str, name: str, timeout_s: float = 20.0) -> dict[str, Any]:
        """The object, once it is there."""
        with self.changed:
            assert self.changed.wait_for(lambda: name in self.objects[plural], timeout_s), f"no {plural}/{name}"
            return self.objects[plural][name]


@contextmanager
def serving_api():
    """(Api, client configuration) of a server on a free port."""
    api = Api()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": api}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    settings = client.Configuration()
    settings.host = f"http://127.0.0.1:{server.server_port}"
    try:
        yield api, settings
    finally:
        api.cut_watches()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    api: Api
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        place = self._place()
        if place is None:
            return
        plural, name, sub, query = place
        if sub == "log":
            self._log(name, query)
        elif name:
            self._one(plural, name)
        elif query.get("watch") in ("True", "true"):
            self._watch(plural, query)
        else:
            with self.api.changed:
                items = [one for one in self.api.objects[plural].values() if _chosen(one, query)]
                version = str(self.api.version)
            kind = f"{KINDS[plural]}List"
            self._answer(200, {"kind": kind, "metadata": {"resourceVersion": version}, "items": items})

    def do_POST(self) -> None:
        place, body = self._place(), self._body()
        if place is None:
            return
        if body["metadata"]["name"] in self.api.objects[place[0]]:
            self._refuse(409, "AlreadyExists")
        else:
            self._answer(201, self.api.put(place[0], body))

    def do_PATCH(self) -> None:
        place, body = self._place(), self._body()
        if place is None:
            return
        plural, name, _, _ = place
        assert self.headers["Content-Type"] == "application/strategic-merge-patch+json"
        found = self.api.objects[plural].get(name)
        if found is None:
            self._refuse(404, "NotFound")
            return
        merged = merge(copy.deepcopy(found), body)
        if merged["spec"] != found["spec"]:
            merged["metadata"]["generation"] = found["metadata"].get("generation", 1) + 1
        self._answer(200, self.api.put(plural, merged))

    def do_DELETE(self) -> None:
        place = self._place()
        self._body()
        if place is None:
            return
        plural, name, _, _ = place
        if name in self.api.objects[plural]:
            self._answer(200, self.api.remove(plural, name))
        else:
            self._refuse(404, "NotFound")

    def _place(self) -> tuple[str, str, str, dict[str, str]] | None:
        split = urlsplit(self.path)
        self.api.requests.append(f"{self.command} {split.path}")
        if self.api.refusals:
            self._refuse(self.api.refusals.pop(0), "Refused")
            return None
        match = PATH.fullmatch(split.path)
        if match is None or match[2] != NAMESPACE or match[3] not in KINDS:
            self._refuse(404, "NotFound")
            return None
        query = {key: values[0] for key, values in parse_qs(split.query).items()}
        if self.api.rules is not None and not self._permitted(match, query):
            self._refuse(403, "Forbidden")
            return None
        return match[3], match[4] or "", match[5] or "", query

    def _permitted(self, match: re.Match[str], query: dict[str, str]) -> bool:
        """RBAC: some rule has the group, the resource, the verb and, where it names objects, this one."""
        group = match[1].split("/")[1] if match[1].startswith("apis/") else ""
        name = match[4] or query.get("fieldSelector", "").removeprefix("metadata.name=")
        resource = f"{match[3]}/{match[5]}" if match[5] else match[3]
        verb = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}.get(self.command, "get" if match[4] else "list")
        verb = "watch" if query.get("watch") in ("True", "true") else verb
        return any(
            group in rule["apiGroups"]
            and resource in rule["resources"]
            and verb in rule["verbs"]
            and ("resourceNames" not in rule or name in rule["resourceNames"])
            for rule in self.api.rules or ()
        )

    def _one(self, plural: str, name: str) -> None:
        found = self.api.objects[plural].get(name)
        if found is None:
            self._refuse(404, "NotFound")
        else:
            self._answer(200, found)

    def _watch(self, plural: str, query: dict[str, str]) -> None:
        api, seen = self.api, int(query.get("resourceVersion") or 0)
        cut, until = api.cut, time.monotonic() + float(query.get("timeoutSeconds", 60))
        self._begin_stream()
        if seen < api.oldest:
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            self._chunk(json.dumps({"type": "ERROR", "object": gone}) + "\n")
            self._chunk("")
            return
        while time.monotonic() < until:
            with api.changed:
                news = [entry for entry in api.history if entry[0] > seen and entry[1] == plural]
                if not news and api.cut == cut:
                    api.changed.wait(0.5)
                    continue
            if api.cut != cut:
                self.close_connection = True
                self.connection.close()
                return
            for version, _, event, one in news:
                seen = version
                if _chosen(one, query) and not self._chunk(json.dumps({"type": event, "object": one}) + "\n"):
                    return
        self._chunk("")

    def _log(self, pod: str, query: dict[str, str]) -> None:
        """Lines with times; a new one is sent as it comes, until the pod has ended."""
        api, cut, sent = self.api, self.api.cut, 0
        if pod not in api.objects["pods"]:
            self._refuse(404, "NotFound")
            return
        self._begin_stream()
        while True:
            with api.changed:
                lines = api.logs.get(pod, [])[sent:]
                here = api.objects["pods"].get(pod)
                ended = here is None or here.get("status", {}).get("phase") in ("Succeeded", "Failed")
                if not lines and not ended and api.cut == cut:
                    api.changed.wait(0.2)
                    continue
            for line in lines:
                sent += 1
                if not self._chunk(line + "\n"):
                    return
            if api.cut != cut:
                self.close_connection = True
                self.connection.close()
                return
            if ended and not lines:
                self._chunk("")
                return

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, text: str) -> bool:
        data = text.encode()
        try:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
        except OSError:
            return False
        return True

    def _body(self) -> dict[str, Any]:
        size = int(self.headers.get("Content-Length") or 0)
        return json.loads(self.rfile.read(size) or b"{}")

    def _answer(self, code: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, code: int, reason: str) -> None:
        self._answer(code, {"kind": "Status", "code": code, "reason": reason, "message": f"{reason} by the test"})

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _chosen(one: dict[str, Any], query: dict[str, str]) -> bool:
    labels = one["metadata"].get("labels", {})
    wanted = [part.split("=") for part in query.get("labelSelector", "").split(",") if part]
    named = query.get("fieldSelector", "").removeprefix("metadata.name=")
    return all(labels.get(key) == value for key, value in wanted) and named in ("", one["metadata"]["name"])


def merge(target: Any, patch: Any) -> Any:
    """A strategic merge: lists of named things by name, null takes a key away."""
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            target[key] = merge(target.get(key, {}), value)
        elif isinstance(value, list) and value and isinstance(value[0], dict) and "name" in value[0]:
            there = {item["name"]: item for item in target.get(key, [])}
            for item in value:
                there[item["name"]] = merge(there.get(item["name"], {}), item)
            target[key] = list(there.values())
        else:
            target[key] = value
    return target
