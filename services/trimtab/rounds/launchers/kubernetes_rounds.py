"""The services of a run of rounds on a cluster: model services are its Deployments, a stage of training is a Job.

The counterpart of `stages.services.RoundServices`, with the same methods. Data goes to the object store before the Job
that reads it; what a Job says in its log comes back as lines and as metrics of the run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.rounds.launchers.kubernetes import Cluster, ClusterError
from trimtab.rounds.launchers.kubernetes_jobs import OF_ROUNDS, OF_STAGE, TrainingJobs, job_name, run_digest, step_of
from trimtab.rounds.launchers.kubernetes_services import ModelServices
from trimtab.rounds.launchers.kubernetes_states import JobState, JobStatus
from trimtab.rounds.launchers.trainer_job import RunFile
from trimtab.rounds.stages.training_runs import TrainedRun
from trimtab.runtime.caller import channel_options
from trimtab.weights.store import Store
from trimtab_client import GeneratorClient, ModelVersion, RewardClient, Unavailable

PORTS = {"generator": 7101, "reward": 7102, "reference": 7103}
LOAD_S = 600.0
DATA_FIELDS = ("data", "validation_data", "normalization_data", "prompts")
PUBLISHES = {"sft": "policy", "reward": "reward", "ppo": "policy"}
KEPT_LINES = 20


@dataclass(frozen=True)
class ClusterPlace:
    """Where a run of rounds has its things.

    Attributes:
        data: fsspec URL under which training data is put for the Jobs.
        share_gpus: the model services give their GPUs to a Job that does not call them (SFT, reward model).
    """

    name: str
    store: Store
    data: str
    runs: Path
    share_gpus: bool = False
    keep_versions: int = 5


class KubernetesRoundServices:
    """Deployments and Jobs of one namespace on behalf of a run of rounds.

    `waiting` is told what is waited for ("" when it is there), `say` what a Job's trainer says of its steps.
    """

    def __init__(
        self,
        cluster: Cluster,
        place: ClusterPlace,
        *,
        gold: Callable[[str], str],
        waiting: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self._place = place
        self._jobs = TrainingJobs(cluster, {"TRIMTAB_KEEP_VERSIONS": str(place.keep_versions)})
        self._models = ModelServices(cluster, waiting)
        self._gold = gold
        self._waiting = waiting
        self._say = say

    def generator(self, version: ModelVersion) -> str:
        """The generators, once all of them serve a policy."""
        return self.generator_and_reference(version, None)[0]

    def generator_and_reference(self, version: ModelVersion, reference: ModelVersion | None) -> tuple[str, str]:
        """Generators that serve one policy, and references that serve another (SFT, always)."""
        wanted = {"generator": f"version:{version}"}
        if reference is not None:
            wanted["reference"] = f"version:{reference}"
        self._models.serve(**wanted)
        generators = self._load("generator", version, GeneratorClient)
        return generators, self._at("reference") if reference is not None else ""

    def reward(self, version: ModelVersion) -> str:
        """The reward services, once all of them serve a reward model."""
        self._models.serve(reward=f"version:{version}")
        return self._load("reward", version, RewardClient)

    def _load(self, name: str, version: ModelVersion, client_class: type[GeneratorClient] | type[RewardClient]) -> str:
        """Their addresses, once each serves the version: PPO may have moved replicas on since they started."""
        deadline = time.monotonic() + LOAD_S
        while True:
            addresses = self._at(name)
            try:
                with client_class(addresses, channel_options()) as client:
                    client.load_version(version)
                return addresses
            except Unavailable as error:  # a replica has gone meanwhile: look who is there now
                if time.monotonic() > deadline:
                    raise ClusterError(f"deployment {name} does not come to serve {version}: {error}") from error
            self._models.wait_rolled_out(name)

    def _at(self, name: str) -> str:
        return self._models.addresses(name, PORTS[name])

    def gold(self, source: str) -> str:
        """A reward service for a model that judges or labels: a process of this pod, for no client must meet it."""
        return self._gold(source)

    def train(self, stage: str, run_id: str, config: Any) -> TrainedRun:
        """Run a stage of training as a Job, to its end; removes the Job.

        An earlier attempt at the same, whose Job is there and has not failed, is gone on with instead.

        Raises:
            ClusterError: the Job failed; the message ends with what its trainer said last.
        """
        config = self._reachable(stage, config)
        run = RunFile.of(run_id, stage, config)
        digest = run_digest(run)
        labels = {OF_ROUNDS: job_name(self._place.name), OF_STAGE: digest}
        earlier = self._jobs.adopt(run, labels)
        if earlier is not None and earlier != run_id:
            self._say(f"going on with run {earlier}")
            run = RunFile.of(earlier, stage, config)
        lends = self._place.share_gpus and stage in ("sft", "reward")
        with self._models.lent(("generator", "reward", "reference")) if lends else nullcontext():
            name = self._jobs.ensure(run, labels)
            teller = _Teller(self._place.runs / run.run_id, self._say)
            ended = self._jobs.follow(name, self._told, teller.line)
        if ended.state == JobState.FAILED:
            raise ClusterError(f"job {name} failed ({ended.detail}): {teller.last_words or 'its log is empty'}")
        published = self._published(run.run_id, PUBLISHES[stage])
        self._jobs.remove(name)
        return TrainedRun(run.run_id, published)

    def _published(self, run_id: str, model: str) -> tuple[ModelVersion, ...]:
        found = tuple(manifest.version for manifest in self._place.store.versions(run_id, model))
        if not found:
            raise ClusterError(f"run {run_id} has ended and published no {model}")
        return found

    def _told(self, status: JobStatus) -> None:
        self._waiting(status.detail if status.state == JobState.WAITING else "")

    def _reachable(self, stage: str, config: Any) -> Any:
        """The stage's config with data where a pod finds it, and no generator where that is lent.

        Services go by their names: over hours of training their pods come and go.
        """
        changed = type(config)()
        changed.CopyFrom(config)
        for name, port in PORTS.items():
            field = f"{name}_address"
            if field in changed.DESCRIPTOR.fields_by_name and getattr(changed, field):
                setattr(changed, field, f"dns:///{name}.{self._jobs.cluster.namespace}.svc:{port}")
        if self._place.share_gpus and stage == "reward":
            changed.ClearField("generator_address")  # the score is normalised on the rankings' own answers then
            changed.ClearField("normalization_data")
        for field in DATA_FIELDS:
            if field in changed.DESCRIPTOR.fields_by_name and getattr(changed, field):
                setattr(changed, field, self.data(getattr(changed, field)))
        return changed

    def data(self, source: str) -> str:
        """The URL of a file or folder of this machine, put there under its digest; anything else as it is."""
        import fsspec

        path = Path(source)
        files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
        if not files:
            return source
        contents = [(file.name, file.read_bytes()) for file in files]
        url = f"{self._place.data.rstrip('/')}/{_digest(contents)}"
        filesystem, root = fsspec.core.url_to_fs(url)
        for name, content in contents:
            target = f"{root}/{name}"
            if not (filesystem.exists(target) and filesystem.size(target) == len(content)):
                filesystem.makedirs(root, exist_ok=True)
                filesystem.pipe_file(target, content)
        return f"{url}/{path.name}" if path.is_file() else url


class _Teller:
    """A Job's log: steps go to the run's metrics, where `rounds status` looks, and all else is kept for last words."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._file = folder / "metrics.jsonl"
        self._say = say
        self._lines: list[str] = []

    def line(self, line: str) -> None:
        step = step_of(line)
        if step is None:
            self._lines = [*self._lines, line][-KEPT_LINES:]
            return
        number, total, values = step
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": number} | values) + "\n")
        shown = " ".join(f"{name}={value:.4g}" for name, value in list(values.items())[:3])
        self._say(f"step {number}/{total} {shown}")

    @property
    def last_words(self) -> str:
        from trimtab.rounds.launchers.log_tail import telling_line

        return telling_line(self._lines)


def _digest(contents: Sequence[tuple[str, bytes]]) -> str:
    hasher = hashlib.sha256()
    for name, content in contents:
        hasher.update(f"{name} {len(content)} ".encode() + content)
    return hasher.hexdigest()[:32]
