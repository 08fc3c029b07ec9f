"""A log says what failed and where, and nothing of what people wrote."""

import json

import pytest
import structlog

from trimtab.runtime.logs import configure_logs, get_logger


@pytest.mark.parametrize("log_format", ["json", "pretty"])
def test_a_traceback_names_the_line_and_shows_no_locals(log_format, capsys):
    configure_logs(log_format=log_format)
    try:
        answer_secretly("-".join(["my", "prompt"]))
    except RuntimeError:
        get_logger("test").exception("step failed")
    logged = capsys.readouterr().err
    assert "answer_secretly" in logged and "cannot" in logged
    assert "my-prompt" not in logged
    if log_format == "json":
        assert json.loads(logged)["event"] == "step failed"


def test_what_is_below_the_level_costs_no_processing(capsys):
    configure_logs("warning", log_format="json")
    seen = []
    structlog.configure(processors=[lambda logger, name, event: seen.append(event["event"]) or event["event"]])
    for level in ("debug", "info", "warning", "error"):
        getattr(get_logger("test"), level)(level)
    configure_logs()
    assert seen == ["warning", "error"]


def answer_secretly(prompt):
    words = prompt.split("-")
    raise RuntimeError(f"cannot answer {len(words)} words")
