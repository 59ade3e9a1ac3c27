"""From texts to vectors: tokenising, scheduling, running models on a device."""

from services.core.inference.embedding import (
    EmbeddingModel,
    Embeddings,
    EmbedOptions,
    NotANumberError,
    finish,
    require_finite,
)
from services.core.inference.engine import Engine, EngineStartError
from services.core.inference.runtime import InferenceError
from services.core.inference.scoring import ScoreOptions, Scorer, Scores

__all__ = [
    "EmbedOptions",
    "EmbeddingModel",
    "Embeddings",
    "Engine",
    "EngineStartError",
    "InferenceError",
    "NotANumberError",
    "ScoreOptions",
    "Scorer",
    "Scores",
    "finish",
    "require_finite",
]
