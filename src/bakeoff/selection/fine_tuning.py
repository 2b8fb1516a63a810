"""Training a language model on chosen samples, with a budget of tokens, by transformers' Trainer.

The learner of training-data selection: all designs get the same start, the same number of tokens,
the same schedule and the same seeds; they differ in what is read.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bakeoff.data.samples import Sample, tokenize_sample
from bakeoff.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainerCallback

    from bakeoff.models import LanguageModel

Train = Literal["full", "lora"]
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class FineTuningBudget:
    """What every design may spend on training.

    Parameters
    ----------
    n_tokens
        Tokens read in all, to within a batch; steps follow from the lengths of the samples.
    batch_size
        Samples per step.
    max_length
        Tokens kept of each sample.
    learning_rate
        Peak rate of AdamW: linear warm-up over 3 % of the steps (none if there are fewer than 17),
        then linear decay to 0.
    train
        ``"full"``: all weights. ``"lora"``: adapters of rank 16 in every linear layer.
    """

    n_tokens: int = 200_000
    batch_size: int = 8
    max_length: int = 128
    learning_rate: float = 5e-4
    train: Train = "full"

    def __post_init__(self) -> None:
        for name, least in (("n_tokens", 1), ("batch_size", 1), ("max_length", 2)):
            if getattr(self, name) < least:
                raise DataError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise DataError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.train not in ("full", "lora"):
            raise DataError(f"train must be full or lora, got {self.train!r}")

    def steps(self, samples: Sequence[Mapping[str, list[int]]]) -> int:
        """Return the steps in which these samples, read again and again, use up the tokens.

        The last batch of every pass is smaller where the batch size does not divide their number.
        """
        total = sum(len(sample["input_ids"]) for sample in samples)
        passes, rest = divmod(self.n_tokens, total)
        per_batch = self.batch_size * total / len(samples)
        return max(1, passes * math.ceil(len(samples) / self.batch_size) + round(rest / per_batch))


@dataclass(frozen=True)
class FineTuned:
    """A trained model and what its training cost."""

    model: Any
    steps: int
    n_tokens: int
    trained_parameters: int


def training_rows(
    samples: Sequence[Sample], tokenizer: Any, max_length: int
) -> list[dict[str, list[int]]]:
    """Return ``{"input_ids", "labels"}`` for each sample; labels of the prefix are -100."""
    rows = []
    for sample in samples:
        prefix, response = tokenize_sample(sample, tokenizer, max_length)
        rows.append(
            {"input_ids": [*prefix, *response], "labels": [*[-100] * len(prefix), *response]}
        )
    return rows


def collate(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """Pad a batch on the right; padding has no label and no attention."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([[*row[name], *[fill] * (longest - len(row[name]))] for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": torch.tensor(mask),
        "labels": padded("labels", -100),
    }


def fine_tune(
    language_model: LanguageModel,
    dataset: Any,
    budget: FineTuningBudget,
    *,
    steps: int,
    seed: int,
    directory: Path,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
) -> FineTuned:
    """Train a copy of a language model.

    Parameters
    ----------
    language_model
        Where training starts; not changed.
    dataset
        Rows as `training_rows` makes them; read in random order, again and again.
    budget
        Batch size, learning rate and what is trained.
    steps
        Optimizer steps, see `FineTuningBudget.steps`.
    seed
        Of order and adapters.
    directory
        For the Trainer's own use; nothing is saved there.
    callbacks
        Of transformers, e.g. `MATESCallback`.
    progress
        Called with a fraction in [0, 1] and a message.
    """
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Report(TrainerCallback):  # type: ignore[misc]  # transformers has no types
        tokens = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.tokens += collated.popleft()
            if progress is not None:
                message = f"training, step {state.global_step} of {state.max_steps}"
                progress(state.global_step / state.max_steps, message)

    report = Report()
    # Batches are prepared one ahead, so that the last one may not be trained on.
    collated: deque[int] = deque()

    def counted(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        collated.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = copy.deepcopy(language_model.model)
        if budget.train == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(
                model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
            )
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        arguments = TrainingArguments(
            output_dir=str(directory),
            max_steps=steps,
            per_device_train_batch_size=budget.batch_size,
            learning_rate=budget.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=round(0.03 * steps),  # the first of them trains nothing
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=seed,
            data_seed=seed,
            use_cpu=model.device.type == "cpu",
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=counted,
            callbacks=[report, *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return FineTuned(model.eval(), steps, report.tokens, trained)


def target_losses(
    model: Any, tokenizer: Any, samples: Sequence[Sample], max_length: int
) -> NDArray[np.float64]:
    """Return each sample's mean loss per response token in nats, ``(n,)``."""
    from bakeoff.models import response_losses

    # Adapters hide which arguments (positions above all) the model inside them takes.
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokens = [tokenize_sample(sample, tokenizer, max_length) for sample in samples]
    prefixes = [prefix for prefix, _ in tokens]
    return response_losses(model, prefixes, [response for _, response in tokens]).means
