"""From contents to vectors and scores: preparing, scheduling, running models on a device."""

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
from services.core.inference.sparse import prune
from services.core.inference.submission import Inputs, add_up

__all__ = [
    "EmbedOptions",
    "EmbeddingModel",
    "Embeddings",
    "Engine",
    "EngineStartError",
    "InferenceError",
    "Inputs",
    "NotANumberError",
    "ScoreOptions",
    "Scorer",
    "Scores",
    "add_up",
    "finish",
    "prune",
    "require_finite",
]
