"""Listwise rerankers: a query and many documents are one prompt, read together.

A decoder reads the prompt once. The states at a marker behind each document and at one behind the query go
through a projector; the cosine of a document's vector with the query's is its score. The network of
jina-reranker-v3 and v3.5. Source: Wang et al., arXiv 2509.25085, and the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from services.core.catalog.types import ModelSpec
from services.core.content import Input, Usage
from services.core.modeling.checkpoints.checkpoint import Checkpoint, CheckpointError, Config, Shape, require
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.families.decoder import load_decoder
from services.core.modeling.families.decoder_config import QWEN3, DecoderConfig
from services.core.modeling.families.encoder import Encoder
from services.core.modeling.families.text import only_texts
from services.core.modeling.layers.packed import Limits, PackedBatch, pinned
from services.core.modeling.types import Backbone, EncodeItem, Encoding, Prepared, TokenIds

DOCUMENT_MARKER = "<|embed_token|>"
QUERY_MARKER = "<|rerank_token|>"
_MARKER_END = ">"

BLOCK_DOCUMENTS = 125
"""Documents of one block, by the published code."""

_ROLE = (
    "You are a search relevance expert who can determine a ranking of the passages based on how relevant "
    "they are to the query. If the query is a question, how relevant a passage is depends on how well it "
    "answers the question. If not, try to analyze the intent of the query and assess how well each passage "
    "satisfies the intent. If an instruction is provided, you should follow the instruction when "
    "determining the ranking."
)
_PROMPT_TOKENS = 8192
"""More than the words of a prompt around its texts take. The texts alone are cut to the positions of the
network, as it was published; turning positions have no table that would end there."""


class CutText(NamedTuple):
    """A text without markers, cut to a length; ``length`` in tokens after the cut, without specials."""

    text: str
    length: int
    truncated: bool


class ListTokenizer:
    """Makes prompts; safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """CheckpointError if the vocabulary lacks a marker."""
        self.plain = tokenizer
        self.document_marker = _marker(tokenizer, DOCUMENT_MARKER)
        self.query_marker = _marker(tokenizer, QUERY_MARKER)

    def cut(self, texts: Sequence[str], limit: int) -> list[CutText]:
        """Take the markers out of ``texts`` and cut each to ``limit`` tokens, at least one."""
        bare = [without_markers(text) for text in texts]
        longest = max(1, limit) + self.plain.special_length
        return [
            CutText(
                self._text(tokens.ids) if tokens.truncated else text,
                len(tokens.ids) - self.plain.special_length,
                tokens.truncated,
            )
            for text, tokens in zip(bare, self.plain.encode_batch(bare, truncate_to=longest), strict=True)
        ]

    def prompts(self, prompts: Sequence[str]) -> list[TokenIds]:
        """Tokenise whole prompts."""
        return [tokens.ids for tokens in self.plain.encode_batch(prompts)]

    def _text(self, ids: TokenIds) -> str:
        end = len(ids) - self.plain.suffix_length
        return without_markers(self.plain.decode(ids[self.plain.prefix_length : end].tolist()))


def without_markers(text: str) -> str:
    """Take both markers out of ``text``, those too that come about when another is taken out."""
    if DOCUMENT_MARKER not in text and QUERY_MARKER not in text:
        return text
    kept: list[str] = []
    for character in text:
        kept.append(character)
        if character == _MARKER_END:
            for marker in (DOCUMENT_MARKER, QUERY_MARKER):
                if "".join(kept[-len(marker) :]) == marker:
                    del kept[-len(marker) :]
    return "".join(kept)


def prompt(query: str, documents: Sequence[str]) -> str:
    """Write the prompt of one block; the texts must be without markers."""
    passages = "\n".join(
        f'<passage id="{i}">\n{document}{DOCUMENT_MARKER}\n</passage>' for i, document in enumerate(documents)
    )
    return (
        f"<|im_start|>system\n{_ROLE}<|im_end|>\n<|im_start|>user\n"
        f"I will provide you with {len(documents)} passages, each indicated by a numerical identifier. "
        f"Rank the passages based on their relevance to query: {query}\n"
        f"{passages}\n<query>\n{query}{QUERY_MARKER}\n</query><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


class ListProcessor:
    """A query and its documents to items, each a block of documents that are read together.

    Pure, and safe to call from several threads. ``longest`` is that of a document in tokens, 0 the model's.
    """

    def __init__(self, spec: ModelSpec, tokenizer: ListTokenizer) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self.query_limit = spec.max_query_length or spec.max_tokens

    def limit(self, longest: int) -> int:
        """Return the longest document in tokens."""
        return longest or self._spec.max_document_length or self._spec.max_tokens

    def query(self, query: Input) -> CutText:
        """Cut the query."""
        (cut,) = self._tokenizer.cut(only_texts([query], self._spec), self.query_limit)
        return cut

    def documents(self, documents: Sequence[Input], longest: int) -> list[CutText]:
        """Cut the documents."""
        return self._tokenizer.cut(only_texts(documents, self._spec), self.limit(longest))

    def prompts(self, query: CutText, documents: Sequence[CutText], longest: int) -> list[str]:
        """Write the prompts of all blocks."""
        room = self._spec.max_tokens - 2 * query.length
        blocks = blocks_of(documents, room, self.limit(longest))
        return [prompt(query.text, [text.text for text in block]) for block in blocks]

    def prepare(self, prompts: Sequence[str]) -> list[Prepared]:
        """Make an item of each prompt. What is billed are the texts in them."""
        ids = self._tokenizer.prompts(prompts)
        return [Prepared(EncodeItem(each), Usage()) for each in ids]


def blocks_of(documents: Sequence[CutText], room: int, longest: int) -> list[list[CutText]]:
    """Cut ``documents`` into blocks, in order.

    A block is closed when it has its number of documents, or when what is left of ``room`` tokens might not
    hold another one of ``longest`` tokens.
    """
    blocks: list[list[CutText]] = [[]]
    left = room
    for document in documents:
        if blocks[-1] and (len(blocks[-1]) >= BLOCK_DOCUMENTS or left <= longest):
            blocks.append([])
            left = room
        blocks[-1].append(document)
        left -= document.length
    return blocks


class ListwiseRanker:
    """A model in memory. Calls may come from several threads; weights are shared and never written."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: ListTokenizer,
        backbone: Backbone,
        head: MarkerHead,
        *,
        device: torch.device,
        limits: Limits,
    ) -> None:
        """Join the parts. CheckpointError if they do not fit."""
        self.processor = ListProcessor(spec, tokenizer)
        self.tokenizer = tokenizer
        self.width = head.width
        self._encoder = Encoder(
            spec,
            tokenizer.plain,
            backbone,
            head,
            device=device,
            limits=limits,
            width=head.width,
            wanted=head.rows,
        )

    @property
    def batch_tokens(self) -> int:
        """See ``types.TextEncoder``."""
        return self._encoder.batch_tokens

    def forward(self, batch: Sequence[EncodeItem]) -> list[NDArray[np.float32]]:
        """Read each prompt; (1 + documents, width) fp32, the query's vector first, not of unit length.

        Raises as ``TextEncoder.forward``, also ValueError for a prompt without its markers.
        """
        return cast("list[NDArray[np.float32]]", self._encoder.forward(batch))

    def warm_up(self) -> None:
        """Run what the first real call would otherwise pay for."""
        self.forward([EncodeItem(ids) for ids in self.tokenizer.prompts([prompt("warm", ["up", "warm up"])])])
        self._encoder.prepare()


class MarkerHead:
    """The states at the markers through two layers without biases, ReLU between them; in fp32."""

    def __init__(self, layers: tuple[torch.Tensor, torch.Tensor], document: int, query: int) -> None:
        """``document`` and ``query`` are the ids of the markers."""
        self._layers = layers
        self._document = document
        self._query = query
        self.width = layers[1].shape[0]

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch, items: Sequence[EncodeItem]) -> torch.Tensor:
        """Return (markers, width) fp32: of each item its query's, then its documents'."""
        index = torch.from_numpy(np.concatenate(self._of_items(batch, items)))
        first, second = self._layers
        states = hidden[pinned(index).to(hidden.device, non_blocking=True)].float()
        return functional.linear(functional.linear(states, first).relu_(), second)

    def results(
        self, rows: NDArray[np.float32], batch: PackedBatch, items: Sequence[EncodeItem]
    ) -> list[Encoding]:
        """Return (1 + documents, width) fp32 for each item."""
        ends = np.cumsum([len(each) for each in self._of_items(batch, items)])[:-1]
        return list(np.split(rows, ends))

    def rows(self, batch: PackedBatch, items: Sequence[EncodeItem]) -> NDArray[np.int32]:
        """Return the places of all markers in the batch, in rising order."""
        return np.sort(np.concatenate(self._of_items(batch, items))).astype(np.int32)

    def _of_items(self, batch: PackedBatch, items: Sequence[EncodeItem]) -> list[NDArray[np.int64]]:
        """Return where in the batch each item has the marker of its query and then those of its documents."""
        starts = np.cumsum((0, *batch.lengths[:-1]))
        return [start + self._places(item.token_ids) for start, item in zip(starts, items, strict=True)]

    def _places(self, ids: TokenIds) -> NDArray[np.int64]:
        queries, documents = np.flatnonzero(ids == self._query), np.flatnonzero(ids == self._document)
        if len(queries) != 1 or not len(documents):
            raise ValueError(f"a prompt with {len(queries)} queries and {len(documents)} documents")
        return np.concatenate([queries, documents])


def is_listwise(config: Config) -> bool:
    """Whether config.json is that of jina-reranker-v3 or v3.5."""
    return "JinaForRanking" in (config.get("architectures") or ())


def projector_shapes(width: int, dimensions: int) -> dict[str, Shape]:
    """Names and shapes of the projector's tensors."""
    return {"projector.0.weight": (width // 2, width), "projector.2.weight": (dimensions, width // 2)}


def load_listwise(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> ListwiseRanker:
    """Load jina-reranker-v3 or v3.5, which differ by the windows that config.json gives to some layers."""
    config = DecoderConfig.read(checkpoint.config, QWEN3)
    config.refuse_short(spec, checkpoint)
    dimensions = 512
    if checkpoint.config.get("embedding_size") is not None:
        dimensions = require(checkpoint.config, "embedding_size", int)
    shapes = projector_shapes(config.width, dimensions)
    network = load_decoder(checkpoint, config, device, dtype, extra=shapes)
    tokenizer = ListTokenizer(Tokenizer.load(checkpoint.directory))
    first, second = (checkpoint.tensor(name, torch.float32).to(device) for name in shapes)
    return ListwiseRanker(
        spec,
        tokenizer,
        network,
        MarkerHead((first, second), tokenizer.document_marker, tokenizer.query_marker),
        device=device,
        limits=Limits(config.vocabulary, config.positions + _PROMPT_TOKENS),
    )


def _marker(tokenizer: Tokenizer, marker: str) -> int:
    id = tokenizer.token_id(marker)
    if id is None:
        raise CheckpointError(f"tokenizer.json has no token '{marker}'")
    return id
