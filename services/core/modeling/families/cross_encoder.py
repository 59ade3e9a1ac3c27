"""Cross-encoders: query and document go through the network together, and one number comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoints.checkpoint import Checkpoint, Shape
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.families import jina_bert, xlm_absolute
from services.core.modeling.families.encoder import Encoder
from services.core.modeling.families.encoder_config import refuse_short
from services.core.modeling.families.pairs import PairRules, PairTokenizer, TextPairProcessor
from services.core.modeling.layers.packed import Limits, PackedBatch
from services.core.modeling.layers.reading import linear_shapes
from services.core.modeling.types import Backbone, EncodeItem, Encoding, PairProcessor

_OVERLAP = 80
"""Tokens that neighbouring windows of a document share, by reranker-v2's published code."""


class PairScorer:
    """An encoder whose head makes one number of each sequence; see ``types.Backend`` for the contract."""

    def __init__(self, processor: PairProcessor, encoder: Encoder) -> None:
        """Score what ``processor`` makes of pairs by ``encoder``."""
        self.processor = processor
        self.width = 0
        self._encoder = encoder

    @property
    def batch_tokens(self) -> int:
        """As of ``types.Backend``."""
        return self._encoder.batch_tokens

    def forward(self, batch: Sequence[EncodeItem]) -> list[float]:
        """Score each sequence, 0 to 1, in the order of ``batch``; raises as ``Backend.forward``."""
        scores = cast("list[NDArray[np.float32]]", self._encoder.forward(batch))
        return [float(score[0]) for score in scores]

    def warm_up(self) -> None:
        """Run what the first real call would otherwise pay for."""
        self._encoder.warm_up()


class CrossEncoder(PairScorer):
    """A model in memory. Calls may come from several threads; weights are shared and never written."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: PairTokenizer,
        backbone: Backbone,
        head: ScoreHead,
        *,
        device: torch.device,
        limits: Limits,
    ) -> None:
        """Join the parts. CheckpointError if they do not fit."""
        self.tokenizer = tokenizer
        encoder = Encoder(spec, tokenizer.plain, backbone, head, device=device, limits=limits, width=1)
        super().__init__(TextPairProcessor(spec, tokenizer), encoder)


class ScoreHead:
    """The first token through a dense layer under tanh to one logit, and the sigmoid of that; in fp32."""

    def __init__(self, checkpoint: Checkpoint, dense: str, out: str, device: torch.device) -> None:
        """Read the layers ``dense`` and ``out``."""

        def read(name: str) -> torch.Tensor:
            return checkpoint.tensor(name, torch.float32).to(device)

        self._dense = read(f"{dense}.weight"), read(f"{dense}.bias")
        self._out = read(f"{out}.weight"), read(f"{out}.bias")

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch, items: Sequence[EncodeItem]) -> torch.Tensor:
        """Return (items, 1) fp32."""
        first = hidden[batch.cu_lengths[:-1]].float()
        pooled = functional.linear(first, *self._dense).tanh_()
        return functional.linear(pooled, *self._out).sigmoid_()

    def results(
        self, rows: NDArray[np.float32], batch: PackedBatch, items: Sequence[EncodeItem]
    ) -> list[Encoding]:
        """Return (1,) fp32 for each item."""
        return list(rows)


def head_shapes(dense: str, out: str, width: int) -> dict[str, Shape]:
    """Names and shapes of the tensors of a ``ScoreHead``."""
    return linear_shapes(dense, width, width) | linear_shapes(out, 1, width)


def load_reranker_v1(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> CrossEncoder:
    """Load jina-reranker-v1-*: JinaBERT with BERT's pooler; the longer text of a pair is cut."""
    config = jina_bert.read_config(checkpoint.config)
    refuse_short(spec, config, checkpoint)
    dense, out = "pooler.dense", "classifier"
    shapes = head_shapes(dense, out, config.width)
    network = jina_bert.load_jina_bert(checkpoint, config, device, dtype, extra=shapes, unused=())
    return CrossEncoder(
        spec,
        PairTokenizer(
            Tokenizer.load(checkpoint.directory), PairRules(spec.max_tokens, spec.max_query_length)
        ),
        network,
        ScoreHead(checkpoint, dense, out, device),
        device=device,
        limits=Limits(config.vocabulary, config.positions),
    )


def load_reranker_v2(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> CrossEncoder:
    """Load jina-reranker-v2-*: XLM-R with learned positions; long documents are read in windows."""
    config = xlm_absolute.read_config(checkpoint.config)
    refuse_short(spec, config, checkpoint)
    dense, out = "classifier.dense", "classifier.out_proj"
    shapes = head_shapes(dense, out, config.width)
    network = xlm_absolute.load_xlm_absolute(checkpoint, config, device, dtype, extra=shapes)
    return CrossEncoder(
        spec,
        PairTokenizer(
            Tokenizer.load(checkpoint.directory), PairRules(spec.max_tokens, spec.max_query_length, _OVERLAP)
        ),
        network,
        ScoreHead(checkpoint, dense, out, device),
        device=device,
        limits=Limits(config.vocabulary, config.positions),
    )
