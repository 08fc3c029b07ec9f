"""The YAML file of `trimtab up`: one section per service, in the words of that service's own config.

store: store
shared: {tls_cert: tls.crt, tls_key: tls.key, auth: {keys_file: keys.yaml}}
generator: {model: "examples/models/stories260K-hf"}
reward: {model: "version:first/reward", port: 7202}
trainer: {services: {tls_ca: ca.crt, token_file: trainer.token}}
gateway: {}    # HTTP before the services that the file starts; `reward`, `generator` and `trainer` name others
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.cli.errors import CommandError
from trimtab.cli.settings import merged, read_yaml
from trimtab.cli.stage_config import unknown_key
from trimtab.rounds.launchers.process import ProcessSpec
from trimtab.rounds.launchers.services import SERVICES, fair_threads, service_process

METRICS_PORT_OFFSET = 2000


class UpConfig(BaseModel):
    """What `trimtab up` starts.

    Attributes:
        folder: where the logs and the written service configs go.
        store: the version store of every service whose section names none.
        shared: settings of every service, under those of its own section.
        threads: cores for each service; None shares the machine's cores evenly.
        grace_s: seconds between SIGTERM and SIGKILL when stopping.
        ready_timeout_s: seconds until every service must serve.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path = Path("runs/up")
    store: str | None = None
    shared: dict[str, Any] = {}
    threads: int | None = None
    grace_s: float = 35.0
    ready_timeout_s: float = 600.0
    generator: dict[str, Any] | None = None
    reward: dict[str, Any] | None = None
    reference: dict[str, Any] | None = None
    trainer: dict[str, Any] | None = None
    gateway: dict[str, Any] | None = None

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """The sections that are there, by service, with what is shared filled in."""
        shared = ({"store": self.store} if self.store else {}) | self.shared
        given = {name: getattr(self, name) for name in SERVICES}
        sections = {name: merged(shared, section) for name, section in given.items() if section is not None}
        if "gateway" in sections:
            sections["gateway"] = _fronted(sections) | sections["gateway"]
        return sections


def load_up_config(path: Path, shared: dict[str, Any] | None = None) -> UpConfig:
    """Read and check the file and each section; CommandError or ConfigError in one line.

    `shared` is laid over the file's own `shared`.
    """
    if not path.exists():
        raise CommandError(f"{path} does not exist; give it a section per service, as examples/own-model/up.yaml has")
    values = read_yaml(path)
    for key in values:
        if key not in UpConfig.model_fields:
            raise CommandError(f"{path}: {unknown_key(str(key), set(UpConfig.model_fields))}")
    empty_sections = {name: {} for name in SERVICES if name in values and values[name] is None}
    try:
        config = UpConfig.model_validate(values | empty_sections)
    except ValidationError as error:
        first = error.errors()[0]
        raise CommandError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    config = config.model_copy(update={"shared": config.shared | (shared or {})})
    if not config.sections:
        raise CommandError(f"{path}: no service; add a section: {', '.join(SERVICES)}")
    for name, section in config.sections.items():
        _check_section(name, section, path)
    return config


def process_specs(config: UpConfig) -> list[ProcessSpec]:
    """The services as processes, on their default ports where a section names none."""
    sections = config.sections
    threads = config.threads or fair_threads(len(sections.keys() - {"gateway"}))
    specs = []
    for name, section in sections.items():
        port = SERVICES[name].default_port
        ports = {"port": port, "metrics_port": port + METRICS_PORT_OFFSET}
        own_threads = section.get("threads") or threads
        specs.append(service_process(name, ports | section, config.folder, threads=own_threads))
    return specs


def _fronted(sections: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The addresses of the file's own services that a gateway stands before."""
    return {
        name: f"127.0.0.1:{sections[name].get('port', SERVICES[name].default_port)}"
        for name in ("reward", "generator", "trainer")
        if name in sections
    }


def _check_section(name: str, section: dict[str, Any], path: Path) -> None:
    from trimtab.runtime.config import ConfigError, load_config

    kind = SERVICES[name]
    config_class = getattr(importlib.import_module(kind.config_module), kind.config_class)
    for key in section:
        if key not in config_class.model_fields:
            raise CommandError(f"{path}: {name}: {unknown_key(str(key), set(config_class.model_fields))}")
    try:
        load_config(config_class, None, section)
    except ConfigError as error:
        raise CommandError(f"{path}: {name}: {str(error).replace(' from the flags', '')}") from error
