"""Answers for a campaign's prompts, sampled from its policies through `trimtab_client`.

Prompts imported without responses are tasks in the state "filling". Each gets its samples from every source, equal
texts only once, and becomes ready in one transaction: what was begun and not written is simply sampled again, with the
same seeds. Several servers on one database do not feed one campaign at a time: it is claimed, and claims expire.
"""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from sqlalchemy import func, or_, select, update

from trimtab.labeling.campaigns import CampaignPlan, Source, find_campaign, plan_of
from trimtab.labeling.database import Database
from trimtab.labeling.errors import LabelingError
from trimtab.labeling.prompts import Prompt
from trimtab.labeling.rows import Answer
from trimtab.labeling.tables import Campaign, Response, Task
from trimtab.labeling.vocabulary import FEWEST_RESPONSES, CampaignState, Kind, TaskState
from trimtab.runtime.logs import get_logger
from trimtab_client import ChannelOptions, Completion, GeneratorClient, ModelVersion, Sampling, TrimtabError

log = get_logger(__name__)

TASKS_PER_BATCH = 32
ROUNDS_FOR_DUPLICATES = 4  # after these a task is ranked with the distinct answers there are
CLAIM = timedelta(minutes=10)
GENERATE_TIMEOUT_S = 540.0
POLL_S = 2.0
LONGEST_PAUSE_S = 60.0


class FeedError(LabelingError):
    """A campaign's generator cannot be asked, or does not serve what the campaign names."""


@dataclass(frozen=True)
class FeedReport:
    """What feeding did: tasks made ready, comparisons with equal answers, tasks with fewer answers than asked."""

    ready: int = 0
    identical: int = 0
    short: int = 0

    def plus(self, other: FeedReport) -> FeedReport:
        return FeedReport(self.ready + other.ready, self.identical + other.identical, self.short + other.short)


@dataclass
class _Filling:
    """A task and the answers it has so far, by source."""

    task_id: int
    key: str
    prompt: Prompt
    answers: dict[int, list[Answer]] = field(default_factory=lambda: defaultdict(list))

    def missing(self, index: int, source: Source) -> int:
        return source.samples - len(self.answers[index])

    def take(self, index: int, answer: Answer, *, keep_equal: bool) -> None:
        there = [one.text for i, answers in self.answers.items() for one in answers if not keep_equal or i == index]
        if answer.text not in there:
            self.answers[index].append(answer)


def feed_campaign(
    database: Database,
    name: str,
    *,
    options: ChannelOptions | None = None,
    stop: threading.Event | None = None,
    progress: Callable[[FeedReport], None] = lambda report: None,
) -> FeedReport:
    """Fill all tasks of a campaign that wait for answers; goes on where an earlier call stopped.

    Raises:
        NotFoundError: no such campaign.
        FeedError: a generator cannot be asked; what was filled before stays.
    """
    with database.read() as session:
        plan = plan_of(find_campaign(session, name))
    report = FeedReport()
    while stop is None or not stop.is_set():
        batch = _filling(database, name)
        if not batch:
            break
        for index, source in enumerate(plan.sources):
            _sample(batch, index, source, plan, options or ChannelOptions())
        report = report.plus(_write(database, name, plan, batch))
        progress(report)
    return report


def _filling(database: Database, name: str) -> list[_Filling]:
    with database.read() as session:
        tasks = session.scalars(
            select(Task)
            .join(Campaign, Task.campaign_id == Campaign.id)
            .where(Campaign.name == name, Task.state == TaskState.FILLING)
            .order_by(Task.position)
            .limit(TASKS_PER_BATCH)
        )
        return [_Filling(task.id, task.key, Prompt.from_json(task.prompt)) for task in tasks]


def _sample(batch: list[_Filling], index: int, source: Source, plan: CampaignPlan, options: ChannelOptions) -> None:
    keep_equal = plan.kind == Kind.COMPARISON
    try:
        with GeneratorClient(source.address, options) as client:
            pin = _serve_version(client, source)
            for attempt in range(ROUNDS_FOR_DUPLICATES):
                wanting = [task for task in batch if task.missing(index, source) > 0]
                for group in _alike(wanting, index, source):
                    for task, completion in _generate(client, group, index, source, plan, pin, attempt):
                        task.take(index, _answer(completion), keep_equal=keep_equal)
    except (TrimtabError, ValueError, OSError) as error:
        raise FeedError(f"{source.address}: {error}") from error


def _serve_version(client: GeneratorClient, source: Source) -> ModelVersion | None:
    """Make the generator serve the version that the source names; None where it names none."""
    if not source.version:
        return None
    run_id, _, rest = source.version.removeprefix("version:").partition("/")
    model, _, step = rest.partition("@")
    if not (run_id and model and step.isdigit()):
        raise FeedError(f"version: {source.version!r} is not RUN/NAME@STEP")
    wanted = ModelVersion(run_id, model, int(step))
    served = client.get_model().version
    if (served.run_id, served.name, served.step) != (wanted.run_id, wanted.name, wanted.step):
        client.load_version(wanted)
    return wanted


def _alike(tasks: list[_Filling], index: int, source: Source) -> list[list[_Filling]]:
    """Tasks that want equally many answers: one call asks for the same number of each prompt."""
    groups: dict[int, list[_Filling]] = defaultdict(list)
    for task in tasks:
        groups[task.missing(index, source)].append(task)
    return list(groups.values())


def _generate(
    client: GeneratorClient,
    tasks: Sequence[_Filling],
    index: int,
    source: Source,
    plan: CampaignPlan,
    pin: ModelVersion | None,
    attempt: int,
) -> Iterator[tuple[_Filling, Completion]]:
    n = tasks[0].missing(index, source)
    sampling = Sampling(
        n=n, max_tokens=plan.sampling.max_tokens, temperature=plan.sampling.temperature, top_p=plan.sampling.top_p
    )
    prompts = [_wire_prompt(task.prompt) for task in tasks]
    seeds = [[_seed(plan.sampling.seed, task.key, index, attempt, sample) for sample in range(n)] for task in tasks]
    completions = client.generate(prompts, sampling, seeds=seeds, version=pin, timeout_s=GENERATE_TIMEOUT_S)
    in_order = sorted(completions, key=lambda one: (one.prompt_index, one.sample_index))
    return ((tasks[one.prompt_index], one) for one in in_order)


def _wire_prompt(prompt: Prompt) -> str | list[dict[str, str]]:
    if prompt.is_chat:
        return [{"role": message.role, "content": message.content} for message in prompt.messages]
    return prompt.text


def _answer(completion: Completion) -> Answer:
    versions = dict.fromkeys(str(run.version) for run in completion.versions)
    return Answer(completion.text.replace("\x00", "\ufffd"), completion.finish_reason == "stop", " + ".join(versions))


def _seed(seed: int, key: str, *numbers: int) -> int:
    """The same for the same sample of the same task, whatever was sampled before."""
    named = "/".join([str(seed), key, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:4], "little")


def _write(database: Database, name: str, plan: CampaignPlan, batch: list[_Filling]) -> FeedReport:
    report = FeedReport()
    with database.write() as session:
        find_campaign(session, name)
        for filled in batch:
            task = session.get(Task, filled.task_id, with_for_update=True)
            if task is None or task.state != TaskState.FILLING:
                continue  # deleted, or filled by another server whose claim this one outlived
            answers = [answer for index in range(len(plan.sources)) for answer in filled.answers[index]]
            if len(answers) < FEWEST_RESPONSES:
                raise FeedError(f"task {task.key}: fewer than {FEWEST_RESPONSES} different answers; raise temperature")
            session.add_all(
                Response(task_id=task.id, position=i, text=answer.text, ended=answer.ended, version=answer.version)
                for i, answer in enumerate(answers)
            )
            is_identical = plan.kind == Kind.COMPARISON and answers[0].text == answers[1].text
            task.state = TaskState.IDENTICAL if is_identical else TaskState.READY
            wanted = sum(source.samples for source in plan.sources)
            report = report.plus(FeedReport(int(not is_identical), int(is_identical), int(len(answers) < wanted)))
    return report


class Feeder:
    """A thread that feeds open campaigns as prompts come in. A generator that is away is asked again, less and less."""

    def __init__(self, database: Database, options: ChannelOptions | None = None) -> None:
        self._database = database
        self._options = options or ChannelOptions()
        self._me = uuid4().hex
        self._stop = threading.Event()
        self._failures: dict[str, int] = defaultdict(int)
        self._not_before: dict[str, datetime] = {}
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the batch in hand; a batch that is not written is sampled again next time."""
        self._stop.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            for name in self._hungry():
                if self._claim(name):
                    self._feed(name)

    def _hungry(self) -> list[str]:
        now = datetime.now(UTC)
        waiting = select(Task.id).where(Task.campaign_id == Campaign.id, Task.state == TaskState.FILLING).exists()
        with self._database.read() as session:
            names = session.scalars(select(Campaign.name).where(Campaign.state == CampaignState.OPEN, waiting)).all()
        return [name for name in names if self._not_before.get(name, now) <= now]

    def _claim(self, name: str) -> bool:
        now = datetime.now(UTC)
        free = or_(Campaign.feeder_until.is_(None), Campaign.feeder_until <= now, Campaign.feeder == self._me)
        with self._database.write() as session:
            session.execute(
                update(Campaign)
                .where(Campaign.name == name, free)
                .values(feeder=self._me, feeder_until=now + CLAIM)
                .execution_options(synchronize_session=False)
            )
            mine = select(func.count()).select_from(Campaign).where(Campaign.name == name, Campaign.feeder == self._me)
            return bool(session.scalar(mine))

    def _feed(self, name: str) -> None:
        try:
            report = feed_campaign(
                self._database, name, options=self._options, stop=self._stop, progress=lambda _: self._renew(name)
            )
        except LabelingError as error:
            self._failures[name] += 1
            pause = timedelta(seconds=min(LONGEST_PAUSE_S, 2.0 ** self._failures[name]))
            self._not_before[name] = datetime.now(UTC) + pause
            self._finish(name, str(error))
            log.warning("feeding failed", campaign=name, reason=str(error), again_in_s=pause.total_seconds())
        else:
            self._failures.pop(name, None)
            self._finish(name, None)
            log.info("fed", campaign=name, ready=report.ready, identical=report.identical, short=report.short)

    def _renew(self, name: str) -> None:
        self._claim(name)

    def _finish(self, name: str, error: str | None) -> None:
        with self._database.write() as session:
            campaign = find_campaign(session, name)
            campaign.feeder_until, campaign.feed_error = None, error
