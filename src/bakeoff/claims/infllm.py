"""InfLLM: what the paper says of its context memory, run.

Facts are hidden in Python's language reference, in documents about four times as long as what a
token may attend to. A model of 135 million parameters reads them in every way at the same budget;
the paper's models have 7 and 8 billion, and its documents 100,000 tokens and more.

Which questions are asked was settled with plain attention over whole documents alone: they are of
a form that this small model answers when it sees everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bakeoff.claims.claim import Claim, Size

if TYPE_CHECKING:
    from bakeoff.study import Study

PAPER = (
    "Xiao et al., InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient "
    "Context Memory, NeurIPS 2024, arXiv 2402.04617"
)

CLAIMS = (
    Claim(
        name="central",
        statement="InfLLM finds facts in documents longer than its window that neither a sliding "
        "window with the first tokens nor the end of the document of the same size holds.",
        source=f"{PAPER}, main results on InfiniteBench (pass keys, numbers, key-value pairs)",
        figure=None,
        treatment="infllm",
        references=("streaming", "keep-end"),
        metrics=("quality",),
    ),
    Claim(
        name="answers",
        statement="The right answer is more probable after reading with InfLLM than with a sliding "
        "window with the first tokens of the same size.",
        source=f"{PAPER}, main results (there by the answers given)",
        figure=None,
        treatment="infllm",
        references=("streaming",),
        metrics=("log_probability",),
    ),
    Claim(
        name="plain text",
        statement="In plain text nothing is lost: a sliding window with the first tokens of the "
        "same size predicts the document's end no better than InfLLM.",
        source="not in the paper; what the memory costs where nothing has to be looked up",
        figure=None,
        treatment="streaming",
        references=("infllm",),
        metrics=("text_loss",),
        expected="not better",
    ),
    Claim(
        name="retrieval",
        statement="InfLLM finds more facts than reading only the passages that are most like the "
        "question, by words or by meaning, in the same number of tokens.",
        source=f"{PAPER}, comparison with retrieval-augmented generation",
        figure=None,
        treatment="infllm",
        references=("retrieve", "retrieve, by meaning"),
        metrics=("quality",),
    ),
    Claim(
        name="representatives",
        statement="Blocks that are represented by their most attended keys are found better than "
        "blocks that are represented by the mean of all their keys.",
        source=f"{PAPER}, ablation of the memory",
        figure=None,
        treatment="infllm",
        references=("infllm, block means",),
        metrics=("quality",),
    ),
    Claim(
        name="full attention",
        statement="Where plain attention over the whole document is possible, InfLLM finds no more "
        "facts than that.",
        source="not in the paper; a sceptic's control",
        figure=None,
        treatment="infllm",
        references=("full-attention",),
        metrics=("quality",),
        expected="not better",
    ),
)


@dataclass(frozen=True)
class Budget:
    """Documents, what a token may attend to, answers and seeds, at one claim size."""

    kinds: tuple[str, ...]
    n_tokens: tuple[int, ...]
    depths: tuple[float, ...]
    n_numbers: int
    n_init: int
    n_local: int
    block_size: int
    topk: int
    exec_chunk: int
    max_new_tokens: int
    n_scored: int
    seeds: int


BUDGETS: dict[Size, Budget] = {
    "smoke": Budget(
        kinds=("pass keys",),
        n_tokens=(100,),
        depths=(0.2, 0.5),
        n_numbers=2,
        n_init=32,
        n_local=48,
        block_size=16,
        topk=2,
        exec_chunk=32,
        max_new_tokens=2,
        n_scored=8,
        seeds=2,
    ),
    "laptop": Budget(
        kinds=("pass keys", "numbers"),
        n_tokens=(2000,),
        depths=(0.1, 0.3, 0.5, 0.7, 0.9),
        n_numbers=8,
        n_init=32,
        n_local=256,
        block_size=32,
        topk=8,
        exec_chunk=64,
        max_new_tokens=16,
        n_scored=64,
        seeds=3,
    ),
    "full": Budget(
        kinds=("pass keys", "numbers"),
        n_tokens=(2000, 4000, 7000),
        depths=(0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95),
        n_numbers=16,
        n_init=32,
        n_local=512,
        block_size=32,
        topk=16,
        exec_chunk=64,
        max_new_tokens=24,
        n_scored=128,
        seeds=5,
    ),
}

DESIGNS = (
    "full-attention",
    "streaming",
    "keep-end",
    "retrieve",
    "retrieve, by meaning",
    "infllm",
    "infllm, block means",
)


def study(size: Size, directory: Path, workers: int = 1) -> Study:
    """Return the study that judges the claims, at one of the three sizes."""
    from bakeoff.data.long_documents import LongDocuments
    from bakeoff.decoding.problem.memory import MemoryProblem, memory_designs
    from bakeoff.study import Designs, Study

    budget = BUDGETS[size]
    problem = MemoryProblem(
        LongDocuments(
            budget.n_tokens, budget.depths, kinds=budget.kinds, n_numbers=budget.n_numbers
        ),
        n_init=budget.n_init,
        n_local=budget.n_local,
        block_size=budget.block_size,
        topk=budget.topk,
        exec_chunk=budget.exec_chunk,
        max_new_tokens=budget.max_new_tokens,
        n_scored=budget.n_scored,
    )
    return Study(
        problem,
        Designs([design for design in memory_designs() if design.name in DESIGNS]),
        reference="streaming",
        seeds=budget.seeds,
        directory=directory,
        workers=workers,
    )
