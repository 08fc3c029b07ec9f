"""The journal: what was appended comes back, a torn tail is dropped, damage is told, a checkpoint ends its growth."""

import os

import pytest

from trimtab.trainer.journal import CorruptJournalError, Journal


def filled(path, steps=3, each=4):
    journal = Journal(path)
    for step in range(1, steps + 1):
        for index in range(each):
            journal.append(step, index, f"{step}/{index} ".encode() * 20)
    journal.sync()
    return journal


def test_what_was_appended_comes_back_in_order(tmp_path):
    filled(tmp_path / "journal").close()
    journal = Journal(tmp_path / "journal")
    assert journal.steps() == [1, 2, 3]
    assert list(journal.read(2)) == [0, 1, 2, 3]
    assert journal.read(2)[3].startswith(b"2/3 ")
    assert journal.read(9) == {}


@pytest.mark.parametrize("cut", [1, 30, 60, 75])
def test_a_torn_tail_is_dropped_and_writing_goes_on_behind_the_rest(tmp_path, cut):
    path = tmp_path / "journal"
    filled(path).close()
    os.truncate(path, path.stat().st_size - cut)
    journal = Journal(path)
    assert list(journal.read(3)) == [0, 1, 2]
    journal.append(3, 3, b"again")
    journal.close()
    assert Journal(path).read(3)[3] == b"again"


def test_blocks_that_never_reached_the_disk_are_a_torn_tail(tmp_path):
    path = tmp_path / "journal"
    filled(path).close()
    size = path.stat().st_size
    with path.open("r+b") as file:  # the file grew, its last blocks are zeros
        file.seek(size - 200)
        file.write(bytes(300))
    assert sorted(Journal(path).read(3)) == [0, 1]


def test_a_flipped_bit_in_the_middle_is_told(tmp_path):
    path = tmp_path / "journal"
    filled(path).close()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptJournalError, match="journal: the record at byte"):
        Journal(path)


def test_forgetting_keeps_what_a_checkpoint_does_not_hold(tmp_path):
    path = tmp_path / "journal"
    journal = filled(path)
    before = path.stat().st_size
    journal.forget(2)
    journal.append(4, 0, b"later")
    assert path.stat().st_size < before / 2
    for each in (journal, Journal(path)):
        assert each.steps() == [3, 4] and each.read(4) == {0: b"later"} and len(each.read(3)) == 4
