"""What rank 0 fails of is said, also where the other ranks did not fail and are lost for it."""

from pathlib import Path

import pytest

from trimtab.runtime.logs import configure_logs
from trimtab.trainer import work
from trimtab.trainer.context import StageContext
from trimtab.trainer.ranks import Ranks, RanksApartError
from trimtab.trainer.run import Run
from trimtab.trainer.stages import parse_stage
from trimtab.weights.store import open_store


class Deserted(Ranks):
    """Rank 0 of two, whose other never comes."""

    def told(self, work):
        return work()

    def meet(self) -> None:
        raise RanksApartError("the ranks are not together any more")


def test_the_reason_of_a_rank_that_failed_alone_is_logged(tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(stage, context) -> None:
        raise OSError("no space left on device")

    monkeypatch.setitem(work.STAGES, "sft", fail)
    configure_logs("info", "json")
    context = StageContext(
        run=Run("run", "sft"),
        store=open_store(str(tmp_path)),
        lease=None,
        folder=tmp_path,
        device="cpu",
        threads=1,
        keep_versions=1,
        ranks=Deserted(world=2),
    )
    task = work.Task("run", "sft", parse_stage("sft", {"stage": {"model": "m"}, "data": "d"}))
    with pytest.raises(RanksApartError):
        work.lead(task, context)
    assert "no space left on device" in capsys.readouterr().err
