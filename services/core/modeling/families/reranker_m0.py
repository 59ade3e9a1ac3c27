"""jina-reranker-m0: a query with a document, either of them a text or a picture, to one number.

Qwen2-VL reads the document, then the query, then a token whose state two layers turn into the score. Source:
the tensors, configuration and published code of the released checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from services.core.catalog.types import Modality, ModelSpec
from services.core.content import Image, Input, Usage
from services.core.modeling.checkpoints.checkpoint import Checkpoint, CheckpointError, Config, Shape
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.families.cross_encoder import PairScorer
from services.core.modeling.families.dense_decoder import ends
from services.core.modeling.families.encoder import Encoder
from services.core.modeling.families.qwen_vl import (
    PICTURE,
    PictureReader,
    VisionLanguageConfig,
    load_parts,
)
from services.core.modeling.layers.packed import Limits, PackedBatch
from services.core.modeling.layers.reading import linear_shapes
from services.core.modeling.types import (
    EncodeItem,
    Encoding,
    Feature,
    Prepared,
    PreparedPair,
    PreparedQuery,
    UnfitInputError,
)

SCORE_TOKEN = 100
SHIFT = 2.65
"""What the published code takes from the logit before its sigmoid."""

_RESERVED = 512
"""Tokens that one side of a pair leaves for the other, however long it is."""


def is_reranker_m0(config: Config) -> bool:
    """Whether config.json is that of jina-reranker-m0."""
    return "JinaVLForRanking" in (config.get("architectures") or ()) or config.get("model_type") == "qwen2_vl"


def m0_shapes(config: VisionLanguageConfig) -> dict[str, Shape]:
    """Names and shapes of the layers that make the score."""
    width = config.text.width
    return linear_shapes("score.0", width, width) | linear_shapes("score.2", 1, width)


def load_reranker_m0(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> PairScorer:
    """Load jina-reranker-m0. The bounds of a picture are the catalogue's, as in the published code."""
    config = VisionLanguageConfig.read(checkpoint.config, newer=False)
    limits = None if spec.images is None else (spec.images.min_pixels, spec.images.max_pixels)
    parts = load_parts(spec, checkpoint, device, dtype, newer=False, extra=m0_shapes(config), limits=limits)
    if config.text.vocabulary <= SCORE_TOKEN:
        raise CheckpointError(f"config.json: no token {SCORE_TOKEN}, whose state becomes the score")
    processor = M0Processor(spec, parts.tokenizer, parts.pictures)
    encoder = Encoder(
        spec,
        parts.tokenizer,
        parts.network,
        M0Head(checkpoint, device),
        device=device,
        limits=Limits(config.text.vocabulary, config.text.positions),
        width=1,
        wanted=ends,
        sees=parts.sight,
        warm=processor.samples(),
    )
    return PairScorer(processor, encoder)


class M0Head:
    """The last token through two layers to one logit, shifted, and the sigmoid of that; in fp32."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Read the layers."""

        def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            weight, bias = (
                checkpoint.tensor(f"{name}.{part}", torch.float32).to(device) for part in ("weight", "bias")
            )
            return weight, bias

        self._first, self._second = read("score.0"), read("score.2")

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch, items: Sequence[EncodeItem]) -> torch.Tensor:
        """Return (items, 1) fp32."""
        last = hidden[batch.cu_lengths[1:] - 1].float()
        return (
            functional.linear(functional.linear(last, *self._first).relu_(), *self._second) - SHIFT
        ).sigmoid_()

    def results(
        self, rows: NDArray[np.float32], batch: PackedBatch, items: Sequence[EncodeItem]
    ) -> list[Encoding]:
        """Return (1,) fp32 for each item."""
        return list(rows)


@dataclass(frozen=True, slots=True)
class _Side:
    """A query or a document: its text, or ``PICTURE`` with a ``feature``; how many tokens it has."""

    text: str
    tokens: int
    feature: Feature | None = None
    truncated: bool = False


class M0Processor:
    """Pairs of texts and pictures to items; see ``types.PairProcessor``."""

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer, pictures: PictureReader | None) -> None:
        """``pictures`` is None where none are offered."""
        self.fit = None if pictures is None else pictures.scaling
        self._spec = spec
        self._tokenizer = tokenizer
        self._pictures = pictures

    def expected(self, kind: Modality) -> int:
        """Return what a large picture costs."""
        if self._pictures is None or kind is not Modality.IMAGE:
            taken = "text only" if self._pictures is None else "text and images"
            raise UnfitInputError(f"Model '{self._spec.id}' takes {taken}, not '{kind}'.")
        return self._pictures.most_states * (1 + self._pictures.patches_of_state)

    def query(self, query: Input) -> PreparedQuery:
        """Read a query; a text may take all tokens but those that are kept for documents."""
        (side,) = self._sides([query], self._longest(self._spec.max_query_length))
        return PreparedQuery(side, _usage(side), side.truncated)

    def pairs(self, query: PreparedQuery, documents: Sequence[Input], longest: int) -> list[PreparedPair]:
        """Put each document before the query; where both are too long together, the document is cut."""
        asked = cast(_Side, query.form)
        limit = self._longest(longest or self._spec.max_document_length)
        return [self._pair(document, asked) for document in self._sides(documents, limit)]

    def limit(self, query: PreparedQuery, longest: int) -> int:
        """Return the limit that a text of the request passed."""
        if query.truncated:
            return self._longest(self._spec.max_query_length)
        return self._longest(longest or self._spec.max_document_length)

    def samples(self) -> list[EncodeItem]:
        """Return items for the warm-up."""
        if self._pictures is None:
            return []
        width, height = self._pictures.scaling.size(100, 100)
        picture = Image(np.zeros((height, width, 3), np.uint8), (100, 100))
        (pair,) = self.pairs(self.query("warm"), [picture], 0)
        return [window.item for window in pair.windows]

    def _longest(self, limit: int) -> int:
        longest = self._spec.max_tokens - _RESERVED
        return min(limit or longest, longest)

    def _sides(self, inputs: Sequence[Input], limit: int) -> list[_Side]:
        texts = iter(self._cut([each for each in inputs if isinstance(each, str)], limit))
        return [next(texts) if isinstance(each, str) else self._picture(each) for each in inputs]

    def _cut(self, texts: Sequence[str], limit: int) -> list[_Side]:
        """Cut texts to ``limit`` tokens, at least one, as the published code does: by ids, and back."""
        plain = self._tokenizer
        longest = max(1, limit) + plain.special_length
        sides: list[_Side] = []
        for text, tokens in zip(texts, plain.encode_batch(texts, truncate_to=longest), strict=True):
            ids = tokens.ids[plain.prefix_length : len(tokens.ids) - plain.suffix_length]
            kept = plain.decode(ids.tolist()) if tokens.truncated else text
            sides.append(_Side(kept, len(ids), truncated=tokens.truncated))
        return sides

    def _picture(self, picture: Input) -> _Side:
        if self._pictures is None or not isinstance(picture, Image):
            what = "no images" if self._pictures is None else "no groups"
            raise UnfitInputError(f"Model '{self._spec.id}' takes {what}.")
        feature = self._pictures.feature(picture)
        return _Side(PICTURE, feature.length + 2, feature)

    def _pair(self, document: _Side, query: _Side) -> PreparedPair:
        truncated = document.truncated
        while True:
            item = self._item(document, query)
            excess = len(item.token_ids) - self._spec.max_tokens
            if excess <= 0:
                break
            truncated = True
            if document.feature is None and document.tokens > excess:
                (document,) = self._cut([document.text], document.tokens - excess)
            elif query.feature is None and query.tokens > excess:
                (query,) = self._cut([query.text], query.tokens - excess)
            else:
                raise UnfitInputError(
                    f"Query and document have {len(item.token_ids)} tokens together, "
                    f"{self._spec.max_tokens} are allowed."
                )
        patches = sum(feature.data.shape[0] for feature in item.features)
        window = Prepared(item, Usage(), patches=patches)
        return PreparedPair((window,), _usage(document), truncated)

    def _item(self, document: _Side, query: _Side) -> EncodeItem:
        text = f"**Document**:\n{document.text}\n**Query**:\n{query.text}"
        ids = np.append(self._tokenizer.encode_batch([text])[0].ids, np.int32(SCORE_TOKEN))
        if self._pictures is None:
            return EncodeItem(ids)
        # A caller's text may look like a picture: the document's stands first, the query's last.
        found = self._pictures.places(ids).tolist()
        features = [side.feature for side in (document, query) if side.feature is not None]
        places = found[:1] if document.feature is not None else []
        places += found[-1:] if query.feature is not None else []
        return self._pictures.expand(ids, places, features)


def _usage(side: _Side) -> Usage:
    if side.feature is None:
        return Usage(side.tokens)
    return Usage(side.tokens - side.feature.length, side.feature.length)
