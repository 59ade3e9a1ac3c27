"""What bodies of ``POST /v1/classify`` and ``/v1/train`` may hold, made from the catalogue.

The same classes check requests and describe them in the served OpenAPI document. Unknown fields are ignored;
``null`` stands for the default.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, SkipValidation, create_model

from services.classify.inputs import LabelsField, examples_field, input_field
from services.classify.types import Access
from services.core.catalog.types import Capability, Modality, ModelSpec
from services.core.requests.content import Accepted
from services.core.requests.fields import Whole, class_name

INPUT_NAMES = ("input", "texts", "content")
"""Names callers know the input by; the first one wins."""

DEFAULT_ITERATIONS = 10
MAX_ITERATIONS = 1000

AccessName = Literal["public", "private"]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class _Training(_Request):
    num_iters: Annotated[int, Field(ge=1, le=MAX_ITERATIONS), Whole] | None = Field(
        DEFAULT_ITERATIONS, description="Times the examples are gone through; multiplies the tokens billed."
    )


class _NewClassifier(_Training):
    access: AccessName | None = Field(
        Access.PUBLIC.value,
        description="Who may classify: everyone who knows the id, or only the key that trains it.",
    )


def classifies(spec: ModelSpec) -> bool:
    """Whether ``/v1/classify`` serves a model."""
    return spec.supports(Capability.CLASSIFY) and Modality.TEXT in spec.classify_inputs


def trains(spec: ModelSpec) -> bool:
    """Whether ``/v1/train`` serves a model."""
    return spec.supports(Capability.CLASSIFY) and Modality.TEXT in spec.train_inputs


def _accepted(model: str, kinds: Iterable[Modality]) -> Accepted:
    return Accepted(model, frozenset(kinds) | {Modality.TEXT})


def _of_classifier(specs: Iterable[ModelSpec]) -> Accepted:
    """Return what any trained classifier may take: its model is unknown while a request is checked."""
    return _accepted("of this classifier", (kind for spec in specs for kind in spec.classify_inputs))


def zero_shot_schema(spec: ModelSpec, max_items: int) -> type[BaseModel]:
    """Make the class of a zero-shot request; ``max_items`` bounds the list form of ``input``."""
    fields: dict[str, Any] = {
        "model": _model(spec),
        "input": _inputs(_accepted(spec.id, spec.classify_inputs), max_items),
        "labels": (
            LabelsField,
            Field(
                description="Candidate labels: a list, or an object of up to 8 named groups of up to 64 "
                "labels, each of which is answered by itself."
            ),
        ),
    }
    name = class_name(spec, "ZeroShotRequest")
    doc = f"Zero-shot classification by {spec.id}."
    return create_model(name, __base__=_Request, __doc__=doc, **fields)


def few_shot_schema(specs: Iterable[ModelSpec], max_items: int) -> type[BaseModel]:
    """Make the class of a request to a trained classifier."""
    fields: dict[str, Any] = {
        "classifier_id": (str, Field(description="Id of the classifier.")),
        "input": _inputs(_of_classifier(specs), max_items),
    }
    doc = "Classification by a trained classifier."
    return create_model("FewShotRequest", __base__=_Request, __doc__=doc, **fields)


def train_schema(spec: ModelSpec, max_items: int) -> type[BaseModel]:
    """Make the class of a request for a new classifier."""
    description = f"2 to {max_items} examples with at least two different labels."
    fields: dict[str, Any] = {
        "model": _model(spec),
        "input": (
            examples_field(_accepted(spec.id, spec.train_inputs), max_items, least=2, one=False),
            Field(validation_alias=AliasChoices(*INPUT_NAMES), description=description),
        ),
    }
    name = class_name(spec, "TrainingRequest")
    doc = f"A new classifier over the vectors of {spec.id}."
    return create_model(name, __base__=_NewClassifier, __doc__=doc, **fields)


def update_schema(specs: Iterable[ModelSpec], max_items: int) -> type[BaseModel]:
    """Make the class of a request to train a classifier further."""
    description = f"An example, or a list of 1 to {max_items}. They may bring new labels."
    fields: dict[str, Any] = {
        "classifier_id": (str, Field(description="Id of the classifier.")),
        "input": (
            examples_field(_of_classifier(specs), max_items, least=1, one=True),
            Field(validation_alias=AliasChoices(*INPUT_NAMES), description=description),
        ),
    }
    doc = "Further training of a classifier of one's own."
    return create_model("UpdateTrainingRequest", __base__=_Training, __doc__=doc, **fields)


def _model(spec: ModelSpec) -> Any:
    return (SkipValidation[Literal[spec.id]], Field(description="Id of the model."))


def _inputs(accepted: Accepted, max_items: int) -> Any:
    info = Field(validation_alias=AliasChoices(*INPUT_NAMES), description=accepted.described(max_items))
    return (input_field(accepted, max_items), info)
