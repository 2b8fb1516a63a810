"""One way to load a base model, wherever it lies: packaged, a folder, a GGUF file or the hub."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bakeoff._files import build_once, cache_directory, sha256, write_text
from bakeoff.errors import BakeoffError, ModelError
from bakeoff.models.gguf import convert_gguf, one_line, quiet_transformers
from bakeoff.models.packaged import is_packaged, pull, suggestion

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]

_DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a base model is made of; other frameworks' weights and pickles stay on the hub.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_IGNORED = ["onnx/*", "openvino/*", "original/*", "consolidated*"]
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
)
# A model without position table (ALiBi, recurrent) states no limit; this one keeps memory in hand.
_NO_STATED_LIMIT = 2048


@dataclass(frozen=True)
class BaseModel:
    """A backbone without its language-model head, ready to give hidden states.

    Parameters
    ----------
    name
        What it was asked for as.
    model
        The transformers model, in eval mode; its output has ``last_hidden_state``.
    tokenizer
        Its tokenizer, with a padding token and `max_length` as ``model_max_length``. Where the
        padding token is a token that also occurs in text, only the attention mask tells padding.
    path
        The local folder that ``from_pretrained`` loads the same model from.
    fingerprint
        64 hexadecimal digits that change with the weights, the configuration, the tokenizer (the
        appended end-of-text token included) or the dtype: what caches of results are keyed by.
    hidden_size
        Width of a hidden state.
    num_layers
        Number of transformer layers; there is one hidden state more, the embedding output.
    max_length
        Longest input in tokens, special tokens included.
    is_decoder
        Whether attention is causal, found by experiment: no state depends on a later token.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    fingerprint: str
    hidden_size: int
    num_layers: int
    max_length: int
    is_decoder: bool


@dataclass(frozen=True)
class LanguageModel:
    """A decoder with its language-model head, ready to score and generate text.

    Parameters
    ----------
    name
        What it was asked for as.
    model
        The transformers causal language model, in eval mode; its output has ``logits``.
    tokenizer
        Its tokenizer, with a padding token and `max_length` as ``model_max_length``.
    path
        The local folder that ``from_pretrained`` loads the same model from.
    fingerprint
        64 hexadecimal digits that change with the weights, the configuration, the tokenizer or the
        dtype.
    max_length
        Longest input in tokens, special tokens included.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    fingerprint: str
    max_length: int

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        """Return the same object: copies of what holds it (scikit-learn's clones) share weights."""
        return self


def load(
    name: str | Path, *, dtype: Dtype = "float32", device: str = "cpu", append_eos: bool = False
) -> BaseModel:
    """Load a base model and its tokenizer.

    Code that comes with a model is never executed, and weights are read from safetensors only.

    Parameters
    ----------
    name
        A packaged model's name (see `available`), a folder in transformers' or
        sentence-transformers' format, a ``.gguf`` file (converted once into the cache), or a hub
        id ``owner/model``.
    dtype
        Precision of the weights.
    device
        A torch device, such as ``"cpu"`` or ``"cuda:0"``.
    append_eos
        Whether the tokenizer ends every text, a truncated one too, with the end-of-text token, so
        that the last state has read the whole text. A tokenizer that already ends texts with a
        special token (``[SEP]``, ``</s>``) stays as it is.

    Returns
    -------
    BaseModel
        The model without its head, in eval mode.

    Raises
    ------
    ModelError
        If there is no such model, the hub cannot be reached, or the model cannot serve: an
        encoder-decoder, code of its own, pickled weights, missing weights, no tokenizer, no hidden
        states.
    FetchError
        If a packaged model cannot be downloaded.
    CacheError
        If it has to be written to the cache and cannot be.

    Examples
    --------
    >>> base = load("all-minilm-l6-v2")  # doctest: +SKIP
    >>> base.hidden_size, base.num_layers, base.max_length, base.is_decoder  # doctest: +SKIP
    (384, 6, 256, False)
    >>> load("smolm2-135m")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    bakeoff.errors.ModelError: unknown model 'smolm2-135m'; did you mean smollm2-135m? ...
    """
    if dtype not in _DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    folder, stated_length = _transformer_part(model_folder(str(name)))
    with quiet_transformers():
        _refuse_unfit(folder)
        tokenizer = _tokenizer(folder)
        model = _model(folder, dtype, device)
    _ensure_padding(tokenizer, str(name))
    if append_eos:
        _append_eos(tokenizer)
    max_length = _max_length(model, tokenizer, stated_length)
    tokenizer.model_max_length = max_length
    hidden_size, num_layers, is_decoder = _inspect(model)
    return BaseModel(
        name=str(name),
        model=model,
        tokenizer=tokenizer,
        path=folder,
        fingerprint=_fingerprint(folder, dtype, append_eos, max_length),
        hidden_size=hidden_size,
        num_layers=num_layers,
        max_length=max_length,
        is_decoder=is_decoder,
    )


def load_language_model(
    name: str | Path,
    *,
    dtype: Dtype = "float32",
    device: str = "cpu",
    build: Callable[[Path, Dtype], PreTrainedModel | None] | None = None,
) -> LanguageModel:
    """Load a causal language model, head included, and its tokenizer.

    Parameters
    ----------
    name, dtype, device
        As for `load`.
    build
        Makes the model of its folder where transformers alone cannot, and returns None where it
        can.

    Returns
    -------
    LanguageModel
        The model in eval mode.

    Raises
    ------
    ModelError
        As `load`; also if the model is no decoder or its folder lacks the head's weights.
    FetchError
        If a packaged model cannot be downloaded.
    CacheError
        If it has to be written to the cache and cannot be.

    Examples
    --------
    >>> smollm = load_language_model("smollm2-135m")  # doctest: +SKIP
    >>> smollm.tokenizer.decode(smollm.model.generate(...)[0])  # doctest: +SKIP
    """
    if dtype not in _DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    folder, stated_length = _transformer_part(model_folder(str(name)))
    with quiet_transformers():
        _refuse_unfit(folder)
        tokenizer = _tokenizer(folder)
        model = None if build is None else _built(build, folder, dtype, device)
        if model is None:
            model = _model(folder, dtype, device, head=True)
    _ensure_padding(tokenizer, str(name))
    max_length = _max_length(model, tokenizer, stated_length)
    tokenizer.model_max_length = max_length
    if not _inspect(model)[2]:
        raise ModelError(
            f"{name} is an encoder, which gives no probability of the next token: give a decoder"
        )
    return LanguageModel(
        name=str(name),
        model=model,
        tokenizer=tokenizer,
        path=folder,
        fingerprint=_fingerprint(folder, dtype, "language model", max_length),
        max_length=max_length,
    )


# Where it lies ------------------------------------------------------------------------------------


def model_folder(name: str) -> Path:
    """Return the folder that holds the model `name`, fetching or converting it if need be.

    Raises
    ------
    ModelError
        If there is no such model, or the hub cannot be reached.
    """
    if is_packaged(name):
        return pull(name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _converted(path)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is neither a folder nor a .gguf file")
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")):
        raise ModelError(f"there is no file or folder {path}")
    if _HUB_ID.fullmatch(name):
        return _from_hub(name)
    raise ModelError(
        f"unknown model {name!r}{suggestion(name)}; else give a folder, a .gguf file or a hub id "
        "'owner/model', which needs network"
    )


def _converted(path: Path) -> Path:
    target = cache_directory() / "models" / f"gguf-{_file_digest(path)[:16]}"
    return build_once(target, lambda folder: convert_gguf(path.resolve(), folder))


def _from_hub(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED)
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{name} asks to accept its terms on the hub first; then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no model {name!r} here or on the hub (or it is private: `hf auth login`)"
        ) from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub was not reached"
        raise ModelError(
            f"there is no folder {name!r}, and as a hub id it cannot be fetched: {why} and it is "
            "not in the hub's local cache"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{name} cannot be fetched from the hub: {one_line(error)}") from error


def _transformer_part(folder: Path) -> tuple[Path, int | None]:
    """Return the transformers folder inside `folder`, and a length limit stated beside it.

    A sentence-transformers folder keeps its backbone as the first of its modules.
    """
    limit = None
    modules = folder / "modules.json"
    if modules.is_file():
        first = _read_json(modules)[0]
        if not str(first["type"]).endswith(".Transformer"):
            raise ModelError(
                f"{folder} is a sentence-transformers model without a transformer: it begins with "
                f"{first['type']}, which has no hidden states per layer"
            )
        folder = folder / first["path"]
        settings = folder / "sentence_bert_config.json"
        if settings.is_file():
            limit = _read_json(settings).get("max_seq_length")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a transformers model")
    if not any(folder.glob("*.safetensors")):
        pickles = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"))]
        raise ModelError(
            f"{folder} has no .safetensors weights"
            + (
                f", and {pickles[0]} is a pickle, which can run any code and is not opened; if you "
                f"trust it, convert it: {_conversion_command(folder)}"
                if pickles
                else ""
            )
        )
    return folder, limit


def _conversion_command(folder: Path) -> str:
    return (
        'python -c "from transformers import AutoModel as M, AutoTokenizer as T; '
        f"[C.from_pretrained('{folder}').save_pretrained('{folder}-safetensors') for C in (M, T)]\""
    )


# What it is made of -------------------------------------------------------------------------------


def _refuse_unfit(folder: Path) -> None:
    """Raise for a model that its configuration alone shows to be unfit, before reading weights."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # anything may be in a JSON file
        raise ModelError(_unreadable(folder, "configuration", error)) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{folder} is an encoder-decoder ({config.model_type}) and cannot serve: its encoder "
            "and its decoder give two sets of hidden states, and a text alone does not drive both; "
            "save the encoder by itself and load that"
        )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(_unreadable(folder, "tokenizer", error)) from error


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {device!r} cannot be used: {one_line(error)}") from error


def _built(
    build: Callable[[Path, Dtype], PreTrainedModel | None], folder: Path, dtype: Dtype, device: str
) -> PreTrainedModel | None:
    _check_device(device)
    try:
        model = build(folder, dtype)
    except BakeoffError:
        raise
    except Exception as error:  # anything may be in the files
        raise ModelError(_unreadable(folder, "model", error)) from error
    return None if model is None else model.eval().to(device)


def _model(folder: Path, dtype: Dtype, device: str, *, head: bool = False) -> PreTrainedModel:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    _check_device(device)
    try:
        model, report = (AutoModelForCausalLM if head else AutoModel).from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(_unreadable(folder, "model", error)) from error
    # A pooler that the checkpoint lacks is drawn at random, but nothing here reads it.
    absent = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if absent:
        raise ModelError(
            f"{folder} lacks {len(absent)} weights of its {type(model).__name__}, among them "
            f"{absent[0]}: they would be random"
        )
    return model.eval().to(device)


def _unreadable(folder: Path, what: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"{folder} needs code of its own to load, which is never executed here"
    return f"the {what} in {folder} cannot be loaded: {one_line(error)}"


def _inspect(model: PreTrainedModel) -> tuple[int, int, bool]:
    """Run a few tokens through the model: width, number of layers, and whether it is causal."""
    import torch

    from bakeoff.models.attention import sees_ahead

    try:
        n_ids = model.get_input_embeddings().num_embeddings
        ids = torch.arange(4, device=model.device)[None] % n_ids
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        hidden_size, num_layers = states[-1].shape[-1], len(states) - 1
    except Exception as error:  # models of images or sound fail in many ways on text
        raise ModelError(
            f"{type(model).__name__} gives no hidden states for text alone: {one_line(error)}"
        ) from error
    return hidden_size, num_layers, not sees_ahead(model)


# The tokenizer ------------------------------------------------------------------------------------


def _ensure_padding(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.pad_token is None:
        stand_in = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        if stand_in is None:
            raise ModelError(f"the tokenizer of {name} has no token that can serve as padding")
        tokenizer.pad_token = stand_in
        logger.info("%s has no padding token; %s serves, masked by position", name, stand_in)


def _append_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer end every text with its end-of-text token, in a way that is saved with it.

    The post-processor does it, not the caller, so that truncation leaves room for the token and
    every library that loads the tokenizer does the same.
    """
    probe = tokenizer("a", return_special_tokens_mask=True)
    special = probe["special_tokens_mask"]
    if special[-1]:
        return
    if tokenizer.eos_token is None:
        raise ModelError("append_eos: the tokenizer has no end-of-text token")
    if not tokenizer.is_fast:
        raise ModelError("append_eos needs a tokenizer of the tokenizers library (tokenizer.json)")
    n_before = special.index(0)
    _set_template(tokenizer, probe["input_ids"][:n_before])
    if "add_bos_token" in tokenizer.init_kwargs or "add_eos_token" in tokenizer.init_kwargs:
        # Some classes build the post-processor anew from these flags whenever they are loaded.
        tokenizer.init_kwargs["add_eos_token"] = True


def _set_template(tokenizer: Any, ids_before: list[int]) -> None:
    """Have the tokenizer put `ids_before` before each text and the end-of-text token after it."""
    from tokenizers import processors

    before, eos = tokenizer.convert_ids_to_tokens(ids_before), tokenizer.eos_token
    template = processors.TemplateProcessing(
        single=[*before, "$A", eos],
        pair=[*before, "$A", eos, *(f"{token}:1" for token in before), "$B:1", f"{eos}:1"],
        special_tokens=list(
            {**dict(zip(before, ids_before, strict=True)), eos: tokenizer.eos_token_id}.items()
        ),
    )
    backend = tokenizer.backend_tokenizer
    present = json.loads(backend.to_str()).get("post_processor") or {}
    trimming = [
        processors.ByteLevel(trim_offsets=part["trim_offsets"])
        for part in present.get("processors", [present])
        if part.get("type") == "ByteLevel"
    ]
    backend.post_processor = processors.Sequence([*trimming, template]) if trimming else template


def _max_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stated: int | None
) -> int:
    """Return the least of the limits that the folder, the tokenizer and the positions set."""
    limits = [stated, tokenizer.model_max_length, _n_positions(model)]
    # Tokenizers say 10**30 when nobody told them.
    return min((n for n in limits if n is not None and n < 10**9), default=_NO_STATED_LIMIT)


def _n_positions(model: PreTrainedModel) -> int | None:
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            # RoBERTa's kin number positions from behind the padding token's id.
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


# Its identity -------------------------------------------------------------------------------------


def _fingerprint(folder: Path, *choices: object) -> str:
    """Hash what decides the hidden states: the folder's files and how they were loaded."""
    files = {"config.json", *(path.name for path in folder.glob("*.safetensors"))}
    for pattern in _TOKENIZER_FILES:
        files |= {path.name for path in folder.glob(pattern)}
    parts = [f"{name} {_file_digest(folder / name)}" for name in sorted(files)]
    return hashlib.sha256("\n".join([*parts, repr(choices)]).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    """Return a file's SHA-256, remembered by path, size and time of change.

    Hashing takes seconds for large weights, and every worker process of a study loads them.
    """
    path = path.resolve()
    status = path.stat()
    if status.st_size < 2**20:
        return sha256(path)
    key = hashlib.sha256(f"{path} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    try:
        note = cache_directory() / "digests" / key
        if note.is_file():
            return note.read_text(encoding="ascii")
        digest = sha256(path)
        write_text(note, digest)
    except OSError:  # a memory that cannot be kept is no reason to fail
        return sha256(path)
    return digest


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {one_line(error)}") from error
