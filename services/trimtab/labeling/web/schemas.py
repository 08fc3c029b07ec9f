"""What the REST API takes and gives. Field comments become the OpenAPI description."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from trimtab.labeling.agreement import Agreement, PairCounts
from trimtab.labeling.campaigns import CampaignPlan, SamplingPlan, Source, plan_of
from trimtab.labeling.judgments import Draft
from trimtab.labeling.tables import Campaign
from trimtab.labeling.vocabulary import Ask, CampaignState, Kind, Role

Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """A body in which an unknown field is refused, not passed over."""

    model_config = ConfigDict(extra="forbid")


class SourceBody(Strict):
    address: str = Field(description="HOST:PORT of a generator.")
    samples: int = Field(ge=1, description="Distinct answers of each task that come from it.")
    version: str = Field(default="", description="RUN/NAME@STEP that it must serve; empty: whatever it serves.")


class SamplingBody(Strict):
    max_tokens: int = Field(default=0, ge=0, description="0 is the generator's default.")
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


class CampaignBody(Strict):
    name: str = Field(description="Small letters, digits, dots, dashes and underscores; part of addresses.")
    title: str = ""
    kind: Kind = Kind.RANKING
    guideline: str = Field(default="", description="Markdown.")
    responses_per_task: int = Field(default=4, description="K: answers sampled for each prompt.")
    overlap: int = Field(default=1, description="How many people judge each task.")
    quota: int | None = Field(default=None, description="Most tasks for one person.")
    lease_s: int = Field(default=1800, description="How long a task stays in one person's hands.")
    ratings: Ask = Ask.OPTIONAL
    ask_flags: bool = True
    sources: list[SourceBody] = []
    sampling: SamplingBody = SamplingBody()

    def plan(self) -> CampaignPlan:
        values = self.model_dump()
        values["sources"] = tuple(Source(**source) for source in values["sources"])
        values["sampling"] = SamplingPlan(**values["sampling"])
        return CampaignPlan(**values)


class CampaignChanges(Strict):
    """What may change while people work; a field left out stays as it is."""

    title: str | None = None
    guideline: str | None = None
    overlap: int | None = None
    quota: int | None = None
    lease_s: int | None = None
    ratings: Ask | None = None
    ask_flags: bool | None = None
    state: CampaignState | None = None


class CampaignReply(CampaignBody):
    state: CampaignState
    created_at: datetime

    @classmethod
    def of(cls, campaign: Campaign) -> CampaignReply:
        plan = asdict(plan_of(campaign))
        return cls(**plan, state=CampaignState(campaign.state), created_at=campaign.created_at)


class ProgressReply(BaseModel):
    tasks: Count
    filling: Count = Field(description="Tasks that still wait for responses.")
    identical: Count = Field(description="Comparisons whose answers are equal: ties without asking anybody.")
    finished: Count
    waiting: Count = Field(description="Tasks that somebody could take now.")
    in_hands: Count
    judgments: Count
    wanted: Count
    skips: Count
    last_hour: Count


class PairsReply(BaseModel):
    same: Count
    opposite: Count
    both_tied: Count
    one_tied: Count
    share: float | None = Field(description="Same order among the pairs that both people ordered.")

    @classmethod
    def of(cls, counts: PairCounts) -> PairsReply:
        return cls(**asdict(counts), share=counts.share)


class AgreementReply(BaseModel):
    pairs: PairsReply
    rank_alpha: float | None = Field(description="Krippendorff's alpha of the ranks, ordinal.")
    rating_alpha: float | None = Field(description="Krippendorff's alpha of the ratings, ordinal.")
    by_labeler: dict[str, PairsReply]
    shared_tasks: Count

    @classmethod
    def of(cls, agreed: Agreement) -> AgreementReply:
        return cls(
            pairs=PairsReply.of(agreed.pairs),
            rank_alpha=agreed.rank_alpha,
            rating_alpha=agreed.rating_alpha,
            by_labeler={name: PairsReply.of(counts) for name, counts in agreed.by_labeler.items()},
            shared_tasks=agreed.shared_tasks,
        )


class WinRateReply(BaseModel):
    base: str
    challenger: str
    rate: float = Field(description="How often the challenger is preferred; a tie counts half.")
    low: float = Field(description="Lower end of the 95 % interval, a bootstrap over tasks.")
    high: float
    tasks: Count
    wins: Count
    ties: Count
    losses: Count
    identical: Count


class WorkReply(BaseModel):
    name: str
    judgments: Count
    skips: Count
    median_s: float | None
    last_at: datetime | None
    agreement: PairsReply


class ImportReply(BaseModel):
    tasks: Count
    judgments: Count
    repeated: Count = Field(description="Rows that were there already.")


class ShownAnswer(BaseModel):
    text: str


class TaskReply(BaseModel):
    """A task in this labeler's order. It does not say which version wrote what."""

    id: int
    campaign: str
    kind: Kind
    prompt: dict[str, Any] = Field(description='{"prompt": text} or {"messages": […]}.')
    answers: list[ShownAnswer]
    lease_expires_at: datetime


class JudgmentBody(Strict):
    """Lists hold one element a response, in the order in which the task was shown."""

    key: str = Field(description="Chosen by the client; sending the same again with the same key is harmless.")
    ranks: list[int] = []
    ratings: list[int | None] = []
    flags: list[list[str]] = []
    notes: list[str] = []
    note: str = ""
    answer: str = Field(default="", description="The text of a demonstration.")
    seconds: float = 0.0

    def draft(self) -> Draft:
        return Draft(
            key=self.key,
            ranks=tuple(self.ranks),
            ratings=tuple(self.ratings),
            flags=tuple(tuple(flags) for flags in self.flags),
            notes=tuple(self.notes),
            note=self.note,
            answer=self.answer,
            seconds=self.seconds,
        )


class ReceiptReply(BaseModel):
    """The judgment is on the disk."""

    judgment_id: int
    task_id: int
    revision: int


class SkipBody(Strict):
    reason: str


class LabelerBody(Strict):
    name: str
    role: Role = Role.LABELER


class LabelerReply(BaseModel):
    name: str
    role: Role
    can_sign_in: bool
    created_at: datetime


class TokenReply(BaseModel):
    name: str
    token: str = Field(description="Shown only now; the server keeps a hash.")
