"""Decoders that give one vector per text, that of its last token: jina-embeddings-v5-text, jina-code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.catalog.types import ModelSpec
from services.core.modeling.checkpoints.checkpoint import Checkpoint, Config
from services.core.modeling.checkpoints.peft import PeftAdapters
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.families.decoder import Decoder, linear_sizes, load_decoder
from services.core.modeling.families.decoder_config import EUROBERT, QWEN2, QWEN3, DecoderConfig, Form
from services.core.modeling.families.encoder import DenseHead, Encoder
from services.core.modeling.layers.packed import Limits, PackedBatch
from services.core.modeling.layers.pooling import last
from services.core.modeling.types import Backbone, EncodeItem, TextEncoder


def is_jina_v5_text(config: Config) -> bool:
    """Whether config.json is that of jina-embeddings-v5-text, in either size."""
    return config.get("model_type") == "jina_embeddings_v5"


def is_jina_code(config: Config) -> bool:
    """Whether config.json is that of a Qwen2, on which the code embeddings stand."""
    return config.get("model_type") == "qwen2"


def load_jina_v5_text(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """Load jina-embeddings-v5-text-* with its task adapters.

    CheckpointError also for an adapter that the catalogue names and the checkpoint has not.
    """
    config = DecoderConfig.read(checkpoint.config, _v5_form(checkpoint))
    config.refuse_short(spec, checkpoint)
    wanted = sorted(set(spec.adapters.values()))
    adapters = PeftAdapters.read(checkpoint.directory / "adapters", linear_sizes(config), wanted)
    network = load_decoder(checkpoint, config, device, dtype, adapters=adapters)
    return _encoder(spec, checkpoint, config, network, device, adapters.names)


def load_jina_code(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """Load jina-code-embeddings-*."""
    config = DecoderConfig.read(checkpoint.config, QWEN2)
    config.refuse_short(spec, checkpoint)
    network = load_decoder(checkpoint, config, device, dtype)
    return _encoder(spec, checkpoint, config, network, device, frozenset())


def _v5_form(checkpoint: Checkpoint) -> Form:
    """Tell small from nano by its norms of heads; config.json gives both the same name."""
    norms = any(name.endswith("self_attn.q_norm.weight") for name in checkpoint.names)
    return QWEN3 if norms else EUROBERT


def _encoder(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    config: DecoderConfig,
    network: Backbone,
    device: torch.device,
    adapters: frozenset[str],
) -> TextEncoder:
    limits = Limits(config.vocabulary, config.positions, adapters)
    tokenizer = Tokenizer.load(checkpoint.directory)
    return Encoder(
        spec,
        tokenizer,
        network,
        DenseHead(last),
        device=device,
        limits=limits,
        width=config.width,
        wanted=ends,
        merges=network.merges if isinstance(network, Decoder) else None,
    )


def ends(batch: PackedBatch, items: Sequence[EncodeItem]) -> NDArray[np.int32] | None:
    """Return the last token of each item; None if one is to be averaged over spans."""
    if any(item.spans is not None for item in items):
        return None
    return np.cumsum(batch.lengths, dtype=np.int32) - np.int32(1)
