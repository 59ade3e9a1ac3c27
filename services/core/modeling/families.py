"""The families of networks: what tells each by its configuration, and how it is put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from services.core.catalog.types import ModelSpec
from services.core.modeling.bert import load_bert, read_config
from services.core.modeling.checkpoint import Checkpoint, CheckpointError, Config, read_json
from services.core.modeling.encoder import DenseHead, Encoder
from services.core.modeling.packed import Limits
from services.core.modeling.pooling import POOLINGS, Pooling
from services.core.modeling.tokenizer import Tokenizer
from services.core.modeling.types import TextEncoder

Loader = Callable[[ModelSpec, Checkpoint, torch.device, torch.dtype], TextEncoder]


@dataclass(frozen=True, slots=True)
class Family:
    """``recognises`` decides by facts of config.json, never by ``model_type`` alone: JinaBERT says bert."""

    recognises: Callable[[Config], bool]
    load: Loader


def _is_bert(config: Config) -> bool:
    return (
        config.get("model_type") == "bert"
        and config.get("position_embedding_type", "absolute") == "absolute"
        and config.get("feed_forward_type") in (None, "original")
        and "auto_map" not in config
    )


def _load_bert(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    tokenizer = Tokenizer.load(checkpoint.directory)
    config = read_config(checkpoint.config)
    network = load_bert(checkpoint, config, device, dtype)
    if spec.max_tokens > config.positions:
        raise CheckpointError(
            f"{checkpoint.directory}: {spec.id} is to take {spec.max_tokens} tokens, "
            f"the network has {config.positions} positions"
        )
    head = DenseHead(sentence_transformers_pooling(checkpoint.directory))
    limits = Limits(config.vocabulary, config.positions)
    return Encoder(tokenizer, network, head, device=device, limits=limits, width=config.width)


_POOLING_SWITCHES: Mapping[str, str] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}


def sentence_transformers_pooling(directory: Path) -> Pooling:
    """Read the pooling from ``1_Pooling/config.json``; mean where the file is not there.

    CheckpointError for a pooling that is not served, or several at once.
    """
    path = directory / "1_Pooling" / "config.json"
    if not path.is_file():
        return POOLINGS["mean"]
    config = read_json(path)
    switched = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if len(switched) != 1 or switched[0] not in _POOLING_SWITCHES:
        raise CheckpointError(f"{path}: poolings served are {list(_POOLING_SWITCHES)}, found {switched}")
    return POOLINGS[_POOLING_SWITCHES[switched[0]]]


FAMILIES: Mapping[str, Family] = {"bert": Family(_is_bert, _load_bert)}
