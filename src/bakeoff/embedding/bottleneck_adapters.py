"""Bottleneck adapters inside a transformer: the rest is frozen, and a folder keeps them apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor, nn

from bakeoff.embedding.pooling import positive_int
from bakeoff.errors import ModelError

ADAPTER_FILE = "bottleneck_adapters.safetensors"


class BottleneckAdapter(nn.Module):
    """A narrow feed-forward network that starts as nothing: d to d / reduction, ReLU, back to d.

    Parameters
    ----------
    hidden_size
        Width d.
    reduction
        How many times narrower the inside is.

    References
    ----------
    Jonas Pfeiffer et al. "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer".
    EMNLP 2020. arXiv:2005.00052.
    """

    def __init__(self, hidden_size: int, reduction: int = 16) -> None:
        super().__init__()
        inner = max(1, hidden_size // positive_int("reduction", reduction))
        self.down = nn.Linear(hidden_size, inner)
        self.up = nn.Linear(inner, hidden_size)
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return what is added to `states`, of the same shape."""
        inside = nn.functional.relu(self.down(states.to(self.down.weight.dtype)))
        return cast("Tensor", self.up(inside)).to(states.dtype)


class AdaptedNorm(nn.Module):
    """The last LayerNorm of a post-norm layer (BERT), with the adapter where Pfeiffer's is.

    With z the sum of the feed-forward output and its residual: ``norm(z + adapter(norm(z)))``.
    """

    def __init__(self, norm: nn.Module, adapter: BottleneckAdapter) -> None:
        super().__init__()
        self.norm = norm
        self.adapter = adapter

    def forward(self, states: Tensor) -> Tensor:
        """Return the layer's output of the sum `states`."""
        return cast("Tensor", self.norm(states + self.adapter(self.norm(states))))


class AdaptedLayer(nn.Module):
    """A pre-norm layer (decoders) with an adapter on the sum that it returns: ``h + adapter(h)``.

    Parameters
    ----------
    layer
        Any module that returns states, or a tuple that begins with them.
    adapter
        What is added.
    """

    def __init__(self, layer: nn.Module, adapter: BottleneckAdapter) -> None:
        super().__init__()
        self.layer = layer
        self.adapter = adapter

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models read settings (attention_type) off their layers
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns, with the adapter's part added to its states."""
        output = self.layer(*args, **kwargs)
        if isinstance(output, tuple):
            return (output[0] + self.adapter(output[0]), *output[1:])
        return output + self.adapter(output)


def add_adapters(model: nn.Module, reduction: int = 16) -> list[BottleneckAdapter]:
    """Put an adapter into every layer of a transformers model, in place, and freeze the rest.

    Parameters
    ----------
    model
        An encoder of BERT's kind (post-norm) or any model with a list of layers (pre-norm).
    reduction
        Width of the states over that of an adapter's inside.

    Returns
    -------
    list of BottleneckAdapter
        One per layer. Until trained they change nothing.

    Raises
    ------
    ModelError
        If there are adapters already, or no list of layers is found.
    """
    if any(isinstance(module, BottleneckAdapter) for module in model.modules()):
        raise ModelError("the model has adapters already")
    layers = _layers_of(model)
    width = int(cast("Any", model).config.get_text_config().hidden_size)
    example = next(model.parameters())
    model.requires_grad_(False)
    adapters = []
    for place, layer in enumerate(layers):
        adapter = BottleneckAdapter(width, reduction).to(example.device)
        output = getattr(layer, "output", None)
        norm = getattr(output, "LayerNorm", None)
        if isinstance(output, nn.Module) and isinstance(norm, nn.Module):
            output.LayerNorm = AdaptedNorm(norm, adapter)
        else:
            layers[place] = AdaptedLayer(layer, adapter)
        adapters.append(adapter)
    return adapters


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """Take the adapters out for a while, so that what is saved has the model's own names."""
    layers = _layers_of(model)
    inside = list(layers)
    for place, layer in enumerate(inside):
        if isinstance(layer, AdaptedLayer):
            layers[place] = layer.layer
    norms = [
        (layer.output, layer.output.LayerNorm)
        for layer in cast("list[Any]", inside)
        if not isinstance(layer, AdaptedLayer)
        and isinstance(getattr(getattr(layer, "output", None), "LayerNorm", None), AdaptedNorm)
    ]
    for owner, norm in norms:
        owner.LayerNorm = norm.norm
    try:
        yield
    finally:
        for owner, norm in norms:
            owner.LayerNorm = norm
        for place, layer in enumerate(inside):
            layers[place] = layer


def _layers_of(model: nn.Module) -> nn.ModuleList:
    n_layers = getattr(cast("Any", model).config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise ModelError(f"{type(model).__name__} has no list of its {n_layers} layers for adapters")


class AdapterTransformer(Transformer):  # type: ignore[misc]  # sentence-transformers is untyped
    """A Transformer with bottleneck adapters, which its folder keeps in a file of their own.

    Loaded by ``SentenceTransformer(folder, trust_remote_code=True)``: the code that this trusts is
    bakeoff's.
    """

    def _load_model(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        model = super()._load_model(model_name_or_path, *args, **kwargs)
        path = self.load_file_path(
            model_name_or_path,
            ADAPTER_FILE,
            subfolder=kwargs.get("subfolder") or "",
            token=kwargs.get("token"),
            cache_folder=kwargs.get("cache_dir"),
            revision=kwargs.get("revision"),
            local_files_only=kwargs.get("local_files_only", False),
        )
        if path is None:
            raise ModelError(f"{model_name_or_path} has no {ADAPTER_FILE}")
        weights = load_file(path)
        inner, width = weights["0.down.weight"].shape
        adapters = nn.ModuleList(add_adapters(model, width // inner))
        adapters.load_state_dict(weights)
        return model.eval()

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the model without adapters, the adapters, and the tokenizer into a folder."""
        adapters = nn.ModuleList(
            module for module in self.model.modules() if isinstance(module, BottleneckAdapter)
        )
        with _without_adapters(self.model):
            super().save(output_path, *args, **kwargs)
        weights = {name: value.contiguous() for name, value in adapters.state_dict().items()}
        save_file(weights, str(Path(output_path) / ADAPTER_FILE))
