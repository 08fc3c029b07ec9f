"""The fixed words of labeling: roles, kinds of campaigns, states, and the flags of InstructGPT's labelers.

They are stored and travel as these strings; what people read is in `translations/`.
"""

from enum import StrEnum

FLAGS = (  # Ouyang et al. 2022, table 3: the metadata that labelers gave for each output
    "fails_instruction",
    "inappropriate_for_assistant",
    "hallucination",
    "satisfies_constraint",
    "sexual",
    "violent",
    "encourages_harm",
    "denigrates_protected_class",
    "harmful_advice",
    "expresses_opinion",
    "moral_judgment",
)
LOWEST_RATING, HIGHEST_RATING = 1, 7
FEWEST_RESPONSES, MOST_RESPONSES = 2, 9
SKIP_REASONS = ("unclear", "unfamiliar", "language", "offensive", "identical", "other")
LETTERS = "ABCDEFGHI"


class Role(StrEnum):
    """What a person may do; each may do what the ones before it may."""

    LABELER = "labeler"
    LEAD = "lead"
    ADMIN = "admin"

    def includes(self, other: "Role") -> bool:
        order = list(Role)
        return order.index(self) >= order.index(other)


class Kind(StrEnum):
    """What a campaign asks for."""

    RANKING = "ranking"
    COMPARISON = "comparison"
    DEMONSTRATION = "demonstration"


class CampaignState(StrEnum):
    """Whether a campaign hands out tasks."""

    OPEN = "open"
    CLOSED = "closed"


class TaskState(StrEnum):
    """Whether a task can be handed out; see `tables.Task`."""

    FILLING = "filling"
    READY = "ready"
    IDENTICAL = "identical"


class Ask(StrEnum):
    """Whether a question is put, and whether it must be answered."""

    OFF = "off"
    OPTIONAL = "optional"
    REQUIRED = "required"
