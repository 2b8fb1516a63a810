"""Tiny random models and a tiny tokenizer: seconds of tests instead of gigabytes of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
# name -> (configuration class, model class, what differs from SHAPE)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaModel", {}),
    "mistral": ("MistralConfig", "MistralModel", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", "MistralModel", {"sliding_window": 3}),
    "qwen2": ("Qwen2Config", "Qwen2Model", {}),
    "qwen2-window": (
        "Qwen2Config",
        "Qwen2Model",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", "Qwen3Model", {}),
    "gemma": ("GemmaConfig", "GemmaModel", {}),
    "gemma2": ("Gemma2Config", "Gemma2Model", {"sliding_window": 3, "layer_types": ALTERNATING}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3TextModel",
        {"sliding_window": 3, "layer_types": ALTERNATING},
    ),
}
WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "saw", "red")


def config(name: str = "llama", **changes: Any) -> Any:
    """Return the configuration of a tiny model; `changes` override any of its fields."""
    import transformers

    configuration, _, differs = ARCHITECTURES[name]
    return getattr(transformers, configuration)(**{**SHAPE, **differs, **changes})


def model(name: str = "llama", attention: str = "sdpa", *, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny random backbone in eval mode, the same for the same arguments.

    Weights are larger than transformers would draw them: with its scale of 0.02 attention is almost
    uniform and tests of masks see differences drowned in rounding.
    """
    import transformers

    _, architecture, _ = ARCHITECTURES[name]
    torch.manual_seed(seed)
    made = getattr(transformers, architecture)._from_config(
        config(name, **{"initializer_range": 0.2, **changes}), attn_implementation=attention
    )
    return made.eval()


def tokenizer(*, eos: bool = False) -> Any:
    """Return a whitespace tokenizer over `WORDS` (others are unknown); `eos` appends </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {word: 4 + number for number, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if eos:
        inner.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
    )


def base(
    name: str = "llama",
    attention: str = "sdpa",
    *,
    eos: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Any:
    """Return a `BaseModel` around a tiny random model."""
    import hashlib

    from bakeoff.models.loading import BaseModel

    backbone = model(name, attention, seed=seed, **changes)
    identity = repr((name, attention, seed, sorted(changes.items())))
    return BaseModel(
        name=f"tiny-{name}",
        model=backbone,
        tokenizer=tokenizer(eos=eos),
        path=Path("tiny"),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        hidden_size=backbone.config.hidden_size,
        num_layers=backbone.config.num_hidden_layers,
        max_length=128,
        is_decoder=True,
    )


def read_in_worker(features: Any, queue: Any) -> None:
    """Put what a spawned process reads from a `Features` handle on a queue, as numpy arrays."""
    tokens, mask = features.tokens([2, 0])
    queue.put((features.load("layer_means").numpy(), (tokens.numpy(), mask.numpy())))
