"""Loading and saving plain Hugging Face folders; what is wrong with a folder is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    BloomForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from trimtab.models.errors import ModelLoadError
from trimtab.models.packing import pack
from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.models.tokenizers import decode_continuation, encode, encode_continuation, encode_prompt, load_tokenizer

WORDS = [f"w{i}" for i in range(20)]


def save_folder(folder: Path, *, vocab_size: int = 23, eos_behind: bool = False) -> Path:
    torch.manual_seed(0)
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "<bos> $A <eos>" if eos_behind else "<bos> $A"
    specials = [("<bos>", 0), ("<eos>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_folder(tmp_path / "model")


def test_what_a_policy_saves_loads_in_bare_transformers(folder, tmp_path):
    policy = Policy.load(str(folder))
    policy.save(tmp_path / "saved")
    ids = torch.tensor([[0, 5, 6, 7]])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").model(ids).last_hidden_state[0]
        ours = policy.hidden(pack([ids[0].numpy()]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode("w1 w2") == [0, 4, 5]
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_what_a_scalar_model_saves_loads_in_bare_transformers(folder, tmp_path):
    model = ScalarModel.from_policy(Policy.load(str(folder)), seed=0)
    model.set_normalization(0.25, 2.0)
    model.save(tmp_path / "reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    ids = np.array([0, 5, 6], dtype=np.int32)
    with torch.no_grad():
        want = theirs(torch.tensor(ids[None].astype(np.int64))).logits[0, 0]
        got = model.last_token_scores(pack([ids]))[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    again = ScalarModel.load(str(tmp_path / "reward"))
    assert (again.mean, again.std) == (0.25, 2.0)


def test_a_bfloat16_policy_is_saved_as_it_is(folder, tmp_path):
    Policy.load(str(folder), dtype="bfloat16").save(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


def test_the_tokenizer_digest_survives_saving_and_tells_tokenizers_apart(folder, tmp_path):
    policy = Policy.load(str(folder))
    policy.save(tmp_path / "saved")
    assert Policy.load(str(tmp_path / "saved")).tokenizer_digest == policy.tokenizer_digest
    other = Policy.load(str(save_folder(tmp_path / "other", eos_behind=True)))
    assert other.tokenizer_digest != policy.tokenizer_digest


def test_a_continuation_keeps_the_prompts_ids_and_the_space_at_the_border(folder, tmp_path):
    for source in (folder, save_folder(tmp_path / "ending", eos_behind=True)):
        tokenizer = Policy.load(str(source)).tokenizer
        ids, prompt_length = encode_continuation(tokenizer, "w1 w2", " w3")
        assert ids.tolist() == [0, 4, 5, 6] and prompt_length == 3
        assert encode_prompt(tokenizer, "w1").tolist() == [0, 4]
        assert decode_continuation(tokenizer, ids[:3], ids[3:]) == " w3"


def spoil_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])


def drop_a_parameter(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda folder: (folder / "config.json").unlink(), "model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "weights"),
        (spoil_weights, "weights"),
        (drop_a_parameter, "weights"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer"),
    ],
)
def test_a_spoiled_folder_is_refused_by_what_is_wrong_with_it(folder, spoil, field):
    spoil(folder)
    with pytest.raises(ModelLoadError) as refused:
        Policy.load(str(folder))
    assert refused.value.field == field and str(folder) in str(refused.value) and "\n" not in str(refused.value)


def test_an_unknown_folder_a_wrong_dtype_and_pickled_weights_are_refused(folder, tmp_path):
    with pytest.raises(ModelLoadError, match="not a model folder"):
        Policy.load(str(tmp_path / "nowhere"))
    with pytest.raises(ModelLoadError, match="dtype"):
        Policy.load(str(folder), dtype="int8")
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(LlamaForCausalLM.from_pretrained(folder).state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(ModelLoadError):
        Policy.load(str(pickled))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="22"):
        Policy.load(str(save_folder(tmp_path / "small", vocab_size=20)))


def test_a_classifier_with_two_labels_is_no_reward_model(folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "two")
    with pytest.raises(ModelLoadError, match="2 labels"):
        ScalarModel.load(str(tmp_path / "two"))


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_a_model_that_would_mix_packed_sequences_is_refused(folder, kind):
    shape = {"vocab_size": 23, "hidden_size": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
    model = BloomForCausalLM(BloomConfig(**shape))
    if kind == "reward":
        model = BloomForSequenceClassification(BloomConfig(**shape, num_labels=1))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    with pytest.raises(ModelLoadError, match="mixes sequences"):
        (Policy if kind == "policy" else ScalarModel).load(str(folder))


@pytest.mark.parametrize("eos_behind", [False, True])
def test_the_short_way_to_ids_gives_those_of_transformers(tmp_path, eos_behind):
    tokenizers = [load_tokenizer(str(save_folder(tmp_path, eos_behind=eos_behind)))]
    tokenizers.append(load_tokenizer("examples/models/stories260K-hf"))
    for tokenizer in tokenizers:
        tokenizer(["w1", "w1 w2 w3"], truncation=True, max_length=2)  # leaves its settings in the core
        for text in ("", "w1 w2  w3", "Once upon a time, ünïcode \U0001f600\n", "<eos> w1 <bos>", " leading"):
            for special in (True, False):
                want = tokenizer.encode(text, add_special_tokens=special)
                assert encode(tokenizer, text, special=special).tolist() == want, (text, special)
