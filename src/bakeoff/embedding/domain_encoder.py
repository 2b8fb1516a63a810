"""Texts that know their domain, in sentence-transformers: domain tokens, experts, pooling.

`DomainEncoder` is a SentenceTransformer whose ``encode`` takes a domain; its first module puts the
domain's token into the sequence and tells the model's experts which of them to use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn

from bakeoff.embedding.domain_experts import (
    EXPERT_IDS,
    SETTINGS_FILE,
    WEIGHTS_FILE,
    Routing,
    checked_domains,
    domain_index,
    experts_of,
    load_domain_experts,
    routed,
    save_domain_experts,
    to_domain_experts,
)
from bakeoff.embedding.pooling import PoolingModule, mean_over_tokens
from bakeoff.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# --- domain tokens ----------------------------------------------------------------------------


def domain_token(domain: str) -> str:
    """Return the special token of a domain.

    Examples
    --------
    >>> domain_token("copd")
    '[domain:copd]'
    """
    return f"[domain:{domain}]"


def add_domain_tokens(model: PreTrainedModel, tokenizer: Any, domains: Sequence[str]) -> list[int]:
    """Give each domain a special token whose embedding begins as a copy of the first token's.

    Parameters
    ----------
    model
        Its input embeddings grow, in place.
    tokenizer
        Its vocabulary grows, in place.
    domains
        Their names; a domain that has its token already keeps it.

    Returns
    -------
    list of int
        The tokens' ids.

    Raises
    ------
    DataError
        If a name is blank or comes twice.
    ModelError
        If the tokenizer has no classification, beginning- or end-of-sequence token to begin from.

    Notes
    -----
    Tokens are spelt ``[domain:copd]`` rather than ``[COPD]``, so that no text holds one by chance.
    An embedding table with spare rows is not cut down to the vocabulary, as the official code does.

    Examples
    --------
    >>> add_domain_tokens(model, tokenizer, ["copd", "cvd"])  # doctest: +SKIP
    [30522, 30523]
    """
    from tokenizers import AddedToken

    names = checked_domains(domains)
    seeds = (tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    seed = next((token for token in seeds if token is not None), None)
    if seed is None:
        raise ModelError(
            "the tokenizer has no cls, bos or eos token, from which a domain's token could begin"
        )
    known = tokenizer.get_vocab()
    new = [domain_token(name) for name in names if domain_token(name) not in known]
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True
    )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = [int(tokenizer.convert_tokens_to_ids(domain_token(name))) for name in names]
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        for token, number in zip((domain_token(name) for name in names), ids, strict=True):
            if token in new:
                weight[number] = weight[seed]
    return ids


# --- sentence-transformers --------------------------------------------------------------------


class DomainText(str):
    """A text that knows its domain, for batches of several domains.

    Every function of sentence-transformers that takes texts takes these.

    Parameters
    ----------
    text
        The text.
    domain
        The domain's name.

    Examples
    --------
    >>> text = DomainText("a mole", "skin")
    >>> text.domain, text + "!", text == DomainText("a mole", "lungs")
    ('skin', 'a mole!', False)
    """

    __slots__ = ("domain",)
    domain: str

    def __new__(cls, text: str, domain: str) -> Self:
        """Make one."""
        new = super().__new__(cls, text)
        new.domain = domain
        return new

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, DomainText)
            and str.__eq__(self, other)
            and self.domain == other.domain
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((str.__hash__(self), self.domain))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str.__str__(self), self.domain)


def with_domains(texts: Sequence[str], domain: str | Sequence[str]) -> list[DomainText]:
    """Return texts that know their domain: one for all, or one each.

    Raises
    ------
    DataError
        If there are not as many domains as texts.
    """
    names = [domain] * len(texts) if isinstance(domain, str) else list(domain)
    if len(names) != len(texts):
        raise DataError(f"domain must be one per text, got {len(names)} for {len(texts)} texts")
    return [DomainText(text, name) for text, name in zip(texts, names, strict=True)]


class DomainTransformer(Transformer):  # type: ignore[misc]  # sentence-transformers is untyped
    """First module of a sentence-transformers model that knows domains.

    Made by `DomainEncoder.from_model`; loaded by ``SentenceTransformer(folder,
    trust_remote_code=True)`` wherever bakeoff is installed. Texts tell their domain by
    ``encode(..., domain="copd")`` or by being `DomainText`.

    Parameters
    ----------
    model_name_or_path
        A folder that `save` wrote.
    domains
        Their names.
    domain_tokens
        Whether each domain has a token: it replaces the first token of the sequence where the
        tokenizer puts one there (``[CLS]``, ``<s>``), and stands before the text where not.
    experts
        Whether the model has experts; if not, domains differ by their token alone.
    kwargs
        As for sentence-transformers' Transformer.
    """

    config_keys: ClassVar[list[str]] = [
        *Transformer.config_keys,
        "domains",
        "domain_tokens",
        "experts",
    ]
    forward_kwargs: ClassVar[set[str]] = {"domain"}

    def __init__(
        self,
        model_name_or_path: str,
        *,
        domains: Sequence[str],
        domain_tokens: bool = True,
        experts: bool = True,
        **kwargs: Any,
    ) -> None:
        self._set_domains(domains, domain_tokens, experts)
        super().__init__(model_name_or_path, **kwargs)
        self._set_tokens()

    def _set_domains(self, domains: Sequence[str], domain_tokens: bool, experts: bool) -> None:
        self.domains = list(checked_domains(domains))
        self.domain_tokens = domain_tokens
        self.experts = experts
        self.default_domain: str | None = None

    def _set_tokens(self) -> None:
        # Padded batches only: a flat one has no row per sequence.
        self.unpad_inputs = False
        self._token_ids: list[int] = []
        self._replaces_first = False
        if self.domain_tokens:
            tokens = [domain_token(name) for name in self.domains]
            self._token_ids = [int(i) for i in self.tokenizer.convert_tokens_to_ids(tokens)]
            first = self.tokenizer("a")["input_ids"][0]
            self._replaces_first = first in (
                self.tokenizer.cls_token_id,
                self.tokenizer.bos_token_id,
            )

    @classmethod
    def from_transformer(
        cls,
        transformer: Transformer,
        domains: Sequence[str],
        *,
        experts: bool = True,
        domain_tokens: bool = True,
        layers: Sequence[int] | Literal["all"] = "all",
        routing: Routing = "enforced",
        top_k: int = 2,
        seed: int = 0,
    ) -> Self:
        """Turn sentence-transformers' first module into one that knows domains.

        The model and the tokenizer are taken over and changed: use the result instead.

        Parameters
        ----------
        transformer
            The module.
        domains, layers, routing, top_k, seed
            As in `to_domain_experts`.
        experts, domain_tokens
            As for the class.
        """
        new = cls.__new__(cls)
        new.__dict__.update(transformer.__dict__)
        new._set_domains(domains, domain_tokens, experts)
        if domain_tokens:
            add_domain_tokens(new.auto_model, new.tokenizer, domains)
        if experts:
            to_domain_experts(
                new.auto_model, domains, layers=layers, routing=routing, top_k=top_k, seed=seed
            )
        new._set_tokens()
        return new

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        domain: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the features of some texts, with ``expert_ids`` among them.

        Parameters
        ----------
        inputs
            Texts; their own domain counts first, then `domain`, then `default_domain`.
        prompt
            Put before each text.
        domain
            The domain of all texts that do not know theirs. One name: sentence-transformers sorts
            texts by length, so that a list would no longer belong to them; give `DomainText`.

        Raises
        ------
        DataError
            If a text's domain is missing or unknown.
        """
        ids = self._ids(inputs, domain)
        if ids is None:  # neither a token nor an expert depends on it
            return super().preprocess(
                [str.__str__(text) if isinstance(text, str) else text for text in inputs],
                prompt=prompt,
                **kwargs,
            )
        texts = [str.__str__(text) if isinstance(text, str) else text for text in inputs]
        if self._token_ids and not self._replaces_first:
            texts = [
                domain_token(self.domains[number]) + text
                for number, text in zip(ids, texts, strict=True)
            ]
        features = super().preprocess(texts, prompt=prompt, **kwargs)
        rows = features["input_ids"]
        padded = isinstance(rows, Tensor)
        if self._replaces_first:
            tokens = [self._token_ids[number] for number in ids]
            if padded:
                first = features["attention_mask"].int().argmax(dim=1)  # padding may be on the left
                rows[torch.arange(len(rows)), first] = torch.tensor(tokens, dtype=rows.dtype)
            else:
                for row, token in zip(rows, tokens, strict=True):
                    row[0] = token
        if self.experts:
            # A row per text, so that whoever pads the rows of a batch himself can pad these too.
            features[EXPERT_IDS] = torch.tensor(ids) if padded else [[number] for number in ids]
        return features

    def _ids(self, inputs: Sequence[Any], domain: str | None) -> list[int] | None:
        if domain is not None and not isinstance(domain, str):
            raise DataError(
                f"domain must be one name, got {domain!r}; for one each, load the folder with "
                "DomainEncoder or give with_domains(texts, domains)"
            )
        default = domain if domain is not None else self.default_domain
        config = experts_of(self.auto_model)
        if not self.domain_tokens and (config is None or config.routing != "enforced"):
            return None
        ids = []
        for text in inputs:
            name = text.domain if isinstance(text, DomainText) else default
            if name is None:
                raise DataError(
                    f"domain is missing: give encode(..., domain=...); known are "
                    f"{', '.join(self.domains)}"
                )
            ids.append(domain_index(name, self.domains))
        return ids

    def forward(self, features: dict[str, Any], domain: str | None = None, **kwargs: Any) -> Any:
        """Return the features with the tokens' states; `domain` has been read by `preprocess`."""
        ids = features.pop(EXPERT_IDS, None)
        if not self.experts:
            return super().forward(features, **kwargs)
        if isinstance(ids, Tensor) and ids.dim() == 2:
            ids = ids[:, 0]
        inverse = None
        given = features
        if ids is not None and not bool((ids[1:] >= ids[:-1]).all()):
            # Sorted once here, no layer has to sort: an expert's sequences are then neighbours.
            order = ids.argsort(stable=True)
            inverse = order.argsort()
            ids = ids[order]
            given = {name: _reordered(value, order) for name, value in features.items()}
        rows, mask = given["input_ids"], given.get("attention_mask")
        with routed(self.auto_model, ids, rows, mask) as batch:
            returned = super().forward({**given, EXPERT_IDS: batch}, **kwargs)
        returned.pop(EXPERT_IDS, None)
        if inverse is not None:
            returned = {name: _reordered(value, inverse) for name, value in returned.items()}
        features.update(returned)
        return features

    @contextmanager
    def using(self, domain: str) -> Iterator[None]:
        """Let texts that do not know their domain be of this one, for a while."""
        domain_index(domain, self.domains)
        before, self.default_domain = self.default_domain, domain
        try:
            yield
        finally:
            self.default_domain = before

    def _load_model(
        self, model_name_or_path: str, task: Any, config: Any, backend: str, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        if not self.experts:
            return super()._load_model(model_name_or_path, task, config, backend, *args, **kwargs)
        if backend != "torch":
            raise ModelError(f"domain experts run in torch only, got backend={backend!r}")
        where = {
            "subfolder": kwargs.get("subfolder") or "",
            "token": kwargs.get("token"),
            "cache_folder": kwargs.get("cache_dir"),
            "revision": kwargs.get("revision"),
            "local_files_only": kwargs.get("local_files_only", False),
        }
        paths = [
            self.load_file_path(model_name_or_path, file, **where)
            for file in (SETTINGS_FILE, WEIGHTS_FILE, "config.json")
        ]
        if None in paths:
            raise ModelError(f"{model_name_or_path} lacks {SETTINGS_FILE} or {WEIGHTS_FILE}")
        wanted = kwargs.get("attn_implementation")
        options = {} if wanted is None else {"attn_implementation": wanted}
        model = load_domain_experts(Path(str(paths[0])).parent, **options)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        # "auto" is what was saved.
        return model.to(dtype) if isinstance(dtype, torch.dtype) else model

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write model, tokenizer and settings into a folder."""
        if not self.experts:
            super().save(output_path, *args, **kwargs)
            return
        save_domain_experts(self.auto_model, output_path)
        self.processor.save_pretrained(output_path)
        self.save_config(output_path)


class DomainEncoder(SentenceTransformer):  # type: ignore[misc]
    """A SentenceTransformer whose ``encode`` takes a domain, or one for each text.

    A folder that it saved loads as ``SentenceTransformer(folder, trust_remote_code=True)`` too
    (the code that this trusts is bakeoff's), whose ``encode`` then takes one domain at a time or
    `DomainText`.

    Examples
    --------
    >>> base = SentenceTransformer("PATH_OR_HUB_ID")  # doctest: +SKIP
    >>> model = DomainEncoder.from_model(base, ["copd", "skin"])  # doctest: +SKIP
    >>> model.encode(["a mole", "a cough"], domain=["skin", "copd"]).shape  # doctest: +SKIP
    (2, 384)
    """

    @classmethod
    def from_model(
        cls,
        model: SentenceTransformer,
        domains: Sequence[str],
        *,
        experts: bool = True,
        domain_tokens: bool = True,
        layers: Sequence[int] | Literal["all"] = "all",
        routing: Routing = "enforced",
        top_k: int = 2,
        pooling: nn.Module | None = None,
        seed: int = 0,
    ) -> Self:
        """Make an encoder for several domains of one for all.

        The model is taken over and changed: use the result instead.

        Parameters
        ----------
        model
            A SentenceTransformer that begins with a Transformer.
        domains
            Their names.
        experts
            Whether every domain gets experts. If not, the model stays dense: the paper's reference
            with domain tokens.
        domain_tokens
            Whether every domain gets a token.
        layers, routing, top_k, seed
            As in `to_domain_experts`.
        pooling
            A module that replaces all after the first: `TanhPooling` for the paper's. None keeps
            what the model has.

        Raises
        ------
        ModelError
            If the model begins with something else, or has domains already.
        """
        modules = list(model.children())
        if type(modules[0]) is not Transformer:
            raise ModelError(
                f"model must begin with sentence-transformers' Transformer, got "
                f"{type(modules[0]).__name__}"
            )
        first = DomainTransformer.from_transformer(
            modules[0], domains, experts=experts, domain_tokens=domain_tokens, layers=layers,
            routing=routing, top_k=top_k, seed=seed,
        )  # fmt: skip
        rest = modules[1:] if pooling is None else [pooling]
        encoder = cls(
            modules=[first, *rest],
            device=str(model.device),
            prompts=model.prompts,
            default_prompt_name=model.default_prompt_name,
            similarity_fn_name=model.similarity_fn_name,
        )
        return cast("Self", encoder.train(model.training))

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains."""
        return tuple(self[0].domains)

    def save_pretrained(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Write the model into a folder, as ``SentenceTransformer.save_pretrained``."""
        with self[0].using(self.domains[0]):  # the model card shows vectors of sample texts
            super().save_pretrained(path, *args, **kwargs)

    def encode(self, inputs: Any, *args: Any, domain: Any = None, **kwargs: Any) -> Any:
        """Return the embeddings of texts.

        Parameters
        ----------
        inputs
            A text or several.
        domain
            Their domain, or one for each text. Texts that are `DomainText` need none.
        args, kwargs
            As for ``SentenceTransformer.encode``.

        Raises
        ------
        DataError
            If a domain is missing or unknown, or there are not as many as texts.
        """
        if domain is not None and not isinstance(domain, str):
            if isinstance(inputs, str):
                raise DataError("domain must be one name for one text")
            inputs = with_domains(list(inputs), list(domain))
            if inputs and not (args or kwargs) and self.device.type == "cpu":
                return encode_domains(self, inputs, [text.domain for text in inputs])
            domain = None
        if domain is not None:
            domain_index(domain, self.domains)
            kwargs["domain"] = domain
        return super().encode(inputs, *args, **kwargs)


def encode_domains(
    model: SentenceTransformer,
    texts: Sequence[str],
    domains: Sequence[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Return what ``model.encode(texts, domain=domains)`` returns, sooner.

    Texts of one domain go through `bakeoff.models.encode` together: without padding, and without
    any sorting by expert.

    Parameters
    ----------
    model
        One whose first module is a `DomainTransformer`; any other is given the texts alone.
    texts, domains
        n each.
    progress
        Called with (texts done, texts in total).

    Returns
    -------
    float32 array
        ``(n, d)``.

    Raises
    ------
    DataError
        If lengths do not agree or a domain is unknown.
    """
    from bakeoff.models.encoding import encode

    given = with_domains(texts, domains)
    first = model[0]
    if not isinstance(first, DomainTransformer):
        return encode(model, [str.__str__(text) for text in texts], progress=progress)
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(given):
        rows.setdefault(text.domain, []).append(row)
    for name in rows:
        domain_index(name, first.domains)
    vectors: NDArray[np.float32] | None = None
    done = 0
    for name, own in rows.items():
        with first.using(name):
            found = encode(model, [str.__str__(given[row]) for row in own])
        if vectors is None:
            vectors = np.empty((len(given), found.shape[1]), dtype=np.float32)
        vectors[own] = found
        done += len(own)
        if progress is not None:
            progress(done, len(given))
    if vectors is None:
        raise DataError("texts is empty")
    return vectors


class TanhPooling(PoolingModule):
    """The paper's pooling: mean over tokens, LayerNorm, linear, tanh, linear.

    Parameters
    ----------
    hidden_size
        Width d of the hidden states.
    normalize
        Whether embeddings are scaled to unit length; the paper trains on plain dot products.
    include_prompt
        As in `bakeoff.embedding.PoolingModule`.

    References
    ----------
    Hallee et al., as in `to_domain_experts`.

    Examples
    --------
    >>> TanhPooling(8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self, hidden_size: int, *, normalize: bool = False, include_prompt: bool = True
    ) -> None:
        super().__init__(hidden_size, normalize=normalize, include_prompt=include_prompt)
        self.norm = nn.LayerNorm(hidden_size)
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.outer = nn.Linear(hidden_size, hidden_size)

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        pooled = self.norm(mean_over_tokens(states, mask))
        return cast("Tensor", self.outer(torch.tanh(self.inner(pooled))))


def _reordered(value: Any, order: Tensor) -> Any:
    if isinstance(value, Tensor) and value.dim() and len(value) == len(order):
        return value.index_select(0, order.to(value.device))
    if isinstance(value, tuple) and all(isinstance(one, Tensor) for one in value):
        return tuple(_reordered(one, order) for one in value)
    return value
