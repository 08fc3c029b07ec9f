"""The words of the pages, one JSON file a language with the same keys, and the choice between them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

LANGUAGES: Mapping[str, str] = {"en": "English", "zh": "中文"}
DEFAULT = "en"


@cache
def words(language: str) -> Mapping[str, str]:
    """All words of a language by key."""
    return json.loads(files("trimtab.labeling.translations").joinpath(f"{language}.json").read_text(encoding="utf-8"))


def translate(language: str, key: str, **values: object) -> str:
    """One phrase with its values filled in; a key that is not there is a KeyError."""
    return words(language)[key].format(**values)


def choose_language(chosen: str | None, accept_language: str) -> str:
    """The language a visitor chose, else the first that their browser asks for and there is, else English."""
    if chosen is not None and chosen in LANGUAGES:
        return chosen
    wanted = []
    for position, part in enumerate(accept_language.split(",")[:20]):
        tag, _, parameters = part.strip().partition(";")
        try:
            weight = float(parameters.strip().removeprefix("q=")) if parameters else 1.0
        except ValueError:
            weight = 0.0
        wanted.append((-weight, position, tag.lower().partition("-")[0]))
    return next((tag for weight, _, tag in sorted(wanted) if weight < 0 and tag in LANGUAGES), DEFAULT)
