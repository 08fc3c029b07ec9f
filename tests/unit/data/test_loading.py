"""The loaders read every documented form of row and stop at the first bad one, naming its place."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from trimtab.trainer.data import (
    ChatMessage,
    DataError,
    Demonstration,
    PromptRow,
    Ranking,
    load_demonstrations,
    load_prompts,
    load_rankings,
)


def write(path: Path, *rows: object) -> Path:
    content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_every_form_of_demonstration_is_read(tmp_path):
    path = write(
        tmp_path / "sft.jsonl",
        {"text": "A story."},
        {"prompt": "Two plus two is", "completion": " four"},
        {"prompt": [user("Hi")], "completion": [assistant("Hello!")]},
        {"messages": [user("Hi"), assistant("Hello!"), user("Bye"), assistant("So long.")]},
    )
    hi = ChatMessage("user", "Hi")
    assert load_demonstrations(path) == [
        Demonstration("", "A story."),
        Demonstration("Two plus two is", " four"),
        Demonstration((hi,), "Hello!"),
        Demonstration((hi, ChatMessage("assistant", "Hello!"), ChatMessage("user", "Bye")), "So long."),
    ]


def test_prompts_are_read_alone_or_out_of_demonstrations(tmp_path):
    rows = [{"prompt": "Once"}, {"messages": [user("Hi"), assistant("Hello!")]}, {"prompt": "A", "completion": "B"}]
    hi = (ChatMessage("user", "Hi"),)
    assert load_prompts(write(tmp_path / "p.jsonl", *rows)) == [PromptRow("Once"), PromptRow(hi), PromptRow("A")]


def test_rankings_keep_ties_labeler_and_task(tmp_path):
    row = {"prompt": "Q", "responses": ["a", "b", "c", "d"], "ranks": [2, 1, 2, 4], "labeler": 7, "task": "t1"}
    path = write(tmp_path / "r.jsonl.gz", row)
    assert load_rankings(path) == [Ranking("Q", ("a", "b", "c", "d"), (2, 1, 2, 4), "7", "t1")]


def test_one_value_of_ended_stands_for_all_responses(tmp_path):
    row = {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 2]}
    path = write(tmp_path / "r.jsonl", row, row | {"ended": False}, row | {"ended": [True, False]})
    assert [ranking.ended for ranking in load_rankings(path)] == [(), (False, False), (True, False)]


def test_pairs_become_rankings_of_two(tmp_path):
    path = write(
        tmp_path / "pairs.jsonl",
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
    )
    assert [(row.responses, row.ranks) for row in load_rankings(path)] == [(("good", "bad"), (1, 2))] * 2
    assert load_rankings(path)[1].prompt == (ChatMessage("user", "Q"),)


def test_hh_transcripts_share_their_prompt_up_to_the_last_common_assistant_mark(tmp_path):
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    path = write(tmp_path / "hh.jsonl", {"chosen": shared + " Because so.", "rejected": shared + " Because no."})
    assert load_rankings(path) == [Ranking(shared, (" Because so.", " Because no."), (1, 2))]


def test_an_answer_that_ended_at_once_can_be_ranked_but_not_imitated(tmp_path):
    path = write(tmp_path / "r.jsonl", {"prompt": "Q", "chosen": "yes", "rejected": ""})
    assert load_rankings(path)[0].responses == ("yes", "")
    path = write(tmp_path / "sft.jsonl", {"prompt": "Q", "completion": ""})
    with pytest.raises(DataError, match="completion: is empty"):
        load_demonstrations(path)


def test_texts_without_a_shared_mark_answer_the_empty_prompt(tmp_path):
    path = write(tmp_path / "pair.jsonl", {"chosen": "The day was good", "rejected": "The day was bad"})
    assert load_rankings(path) == [Ranking("", ("The day was good", "The day was bad"), (1, 2))]


def test_parquet_and_folders_give_the_same_rows_as_jsonl(tmp_path):
    rows = [
        {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 2], "labeler": None},
        {"prompt": "R", "responses": ["a", "b", "c"], "ranks": [1, 1, 3], "labeler": "x"},
    ]
    (tmp_path / "folder").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "folder" / "a.parquet")
    write(tmp_path / "folder" / "b.jsonl", rows[1])
    expected = [Ranking("Q", ("a", "b"), (1, 2)), Ranking("R", ("a", "b", "c"), (1, 1, 3), "x")]
    assert load_rankings(tmp_path / "folder") == expected


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"prompt": "Q", "responses": ["a", "b"], "ranks": [1]}, "ranks", "1 ranks for 2 responses"),
        ({"prompt": "Q", "responses": ["a", "b"], "ranks": [0, 1]}, "ranks[0]", "from 1"),
        ({"prompt": "Q", "responses": ["a", "b"], "ranks": [2, 3]}, "ranks", "the best rank is 1"),
        ({"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 1.5]}, "ranks[1]", "whole number"),
        ({"prompt": "Q", "responses": ["a", "b"], "ranks": [True, 2]}, "ranks[0]", "whole number"),
        ({"prompt": "Q", "responses": ["a", None], "ranks": [1, 2]}, "responses[1]", "missing"),
        ({"prompt": "Q", "responses": ["a", 5], "ranks": [1, 2]}, "responses[1]", "must be text"),
        ({"prompt": "Q", "responses": ["a"], "ranks": [1]}, "responses", "at least 2"),
        ({"prompt": 3, "responses": ["a", "b"], "ranks": [1, 2]}, "prompt", "must be text"),
        ({"prompt": [{"role": "human", "content": "x"}], "chosen": "a", "rejected": "b"}, "prompt[0].role", "human"),
        ({"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 2], "ended": [True]}, "ended", "1 values for 2"),
        ({"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 2], "ended": [True, 0]}, "ended[1]", "true or false"),
        ({"prompt": "Q", "chosen": "a"}, "rejected", "missing"),
        ({"prompt": "Q", "chosen": "a", "rejected": "\ud800"}, "rejected", "surrogate"),
        ('{"prompt": "Q", ', "", "not JSON"),
        ("[1, 2]", "", "a row is a JSON object"),
    ],
)
def test_the_first_bad_row_is_named_by_line_and_field(tmp_path, row, field, reason):
    good = {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 2]}
    path = write(tmp_path / "r.jsonl", good, "", row, good)
    with pytest.raises(DataError, match=r"r\.jsonl:3") as caught:
        load_rankings(path)
    assert (caught.value.line, caught.value.field) == (3, field)
    assert reason in caught.value.reason


def test_bytes_that_are_no_text_and_damaged_archives_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: not UTF-8"):
        load_demonstrations(tmp_path / "bad.jsonl")
    whole = gzip.compress(json.dumps({"text": "a story " * 500}).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged gzip"):
        load_demonstrations(tmp_path / "cut.jsonl.gz")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="not a readable Parquet"):
        load_demonstrations(tmp_path / "bad.parquet")


def test_nothing_to_read_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "other.txt").write_text("text")
    for source, reason in [
        (tmp_path / "empty.jsonl", "holds no rows"),
        (tmp_path / "missing.jsonl", "no such file"),
        (tmp_path / "other.txt", "unknown kind of file"),
    ]:
        with pytest.raises(DataError, match=reason):
            load_demonstrations(source)
