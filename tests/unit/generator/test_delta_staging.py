"""A generator takes over a delta by its changed elements, and ends with the very weights of the published folder."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.generator.engine import StagedPatches, StagedWeights, SwapMode
from trimtab.generator.loading import stage_weights
from trimtab.models.policy import Policy
from trimtab.runtime.errors import ServiceError
from trimtab.weights.delta_file import DELTA_FILE
from trimtab.weights.delta_publish import Deltas
from trimtab.weights.digests import digest_file
from trimtab.weights.store import Store, open_store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


class Versions:
    """A published chain of one tiny policy: step 1 is full, each later one a delta that changes `changed` elements."""

    def __init__(self, lab: ModuleType, root: Path, *, tied: bool) -> None:
        self.store: Store = open_store(str(root / "store"))
        self.root, self.deltas = root, Deltas(cache_dir=root / "publisher", max_share=1.0)
        model = lab.build("llama").to(torch.bfloat16)
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(root / "step-1")
        lab.byte_tokenizer().save_pretrained(root / "step-1")
        self.steps = [self._publish(1)]

    def folder(self, step: int) -> Path:
        return self.root / f"step-{step}"

    def add(self, *, every: int = 50, value: float | None = None):
        """Publish the next step: every so manieth element of each tensor changes."""
        step = len(self.steps) + 1
        shutil.copytree(self.folder(step - 1), self.folder(step))
        tensors = load_file(self.folder(step) / "model.safetensors")
        for tensor in tensors.values():
            flat = tensor.view(-1)[step::every]
            flat.copy_(flat * 1.5 + 0.01 if value is None else torch.full_like(flat, value))
        save_file(tensors, self.folder(step) / "model.safetensors", metadata={"format": "pt"})
        self.steps.append(self._publish(step))
        return self.steps[-1]

    def _publish(self, step: int):
        return self.store.publish(self.folder(step), run_id="run", name="policy", step=step, deltas=self.deltas)


def swapped(lab: ModuleType, policy: Policy, staged: StagedPatches | StagedWeights, base) -> None:
    engine = lab.engine_of(policy.model, version=base)
    done = engine.swap(staged, SwapMode.KEEP)
    engine.step()
    assert done.result(timeout=0) == staged.version


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_chain_of_deltas_is_taken_over_bit_by_bit(lab: ModuleType, tmp_path: Path, dtype: str, tied: bool) -> None:
    versions = Versions(lab, tmp_path, tied=tied)
    policy = Policy.load(str(versions.folder(1)), dtype=dtype)
    base = versions.steps[0].version
    versions.add()
    for latest in (versions.add(), versions.add()):  # two deltas at once, then one
        assert latest.kind == "delta"
        staged = stage_weights(versions.store, latest.version, policy, base)
        assert isinstance(staged, StagedPatches)
        swapped(lab, policy, staged, base)
        base = latest.version
        live = policy.model.state_dict()
        files = load_file(versions.folder(base.step) / "model.safetensors")
        assert files and all(torch.equal(live[name], tensor.to(live[name].dtype)) for name, tensor in files.items())
        assert ("lm_head.weight" in files) == (not tied)
    assert torch.equal(live["lm_head.weight"], live["model.embed_tokens.weight"]) == tied


def test_what_is_no_delta_on_the_served_version_is_loaded_whole(lab: ModuleType, tmp_path: Path) -> None:
    versions = Versions(lab, tmp_path, tied=False)
    policy = Policy.load(str(versions.folder(1)), dtype="bfloat16")
    second, first = versions.add(), versions.steps[0].version
    dense = versions.add(every=1)
    foreign = replace(first, digest="blake3:" + "0" * 64)
    for target, base in ((second.version, foreign), (dense.version, second.version), (first, second.version)):
        staged = stage_weights(versions.store, target, policy, base)
        assert isinstance(staged, StagedWeights), (target, base)
        swapped(lab, policy, staged, base)
        files = load_file(versions.folder(target.step) / "model.safetensors")
        assert all(torch.equal(policy.model.state_dict()[name], tensor) for name, tensor in files.items())


def test_a_delta_of_numbers_that_are_not_finite_is_refused(lab: ModuleType, tmp_path: Path) -> None:
    versions = Versions(lab, tmp_path, tied=False)
    policy = Policy.load(str(versions.folder(1)), dtype="bfloat16")
    broken = versions.add(value=torch.inf)
    with pytest.raises(ServiceError, match="not finite"):
        stage_weights(versions.store, broken.version, policy, versions.steps[0].version)


def test_a_damaged_delta_is_refused_even_where_its_manifest_agrees(lab: ModuleType, tmp_path: Path) -> None:
    versions = Versions(lab, tmp_path, tied=False)
    policy = Policy.load(str(versions.folder(1)), dtype="bfloat16")
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    base, second = versions.steps[0].version, versions.add()
    folder = tmp_path / "store" / "run" / "policy" / f"step-{2:012d}"
    delta, manifest = folder / DELTA_FILE, folder / "manifest.json"
    whole, honest = delta.read_bytes(), manifest.read_text()
    digest = digest_file(delta)
    for byte in (3, len(whole) // 2, len(whole) - 3):
        delta.write_bytes(whole[:byte] + bytes([whole[byte] ^ 16]) + whole[byte + 1 :])
        for text in (honest, honest.replace(digest, digest_file(delta))):
            manifest.write_text(text)
            with pytest.raises(ServiceError) as refused:
                stage_weights(open_store(versions.store.url), second.version, policy, base)
            assert refused.value.code == grpc.StatusCode.DATA_LOSS, refused.value
    delta.unlink()
    with pytest.raises(ServiceError) as missing:
        stage_weights(open_store(versions.store.url), second.version, policy, base)
    assert missing.value.code == grpc.StatusCode.DATA_LOSS
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())


def test_weights_that_are_not_the_version_they_say_are_loaded_whole(lab: ModuleType, tmp_path: Path) -> None:
    versions = Versions(lab, tmp_path, tied=False)
    policy = Policy.load(str(versions.folder(1)), dtype="bfloat16")
    policy.model.state_dict()["model.norm.weight"][0] += 1.0
    second = versions.add()
    staged = stage_weights(versions.store, second.version, policy, versions.steps[0].version)
    assert isinstance(staged, StagedWeights)
