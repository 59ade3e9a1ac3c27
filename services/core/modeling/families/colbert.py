"""ColBERT: a vector for each token; queries and documents are written differently.

Sources: Khattab and Zaharia, arXiv 2004.12832; Jha et al., arXiv 2408.16672; ``artifact.metadata`` of the
checkpoints and the tokenising code of stanford-futuredata/ColBERT.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    Config,
    Shape,
    read_json,
    require,
)
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.families import jina_bert, xlm_rotary
from services.core.modeling.families.encoder import Encoder
from services.core.modeling.families.encoder_config import EncoderConfig, refuse_short
from services.core.modeling.families.text import TextProcessor
from services.core.modeling.layers.linear import Linear
from services.core.modeling.layers.lora import Adapters
from services.core.modeling.layers.packed import Limits, PackedBatch
from services.core.modeling.layers.reading import Layers
from services.core.modeling.types import Backbone, EncodeItem, Encoding, TokenIds, Tokens

_QUERY_LENGTH = 32
_PROJECTION = "linear.weight"


@dataclass(frozen=True, slots=True)
class ColbertRules:
    """``artifact.metadata``: how queries and documents are written.

    The markers and the filler are tokens; of several markers the first that the tokenizer has counts. With
    ``attend_to_fillers`` the fillers of a query are attended to; they have vectors either way.
    ``skip_punctuation`` leaves the vectors of punctuation out of a document.
    """

    query_markers: tuple[str, ...]
    document_markers: tuple[str, ...]
    filler: str
    attend_to_fillers: bool
    skip_punctuation: bool = True

    def read(self, checkpoint: Checkpoint) -> ColbertRules:
        """Return these rules, but for what the checkpoint says. CheckpointError if that is broken."""
        path = checkpoint.directory / "artifact.metadata"
        if not path.is_file():
            return self
        said = read_json(path)
        _refuse_unlike_cosine(said)
        return replace(
            self,
            query_markers=(*_tokens(said, "query_token_id", "query_token"), *self.query_markers),
            document_markers=(*_tokens(said, "doc_token_id", "doc_token"), *self.document_markers),
            attend_to_fillers=require(
                {"attend_to_mask_tokens": self.attend_to_fillers, **said}, "attend_to_mask_tokens", bool
            ),
            skip_punctuation=require(
                {"mask_punctuation": self.skip_punctuation, **said}, "mask_punctuation", bool
            ),
        )


V1 = ColbertRules(("[unused0]",), ("[unused1]",), "[MASK]", attend_to_fillers=False)
V2 = ColbertRules(("[QueryMarker]",), ("[DocumentMarker]",), "<mask>", attend_to_fillers=True)


def _refuse_unlike_cosine(said: Config) -> None:
    similarity = said.get("similarity", "cosine")
    if similarity != "cosine":
        raise CheckpointError(f"artifact.metadata: 'similarity' is {similarity!r}, cosine is served")


def _tokens(said: Config, *names: str) -> list[str]:
    """Read the tokens that writers call by any of ``names``, though they are no ids."""
    found = [said[name] for name in names if name in said]
    if strange := [token for token in found if not isinstance(token, str)]:
        raise CheckpointError(f"artifact.metadata: {', '.join(names)} must be tokens, found {strange}")
    return found


class DocumentTokenizer:
    """Documents: the marker behind the first special token."""

    def __init__(self, tokenizer: Tokenizer, marker: int) -> None:
        """``marker`` is a token id."""
        self._tokenizer = tokenizer
        self._marker = marker
        self.special_length = tokenizer.special_length + 1
        self.prefix_length = tokenizer.prefix_length + 1

    def names(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of ``ids`` as the vocabulary writes them."""
        return self._tokenizer.names(ids)

    def encode_batch(
        self, texts: Sequence[str], prompt: str = "", truncate_to: int | None = None
    ) -> list[Tokens]:
        """Tokenise as ``TextTokenizer`` says; the marker counts as a special token."""
        room = None if truncate_to is None else truncate_to - 1
        return [self._marked(each) for each in self._tokenizer.encode_batch(texts, prompt, room)]

    def _marked(self, tokens: Tokens) -> Tokens:
        ids = np.insert(tokens.ids, self._tokenizer.prefix_length, self._marker)
        return Tokens(ids, tokens.length + 1, tokens.truncated)


class QueryTokenizer:
    """Queries: marked too, and always of the same length, filled up with the filler."""

    def __init__(self, tokenizer: Tokenizer, marker: int, filler: int, length: int) -> None:
        """``marker`` and ``filler`` are token ids."""
        self._marked = DocumentTokenizer(tokenizer, marker)
        self._filler = filler
        self._length = length
        self.special_length = self._marked.special_length
        self.prefix_length = self._marked.prefix_length

    def names(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of ``ids`` as the vocabulary writes them."""
        return self._marked.names(ids)

    def encode_batch(
        self, texts: Sequence[str], prompt: str = "", truncate_to: int | None = None
    ) -> list[Tokens]:
        """Tokenise as ``TextTokenizer`` says, but cut at the length of a query at the latest.

        ``length`` of the result counts no fillers.
        """
        room = self._length if truncate_to is None else min(truncate_to, self._length)
        return [self._filled(each) for each in self._marked.encode_batch(texts, prompt, room)]

    def _filled(self, tokens: Tokens) -> Tokens:
        fillers = np.full(self._length - len(tokens.ids), self._filler, np.int32)
        return tokens._replace(ids=np.concatenate([tokens.ids, fillers]))


@dataclass(frozen=True, slots=True)
class ColbertIds:
    """The token ids that the rules amount to; ``skipped`` has those left out of documents."""

    query_marker: int
    document_marker: int
    filler: int
    skipped: frozenset[int]

    @classmethod
    def find(cls, rules: ColbertRules, tokenizer: Tokenizer) -> ColbertIds:
        """Look the tokens up. CheckpointError for one that the tokenizer does not have."""

        def find(*tokens: str) -> int:
            found = [id for token in tokens if (id := tokenizer.token_id(token)) is not None]
            if not found:
                raise CheckpointError(f"tokenizer.json: it has no token '{tokens[0]}'")
            return found[0]

        # The original takes the first id of each character, so a tokenizer that puts a lone word start before
        # punctuation has that skipped, and a mark glued to the word before it is kept.
        skipped = tokenizer.first_ids(string.punctuation) if rules.skip_punctuation else ()
        return cls(
            query_marker=find(*rules.query_markers),
            document_marker=find(*rules.document_markers),
            filler=find(rules.filler),
            skipped=frozenset(skipped),
        )

    def is_query(self, ids: TokenIds, prefix: int) -> bool:
        """Whether ``ids`` were written by the query's tokenizer, whose marker stands behind the prefix."""
        return len(ids) > prefix and int(ids[prefix]) == self.query_marker

    def shown(self, query: TokenIds) -> int:
        """Tokens of a query before its fillers; its last special token ends them, whatever the text says."""
        real = np.flatnonzero(query != self.filler)
        return int(real[-1]) + 1


class ColbertHead:
    """The projection of each token, fp32, not normalised; punctuation of documents is left out."""

    def __init__(self, projection: Linear, ids: ColbertIds, prefix: int) -> None:
        """``prefix`` is the number of special tokens before the marker."""
        self._projection = projection
        self._ids = ids
        self._prefix = prefix
        self._skipped = np.array(sorted(ids.skipped), np.int32)

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch, items: Sequence[EncodeItem]) -> torch.Tensor:
        """Return (tokens, dimensions) fp32."""
        return self._projection(hidden).float()

    def results(
        self, rows: NDArray[np.float32], batch: PackedBatch, items: Sequence[EncodeItem]
    ) -> list[Encoding]:
        """Return (vectors, dimensions) for each item."""
        results: list[Encoding] = []
        start = 0
        for item in items:
            end = start + len(item.token_ids)
            results.append(self._kept(rows[start:end], item.token_ids))
            start = end
        return results

    def _kept(self, rows: NDArray[np.float32], ids: TokenIds) -> NDArray[np.float32]:
        if self._ids.is_query(ids, self._prefix):
            return rows
        return rows[~np.isin(ids, self._skipped)]


class ColbertEncoder:
    """A model in memory; see ``types.TextEncoder`` for the contract. Its results are multi-vectors."""

    def __init__(
        self, spec: ModelSpec, encoder: Encoder, ids: ColbertIds, query_length: int, attend_to_fillers: bool
    ) -> None:
        """Put the two forms in front of ``encoder``."""
        plain = encoder.tokenizer
        self.tokenizer = DocumentTokenizer(plain, ids.document_marker)
        self.query_tokenizer = QueryTokenizer(plain, ids.query_marker, ids.filler, query_length)
        self.processor = TextProcessor(spec, self.tokenizer, self.query_tokenizer)
        self.width = encoder.width
        self._encoder = encoder
        self._ids = ids
        self._prefix = plain.prefix_length
        self._hides = not attend_to_fillers

    @property
    def batch_tokens(self) -> int:
        """See ``types.TextEncoder``."""
        return self._encoder.batch_tokens

    def forward(self, batch: Sequence[EncodeItem]) -> list[Encoding]:
        """Run the network; (vectors, width) fp32 per item, not normalised."""
        return self._encoder.forward([self._hidden(item) for item in batch] if self._hides else batch)

    def warm_up(self) -> None:
        """Run what the first real call would otherwise pay for."""
        self._encoder.warm_up()
        self.forward([EncodeItem(self.query_tokenizer.encode_batch(["warm"])[0].ids)])

    def _hidden(self, item: EncodeItem) -> EncodeItem:
        if not self._ids.is_query(item.token_ids, self._prefix):
            return item
        return item._replace(attended=self._ids.shown(item.token_ids))


def is_colbert_v1(config: Config) -> bool:
    """Whether config.json is that of jina-colbert-v1."""
    return jina_bert.is_jina_bert(config) and config.get("architectures") == ["HF_ColBERT"]


def is_colbert_v2(config: Config) -> bool:
    """Whether config.json may be that of jina-colbert-v2, which is that of its backbone."""
    return xlm_rotary.is_xlm_rotary(config) and not xlm_rotary.has_adapters(config)


def load_colbert_v1(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> ColbertEncoder:
    """Load jina-colbert-v1-en: JinaBERT, fillers are not attended to."""
    config = jina_bert.read_config(checkpoint.config)
    refuse_short(spec, config, checkpoint)
    extra = _projection_shape(spec, config)
    network = jina_bert.load_jina_bert(checkpoint, config, device, dtype, extra=extra)
    return _joined(spec, checkpoint, config, network, V1.read(checkpoint), device, dtype)


def load_colbert_v2(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> ColbertEncoder:
    """Load jina-colbert-v2: XLM-R with rotary positions."""
    config = xlm_rotary.read_config(checkpoint.config)
    refuse_short(spec, config, checkpoint)
    extra = _projection_shape(spec, config)
    network = xlm_rotary.load_xlm_rotary(checkpoint, config, Adapters(), device, dtype, extra=extra)
    return _joined(spec, checkpoint, config, network, V2.read(checkpoint), device, dtype)


def _projection_shape(spec: ModelSpec, config: EncoderConfig) -> Mapping[str, Shape]:
    return {_PROJECTION: (spec.dimensions, config.width)}


def _joined(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    config: EncoderConfig,
    network: Backbone,
    rules: ColbertRules,
    device: torch.device,
    dtype: torch.dtype,
) -> ColbertEncoder:
    tokenizer = Tokenizer.load(checkpoint.directory)
    ids = ColbertIds.find(rules, tokenizer)
    projection = Layers(checkpoint, device, dtype).joined(checkpoint.tensor(_PROJECTION), None)
    head = ColbertHead(projection, ids, tokenizer.prefix_length)
    limits = Limits(config.vocabulary, config.positions)
    width = spec.dimensions
    encoder = Encoder(spec, tokenizer, network, head, device=device, limits=limits, width=width)
    length = spec.max_query_length or _QUERY_LENGTH
    return ColbertEncoder(spec, encoder, ids, length, rules.attend_to_fillers)
