"""What one row means: demonstrations, prompts and rankings, as frozen dataclasses.

Each `parse_*` function reads one row's fields and raises RowError naming the field. The next step is `load`, which adds
the file and the line, or `tokenize`.
"""

from dataclasses import dataclass
from typing import Any

from trimtab.trainer.data.errors import RowError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation; role is one of system, user, assistant, tool."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates read."""
        return {"role": self.role, "content": self.content}


# Plain text, continued as it stands, or a conversation that the tokenizer's chat template lays out.
Prompt = str | tuple[ChatMessage, ...]


@dataclass(frozen=True)
class Demonstration:
    """An answer to imitate. A row of bare text is a response to the empty prompt."""

    prompt: Prompt
    response: str


@dataclass(frozen=True)
class PromptRow:
    """A prompt to answer."""

    prompt: Prompt


@dataclass(frozen=True)
class Ranking:
    """One labeler's order of K responses to one prompt.

    `ranks[i]` belongs to `responses[i]`: 1 is best, equal ranks are ties. `group` names the task the row came from, so
    that training and held-out rows can be split by task; "" where the file does not say. `ended[i]` is false where
    `responses[i]` was cut off (by a token limit, say), so that no end token may follow it; () means that all ended.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    labeler: str = ""
    group: str = ""
    ended: tuple[bool, ...] = ()


def detect_kind(fields: dict[str, Any]) -> str:
    """ "rankings", "demonstrations" or "prompts", by the fields a row has. Raises RowError where they fit none."""
    if "responses" in fields or "ranks" in fields or "chosen" in fields or "rejected" in fields:
        return "rankings"
    if "text" in fields or "completion" in fields or "response" in fields:
        return "demonstrations"
    if "messages" in fields:
        messages = _messages(fields["messages"], "messages")
        return "demonstrations" if messages[-1].role == "assistant" else "prompts"
    if "prompt" in fields:
        return "prompts"
    known = "text; prompt and completion; messages; prompt; prompt, responses and ranks; chosen and rejected"
    raise RowError("", f"no known fields among {sorted(fields)}; a row has one of: {known}")


def parse_demonstration(fields: dict[str, Any]) -> Demonstration:
    """`messages` that end with the assistant, or `prompt` + `completion` (or `response`), or `text`."""
    if "messages" in fields:
        messages = _messages(fields["messages"], "messages")
        if messages[-1].role != "assistant":
            raise RowError(f"messages[{len(messages) - 1}].role", "a demonstration ends with the assistant's message")
        if len(messages) == 1:
            raise RowError("messages", "a demonstration needs a message before the assistant's")
        return Demonstration(messages[:-1], _not_empty(messages[-1].content, f"messages[{len(messages) - 1}].content"))
    name = "completion" if "completion" in fields else "response"
    if name in fields:
        return Demonstration(_prompt(fields), _answer(fields[name], name))
    if "text" in fields:
        return Demonstration("", _not_empty(_text(fields["text"], "text"), "text"))
    raise RowError("", f"expected messages, prompt and completion, or text; found {sorted(fields)}")


def parse_prompt(fields: dict[str, Any]) -> PromptRow:
    """`prompt`, or `messages`; of messages that end with the assistant, what comes before."""
    if "prompt" not in fields and "messages" not in fields:
        raise RowError("prompt", f"missing; found {sorted(fields)}")
    prompt = _prompt(fields)
    if isinstance(prompt, tuple) and prompt[-1].role == "assistant":
        prompt = prompt[:-1]
    if not prompt:
        raise RowError("prompt" if "prompt" in fields else "messages", "is empty")
    return PromptRow(prompt)


def parse_ranking(fields: dict[str, Any]) -> Ranking:
    """`responses` + `ranks` with `prompt` or `messages`, or a pair `chosen` / `rejected`, which is a ranking of two."""
    labeler, group = _label(fields, "labeler"), _label(fields, "task")
    if "responses" not in fields and "ranks" not in fields:
        prompt, chosen, rejected = _pair(fields)
        return Ranking(prompt, (chosen, rejected), (1, 2), labeler, group, _ended(fields, 2))
    responses = _list(fields.get("responses"), "responses")
    ranks = _list(fields.get("ranks"), "ranks")
    texts = tuple(_answer(response, f"responses[{i}]", may_be_empty=True) for i, response in enumerate(responses))
    if len(texts) < 2:
        raise RowError("responses", f"a ranking needs at least 2 responses, found {len(texts)}")
    if len(ranks) != len(texts):
        raise RowError("ranks", f"{len(ranks)} ranks for {len(texts)} responses")
    for i, rank in enumerate(ranks):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise RowError(f"ranks[{i}]", f"a rank is a whole number from 1 (best), found {rank!r}")
    if min(ranks) != 1:
        raise RowError("ranks", f"the best rank is 1, found {min(ranks)} as the lowest")
    return Ranking(_prompt(fields), texts, tuple(ranks), labeler, group, _ended(fields, len(texts)))


def _pair(fields: dict[str, Any]) -> tuple[Prompt, str, str]:
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise RowError(name, "missing; a ranking has responses and ranks, or chosen and rejected")
    chosen, rejected = fields["chosen"], fields["rejected"]
    if "prompt" in fields or "messages" in fields:
        return (
            _prompt(fields),
            _answer(chosen, "chosen", may_be_empty=True),
            _answer(rejected, "rejected", may_be_empty=True),
        )
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _chat_pair(_messages(chosen, "chosen"), _messages(rejected, "rejected"))
    return _transcript_pair(_text(chosen, "chosen"), _text(rejected, "rejected"))


def _chat_pair(chosen: tuple[ChatMessage, ...], rejected: tuple[ChatMessage, ...]) -> tuple[Prompt, str, str]:
    """Two conversations that differ in the last message, the assistant's."""
    if chosen[:-1] != rejected[:-1]:
        raise RowError("rejected", "must be the same conversation as chosen up to its last message")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1].role != "assistant":
            raise RowError(f"{name}[{len(messages) - 1}].role", "the last message must be the assistant's")
    prompt: Prompt = chosen[:-1] or ""
    return prompt, chosen[-1].content, rejected[-1].content


def _transcript_pair(chosen: str, rejected: str) -> tuple[Prompt, str, str]:
    r"""Two whole transcripts as in hh-rlhf: the prompt is what they share, up to and with an "\n\nAssistant:" mark.

    Texts that share no such mark answer the empty prompt.
    """
    mark = "\n\nAssistant:"
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    start = chosen.rfind(mark, 0, shared)
    cut = start + len(mark) if start >= 0 else 0
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _prompt(fields: dict[str, Any]) -> Prompt:
    if "prompt" in fields and "messages" in fields:
        raise RowError("messages", "give prompt or messages, not both")
    name = "messages" if "messages" in fields else "prompt"
    value = fields.get(name, "")
    return _messages(value, name) if isinstance(value, list) or name == "messages" else _text(value, name)


def _answer(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """A response: text, or a list of one assistant message. One to be ranked may be empty: it ended at once."""
    if isinstance(value, list):
        messages = _messages(value, name)
        if len(messages) != 1 or messages[0].role != "assistant":
            raise RowError(name, "a response given as messages is exactly one assistant message")
        name, text = f"{name}[0].content", messages[0].content
    else:
        text = _text(value, name)
    return text if may_be_empty else _not_empty(text, name)


def _messages(value: Any, name: str) -> tuple[ChatMessage, ...]:
    messages = []
    for i, message in enumerate(_list(value, name)):
        if not isinstance(message, dict):
            raise RowError(f"{name}[{i}]", f"a message is an object with role and content, found {_type(message)}")
        role = message.get("role")
        if role not in ROLES:
            raise RowError(f"{name}[{i}].role", f"must be one of {', '.join(ROLES)}, found {role!r}")
        messages.append(ChatMessage(role, _text(message.get("content"), f"{name}[{i}].content")))
    if not messages:
        raise RowError(name, "is empty")
    return tuple(messages)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(name, "missing" if value is None else f"must be a list, found {_type(value)}")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(name, "missing" if value is None else f"must be text, found {_type(value)}")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise RowError(name, "holds half of a surrogate pair, which is not valid Unicode text")
    return value


def _not_empty(value: str, name: str) -> str:
    if not value.strip():
        raise RowError(name, "is empty")
    return value


def _ended(fields: dict[str, Any], count: int) -> tuple[bool, ...]:
    """`ended`: true or false for all responses, or a list with one of them each."""
    value = fields.get("ended", True)
    values = [value] * count if isinstance(value, bool) else _list(value, "ended")
    if len(values) != count:
        raise RowError("ended", f"{len(values)} values for {count} responses")
    for i, one in enumerate(values):
        if not isinstance(one, bool):
            raise RowError(f"ended[{i}]", f"must be true or false, found {_type(one)}")
    return () if all(values) else tuple(values)


def _label(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name, "")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(name, f"must be text or a whole number, found {_type(value)}")
    return str(value)


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
