"""Settings: which source wins, and one line for each mistake."""

from pathlib import Path
from typing import Literal

import pytest

from trimtab.runtime.config import ConfigError, RequestLimits, ServiceConfig, load_config


class RoomConfig(ServiceConfig):
    model: str
    mode: Literal["slow", "fast"] = "slow"


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "room.yaml"
        path.write_text(text)
        return path

    return write


def test_flags_beat_the_environment_which_beats_the_file(yaml_file, monkeypatch):
    monkeypatch.setenv("TRIMTAB_PORT", "2222")
    monkeypatch.setenv("TRIMTAB_GRACE_S", "2.5")
    config = load_config(
        RoomConfig, yaml_file("model: a\nport: 1111\ngrace_s: 1\nthreads: 3\n"), {"port": 3333, "mode": None}
    )
    assert (config.port, config.grace_s, config.threads, config.mode) == (3333, 2.5, 3, "slow")


def test_nested_limits_merge_field_by_field(yaml_file, monkeypatch):
    monkeypatch.setenv("TRIMTAB_LIMITS__MAX_TOKENS", "77")
    config = load_config(RoomConfig, yaml_file("model: a\nlimits:\n  max_sequences: 5\n"))
    assert config.limits == RequestLimits(max_sequences=5, max_tokens=77)


def test_a_config_made_directly_reads_no_environment(monkeypatch):
    monkeypatch.setenv("TRIMTAB_PORT", "2222")
    assert RoomConfig(model="a").port == 0


@pytest.mark.parametrize(
    ("text", "flags", "field", "reason"),
    [
        ("port: 1\n", {}, "model", "required"),
        ("model: a\nport: seven\n", {}, "port", "integer"),
        ("model: a\nport: 70000\n", {}, "port", "65535"),
        ("model: a\nprot: 7\n", {}, "prot", "no such setting"),
        ("model: a\nlimits:\n  max_tokens: 0\n", {}, "limits.max_tokens", "greater than or equal to 1"),
        ("model: a\nlimits:\n  max_toknes: 4\n", {}, "limits.max_toknes", "no such setting"),
        ("model: a\n", {"mode": "medium"}, "mode", "'slow' or 'fast'"),
        ("model: a\n", {"threads": 0}, "threads", "greater than or equal to 1"),
        ("model: a\n", {"device": "gpu7"}, "device", "pattern"),
        ("model: a\n", {"host": "0.0.0.0"}, "host", "insecure: true"),
        ("model: a\n", {"tls_cert": "cert.pem"}, "tls_key", "together"),
        ("model: a\n", {"host": "0.0.0.0", "insecure": True, "auth": {"keys_file": "k"}}, "auth", "over TLS only"),
        ("model: a\n", {"tls_cert": "c", "tls_key": "k", "tls_client_ca": "ca"}, "auth.certificates", "which roles"),
        ("model: a\n", {"auth": {"certificates": {"a": ["score"]}}}, "tls_client_ca", "authorities"),
        ("model: a\nauth: {certificates: {a: [fly]}}\n", {}, "auth.certificates.a.0", "'score'"),
        ("model: a\n", {"tls_client_ca": "ca.pem"}, "tls_client_ca", "needs tls_cert"),
        ("- model\n", {}, "config", "name: value"),
        ("model: [unclosed\n", {}, "config", "not YAML"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_with_field_and_reason(yaml_file, text, flags, field, reason):
    with pytest.raises(ConfigError) as caught:
        load_config(RoomConfig, yaml_file(text), flags)
    line = str(caught.value)
    assert line.startswith(f"{field}: ")
    assert reason in line
    assert "\n" not in line


def test_a_wrong_environment_variable_is_blamed_on_the_environment(monkeypatch):
    monkeypatch.setenv("TRIMTAB_PORT", "seven")
    with pytest.raises(ConfigError, match=r"^port: .* \(from the environment\)$"):
        load_config(RoomConfig, None, {"model": "a"})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config: cannot read .*absent\.yaml: No such file"):
        load_config(RoomConfig, tmp_path / "absent.yaml")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.9.1"])
def test_loopback_needs_no_tls(host):
    assert RoomConfig(model="a", host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "a.example"])
def test_other_addresses_need_tls_or_insecure(host):
    with pytest.raises(ValueError, match="insecure: true"):
        RoomConfig(model="a", host=host)
    assert RoomConfig(model="a", host=host, insecure=True).host == host
