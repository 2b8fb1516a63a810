"""What this family's methods have in common."""

from __future__ import annotations

from typing import Any, Protocol


class Decoder(Protocol):
    """Anything that continues prompts with a language model, in the manner of ``generate``.

    `SetPromptingModel`, `PlainOrderModel`, `OrderEnsembleModel` and `Cascade` are decoders of
    texts; `InfLLM` has the same method over token ids, as transformers' models do.
    """

    def generate(self, prompts: Any, **generate_arguments: Any) -> Any:
        """Return one continuation per prompt; further arguments are those of transformers."""
