"""Prompts as labeling keeps them: plain text or a conversation, and the digest that tells one from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """Text to continue, or messages to answer; exactly one of them holds. Both empty: the empty prompt."""

    text: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)

    def to_json(self) -> dict[str, Any]:
        """{"messages": […]} or {"prompt": text}: the fields of a JSONL row, and what the database keeps."""
        if self.messages:
            return {"messages": [{"role": m.role, "content": m.content} for m in self.messages]}
        return {"prompt": self.text}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Prompt:
        """What `to_json` made."""
        if "messages" in fields:
            return cls(messages=tuple(Message(m["role"], m["content"]) for m in fields["messages"]))
        return cls(text=fields["prompt"])

    def digest(self, responses: Iterable[str] = ()) -> str:
        """Names the prompt, together with its responses in whatever order where they are given."""
        content = json.dumps([self.to_json(), sorted(responses)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:32]

    def first_words(self, limit: int = 120) -> str:
        """The beginning of what is asked, for lists."""
        text = " ".join((self.messages[-1].content if self.messages else self.text).split())
        return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
