"""GGUF files, the quantised format of llama.cpp, turned into a transformers folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path

from bakeoff._files import cache_error
from bakeoff.errors import ModelError


def convert_gguf(source: Path, target: Path) -> None:
    """Write a GGUF file's model and tokenizer as float32 safetensors that transformers loads.

    Reading GGUF dequantises every weight, which takes many times as long as reading safetensors:
    once is enough. The weights stay what the quantisation made of them.

    Parameters
    ----------
    source
        The ``.gguf`` file.
    target
        An existing folder for ``config.json``, ``model.safetensors`` and the tokenizer's files.

    Raises
    ------
    ModelError
        If transformers cannot read the file: damaged, or an architecture it does not know.
    CacheError
        If `target` cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    with quiet_transformers():
        try:
            with redirect_stderr(StringIO()):  # the reader's progress bar has no other switch
                quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
                tokenizer = AutoTokenizer.from_pretrained(**where)
        except Exception as error:  # the reader raises whatever the bytes lead it to
            raise ModelError(f"transformers cannot read {source}: {one_line(error)}") from error
        config = quantised.config
        # A model that came from GGUF refuses to be saved; one that takes over its weights does not.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(quantised.state_dict(), assign=True)
        plain.tie_weights()
        tokenizer.model_max_length = config.get_text_config().max_position_embeddings
        try:
            plain.save_pretrained(target)
            tokenizer.save_pretrained(target)
        except SafetensorError as error:
            raise cache_error(target, OSError(str(error))) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and warnings out of the terminal for a while."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
