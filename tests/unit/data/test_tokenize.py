"""Rows as token ids: the start token as the tokenizer puts it, the end token we add, and nothing lost in silence."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trimtab.trainer.data import (
    ChatMessage,
    DataError,
    Demonstration,
    PromptRow,
    Ranking,
    tokenize_demonstrations,
    tokenize_prompts,
    tokenize_rankings,
)

BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, <s> in front, as the small Llama-style tokenizers do it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)} | {"<s>": BOS, "</s>": EOS}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    result = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    result.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}assistant:"
    return result


def test_text_rows_start_with_bos_and_end_with_eos(tokenizer):
    (sequence,) = tokenize_demonstrations([Demonstration("", "abc")], tokenizer, 32, eos_token_id=EOS)
    assert sequence.token_ids_T.dtype == np.int32
    assert sequence.token_ids_T[0] == BOS and sequence.token_ids_T[-1] == EOS
    assert (len(sequence.token_ids_T), sequence.prompt_length) == (5, 1)


def test_prompt_and_response_meet_without_a_second_bos(tokenizer):
    (sequence,) = tokenize_demonstrations([Demonstration("ab", " cd")], tokenizer, 32, eos_token_id=EOS)
    assert sequence.prompt_length == 3
    assert tokenizer.decode(sequence.token_ids_T[1:-1]) == "ab cd"
    assert (sequence.token_ids_T == BOS).sum() == 1


def test_chat_rows_go_through_the_template(tokenizer):
    row = Demonstration((ChatMessage("user", "hi"),), "yo")
    (sequence,) = tokenize_demonstrations([row], tokenizer, 64, eos_token_id=EOS)
    assert tokenizer.decode(sequence.token_ids_T[: sequence.prompt_length]) == "user:hi;assistant:"
    assert tokenizer.decode(sequence.token_ids_T[sequence.prompt_length : -1]) == "yo"


def test_long_responses_are_cut_and_counted_and_lose_their_end_token(tokenizer):
    rows = [Demonstration("ab", "c" * 20), Demonstration("ab", "c")]
    result = tokenize_demonstrations(rows, tokenizer, 10, eos_token_id=EOS)
    assert (len(result), result.truncated_count, result.dropped_count) == (2, 1, 0)
    assert len(result[0].token_ids_T) == 10 and result[0].token_ids_T[-1] != EOS


def test_rows_whose_prompt_fills_the_model_are_dropped_and_counted(tokenizer):
    rows = [Demonstration("a" * 20, "b"), Demonstration("a", "b")]
    result = tokenize_demonstrations(rows, tokenizer, 10, eos_token_id=EOS)
    assert (len(result), result.dropped_count) == (1, 1)
    prompts = tokenize_prompts([PromptRow("a" * 20), PromptRow("a" * 9)], tokenizer, 10)
    assert ([len(ids) for ids in prompts], prompts.dropped_count) == ([10], 1)


def test_refusing_long_rows_names_the_row_and_the_field(tokenizer):
    rows = [Ranking("q", ("a", "b"), (1, 2)), Ranking("q", ("a", "b" * 30), (1, 2))]
    with pytest.raises(DataError, match=r"rows:2: responses\[1\]: 33 tokens"):
        tokenize_rankings(rows, tokenizer, 16, eos_token_id=EOS, on_long="refuse")


def test_rankings_keep_order_ranks_and_the_empty_prompt_is_bos_alone(tokenizer):
    row = Ranking("", ("x", "yy", "zzz"), (2, 1, 2), "ann", "t")
    (ranking,) = tokenize_rankings([row], tokenizer, 16, eos_token_id=EOS)
    assert [len(sequence.token_ids_T) for sequence in ranking.sequences] == [3, 4, 5]
    assert all(sequence.prompt_length == 1 for sequence in ranking.sequences)
    assert ranking.ranks_K.tolist() == [2, 1, 2] and (ranking.labeler, ranking.group) == ("ann", "t")


def test_responses_that_were_cut_off_get_no_end_token(tokenizer):
    row = Ranking("q", ("x", "yy"), (2, 1), ended=(True, False))
    (ranking,) = tokenize_rankings([row], tokenizer, 16, eos_token_id=EOS)
    assert [sequence.token_ids_T[-1] == EOS for sequence in ranking.sequences] == [True, False]


def test_chat_rows_without_a_template_are_refused_with_the_reason(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    with pytest.raises(DataError, match="no chat template"):
        tokenize_prompts([PromptRow((ChatMessage("user", "hi"),))], bare, 16)
