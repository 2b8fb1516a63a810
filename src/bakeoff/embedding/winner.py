"""From a fitted design to a folder that other tools load.

What sentence-transformers can say in modules of its own is saved in those, so that the folder
needs nothing of bakeoff; other heads are saved as bakeoff's module, which sentence-transformers
loads with ``trust_remote_code=True``. `export_onnx` makes a folder that needs neither library.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bakeoff._files import atomic_folder, write_text
from bakeoff.embedding.baselines import (
    LastTokenPooling,
    MeanPooling,
    PositionWeightedMeanPooling,
    SingleLayerMeanPooling,
)
from bakeoff.embedding.pooling import PoolingModule
from bakeoff.errors import BakeoffError, ModelError
from bakeoff.models import quiet_transformers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from bakeoff.models import BaseModel

STOCK_POOLING: dict[type[PoolingModule], str] = {
    LastTokenPooling: "lasttoken",
    MeanPooling: "mean",
    PositionWeightedMeanPooling: "weightedmean",
    SingleLayerMeanPooling: "mean",
}
PROBE_TEXTS = ("a", "Return the number of lines.", "Open a file and read it line by line, twice.")


def sentence_transformer(
    base: BaseModel,
    head: PoolingModule,
    *,
    attention: str,
    max_length: int,
    offsets: Mapping[str, Tensor] | None = None,
    stock: bool = True,
) -> SentenceTransformer:
    """Put a base model and a pooling head together as a `SentenceTransformer`.

    Parameters
    ----------
    base
        A loaded base model; its weights are read again from ``base.path``, so that the result can
        be trained without touching `base`.
    head
        A pooling head; normalises by itself, or is followed by `Normalize`.
    attention
        ``"causal"`` or ``"bidirectional"``.
    max_length
        Tokens kept of each text.
    offsets
        By role (``"query"``, ``"document"``, ``"text"``) a vector ``(d,)`` that is subtracted from
        the pooled one before it is normalised. `encode_query` and `encode_document` choose their
        roles, `encode` is for other texts.
    stock
        Whether to use sentence-transformers' own modules where they say the same.

    Returns
    -------
    SentenceTransformer
        In evaluation mode, on the CPU, float32.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modality import InputFormatter
    from sentence_transformers.sentence_transformer.modules import Normalize, Transformer

    with quiet_transformers():  # it warns of the language-model head that pooling does without
        transformer = Transformer(
            str(base.path), max_seq_length=max_length, model_kwargs={"dtype": torch.float32}
        )
    # With a chat template, sentence-transformers would put each text into a conversation, system
    # prompt included; what was scored are the texts themselves.
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = None
    transformer.processor = tokenizer
    transformer.modality_config, transformer.module_output_name = transformer.infer_modalities(
        transformer.model, tokenizer
    )
    transformer.input_formatter = InputFormatter(
        model_type=transformer.config.model_type, message_format="auto", processor=tokenizer
    )
    transformer.input_formatter.supported_modalities = list(transformer.modality_config)
    transformer.max_seq_length = max_length
    if attention == "bidirectional" and base.is_decoder:
        from bakeoff.models import make_bidirectional

        make_bidirectional(transformer.model)
    modules: list[nn.Module] = [transformer]
    if stock and type(head) in STOCK_POOLING:
        modules += _stock_modules(transformer, base, head)
    else:
        modules.append(head)
    if offsets:
        modules.append(_centring(offsets))
    if offsets or not getattr(modules[-1], "normalize", False):
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, device="cpu").eval()


def _stock_modules(transformer: Any, base: BaseModel, head: PoolingModule) -> list[nn.Module]:
    from sentence_transformers.sentence_transformer.modules import Pooling, WeightedLayerPooling

    pooling = Pooling(base.hidden_size, pooling_mode=STOCK_POOLING[type(head)])
    if not isinstance(head, SingleLayerMeanPooling) or head.layer == base.num_layers:
        return [pooling]
    transformer.model.config.output_hidden_states = True
    chosen = torch.zeros(base.num_layers + 1)
    chosen[head.layer] = 1.0
    one_layer = WeightedLayerPooling(
        base.hidden_size,
        num_hidden_layers=base.num_layers,
        layer_start=0,
        layer_weights=nn.Parameter(chosen),
    )
    return [one_layer, pooling]


def _centring(offsets: Mapping[str, Tensor]) -> nn.Module:
    from sentence_transformers.base.modules import Dense, Router

    def subtract(offset: Tensor) -> nn.Module:
        width = len(offset)
        module: nn.Module = Dense(
            width,
            width,
            bias=True,
            activation_function=nn.Identity(),
            init_weight=torch.eye(width),
            init_bias=-offset.detach().float(),
        )
        return module

    routes = {role: [subtract(offset)] for role, offset in offsets.items()}
    by_role: nn.Module = Router(routes, default_route="text")
    return by_role


def save_winner(model: SentenceTransformer, directory: Path, facts: Mapping[str, Any]) -> bool:
    """Save a model as a sentence-transformers folder with a README that says how to load it.

    Parameters
    ----------
    model
        From `sentence_transformer`, fitted.
    directory
        Replaced as a whole: a kill leaves the old folder or the new one.
    facts
        For the README: ``design``, ``base``, ``reason`` and whatever else is known.

    Returns
    -------
    bool
        Whether the folder loads without bakeoff.
    """
    with atomic_folder(Path(directory)) as scratch:
        with quiet_transformers():
            model.save_pretrained(str(scratch), create_model_card=False)
        stock = not any(name.startswith("bakeoff.") for name in _module_types(scratch))
        write_text(scratch / "bakeoff.json", json.dumps(dict(facts), indent=1, default=str))
        write_text(scratch / "README.md", _readme(facts, stock))
    return stock


def _module_types(folder: Path) -> list[str]:
    return [entry["type"] for entry in json.loads((folder / "modules.json").read_text("utf-8"))]


def _readme(facts: Mapping[str, Any], stock: bool) -> str:
    argument = "" if stock else ", trust_remote_code=True"
    needs = (
        "It needs `sentence-transformers` only."
        if stock
        else "Its pooling head is a module of `bakeoff`: `pip install bakeoff` beside "
        "`sentence-transformers`, which asks for `trust_remote_code=True` before it loads module "
        "classes of other packages (from version 6.0 on, local folders included)."
    )
    rows = "".join(f"- {key}: {value}\n" for key, value in facts.items())
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, bakeoff]
---

# {facts.get("design", "winner")}

Chosen by bakeoff. {needs}

```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("PATH/TO/THIS/FOLDER"{argument})
```

In retrieval, embed queries with `model.encode_query` and documents with `model.encode_document`;
any other text with `model.encode`. A folder that needs neither library:
`bakeoff export PATH/TO/THIS/FOLDER --to onnx`.

{rows}"""


class _EndToEnd(nn.Module):
    """A whole sentence-transformers chain as one graph: ids and mask in, embedding out."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.chain = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        for module in self.chain:
            features = module(features)
        embedding: Tensor = features["sentence_embedding"]
        return embedding


def export_onnx(winner: Path, destination: Path) -> float:
    """Export a winner folder as one ONNX graph from token ids to embedding, with its tokenizer.

    Parameters
    ----------
    winner
        A folder written by `save_winner`, or any sentence-transformers text model.
    destination
        Receives ``model.onnx`` (weights beside it), ``tokenizer.json``, ``bakeoff.json`` and a
        README with the lines of code that use them with `onnxruntime` and `tokenizers` alone.

    Returns
    -------
    float
        The largest absolute difference between the exported and the original vectors, checked on
        texts of unequal length in one padded batch.

    Raises
    ------
    ModelError
        If `winner` is not a sentence-transformers folder, or the exported vectors differ by more
        than 1e-4.
    BakeoffError
        If the extra ``bakeoff[onnx]`` is not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BakeoffError(f'{error.name} is not installed: pip install "bakeoff[onnx]"') from error
    if not (Path(winner) / "modules.json").exists():
        raise ModelError(f"{winner} is not a winner folder: it has no modules.json")
    foreign = [
        name
        for name in _module_types(Path(winner))
        if not name.startswith(("bakeoff.", "sentence_transformers."))
    ]
    if foreign:
        raise ModelError(f"{winner} asks for code of other packages, which is not run: {foreign}")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(winner),
        device="cpu",
        trust_remote_code=True,
        # Fused attention kernels export worse than the plain operations they stand for.
        model_kwargs={"attn_implementation": "eager"},
    ).eval()
    tokenizer, max_length = model.tokenizer, model.max_seq_length
    encoded = tokenizer(
        list(PROBE_TEXTS), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    example = (encoded["input_ids"], encoded["attention_mask"])
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    shape = {0: batch, 1: sequence}
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        program = torch.onnx.export(
            _EndToEnd(model).eval(),
            example,
            dynamo=True,
            verbose=False,
            dynamic_shapes={"input_ids": shape, "attention_mask": shape},
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence_embedding"],
        )
    if program is None:
        raise ModelError(f"{winner} could not be exported")
    program.save(str(destination / "model.onnx"), external_data=True)
    tokenizer.backend_tokenizer.save(str(destination / "tokenizer.json"))
    facts = {
        "max_length": max_length,
        "pad_token": tokenizer.pad_token,
        "pad_token_id": tokenizer.pad_token_id,
    }
    write_text(destination / "bakeoff.json", json.dumps(facts, indent=1))
    write_text(destination / "README.md", _onnx_readme(facts))
    session = onnxruntime.InferenceSession(str(destination / "model.onnx"))
    inputs = dict(zip(("input_ids", "attention_mask"), (x.numpy() for x in example), strict=True))
    exported = session.run(None, inputs)[0]
    difference = float(np.abs(exported - model.encode(list(PROBE_TEXTS))).max())
    if not difference < 1e-4:
        raise ModelError(f"the exported vectors differ by {difference:.2e}, more than 1e-4")
    return difference


def _onnx_readme(facts: Mapping[str, Any]) -> str:
    return f"""# An embedding model as ONNX

Needs `pip install onnxruntime tokenizers numpy`; run inside this folder:

```python
import numpy as np, onnxruntime, tokenizers
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({facts["max_length"]})
tokenizer.enable_padding(pad_id={facts["pad_token_id"]}, pad_token={facts["pad_token"]!r})
session = onnxruntime.InferenceSession("model.onnx")
encoded = tokenizer.encode_batch(["a first text", "another, longer text"])
vectors, = session.run(None, {{
    "input_ids": np.array([e.ids for e in encoded]),
    "attention_mask": np.array([e.attention_mask for e in encoded]),
}})
```
"""
