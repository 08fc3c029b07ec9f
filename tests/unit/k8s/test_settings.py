"""Every flag, variable and key in a manifest is one that trimtab takes, by the services' own config classes."""

import importlib
import os
from pathlib import Path

import pytest
import typer
import yaml

from tests.unit.k8s.manifests import environment, installations, label, pods, rendered
from trimtab.cli.main import app
from trimtab.deploy.render import find
from trimtab.rounds.launchers.services import SERVICES
from trimtab.runtime.config import load_config

READ_BY_LIBRARIES = {"HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "AWS_CONFIG_FILE"}
READ_BY_LIBRARIES |= {
    "VLLM_CACHE_ROOT",
    "VLLM_NO_USAGE_STATS",
    "AWS_SHARED_CREDENTIALS_FILE",
    "PGSERVICEFILE",
    "DEPLOYED_MODEL",
    "JOBSET_NAME",
    "RENDEZVOUS",
}


def ours():
    return [
        pytest.param(i, pod, id=f"{label(i)}-{pod.owner}")
        for i in installations()
        for pod in pods(rendered(i))
        if pod.spec["containers"][0]["name"] == "trimtab" and (pod.name != "gateway" or "gateway" in SERVICES)
    ]


def config_file(installation, pod, folder):
    """The pod's config as a file here; None where it has none."""
    maps = {one["metadata"]["name"]: one["data"] for one in find(rendered(installation), "ConfigMap")}
    for volume in pod.spec["volumes"]:
        if volume["name"] == "config":
            ((name, text),) = maps[volume["configMap"]["name"]].items()
            path = Path(folder) / name
            path.write_text(text)
            return path
    return None


def config_class(name):
    if name == "labeling":
        return importlib.import_module("trimtab.labeling.config").LabelingConfig
    kind = SERVICES[name]
    return getattr(importlib.import_module(kind.config_module), kind.config_class)


@pytest.mark.parametrize(("installation", "pod"), ours())
def test_the_command_line_is_one_that_trimtab_takes(installation, pod):
    args = list(pod.spec["containers"][0]["args"])
    command = typer.main.get_command(app)
    context = command.make_context("trimtab", args)
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    assert context.args == []


@pytest.mark.parametrize(("installation", "pod"), ours())
def test_settings_are_accepted_and_listen_where_the_pod_says(installation, pod, tmp_path, monkeypatch):
    path = config_file(installation, pod, tmp_path)
    if path is None:
        return
    for name in [name for name in os.environ if name.startswith("TRIMTAB_")]:
        monkeypatch.delenv(name)
    for name, value in environment(pod.spec["containers"][0], rendered(installation)).items():
        if name.startswith("TRIMTAB_"):
            monkeypatch.setenv(name, value)
    settings = load_config(config_class(pod.name), path)
    ports = {port["name"]: port["containerPort"] for port in pod.spec["containers"][0]["ports"]}
    told = {"grpc": settings.port, "health": settings.health_port, "metrics": settings.metrics_port}
    if pod.name == "labeling":
        told = {"http": settings.port, "metrics": settings.metrics_port}
    elif pod.name == "gateway":
        told["http"] = settings.http_port
    assert {name: port for name, port in ports.items() if name != "rendezvous"} == told
    assert settings.host == "0.0.0.0"
    assert settings.has_tls == (installation.overlay == "gpu")
    assert settings.insecure == (installation.overlay == "dev")
    if pod.name in ("generator", "reward", "reference", "trainer"):
        assert settings.device == ("cuda" if installation.overlay == "gpu" else "cpu")
        assert (settings.tls_client_ca is not None) == (installation.overlay == "gpu")
        assert settings.auth.is_open == (installation.overlay == "dev")
        behind_ingress = pod.name == "reward" and "ingress" in installation.components
        assert (settings.auth.keys_file is not None) == behind_ingress
    if pod.name == "trainer":
        assert (settings.services.options().tls is not None) == (installation.overlay == "gpu")


@pytest.mark.parametrize(("installation", "pod"), ours())
def test_every_variable_is_read_by_someone(installation, pod):
    fields = set()
    if pod.name in SERVICES or pod.name == "labeling":
        fields = {f"TRIMTAB_{name.upper()}" for name in config_class(pod.name).model_fields}
    fields |= {"TRIMTAB_STORE", "TRIMTAB_DATA"} if pod.name == "rounds" else set()
    fields |= {f"TRIMTAB_CLIENT_{name}" for name in ("TLS_CA", "TLS_CERT", "TLS_KEY", "TLS_SERVER_NAME")}
    given = {name.partition("__")[0] for name in environment(pod.spec["containers"][0], rendered(installation))}
    assert given <= fields | READ_BY_LIBRARIES


def test_base_serves_nobody_in_the_clear(tmp_path, monkeypatch):
    """Without what an overlay says of TLS a server refuses to listen."""
    page = yaml.safe_load((Path(__file__).parents[3] / "k8s/base/reward/reward.yaml").read_text())
    with pytest.raises(ValueError, match="give tls_cert and tls_key, or insecure"):
        config_class("reward")(model="m", **page)
