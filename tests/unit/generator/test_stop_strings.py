"""Stop strings in text that arrives token by token, and the text of a response behind its prompt."""

from types import ModuleType

import numpy as np
import pytest

from trimtab.generator.local.stop_strings import StopStrings, response_text


def ids_of(lab: ModuleType, text: str) -> np.ndarray:
    return np.array(lab.byte_tokenizer().encode(text, add_special_tokens=False), dtype=np.int32)


def first_stop(lab: ModuleType, prompt: str, response: str, stops: list[str]) -> int | None:
    """How many tokens of the response it takes until a stop string is found."""
    watch = StopStrings(lab.byte_tokenizer(), stops, ids_of(lab, prompt))
    tokens = ids_of(lab, response)
    return next((count for count in range(1, len(tokens) + 1) if watch.push(tokens[:count])), None)


@pytest.mark.parametrize(
    ("response", "stops", "text"),
    [
        ("hello\n\nUser: x", ["\n\n"], "hello"),
        ("hello END of", ["absent", "END"], "hello "),
        ("aaab", ["ab"], "aa"),
        ("xyz", ["x"], ""),
        ("naïve café ü!", ["ü"], "naïve café "),
        ("emoji 🙂🙃 stop", ["🙃"], "emoji 🙂"),
    ],
)
def test_a_response_ends_with_the_token_that_completes_a_stop_string(
    lab: ModuleType, response: str, stops: list[str], text: str
) -> None:
    count = first_stop(lab, "prompt: é", response, stops)
    tokens = ids_of(lab, response)
    assert count == len(ids_of(lab, text + next(stop for stop in stops if stop in response)))
    assert response_text(lab.byte_tokenizer(), ids_of(lab, "prompt: é"), tokens[:count], stops) == text


def test_stop_strings_in_the_prompt_or_absent_do_not_stop(lab: ModuleType) -> None:
    assert first_stop(lab, "END", " of story", ["END", "never"]) is None
    assert first_stop(lab, "EN", "D and then END", ["END"]) == len("D and then END")


def test_a_match_before_min_tokens_is_not_cut_later(lab: ModuleType) -> None:
    """The engine goes on past an early match; the text is cut at the one that ended the response."""
    tokens = ids_of(lab, "a.b.c.")
    assert response_text(lab.byte_tokenizer(), ids_of(lab, "x"), tokens, ["."]) == "a.b.c"
