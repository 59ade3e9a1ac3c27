"""The families of networks: what tells each by its configuration, and how it is put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from services.core.catalog.types import ModelSpec
from services.core.modeling import dense
from services.core.modeling.checkpoint import Checkpoint, Config
from services.core.modeling.jina_bert import is_jina_bert
from services.core.modeling.types import TextEncoder

Loader = Callable[[ModelSpec, Checkpoint, torch.device, torch.dtype], TextEncoder]


@dataclass(frozen=True, slots=True)
class Family:
    """``recognises`` decides by facts of config.json, never by ``model_type`` alone: JinaBERT says bert."""

    recognises: Callable[[Config], bool]
    load: Loader


FAMILIES: Mapping[str, Family] = {
    "bert": Family(dense.is_bert, dense.load_bert),
    "jina_bert": Family(is_jina_bert, dense.load_jina_bert),
    "jina_v3": Family(dense.is_jina_v3, dense.load_jina_v3),
}
