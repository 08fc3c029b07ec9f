"""The report says what was measured, in Markdown, JSON and pictures, and which promises held."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from trimtab.rounds.demo.figures import (
    Accuracy,
    Comparison,
    DemoReport,
    PolicyFigures,
    PublishedVersion,
    Sample,
    StageSeries,
    bars_of,
)
from trimtab.rounds.demo.report import write_report
from trimtab.rounds.evaluate import Interval, KlSummary, TextSummary, win_rate


def series(stage: str, count: int, **columns: np.ndarray) -> StageSeries:
    return StageSeries(stage, np.arange(1, count + 1), columns)


@pytest.fixture
def report() -> DemoReport:
    chance = np.random.default_rng(0)
    before = 1 / (1 + np.exp(-chance.normal(0.2, 1.3, (243, 2))))
    after = 1 / (1 + np.exp(-chance.normal(1.4, 1.0, (243, 2))))
    texts = TextSummary(0.61, 0.93, Interval(39.4, 39.0, 39.8), 0.04, 5.1)
    kl = KlSummary(Interval(7.3, 6.9, 7.7), Interval(6.8, 6.5, 7.1), Interval(7.4, 7.0, 7.8))
    comparison = Comparison(
        before=PolicyFigures("SFT", before, texts, before * 2 - 1),
        after=PolicyFigures("PPO", after, replace(texts, distinct_2=0.85, perplexity=6.4), after * 2 - 1),
        win_rate=win_rate(after, before),
        kl=kl,
        judge="MiniLM + logistic regression",
        gold="VADER compound",
    )
    steps = np.arange(30)
    validation = np.where(steps % 10 == 9, 1.7 - 0.005 * steps, np.nan)
    return DemoReport(
        title="Happier stories",
        facts=(("commit", "abc1234"), ("machine", "2 cores | no GPU")),
        timings=(("SFT", 61.2), ("PPO", 190.0)),
        sft=series("sft", 30, loss=1.9 - 0.006 * steps + chance.normal(0, 0.02, 30), validation_loss=validation),
        reward=series("reward", 200, loss=0.48 + 0.25 * np.exp(-np.arange(200) / 40) + chance.normal(0, 0.03, 200)),
        ppo=series("ppo", 30, normalized_score_mean=1.5 * (1 - np.exp(-steps / 12)), kl_nats_per_sequence=0.26 * steps),
        accuracies=(
            Accuracy("movie sentences, mean of raters", Interval(0.66, 0.63, 0.69), 2811),
            Accuracy("tweets, mean of raters", Interval(0.77, 0.75, 0.79), 2702),
        ),
        rater_agreement=Interval(0.835, 0.817, 0.851),
        comparison=comparison,
        samples=(
            Sample("Once upon a time", "there was a *sad* <dog>.\n\nHe cried.", "there was a happy dog.", 0.31, 0.88),
        ),
        versions=(PublishedVersion("demo/policy@30", "blake3:" + "0" * 64, "PPO"),),
        bars=bars_of(comparison),
    )


def test_the_page_and_its_pictures_are_written(report, tmp_path):
    page = write_report(report, tmp_path / "out").read_text()
    for name in ("curves.png", "judge.png", "reward_model.png"):
        assert f"({name})" in page
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "| PPO | 190 |" in page and "`demo/policy@30`" in page
    assert "66.0 % (63.0 to 69.0)" in page and "83.5 % (81.7 to 85.1)" in page
    assert "2 cores \\| no GPU" in page, "a bar inside a cell would break the table"
    assert "&lt;dog>. He cried." in page, "samples stay text"


def test_the_numbers_are_there_for_programs(report, tmp_path):
    write_report(report, tmp_path)
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["win_rate"]["low"] > 0.5
    assert numbers["policies"]["PPO"]["distinct_2"] == 0.85
    assert all(bar["held"] for bar in numbers["bars"])


def test_promises_that_do_not_hold_are_named(report):
    comparison = replace(
        report.comparison,
        win_rate=Interval(0.53, 0.49, 0.57),
        kl=replace(report.comparison.kl, k1_per_40_tokens=Interval(12.0, 11.0, 13.0)),
        after=replace(report.comparison.after, texts=replace(report.comparison.after.texts, distinct_2=0.5)),
    )
    assert [bar.held for bar in bars_of(comparison)] == [True, False, False, False, False]


def test_series_come_from_the_trainers_metric_file(tmp_path):
    rows = [
        {"run_id": "r", "stage": "sft", "step": 1, "time": "t", "loss": 2.0},
        {"run_id": "r", "stage": "sft", "step": 2, "time": "t", "loss": 1.5, "validation_loss": 1.7},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = StageSeries.from_jsonl("sft", tmp_path / "metrics.jsonl")
    assert read.steps.tolist() == [1, 2] and read.values["loss"].tolist() == [2.0, 1.5]
    assert math.isnan(read.values["validation_loss"][0])
