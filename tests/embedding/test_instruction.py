"""Instruction masks against NV-Embed's counting rule and by hand. About 2 seconds."""

import pytest
import torch
from tests.embedding.small_models import TEXTS, tokenizer

from bakeoff.embedding import encode_with_instruction, instruction_pool_mask, instruction_prompt


def byte_level_tokenizer():
    """Return a BPE tokenizer whose merges cross the border between instruction and text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "c"), ("x", "y")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, "ab", "abc", "xy", "<eos>"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def test_mask_by_hand():
    # <s> find the : | a dog ran </s>     and     <s> find the : | red tree </s> <pad>
    mask = instruction_pool_mask(tokenizer(), "find the : ", ["a dog ran", "red tree"])
    assert mask.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 0]]
    assert mask.dtype == torch.int64


def test_equals_the_official_count_where_that_is_right():
    """The released code zeroes as many positions as the instruction alone has tokens.

    Without a beginning-of-sequence token and without merges across the border, that is exact.
    """
    plain = tokenizer(bos=False)
    instruction = "find the red cat : "
    encoded = encode_with_instruction(plain, instruction, TEXTS)
    official = encoded["attention_mask"].clone()
    official[:, : len(plain.tokenize(instruction))] = 0
    assert torch.equal(encoded["pool_mask"], official)
    # With one, the official rule keeps the instruction's last token; ours does not.
    encoded = encode_with_instruction(tokenizer(), instruction, TEXTS)
    official = encoded["attention_mask"].clone()
    official[:, : len(plain.tokenize(instruction))] = 0
    assert ((official - encoded["pool_mask"]).sum(dim=1) == 1).all()


def test_a_token_across_the_border_is_text():
    bpe = byte_level_tokenizer()
    encoded = encode_with_instruction(bpe, "xya", ["bz", "z"])
    tokens = [bpe.convert_ids_to_tokens(row) for row in encoded["input_ids"].tolist()]
    assert tokens[0] == ["xy", "ab", "z", "<eos>"]
    assert tokens[1] == ["xy", "a", "z", "<eos>"]
    assert encoded["pool_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]


def test_padding_is_the_end_of_sequence_and_the_real_one_is_kept():
    bpe = byte_level_tokenizer()
    assert bpe.pad_token_id is None
    encoded = encode_with_instruction(bpe, "", ["abc", "abcxyz"])
    end = bpe.eos_token_id
    assert encoded["input_ids"][0].tolist() == [bpe.convert_tokens_to_ids("abc"), end, end, end]
    assert encoded["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert torch.equal(encoded["pool_mask"], encoded["attention_mask"])


def test_ids_are_those_of_the_tokenizer():
    ours = encode_with_instruction(tokenizer(), "find : ", TEXTS)
    theirs = tokenizer()(["find : " + text for text in TEXTS], padding=True, return_tensors="pt")
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])


def test_truncation_keeps_the_end_of_sequence():
    bpe = byte_level_tokenizer()
    encoded = encode_with_instruction(bpe, "xy", ["pqrstuvw", "p"], max_length=5)
    assert encoded["input_ids"].shape == (2, 5)
    assert encoded["input_ids"][0, -1] == bpe.eos_token_id
    assert encoded["pool_mask"].tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]
    without = encode_with_instruction(bpe, "xy", ["pq"], add_eos=False)
    assert without["pool_mask"].tolist() == [[0, 1, 1]]


def test_prompt_is_written_as_released():
    assert instruction_prompt("Find it") == "Instruct: Find it\nQuery: "
    assert instruction_prompt("Find it", separator=" ") == "Instruct: Find it Query: "


def test_bad_input():
    with pytest.raises(ValueError, match="padding on the right, got padding_side='left'"):
        instruction_pool_mask(tokenizer(padding_side="left"), "find : ", TEXTS)
    with pytest.raises(ValueError, match="texts is empty"):
        instruction_pool_mask(tokenizer(), "find : ", [])
    with pytest.raises(ValueError, match=r"texts \[0\] have no token to pool"):
        encode_with_instruction(byte_level_tokenizer(), "xy", ["", "a"], add_eos=False)
    with pytest.raises(ValueError, match="max_length=1 leaves no room"):
        instruction_pool_mask(tokenizer(), "find : ", TEXTS, max_length=1)
    nameless = tokenizer()
    nameless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        instruction_pool_mask(nameless, "find : ", TEXTS)

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow gives no character offsets"):
        instruction_pool_mask(Slow(), "find : ", TEXTS)
