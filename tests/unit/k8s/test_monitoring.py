"""What the dashboard and the alerts ask for is what the services export, and what they export is documented."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from trimtab.generator.service import swap_pause
from trimtab.runtime.metrics import Metrics
from trimtab.trainer.metric_sinks import METRIC

ROOT = Path(__file__).parents[3]
MONITORING = ROOT / "k8s" / "components" / "monitoring"
DOCS = (ROOT / "docs" / "metrics.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
NAME = re.compile(r"\b((?:trimtab|process|python)_[a-z0-9_]+)\b")
TRAINER_NAME = re.compile(r'metric(=~?)"([^"]+)"')


def exported() -> dict[str, str]:
    """Name and type of every metric family of a server, of the generator and of the trainer, by sample name."""
    metrics = Metrics()
    swap_pause(metrics.registry)
    metrics.registry.register(METRIC)
    METRIC.labels("run", "ppo", "loss").set(1.0)
    metrics.requests.labels("s", "m", "OK").inc()
    metrics.request_seconds.labels("s", "m").observe(1.0)
    metrics.version_loads.labels("ok").inc()
    names = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        names |= {sample.name: family.type for sample in family.samples}
    return names


def expressions() -> list[str]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]:
        found += [rule["expr"] for rule in group["rules"]]
    return found


@pytest.mark.parametrize("expression", expressions())
def test_each_expression_names_metrics_that_are_exported(expression: str) -> None:
    names = set(NAME.findall(expression))
    assert names and names <= exported().keys()


@pytest.mark.parametrize("expression", [e for e in expressions() if "trimtab_trainer_metric" in e])
def test_each_training_metric_asked_for_is_documented(expression: str) -> None:
    for operator, value in TRAINER_NAME.findall(expression):
        for name in value.split("|"):
            if operator == "=~" and name.endswith(".*"):
                assert name.removesuffix(".*") in DOCS
            else:
                generic = re.sub(r"^(seconds|wait_share|tokens_per_second)_.*", r"\1_X", name)
                assert f"`{generic}`" in DOCS, name


def test_every_exported_metric_is_documented_and_every_documented_one_exported() -> None:
    table = DOCS.split("## Every server")[1].split("\n## ")[0]
    first_cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    documented = {name for cell in first_cells for name in re.findall(r"`(trimtab_[a-z_]+)`", cell)}
    own = {name.removesuffix("_bucket") for name in exported() if name.startswith("trimtab_")}
    families = {name for name in own if not name.endswith(("_sum", "_count", "_created"))}
    assert documented == families


def test_every_alert_says_what_to_do_and_the_runbook_has_it_and_no_other() -> None:
    alerts = set()
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"] and rule["annotations"]["action"], rule["alert"]
            assert rule["labels"]["severity"] in ("info", "warning", "critical")
            alerts.add(rule["alert"])
    rows = [row.split(" | ") for row in OPERATIONS.splitlines() if row.startswith("| `Trimtab")]
    assert {cells[0].strip("|` ") for cells in rows} == alerts
    assert all(len(cells) == 4 and all(cell.strip(" |") for cell in cells) for cells in rows)


def test_counters_are_read_as_rates() -> None:
    types = exported()
    for expression in expressions():
        for name in NAME.findall(expression):
            if types[name] in ("counter", "histogram"):
                assert re.search(rf"(rate|increase)\({name}", expression), expression


def test_the_registry_of_a_server_stands_alone() -> None:
    assert isinstance(Metrics().registry, CollectorRegistry)
    assert Metrics().registry is not Metrics().registry
