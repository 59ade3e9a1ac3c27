"""The failures of this capability, in the words of the table of errors."""

from __future__ import annotations

from services.core.errors import ErrorCode, ServiceError

_RESOURCE = "Classifier"
_RETRY_AFTER = 1.0
_LONGEST_ID = 100


def not_found(classifier_id: str) -> ServiceError:
    """Say that there is no such classifier, or none for this caller: which of both is not told."""
    return ServiceError(
        ErrorCode.RESOURCE_NOT_FOUND, resource_type=_RESOURCE, resource_id=classifier_id[:_LONGEST_ID]
    )


def busy(classifier_id: str) -> ServiceError:
    """Say that another call is training the classifier."""
    return ServiceError(
        ErrorCode.CONFLICT_RESOURCE_BUSY,
        resource_type=_RESOURCE,
        resource_id=classifier_id,
        retry_after=_RETRY_AFTER,
    )


def too_few_labels() -> ServiceError:
    """Say that examples of one label teach nothing."""
    return ServiceError(ErrorCode.INPUT_INVALID_LABELS, min_labels=2)


def too_many_labels(current: int, limit: int) -> ServiceError:
    """Say that a classifier would have more labels than it may."""
    return ServiceError(ErrorCode.INPUT_LABEL_LIMIT_EXCEEDED, current=current, limit=limit)


def too_many_classifiers(current: int, limit: int) -> ServiceError:
    """Say that the caller has as many classifiers as it may."""
    return ServiceError(ErrorCode.AUTHZ_RESOURCE_LIMIT_EXCEEDED, current=current, limit=limit)
