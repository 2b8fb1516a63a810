"""A tiny random decoder over bytes and a few merges, with a chat template, as a folder."""

from pathlib import Path

import torch
from tests.models import tiny
from transformers import LlamaForCausalLM

from bakeoff.decoding.codegen2 import add_infill_tokens
from bakeoff.models.small_gpt import _byte_pair_tokenizer

TEXT = "one two three four the cat sat on a mat yes no maybe 0123456789 2024"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_decoder(folder: Path, *, seed: int = 0, chat: bool = False, infill: bool = False) -> Path:
    """Write a model and its tokenizer as a transformers folder."""
    tokenizer = _byte_pair_tokenizer([TEXT] * 20, 300, 1024)
    if chat:
        tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        tiny.config(
            vocab_size=len(tokenizer),
            initializer_range=0.2,
            eos_token_id=tokenizer.eos_token_id,
            max_position_embeddings=1024,
        )
    )
    if infill:
        add_infill_tokens(tokenizer, model, max_sentinels=3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
