"""One loader for every mixture of experts: those of this library, and those of transformers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bakeoff._files import sha256
from bakeoff.errors import ModelError
from bakeoff.models.loading import Dtype, LanguageModel, load_language_model, model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")


def load_experts(
    name: str | Path, *, dtype: Dtype | Literal["stored"] = "float32", device: str = "cpu"
) -> tuple[Any, Any]:
    """Load a mixture of experts and its tokenizer, whatever made it.

    Parameters
    ----------
    name
        A folder that `save_moe` wrote, or ``save_pretrained`` of an upcycled model, of a
        `ReadMeForCausalLM` or of a model with recurrent routers, beside its tokenizer; or any
        decoder of transformers (OLMoE, Mixtral, Qwen-MoE, or a dense one): a packaged model's name,
        a folder, a ``.gguf`` file or a hub id.
    dtype
        Precision of the weights; ``"stored"`` for the one that the model's configuration names.
        The routers of this library's mixtures stay as they are stored.
    device
        A torch device.

    Returns
    -------
    model : transformers.PreTrainedModel
        In evaluation mode.
    tokenizer : transformers.PreTrainedTokenizerBase
        With a padding token.

    Raises
    ------
    bakeoff.errors.ModelError
        As `bakeoff.models.load_language_model`; also if weights of a recurrent router are missing.

    Examples
    --------
    >>> model, tokenizer = load_experts("my-moe")  # doctest: +SKIP
    """
    loaded = load_mixture(name, dtype=dtype, device=device)
    return loaded.model, loaded.tokenizer


def load_mixture(
    name: str | Path, *, dtype: Dtype | Literal["stored"] = "float32", device: str = "cpu"
) -> LanguageModel:
    """Load what `load_experts` loads, with its path, length limit and fingerprint.

    Parameters
    ----------
    name, dtype, device
        As for `load_experts`.

    Returns
    -------
    bakeoff.models.LanguageModel
        Its fingerprint changes with the experts' settings too.

    Raises
    ------
    bakeoff.errors.ModelError
        As `load_experts`.
    """
    # Importing these makes transformers know their configurations and classes.
    import bakeoff.experts.read_me
    import bakeoff.experts.upcycled_model  # noqa: F401
    from bakeoff.experts.conversion import SETTINGS_FILE

    precision: Dtype = stored_dtype(name) if dtype == "stored" else dtype
    loaded = load_language_model(name, dtype=precision, device=device, build=_build)
    settings = loaded.path / SETTINGS_FILE
    if settings.is_file():
        parts = f"{loaded.fingerprint} {sha256(settings)}"
        identity = hashlib.sha256(parts.encode()).hexdigest()
        loaded = dataclasses.replace(loaded, fingerprint=identity)
    return loaded


def stored_dtype(name: str | Path) -> Dtype:
    """Return the precision that a model's configuration names; float32 if none.

    Raises
    ------
    bakeoff.errors.ModelError
        If there is no such model.
    """
    given = _configuration(model_folder(str(name)))
    found = given.get("dtype") or given.get("torch_dtype")
    return next((known for known in _DTYPES if known == found), "float32")


def _configuration(folder: Path) -> dict[str, Any]:
    """Return what config.json holds; empty where there is none that can be read."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads the model says what is wrong
        return {}
    return found if isinstance(found, dict) else {}


def _build(folder: Path, dtype: Dtype) -> PreTrainedModel | None:
    """Return the mixture in a folder, or None if transformers can load it by itself."""
    import torch

    from bakeoff.experts.conversion import SETTINGS_FILE, load_moe
    from bakeoff.experts.recurrent_router import load_recurrent

    precision = getattr(torch, dtype)
    if (folder / SETTINGS_FILE).is_file():
        try:
            made: PreTrainedModel = load_moe(folder)
        except RuntimeError as error:  # which lists missing weights, a line each
            words = " ".join(str(error).split())
            raise ModelError(f"the model in {folder} cannot be loaded: {words[:300]}") from error
        _convert(made, precision)
        return made
    if isinstance(_configuration(folder).get("recurrent_router"), dict):
        _check_recurrent(folder)
        loaded: PreTrainedModel = load_recurrent(folder, dtype=precision)
        return loaded
    return None


def _convert(model: Any, precision: Any) -> None:
    """Convert a mixture's weights, but not its routers', whose rounding would change choices."""
    from bakeoff.experts.mixture_of_experts import moe_layers

    routers: list[Any] = [layer.router for layer in moe_layers(model).values()]
    kept = {id(parameter) for router in routers for parameter in router.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept and parameter.is_floating_point():
            parameter.data = parameter.data.to(precision)
    if getattr(model.config, "dtype", None) is not None:
        model.config.dtype = precision


def _check_recurrent(folder: Path) -> None:
    """Raise unless a folder has weights of a recurrent router: they would be random."""
    from safetensors import safe_open

    for path in folder.glob("*.safetensors"):
        with safe_open(str(path), "pt") as file:
            if any("recurrent_router." in key for key in file.keys()):  # noqa: SIM118  no mapping
                return
    raise ModelError(
        f"{folder} lacks the weights of its recurrent router, which its configuration speaks of: "
        "they would be random"
    )


__all__ = ["load_experts", "load_mixture", "stored_dtype"]
