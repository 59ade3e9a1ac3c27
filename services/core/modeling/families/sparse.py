"""Sparse encoders in the manner of SPLADE (ELSER v2): a weight for each entry of the vocabulary.

Source: Formal et al., arXiv 2109.10086: the largest ``log(1 + relu(logit))`` of any token by a masked
language model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoints.checkpoint import Checkpoint, Config, Shape
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.families import bert
from services.core.modeling.families.dense import is_bert
from services.core.modeling.families.encoder import Encoder
from services.core.modeling.families.encoder_config import EncoderConfig, refuse_short
from services.core.modeling.layers.packed import Limits, PackedBatch
from services.core.modeling.layers.reading import Layers, linear_shapes, norm_shapes
from services.core.modeling.types import EncodeItem, Encoding, SparseVector, TextEncoder

_TRANSFORM = "cls.predictions.transform"
_DECODER = "cls.predictions.decoder"
_BIAS = "cls.predictions.bias"
_WORDS = "embeddings.word_embeddings.weight"

_LOGITS = 1 << 23
"""Logits held at a time; a text of 512 tokens has 16 million over BERT's vocabulary."""


def is_masked_language_model(config: Config) -> bool:
    """Whether config.json is that of a stock BERT with the head of a masked language model."""
    return is_bert(config) and config.get("architectures") == ["BertForMaskedLM"]


def load_sparse(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """Load a BERT with the head of a masked language model. Its results are ``SparseVector``."""
    config = bert.read_config(checkpoint.config)
    refuse_short(spec, config, checkpoint)
    network = bert.load_bert(
        checkpoint,
        config,
        device,
        dtype,
        extra=_head_shapes(config, checkpoint),
        unused=("pooler.*", "cls.seq_relationship.*", "embeddings.position_ids", f"{_DECODER}.bias"),
    )
    return Encoder(
        spec,
        Tokenizer.load(checkpoint.directory),
        network,
        SparseHead(checkpoint, config, device),
        device=device,
        limits=Limits(config.vocabulary, config.positions),
        width=config.vocabulary,
    )


class SparseHead:
    """The head in fp32, since what is near zero decides which entries there are."""

    def __init__(self, checkpoint: Checkpoint, config: EncoderConfig, device: torch.device) -> None:
        """Read the head; the decoder is the table of words unless the checkpoint has one of its own."""
        layers = Layers(checkpoint, device, torch.float32, config.epsilon)
        decoder = f"{_DECODER}.weight"
        table = checkpoint.tensor(decoder if decoder in checkpoint.names else _WORDS)
        self._dense = layers.linear(f"{_TRANSFORM}.dense")
        self._norm = layers.norm(f"{_TRANSFORM}.LayerNorm")
        self._decoder = layers.joined(table, checkpoint.tensor(_BIAS))
        self._rows = max(1, _LOGITS // config.vocabulary)
        self._vocabulary = config.vocabulary

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch, items: Sequence[EncodeItem]) -> torch.Tensor:
        """Return the weight of each entry, (items, vocabulary) fp32."""
        states = self._norm(self._dense.gelu(hidden.float()))
        best = torch.full((len(items), self._vocabulary), 0.0, device=hidden.device)
        starts = np.cumsum([0, *batch.lengths])
        for start in range(0, batch.tokens, self._rows):
            logits = self._decoder(states[start : start + self._rows])
            end = start + logits.shape[0]
            first, last = np.searchsorted(starts, [start, end - 1], side="right") - 1
            for i in range(first, last + 1):
                rows = logits[max(starts[i], start) - start : min(starts[i + 1], end) - start]
                torch.maximum(best[i], rows.amax(0), out=best[i])
        return functional.relu(best).log1p_()

    def results(
        self, rows: NDArray[np.float32], batch: PackedBatch, items: Sequence[EncodeItem]
    ) -> list[Encoding]:
        """Return the entries above zero of each item."""
        return [_entries(row) for row in rows]


def _entries(weights: NDArray[np.float32]) -> SparseVector:
    indices = np.flatnonzero(weights).astype(np.int32)
    return SparseVector(indices, weights[indices])


def _head_shapes(config: EncoderConfig, checkpoint: Checkpoint) -> dict[str, Shape]:
    width = config.width
    shapes: dict[str, Shape] = {
        **linear_shapes(f"{_TRANSFORM}.dense", width, width),
        **norm_shapes(f"{_TRANSFORM}.LayerNorm", width),
        _BIAS: (config.vocabulary,),
    }
    if f"{_DECODER}.weight" in checkpoint.names:
        shapes[f"{_DECODER}.weight"] = (config.vocabulary, width)
    return shapes
