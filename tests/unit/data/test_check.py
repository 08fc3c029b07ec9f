"""`trimtab data check` lists every bad row and says what a good file holds."""

import json
import subprocess
import sys

from typer.testing import CliRunner

from trimtab.cli.data import app
from trimtab.trainer.data import check_file
from trimtab.trainer.data.check import untied_pairs

GOOD = {"prompt": "Q", "responses": ["a", "b", "c", "d"], "ranks": [1, 2, 2, 4], "labeler": "ann"}


def test_a_good_file_is_counted(tmp_path):
    path = tmp_path / "r.jsonl"
    tied = {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 1], "labeler": "bob"}
    path.write_text("\n".join(json.dumps(row) for row in (GOOD, GOOD, tied)))
    report = check_file(path)
    assert report.ok and report.kind == "rankings" and report.row_count == 3
    assert report.rankings_by_k == ((2, 1), (4, 2))
    assert (report.pair_count, report.tied_row_count, report.labeler_count) == (10, 1, 2)


def test_every_bad_row_is_listed_not_only_the_first(tmp_path):
    path = tmp_path / "r.jsonl"
    lines = [json.dumps(GOOD), "{", json.dumps(GOOD | {"ranks": [1]}), json.dumps({"text": "x"}), json.dumps({"a": 1})]
    path.write_text("\n".join(lines))
    report = check_file(path)
    assert [(problem.line, problem.field) for problem in report.problems] == [(2, ""), (3, "ranks"), (4, ""), (5, "")]
    assert report.bad_count == 4 and not report.ok
    assert "demonstrations in a file of rankings" in report.problems[2].reason


def test_a_file_that_cannot_be_read_is_a_problem_not_a_crash(tmp_path):
    assert check_file(tmp_path / "missing.jsonl").problems[0].reason == "no such file or folder"
    (tmp_path / "empty.jsonl").write_text("")
    assert check_file(tmp_path / "empty.jsonl").problems[0].reason == "holds no rows"


def test_untied_pairs():
    assert untied_pairs((1, 2, 3, 4)) == 6
    assert untied_pairs((1, 1, 3, 3)) == 4
    assert untied_pairs((1, 1, 1)) == 0


def test_the_command_names_line_and_field_and_exits_1(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"ranks": [1, 2, 3, "x"]}) + "\n")
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 1
    assert f"{path}:2: ranks[3]: a rank is a whole number" in result.output
    path.write_text(json.dumps(GOOD) + "\n")
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 0 and "1 rows of rankings" in result.output


def test_checking_needs_neither_torch_nor_transformers():
    code = "import sys, trimtab.cli.data, trimtab.trainer.data; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
