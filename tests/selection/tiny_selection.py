"""Selection problems that run in seconds: a tiny random decoder and encoder on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.embedding.tiny_problem import sentences
from tests.models import tiny

from bakeoff.data.samples import Sample, TrainingPool
from bakeoff.data.tasks import ClassificationTask

CLASSES = ("cat", "dog", "tree")


def byte_tokenizer(*, bos: bool = False, length: int = 1024) -> Any:
    """Return a tokenizer with one token per byte, so that any text comes back as it was."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=length,
    )


def save_language_model(folder: Path, *, seed: int = 0, length: int = 1024, **changes: Any) -> Path:
    """Write a tiny random Llama over bytes as a transformers folder."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tiny.config(
            vocab_size=259,
            max_position_embeddings=length,
            num_hidden_layers=2,
            initializer_range=0.2,
            **changes,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(length=length).save_pretrained(folder)
    return folder


def save_encoder(folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny random sentence-transformers model over `tiny.WORDS`."""
    from sentence_transformers import SentenceTransformer

    inner = folder.parent / f"{folder.name}-inside"
    tiny.model("llama", seed=seed).save_pretrained(inner)
    tiny.tokenizer().save_pretrained(inner)
    SentenceTransformer(str(inner), device="cpu").save(str(folder))
    return folder


def save_models(folder: Path) -> Path:
    """Write ``folder/base`` (language model) and ``folder/encoder``."""
    save_language_model(folder / "base")
    save_encoder(folder / "encoder")
    return folder


def labelled(name: str = "animals", n: int = 84, n_test: int = 24, seed: int = 0) -> Any:
    """Return a classification task whose label is a text's first word, one of three."""
    texts = [f"{CLASSES[i % 3]} {text}" for i, text in enumerate(sentences(n, seed))]
    labels = [text.split()[0] for text in texts]
    return ClassificationTask(
        name,
        tuple(texts[n_test:]),
        tuple(labels[n_test:]),
        tuple(texts[:n_test]),
        tuple(labels[:n_test]),
    )


def samples(n: int, seed: int, *, kind: str = "cat", context: bool = True) -> tuple[Sample, ...]:
    """Return samples with a response that begins with `kind`, an instruction and a context."""
    texts = sentences(3 * n, seed)
    return tuple(
        Sample(
            f"{kind} {texts[3 * i]}",
            instruction=texts[3 * i + 1],
            context=f"{texts[3 * i + 2]} {texts[3 * i + 1]}" if context else "",
            source=kind,
        )
        for i in range(n)
    )


def pool(name: str = "tiny pool", *, context: bool = True, marks: bool = True) -> TrainingPool:
    """Return a pool of 24 samples of two kinds, with 4 queries and 4 tests of one of them."""
    mixed = (*samples(14, 1, kind="dog", context=context), *samples(10, 2, context=context))
    return TrainingPool(
        name,
        mixed,
        samples(4, 3, context=context),
        samples(4, 4, context=context),
        relevant=[sample.source == "cat" for sample in mixed] if marks else None,
        notes=("made up",),
    )
