"""The families of networks: what tells each by its configuration, and how it is put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoints.checkpoint import Checkpoint, Config
from services.core.modeling.families import (
    clip,
    colbert,
    cross_encoder,
    dense,
    dense_decoder,
    jina_v4,
    jina_vlm,
    listwise,
    reranker_m0,
    sparse,
    xlm_absolute,
)
from services.core.modeling.families.jina_bert import is_jina_bert
from services.core.modeling.families.jina_v5_omni import is_jina_v5_omni, load_jina_v5_omni
from services.core.modeling.types import Backend, Door, Generator

Network: TypeAlias = Backend[Any] | Generator
Loader = Callable[[ModelSpec, Checkpoint, torch.device, torch.dtype], Network]


@dataclass(frozen=True, slots=True)
class Family:
    """``door`` is what the family does for the engine; nobody else says what kind of model one is.

    ``recognises`` decides by facts of config.json, never by ``model_type`` alone: JinaBERT says bert.
    ``narrow`` are beginnings of the names of tensors that make a ``CausalNetwork``, see ``keeps_bf16``.
    """

    door: Door
    recognises: Callable[[Config], bool]
    load: Loader
    narrow: tuple[str, ...] = ()


def _embeds(recognises: Callable[[Config], bool], load: Loader) -> Family:
    return Family(Door.EMBEDS, recognises, load)


def _scores_pairs(recognises: Callable[[Config], bool], load: Loader) -> Family:
    return Family(Door.SCORES_PAIRS, recognises, load)


def _scores_lists(recognises: Callable[[Config], bool], load: Loader) -> Family:
    return Family(Door.SCORES_LISTS, recognises, load)


def _generates(
    recognises: Callable[[Config], bool],
    load: Callable[[ModelSpec, Checkpoint, torch.device, torch.dtype], Generator],
    narrow: tuple[str, ...],
) -> Family:
    return Family(Door.GENERATES, recognises, load, narrow)


FAMILIES: Mapping[str, Family] = {
    "bert": _embeds(dense.is_bert, dense.load_bert),
    "jina_bert": _embeds(is_jina_bert, dense.load_jina_bert),
    "jina_v3": _embeds(dense.is_jina_v3, dense.load_jina_v3),
    "colbert_v1": _embeds(colbert.is_colbert_v1, colbert.load_colbert_v1),
    "colbert_v2": _embeds(colbert.is_colbert_v2, colbert.load_colbert_v2),
    "jina_v4": _embeds(jina_v4.is_jina_v4, jina_v4.load_jina_v4),
    "jina_v5_text": _embeds(dense_decoder.is_jina_v5_text, dense_decoder.load_jina_v5_text),
    "jina_v5_omni": _embeds(is_jina_v5_omni, load_jina_v5_omni),
    "jina_code": _embeds(dense_decoder.is_jina_code, dense_decoder.load_jina_code),
    "jina_clip": _embeds(clip.is_jina_clip, clip.load_jina_clip),
    "elser": _embeds(sparse.is_masked_language_model, sparse.load_sparse),
    "reranker_v1": _scores_pairs(is_jina_bert, cross_encoder.load_reranker_v1),
    "reranker_v2": _scores_pairs(xlm_absolute.is_reranker, cross_encoder.load_reranker_v2),
    "reranker_m0": _scores_pairs(reranker_m0.is_reranker_m0, reranker_m0.load_reranker_m0),
    "reranker_v3": _scores_lists(listwise.is_listwise, listwise.load_listwise),
    "jina_vlm": _generates(jina_vlm.is_jina_vlm, jina_vlm.load_jina_vlm, jina_vlm.DECODER),
}
"""By the name that the catalogue gives them; who comes in here leaves ``_UNBUILT`` of its ``types``."""
