"""The weights that vLLM serves: changed in place, proven by a probe, and put back where the proof fails."""

import itertools
import time
from pathlib import Path
from typing import Any

from vllm.inputs import tokens_input  # type: ignore[import-not-found]

from trimtab.generator.engine import StagedWeights
from trimtab.generator.vllm.adapter import change_weights, stage_weights
from trimtab.generator.vllm.probe import Expected, Measured, Probe
from trimtab.generator.vllm.sampling import probe_params
from trimtab.models.policy import Policy
from trimtab.runtime.logs import get_logger
from trimtab_client.versions import ModelVersion

log = get_logger(__name__)

# Before every other request: to vLLM the smaller number is the more urgent.
FIRST = -1


class Weights:
    """The served version, the policy in host memory that says what it should compute, and the way to the next.

    Attributes:
        versions: what each of vLLM's weight labels stands for.
        label: the one of now.
        pause_s: how long requests were paused for the newest change.
    """

    def __init__(self, llm: Any, policy: Policy, version: ModelVersion, folder: str, *, max_length: int) -> None:
        self._llm = llm
        self._policy = policy
        self._probe = Probe(policy, max_length)
        self._folder = folder
        self._labels = itertools.count()
        self._probes = itertools.count()
        self.version = version
        self.pause_s = 0.0
        self.label = ""
        self.versions: dict[str, ModelVersion] = {}

    @property
    def is_dead(self) -> bool:
        """Whether vLLM's engine process is gone."""
        return bool(self._llm.errored)

    async def ask(self) -> None:
        """Return when vLLM's engine process answers; raises where it is gone."""
        await self._llm.get_weight_version()

    async def begin(self, *, check: bool) -> None:
        """Name the weights that vLLM has loaded itself, and check them. Raises ValueError.

        Then they are changed for themselves: the first change takes longer than the later ones, and one that goes
        wrong is better met here.
        """
        self.label = self._new_label(self.version)
        await self._llm.update_weight_version(self.label)
        if check:
            expected = self._probe.expected()
            difference = self._probe.check(expected, await self._measure())
            await stage_weights(self._llm, self._folder)
            await change_weights(self._llm, self._folder, self.label, recompute_kv=True)
            self._probe.check(expected, await self._measure())
            log.info("vLLM agrees with a full forward, before and after a reload", mean_nats=difference)

    def live_tensors(self) -> dict[str, Any]:
        """The state dict that a new version must fit."""
        return self._policy.model.state_dict()

    def expected(self, staged: StagedWeights) -> Expected:
        """What a full forward with the staged tensors says of the probe; blocks."""
        return self._probe.expected(staged.tensors)

    async def stage(self, staged: StagedWeights) -> None:
        """Have vLLM make the version ready beside the one that serves."""
        await stage_weights(self._llm, str(staged.folder))

    async def change(self, staged: StagedWeights, expected: Expected, *, recompute_kv: bool) -> ModelVersion:
        """Serve `staged`, or go on as before. It takes long where another version was staged after this one.

        Raises ValueError where vLLM refused it or computes something else, with the version before loaded anew; what
        was sampled meanwhile is worthless then. Anything else means that vLLM cannot serve any more.
        """
        started_s, label = time.monotonic(), self._new_label(staged.version)
        try:
            await change_weights(self._llm, str(staged.folder), label, recompute_kv=recompute_kv)
            self.pause_s = time.monotonic() - started_s
            difference = self._probe.check(expected, await self._measure())
        except Exception as error:
            try:
                await self._put_back()
            except Exception as failure:
                raise RuntimeError(f"{self.version} could not be loaded again ({failure}) after: {error}") from failure
            raise ValueError(f"vLLM did not take it, {self.version} serves on: {error}") from error
        self.version, self.label, self._folder = staged.version, label, str(Path(staged.folder or ""))
        self._adopt(staged)
        checked_s = time.monotonic() - started_s - self.pause_s
        seconds = {"paused_s": round(self.pause_s, 4), "checked_s": round(checked_s, 4)}
        log.info("weights changed in place", version=str(self.version), mean_nats=difference, **seconds)
        return self.version

    async def _put_back(self) -> None:
        """Load the version before again, and see that it is that."""
        label = self._new_label(self.version)
        await change_weights(self._llm, self._folder, label, recompute_kv=True)
        self._probe.check(self._probe.expected(), await self._measure())
        self.label = label

    async def _measure(self) -> Measured:
        """Ask vLLM for the logits of the probe's tokens and one token more."""
        name = f"probe-{next(self._probes)}"
        prompt = tokens_input(self._probe.token_ids, cache_salt=name)
        async for output in self._llm.generate(prompt, probe_params(), name, priority=FIRST):
            if output.finished:
                completion = output.outputs[0]
                return Measured.of(self._probe.token_ids, output.prompt_logprobs, completion)
        raise RuntimeError("vLLM gave no answer to the probe")

    def _adopt(self, staged: StagedWeights) -> None:
        """Keep the new tensors as the policy's own; the old ones go with `staged`."""
        live = self._policy.model.state_dict(keep_vars=True)
        for name, tensor in staged.tensors.items():
            before, live[name].data = live[name].data, tensor.data
            tensor.data = before

    def _new_label(self, version: ModelVersion) -> str:
        label = f"w{next(self._labels)}"
        self.versions[label] = version
        return label
