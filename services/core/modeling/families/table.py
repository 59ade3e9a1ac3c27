"""The families of networks: what tells each by its configuration, and how it is put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoints.checkpoint import Checkpoint, Config
from services.core.modeling.families import (
    colbert,
    cross_encoder,
    dense,
    dense_decoder,
    listwise,
    sparse,
    xlm_absolute,
)
from services.core.modeling.families.cross_encoder import CrossEncoder
from services.core.modeling.families.jina_bert import is_jina_bert
from services.core.modeling.families.listwise import ListwiseRanker
from services.core.modeling.types import TextEncoder

M = TypeVar("M")

Loader = Callable[[ModelSpec, Checkpoint, torch.device, torch.dtype], M]


@dataclass(frozen=True, slots=True)
class Family(Generic[M]):
    """``recognises`` decides by facts of config.json, never by ``model_type`` alone: JinaBERT says bert."""

    recognises: Callable[[Config], bool]
    load: Loader[M]


FAMILIES: Mapping[str, Family[TextEncoder]] = {
    "bert": Family(dense.is_bert, dense.load_bert),
    "jina_bert": Family(is_jina_bert, dense.load_jina_bert),
    "jina_v3": Family(dense.is_jina_v3, dense.load_jina_v3),
    "colbert_v1": Family(colbert.is_colbert_v1, colbert.load_colbert_v1),
    "colbert_v2": Family(colbert.is_colbert_v2, colbert.load_colbert_v2),
    "jina_v5_text": Family(dense_decoder.is_jina_v5_text, dense_decoder.load_jina_v5_text),
    "jina_code": Family(dense_decoder.is_jina_code, dense_decoder.load_jina_code),
    "elser": Family(sparse.is_masked_language_model, sparse.load_sparse),
}
"""Encoders: a text in, a vector or several out."""

CROSS_ENCODERS: Mapping[str, Family[CrossEncoder]] = {
    "reranker_v1": Family(is_jina_bert, cross_encoder.load_reranker_v1),
    "reranker_v2": Family(xlm_absolute.is_reranker, cross_encoder.load_reranker_v2),
}
"""A query and a document in, a score out."""

LISTWISE: Mapping[str, Family[ListwiseRanker]] = {
    "reranker_v3": Family(listwise.is_listwise, listwise.load_listwise),
}
"""A query and many documents in, a vector of each out."""
