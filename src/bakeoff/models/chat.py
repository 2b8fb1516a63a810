"""A tokenizer's chat template as two texts: what comes before a user's words, and what after."""

from __future__ import annotations

from typing import Any

from bakeoff.errors import DataError

# Stands where the template puts the user's words; nothing that a template would strip or change.
_MARK = "\N{REPLACEMENT CHARACTER}words\N{REPLACEMENT CHARACTER}"


def chat_frame(tokenizer: Any, name: str) -> tuple[str, str]:
    r"""Return what a chat template puts before and after the only message of a user.

    The parts hold the template's special tokens: encode them without adding any.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    name
        The model's, for the message.

    Returns
    -------
    before, after : str
        `after` ends where the assistant begins.

    Raises
    ------
    DataError
        If the tokenizer has no chat template, or one that changes the message.

    Examples
    --------
    >>> from bakeoff.models import load_language_model
    >>> model = load_language_model("smollm2-135m")  # doctest: +SKIP
    >>> chat_frame(model.tokenizer, model.name)[1]  # doctest: +SKIP
    '<|im_end|>\n<|im_start|>assistant\n'
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"chat: the tokenizer of {name} has no chat template")
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = str(whole).partition(_MARK)
    if not found:
        raise DataError(f"chat: the chat template of {name} does not repeat what the user says")
    return before, after
