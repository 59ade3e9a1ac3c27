"""From texts to vectors: tokenising, scheduling, running models on a device."""

from services.core.inference.embedding import (
    EmbeddingModel,
    Embeddings,
    EmbedOptions,
    NotANumberError,
    Texts,
    finish,
    require_finite,
)
from services.core.inference.engine import Engine, EngineStartError
from services.core.inference.runtime import InferenceError
from services.core.inference.scoring import ScoreOptions, Scorer, Scores
from services.core.inference.sparse import prune

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
    "Texts",
    "finish",
    "prune",
    "require_finite",
]
