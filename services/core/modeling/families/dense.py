"""Families whose encoders give one vector per text: BERT, JinaBERT, jina-embeddings-v3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoints.checkpoint import Checkpoint, CheckpointError, Config, read_json
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.families import bert, jina_bert, xlm_rotary
from services.core.modeling.families.encoder import DenseHead, Encoder
from services.core.modeling.families.encoder_config import EncoderConfig, refuse_short
from services.core.modeling.layers.lora import Adapters
from services.core.modeling.layers.packed import Limits
from services.core.modeling.layers.pooling import POOLINGS, Pooling
from services.core.modeling.types import Backbone, TextEncoder

_POOLING_SWITCHES: Mapping[str, str] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}


def is_bert(config: Config) -> bool:
    """Whether config.json is that of a stock BERT; JinaBERT calls itself bert too."""
    return (
        config.get("model_type") == "bert"
        and config.get("position_embedding_type", "absolute") == "absolute"
        and config.get("feed_forward_type") in (None, "original")
        and "auto_map" not in config
    )


def load_bert(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """Load a stock BERT sentence encoder."""
    config = bert.read_config(checkpoint.config)
    refuse_short(spec, config, checkpoint)
    return _pooled(spec, checkpoint, bert.load_bert(checkpoint, config, device, dtype), config, device)


def _pooled(
    spec: ModelSpec, checkpoint: Checkpoint, network: Backbone, config: EncoderConfig, device: torch.device
) -> Encoder:
    """Join a network with the tokenizer and the pooling of its folder."""
    head = DenseHead(sentence_transformers_pooling(checkpoint.directory))
    limits = Limits(config.vocabulary, config.positions)
    tokenizer = Tokenizer.load(checkpoint.directory)
    return Encoder(spec, tokenizer, network, head, device=device, limits=limits, width=config.width)


def load_jina_bert(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """Load jina-embeddings-v2-base-*, in either block form."""
    config = jina_bert.read_config(checkpoint.config)
    refuse_short(spec, config, checkpoint)
    return _pooled(
        spec, checkpoint, jina_bert.load_jina_bert(checkpoint, config, device, dtype), config, device
    )


def is_jina_v3(config: Config) -> bool:
    """Whether config.json is that of jina-embeddings-v3."""
    return xlm_rotary.is_xlm_rotary(config) and xlm_rotary.has_adapters(config)


def load_jina_v3(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """Load jina-embeddings-v3 with its task adapters.

    CheckpointError also for an adapter that the catalogue names and the checkpoint has not.
    """
    config = xlm_rotary.read_config(checkpoint.config)
    adapters = Adapters.read(checkpoint.config)
    refuse_short(spec, config, checkpoint)
    if lacking := sorted(set(spec.adapters.values()) - set(adapters.names)):
        raise CheckpointError(f"{checkpoint.directory}: no adapters {', '.join(lacking)} for {spec.id}")
    network = xlm_rotary.load_xlm_rotary(checkpoint, config, adapters, device, dtype)
    limits = Limits(config.vocabulary, config.positions, frozenset(adapters.names))
    head = DenseHead(sentence_transformers_pooling(checkpoint.directory))
    tokenizer = Tokenizer.load(checkpoint.directory)
    return Encoder(
        spec,
        tokenizer,
        network,
        head,
        device=device,
        limits=limits,
        width=config.width,
        merges=network.merges if isinstance(network, xlm_rotary.XlmRotary) else None,
    )


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
