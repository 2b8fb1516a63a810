"""A random decoder and tokenizer of a few kilobytes, and the numbers that fixtures are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "red", "find", ":")
TEXTS = ("the cat sat on the mat", "a dog ran", "red tree", "the dog sat under a red tree on a mat")
OFFICIAL = json.loads((Path(__file__).parent / "fixtures/official_outputs.json").read_text())


def tokenizer(*, padding_side: str = "right", bos: bool = True) -> Any:
    """Return a whitespace tokenizer: <s> words </s>, or without <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<s>", "</s>", "<unk>")
    vocabulary = {word: number for number, word in enumerate((*special, *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if bos else "$A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        padding_side=padding_side,
    )


def llama(num_layers: int = 3) -> Any:
    """Return a random Llama of width 16 whose attention is far from uniform."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(
            vocab_size=len(WORDS) + 4,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def backbone_folder(folder: Path, **tokenizer_options: Any) -> str:
    """Save the decoder and tokenizer as transformers does and return the path."""
    llama().save_pretrained(folder)
    tokenizer(**tokenizer_options).save_pretrained(folder)
    return str(folder)


def embedder(folder: Path, *modules: Any, **tokenizer_options: Any) -> Any:
    """Return a SentenceTransformer of the decoder and the given modules."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    transformer = Transformer(backbone_folder(folder, **tokenizer_options))
    return SentenceTransformer(modules=[transformer, *modules], device="cpu").eval()


def drawn(number: int, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """Return the array of that number in the fixtures, see the note there."""
    values = scale * np.random.default_rng(number).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))


def with_official_weights(head: Any) -> Any:
    """Fill a head with the weights of the fixtures."""
    state = head.state_dict()
    for offset, role in enumerate(OFFICIAL["weights"]):
        names = [name for name in state if name == role or name.endswith("." + role)]
        if role == "layer_table" and not names:
            continue
        (name,) = names
        state[name] = drawn(100 + offset, tuple(state[name].shape), scale=0.3)
    head.load_state_dict(state)
    return head


def n_parameters(module: Any) -> int:
    """Return the number of scalars that a module trains."""
    return sum(parameter.numel() for parameter in module.parameters())
