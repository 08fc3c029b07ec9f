"""Rules: one response in, one number out. Plain Python, without torch; `rule_process` runs them.

A rule is made from its settings as JSON gives them (`scorer_config`), and called with a `Response`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Response:
    """What a rule may look at. `messages` are a conversation's, role and content, or None for a pair of texts."""

    prompt: str
    response: str
    reference: str
    messages: list[dict[str, str]] | None = None


Rule = Callable[[Response], float]


def make_rule(settings: Mapping[str, Any]) -> Rule:
    """The rule that settings describe. Raises whatever keeps a user's function from being found."""
    return {"length": length_rule, "regex": regex_rule, "answer": answer_rule, "function": function_rule}[
        settings["kind"]
    ](settings)


def length_rule(settings: Mapping[str, Any]) -> Rule:
    """The response's length; with bounds, 1 inside of them and 0 outside."""
    least, most = settings["at_least"], settings["at_most"]
    in_words = settings["unit"] == "words"

    def rule(item: Response) -> float:
        length = len(item.response.split()) if in_words else len(item.response)
        if least is None and most is None:
            return float(length)
        return float((least is None or length >= least) and (most is None or length <= most))

    return rule


def regex_rule(settings: Mapping[str, Any]) -> Rule:
    """Whether, or how often, a pattern occurs in the response."""
    flags = (re.IGNORECASE if settings["ignore_case"] else 0) | (re.DOTALL if settings["dot_matches_newline"] else 0)
    pattern = re.compile(settings["pattern"], flags)
    match settings["match"]:
        case "count":
            return lambda item: float(sum(1 for _ in pattern.finditer(item.response)))
        case "whole":
            return lambda item: float(pattern.fullmatch(item.response) is not None)
        case _:
            return lambda item: float(pattern.search(item.response) is not None)


NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
MARKED = re.compile(r"####\s*([^\n]+)")
BOXED = "\\boxed{"


def answer_rule(settings: Mapping[str, Any]) -> Rule:
    """Whether the response's final answer is the reference's, numbers compared as numbers."""
    own = re.compile(settings["pattern"]) if settings["pattern"] is not None else None
    right, wrong = settings["right"], settings["wrong"]

    def rule(item: Response) -> float:
        found = final_answer(item.response) if own is None else _last_group(own, item.response)
        wanted = final_answer(item.reference, whole=True)
        return right if found is not None and wanted is not None and same_answer(found, wanted) else wrong

    return rule


def final_answer(text: str, *, whole: bool = False) -> str | None:
    r"""What stands in the last \boxed{…}, behind the last ####, or else the last number (with `whole`, the text)."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    marked = _last_group(MARKED, text)
    if marked is not None:
        return marked
    if whole:
        return text.strip() or None
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def same_answer(found: str, wanted: str) -> bool:
    """Equal numbers (1,000 = 1000.0 = $1000), or equal texts but for case, spaces and a full stop."""
    a, b = _number(found), _number(wanted)
    return a == b if a is not None and b is not None else _plain(found) == _plain(wanted)


def function_rule(settings: Mapping[str, Any]) -> Rule:
    """A user's function, called with the arguments that it names among those of `Response`."""
    if settings["folder"]:
        sys.path.insert(0, settings["folder"])
    module, _, name = settings["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    known = list(Response.__dataclass_fields__)
    wanted = known if takes_all else [parameter.name for parameter in parameters if parameter.name in known]
    for parameter in parameters:
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if parameter.name not in known and not optional:
            raise TypeError(f"{settings['function']} wants {parameter.name!r}; there are {', '.join(known)}")
    return lambda item: float(function(**{field: getattr(item, field) for field in wanted}))


def checked(score: float) -> float:
    """The score; ValueError for one that is no finite float32."""
    if not math.isfinite(score) or abs(score) > 3.4e38:
        raise ValueError(f"scored {score}, which is no finite number")
    return score


def _last_group(pattern: re.Pattern[str], text: str) -> str | None:
    last = None
    for last in pattern.finditer(text):  # noqa: B007 the last one is what is wanted
        pass
    return last.group(1).strip() if last is not None and last.group(1) is not None else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(BOXED)
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position].strip()
    return None


def _number(text: str) -> float | None:
    bare = text.strip().rstrip(".").replace(",", "").replace("$", "").strip()
    try:
        return float(bare)
    except ValueError:
        return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
