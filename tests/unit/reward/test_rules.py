"""Rules by themselves: what they score."""

import pytest

from trimtab.reward.rules import Response, final_answer, make_rule, same_answer
from trimtab.reward.scorer_config import AnswerSettings, FunctionSettings, LengthSettings, RegexSettings


def scored(settings, response: str, *, reference: str = "", prompt: str = "") -> float:
    return make_rule(settings.model_dump(mode="json"))(Response(prompt, response, reference))


def test_length_counts_or_says_whether_it_is_within_bounds():
    assert scored(LengthSettings(kind="length"), "one two  three\n") == 3
    assert scored(LengthSettings(kind="length", unit="characters"), "abc") == 3
    bounded = LengthSettings(kind="length", at_least=2, at_most=3)
    assert [scored(bounded, " ".join("w" * n)) for n in (1, 2, 3, 4)] == [0, 1, 1, 0]


def test_a_pattern_is_found_anywhere_or_as_a_whole_or_counted():
    assert scored(RegexSettings(kind="regex", pattern="b+"), "abba") == 1
    assert scored(RegexSettings(kind="regex", pattern="B+"), "abba") == 0
    assert scored(RegexSettings(kind="regex", pattern="B+", ignore_case=True), "abba") == 1
    assert scored(RegexSettings(kind="regex", pattern="b+", match="whole"), "abba") == 0
    assert scored(RegexSettings(kind="regex", pattern="a", match="count"), "abba") == 2


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} it is, not 7", r"\frac{1}{2}"),
        ("3 + 4 = 7\n#### 7", "7"),
        ("first 12, then $1,234.50.", "$1,234.50"),
        ("no number", None),
        (r"\boxed{never closed", None),
    ],
)
def test_the_final_answer_is_boxed_or_marked_or_the_last_number(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [("1,000", "1000.0", True), ("$5", "5", True), ("7.", "7", True), ("Paris", " paris ", True), ("7", "8", False)],
)
def test_answers_are_compared_as_numbers_and_else_as_plain_text(found, wanted, same):
    assert same_answer(found, wanted) is same


def test_an_answer_scores_right_or_wrong():
    settings = AnswerSettings(kind="answer", right=2.0, wrong=-1.0)
    assert scored(settings, "It is 42.", reference="#### 42") == 2
    assert scored(settings, "It is 41.", reference="42") == -1
    assert scored(settings, "I do not know", reference="42") == -1
    own = AnswerSettings(kind="answer", pattern=r"<answer>(.*?)</answer>")
    assert scored(own, "<answer>a</answer> <answer>b</answer>", reference="b") == 1


def test_a_function_gets_the_arguments_it_names(tmp_path):
    (tmp_path / "my_rewards.py").write_text(
        "def by_prompt(prompt, response, scale=2):\n    return scale * (len(response) - len(prompt))\n"
        "def everything(**given):\n    return len(given)\n"
        "def strange(question):\n    return 1\n"
    )
    folder = {"kind": "function", "folder": tmp_path}
    assert scored(FunctionSettings(function="my_rewards:by_prompt", **folder), "abcd", prompt="a") == 6
    assert scored(FunctionSettings(function="my_rewards:everything", **folder), "abcd") == 4
    with pytest.raises(TypeError, match="question"):
        make_rule(FunctionSettings(function="my_rewards:strange", **folder).model_dump(mode="json"))
