"""The answers of the classify paths, for the OpenAPI document only; ``rest`` writes answers by hand."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, Field

from services.classify.schemas import AccessName


class ClassificationUsage(BaseModel):
    """Tokens of a request, special tokens included."""

    total_tokens: int = Field(description="Tokens billed.", ge=0)


class ClassificationPredictionLabel(BaseModel):
    """A label and how much it fits."""

    label: str
    score: float = Field(description="From 0 to 1; the scores of a list sum to 1.", ge=0, le=1)


class ClassificationPrediction(BaseModel):
    """The result of one input. With groups of labels, every value is an object with one entry per group."""

    object: Literal["classification"] = Field(description="Always `classification`.")
    index: int = Field(description="Position of the input, from 0.", ge=0)
    prediction: str | dict[str, str] = Field(description="The label with the highest score.")
    score: float | dict[str, float] = Field(description="Its score.")
    predictions: list[ClassificationPredictionLabel] | dict[str, list[ClassificationPredictionLabel]] = Field(
        description="All labels, in the order of the request or of the classifier."
    )


class ClassificationResponse(BaseModel):
    """One result per input, in the order of the inputs."""

    usage: ClassificationUsage
    data: list[ClassificationPrediction]


class TrainingResponse(BaseModel):
    """A classifier was trained and stored."""

    classifier_id: UUID = Field(description="What to classify with.")
    num_samples: int = Field(description="Examples of this request.", ge=1)
    usage: ClassificationUsage


class ClassifierSummary(BaseModel):
    """What is known of a classifier."""

    classifier_id: UUID
    user_id: UUID = Field(description="Stands for the key that owns it.")
    model: str = Field(description="Id of the model whose vectors it was trained on.")
    labels: list[str]
    access: AccessName
    updated_number: int = Field(description="Trainings, the first one included.", ge=1)
    used_number: int = Field(description="Calls that classified with it.", ge=0)
    created_at: datetime
    updated_at: datetime = Field(description="Of the last training.")
    used_at: datetime | None
    is_active: bool
    is_latest: bool
    metadata_: dict[str, Any]


class DeletedClassifier(BaseModel):
    """A classifier is gone."""

    classifier_id: UUID
    deleted: bool
    detail: str
