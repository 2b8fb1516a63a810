"""A small language model trained from scratch in minutes on a CPU: for studies of training data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bakeoff._files import build_once, cache_directory
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_VERSION = 2
_END = "<|end|>"
_PASSES = 2


@dataclass(frozen=True)
class SmallGPT:
    """Shape and training of a small GPT: a Llama with tied embeddings over byte-level BPE.

    Parameters
    ----------
    vocabulary
        Tokens of its byte-level BPE.
    n_layers, width, n_heads
        Transformer blocks, hidden size and attention heads; the default has 3.1 million weights.
    context
        Longest input in tokens.
    steps, batch_size
        Training: so many steps of so many packed sequences of `context` tokens, but at most two
        passes: a base that knows a small pool by heart has nothing to learn from it.
    learning_rate
        Peak rate of AdamW, reached after a tenth of the steps and kept: training goes on later.
    seed
        Of weights and order.

    Raises
    ------
    DataError
        If a number is too small, or `width` is no even multiple of `n_heads`.

    Examples
    --------
    >>> folder = SmallGPT(steps=500).pretrained(texts)  # doctest: +SKIP
    >>> load_language_model(folder)  # doctest: +SKIP
    """

    vocabulary: int = 4096
    n_layers: int = 4
    width: int = 192
    n_heads: int = 6
    context: int = 128
    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        # The tokenizer begins with its end token and every byte.
        least = {"vocabulary": 257, "n_layers": 1, "n_heads": 1, "context": 2}
        for name, bound in {**least, "steps": 1, "batch_size": 1}.items():
            if getattr(self, name) < bound:
                raise DataError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if self.width < 1 or self.width % (2 * self.n_heads):
            raise DataError(
                f"width must be an even multiple of n_heads, {self.n_heads}, got {self.width}"
            )
        if not self.learning_rate > 0:
            raise DataError(f"learning_rate must be positive, got {self.learning_rate}")

    def pretrained(
        self, texts: Sequence[str], *, progress: Callable[[float, str], None] | None = None
    ) -> Path:
        """Return a folder with the model trained on `texts`; made once and kept in the cache.

        Parameters
        ----------
        texts
            What its tokenizer and weights are trained on, packed in random order.
        progress
            Called with a fraction in [0, 1] and a message.

        Returns
        -------
        Path
            A folder that transformers and `load_language_model` load.

        Raises
        ------
        DataError
            If the texts hold less than one sequence.
        """
        digest = hashlib.sha256(json.dumps([_VERSION, asdict(self)]).encode())
        for text in texts:
            digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        target = cache_directory() / "models" / f"small-gpt-{digest.hexdigest()[:16]}"
        return build_once(target, lambda folder: self._train(texts, folder, progress))

    def tokenizer(self, texts: Sequence[str]) -> Any:
        """Return a byte-level BPE tokenizer of this vocabulary, trained on `texts`.

        Its one special token ends a text, begins it and pads.
        """
        return _byte_pair_tokenizer(texts, self.vocabulary, self.context)

    def untrained(
        self,
        tokenizer: Any,
        *,
        seed: int = 0,
        block: Literal["sequential", "parallel"] = "sequential",
    ) -> Any:
        """Return a model of this shape with random weights, in evaluation mode.

        Parameters
        ----------
        tokenizer
            Of `tokenizer`.
        seed
            Of the weights.
        block
            ``"sequential"``, a Llama: the feed-forward network sees what attention did.
            ``"parallel"``, a Cohere model: both see the block's input.

        Raises
        ------
        DataError
            If `block` is neither.
        """
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._drawn(tokenizer, block)

    def _drawn(self, tokenizer: Any, block: str = "sequential") -> Any:
        """Return a model whose weights are drawn from torch's own generator."""
        import torch
        from transformers import AutoModelForCausalLM, CohereConfig, LlamaConfig

        kinds: dict[str, Any] = {"sequential": LlamaConfig, "parallel": CohereConfig}
        if block not in kinds:
            raise DataError(f"block must be sequential or parallel, got {block!r}")
        # Cohere's own factor of 1/16 on the logits belongs to its far wider states.
        scale = {"logit_scale": 1.0} if block == "parallel" else {}
        end = tokenizer.eos_token_id
        config = kinds[block](
            vocab_size=len(tokenizer),
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_heads,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            **scale,
        )
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    def _train(
        self,
        texts: Sequence[str],
        folder: Path,
        progress: Callable[[float, str], None] | None,
    ) -> None:
        import torch

        tokenizer = self.tokenizer(texts)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self._drawn(tokenizer)
            sequences = _packed(tokenizer, texts, self.context, self.seed)
            optimizer = torch.optim.AdamW(
                model.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
            )
            steps = min(self.steps, math.ceil(_PASSES * len(sequences) / self.batch_size))
            warm_up = max(1, steps // 10)
            model.train()
            for step, batch in enumerate(_batches(sequences, self.batch_size, steps)):
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * min(1.0, (step + 1) / warm_up)
                loss = model(batch, labels=batch).loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if progress is not None:
                    progress((step + 1) / steps, f"training a small GPT, loss {loss:.2f}")
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _byte_pair_tokenizer(texts: Sequence[str], vocabulary: int, context: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=_END,
        eos_token=_END,
        pad_token=_END,
        model_max_length=context,
    )


def _packed(tokenizer: Any, texts: Sequence[str], context: int, seed: int) -> Tensor:
    """Return all texts in random order, an end token after each, cut into rows of `context`."""
    import torch

    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    ids: list[int] = []
    shuffled = [texts[row] for row in order]
    for encoded in tokenizer(shuffled, verbose=False).input_ids if shuffled else []:
        ids += [*encoded, tokenizer.eos_token_id]
    n_rows = len(ids) // context
    if n_rows == 0:
        raise DataError(f"the texts hold {len(ids)} tokens, less than one sequence of {context}")
    return torch.tensor(ids[: n_rows * context]).view(n_rows, context)


def _batches(sequences: Tensor, batch_size: int, steps: int) -> Iterator[Tensor]:
    """Yield `steps` batches, going through the sequences as often as it takes."""
    import torch

    needed = math.ceil(steps * batch_size / len(sequences))
    order = torch.cat([torch.randperm(len(sequences)) for _ in range(needed)])
    for step in range(steps):
        yield sequences[order[step * batch_size : (step + 1) * batch_size]]
