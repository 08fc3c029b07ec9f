"""Bodies that are almost right: every JSON route's own examples with something wrong about them, by a seed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

STRANGE: list[Any] = [
    None,
    True,
    -1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**40,
    1e308,
    float("nan"),
    float("inf"),
    -0.5,
    "",
    "\u0000",
    "\ud800",
    "x" * 3000,
    [],
    {},
    [[]],
    [None],
    {"": ""},
    [[[[[[]]]]]],
    {"role": "user"},
]


def mutated(body: dict[str, Any], random_: random.Random) -> tuple[bytes, str]:
    """A changed copy of a body as bytes, and what was done to it."""
    kind = random_.choice(["value", "value", "value", "drop", "add", "rename", "nest", "bytes", "cut", "utf8", "depth"])
    if kind == "bytes":
        return bytes(random_.randrange(256) for _ in range(random_.randrange(1, 60))), kind
    if kind == "depth":
        levels = random_.choice([100, 20_000])
        return b"[" * levels + b"]" * levels, kind
    changed = copy.deepcopy(body)
    places = list(_places(changed))
    holder, key = random_.choice(places)
    if kind == "value":
        holder[key] = copy.deepcopy(random_.choice(STRANGE))
    elif kind == "drop":
        del holder[key]
    elif kind == "nest":
        holder[key] = [holder[key]]
    elif kind == "add" and isinstance(holder, dict):
        holder[random_.choice(["extra", "\ud800", "", "__class__"])] = 1
    elif kind == "rename" and isinstance(holder, dict):
        holder[str(key) + "_"] = holder.pop(key)
    text = json.dumps(changed).encode()
    if kind == "cut":
        return text[: random_.randrange(len(text))], kind
    if kind == "utf8":
        at = random_.randrange(len(text))
        return text[:at] + b"\xff\xfe\xc0" + text[at:], kind
    return text, kind


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)
