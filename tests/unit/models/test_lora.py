"""Adapters in a model: what trains, what is merged, and that peft and the store make the same of what is published."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen3Config

from trimtab.models import lora
from trimtab.models.errors import ModelLoadError
from trimtab.models.packing import pack
from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.weights.errors import ParentMissingError, RefusedFileError, WrongParentError
from trimtab.weights.store import Store, open_store

EXAMPLE = Path(__file__).parents[3] / "examples" / "models" / "stories260K-hf"
SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "tied": Qwen3Config(**SMALL, **HEADS, head_dim=8, tie_word_embeddings=True),
    "transposed": GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
}
PACKED = pack([np.arange(start, start + length, dtype=np.int32) for start, length in ((3, 7), (20, 1), (30, 19))])
# What a machine without trimtab does with an adapter and its base.
PLAIN_PEFT = """
import sys, numpy, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
assert "trimtab" not in sys.modules
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float64), sys.argv[2])
assert any("lora_A" in name for name, _ in model.named_parameters())
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 20)[None]).logits
numpy.save(sys.argv[3], logits.numpy())
"""


def save_model(folder: Path, config, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(folder)
    return folder


def attach(model: torch.nn.Module, targets: tuple[str, ...] = (), seed: int = 0) -> None:
    lora.attach(model, rank=4, alpha=6.0, dropout=0.0, targets=targets, seed=seed, field="lora")


def trained(model: torch.nn.Module, seed: int = 1) -> None:
    """As after some training: no adapter is nothing."""
    torch.manual_seed(seed)
    for layer in lora.adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B[lora.ADAPTER].weight, std=0.5)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_policy_is_a_plain_model_whose_forward_is_that_of_base_and_adapters(tmp_path, name):
    folder = save_model(tmp_path / "base", MODELS[name])
    policy = Policy.load(str(folder), dtype="float64")
    before = policy.hidden(PACKED).detach()
    attach(policy.model)
    assert torch.equal(policy.hidden(PACKED), before), "adapters start as nothing"
    trained(policy.model)
    ours = policy.hidden(PACKED).detach()
    assert (ours - before).abs().max() > 0.1
    policy.save(tmp_path / "merged")
    plain = Policy.load(str(tmp_path / "merged"), dtype="float64")
    assert type(plain.model) is type(policy.model) and not lora.is_adapted(plain.model)
    assert float((plain.hidden(PACKED).detach() - ours).abs().max()) < 1e-6
    assert not any("lora" in key for key in load_file(tmp_path / "merged" / "model.safetensors"))


def test_only_adapters_and_a_scalar_head_train_and_a_seed_decides_how_they_start():
    models = []
    for seed in (5, 5, 6):
        policy = Policy.load(str(EXAMPLE))
        value = ScalarModel.from_policy(policy, seed=0)
        attach(policy.model, ("q_proj", "down_proj"), seed)
        attach(value.model, seed=seed)
        models.append((policy.model, value.model))
    state = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model, _ in models]
    assert state[0] and all(".lora_" in name for name in state[0])
    assert {name.split(".")[4] for name in state[0]} == {"q_proj", "down_proj"}
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])
    assert not all(torch.equal(state[0][name], state[2][name]) for name in state[0])
    heads = [name for name, p in models[0][1].named_parameters() if p.requires_grad and ".lora_" not in name]
    assert heads == ["score.weight"] and "score" not in lora.adapted_layers(models[0][1])


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "no_such_layer"])
def test_targets_that_are_no_linear_layers_of_the_body_are_refused_with_their_field(target):
    with pytest.raises(ModelLoadError, match=target) as refused:
        attach(Policy.load(str(EXAMPLE)).model, (target,))
    assert refused.value.field == "lora.target_modules"


@pytest.fixture
def published(tmp_path, monkeypatch) -> tuple[Store, Policy]:
    """A store with base@0 and an adapter on it, r/policy@3; and the policy that it was published from."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    store = open_store(str(tmp_path / "store"))
    base = store.publish(save_model(tmp_path / "model", MODELS["llama"]), run_id="r", name="base", step=0)
    policy = Policy.load(str(store.fetch(base)))
    attach(policy.model)
    trained(policy.model)
    publish(store, policy, base.version, tmp_path / "adapter", 3)
    return store, policy


def publish(store: Store, policy: Policy, base, folder: Path, step: int):
    folder.mkdir()
    lora.save_adapter(policy.model, folder, base)
    return store.publish(folder, run_id="r", name="policy", step=step, base=base)


def test_an_adapter_is_a_version_of_its_own_kind_whose_plain_folder_is_the_merged_model(published, tmp_path):
    store, policy = published
    manifest, base = store.get("r", "policy", 3), store.get("r", "base", 0)
    assert (manifest.kind, manifest.parent, manifest.parent_digest) == ("adapter", "r/base@0", base.version.digest)
    assert [entry.name for entry in manifest.files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert manifest.size_bytes < base.size_bytes / 2 and store.pinned_steps("r", "base") == {0}
    store.verify(manifest)
    fetched = store.fetch(manifest)
    policy.save(tmp_path / "saved")
    saved, ours = load_file(tmp_path / "saved" / "model.safetensors"), load_file(fetched / "model.safetensors")
    assert saved.keys() == ours.keys() and all(torch.equal(saved[key], ours[key]) for key in saved)
    assert store.read_file(manifest, "config.json") == store.read_file(base, "config.json")
    store.merge(manifest, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (fetched / "model.safetensors").read_bytes()
    again = Policy.load(str(store.fetch(base)))
    attach(again.model)
    trained(again.model)
    assert publish(store, again, base.version, tmp_path / "again", 3) == manifest, "the same again is a no-op"
    with store.changes(base.version, manifest) as changes:
        assert changes is None


def test_a_merged_copy_that_was_damaged_is_made_anew(published):
    store, _ = published
    manifest = store.get("r", "policy", 3)
    file = store.fetch(manifest) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert store.fetch(manifest) == file.parent and file.read_bytes() == whole


def test_an_adapter_on_another_base_or_none_and_a_folder_that_is_none_are_refused(published, tmp_path):
    store, policy = published
    other = store.publish(save_model(tmp_path / "other", MODELS["llama"], 1), run_id="r", name="base", step=1).version
    with pytest.raises(WrongParentError):
        publish(store, policy, replace(other, step=0), tmp_path / "wrong", 4)
    with pytest.raises(RefusedFileError, match="no peft folder"):
        store.publish(tmp_path / "other", run_id="r", name="policy", step=4, base=other)
    assert store.current_version("r", "policy") == store.get("r", "policy", 3).version
    shutil.rmtree(tmp_path / "store" / "r" / "base" / "step-000000000000")
    with pytest.raises(ParentMissingError, match="r/base@0, which is not in"):
        store.fetch(store.get("r", "policy", 3))


def test_plain_peft_loads_what_was_published(published, tmp_path):
    store, _ = published
    for name, step in (("base", 0), ("policy", 3)):
        store.pull(store.get("r", name, step), tmp_path / f"pulled-{name}")
    arguments = [tmp_path / "pulled-base", tmp_path / "pulled-policy", tmp_path / "logits.npy"]
    subprocess.run([sys.executable, "-I", "-c", PLAIN_PEFT, *map(str, arguments)], check=True, timeout=240)
    plain = AutoModelForCausalLM.from_pretrained(store.fetch(store.get("r", "policy", 3)), dtype=torch.float64)
    with torch.no_grad():
        ours = plain(input_ids=torch.arange(3, 20)[None]).logits.numpy()
    assert np.abs(np.load(arguments[2]) - ours).max() < 1e-5  # merged in float32
