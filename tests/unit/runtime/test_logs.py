"""A log says what failed and where, and nothing of what people wrote."""

import json

import pytest

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


def answer_secretly(prompt):
    words = prompt.split("-")
    raise RuntimeError(f"cannot answer {len(words)} words")
