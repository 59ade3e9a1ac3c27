"""The model of calls that cannot name one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.core.catalog import Catalog
from services.core.catalog.types import Capability, ModelSpec
from services.core.errors import ErrorCode, ServiceError
from services.core.settings import Settings


class DefaultModels:
    """``SF_DEFAULT_MODEL`` where it can answer, else the first served model that can."""

    def __init__(
        self, catalog: Catalog, settings: Settings, served: Sequence[ModelSpec], capability: Capability
    ) -> None:
        self._specs = {spec.id: spec for spec in served if spec.supports(capability)}
        self._wanted = settings.default_model
        self._known = catalog.get(self._wanted) if self._wanted is not None else None

    def find(self, what: str, can: Callable[[ModelSpec], bool] = lambda _: True) -> ModelSpec:
        """Return the model that answers; ``what`` says in an error what none here can do.

        Raises ``ServiceError``: INPUT_MODEL_NOT_FOUND where the setting names no model, INPUT_INVALID where
        no served model can.
        """
        if self._wanted is not None and self._known is None:
            available = ", ".join(self._specs)
            raise ServiceError(ErrorCode.INPUT_MODEL_NOT_FOUND, model=self._wanted, available=available)
        default = None if self._known is None else self._specs.get(self._known.id)
        specs = (*(() if default is None else (default,)), *self._specs.values())
        found = next((spec for spec in specs if can(spec)), None)
        if found is None:
            raise ServiceError(ErrorCode.INPUT_INVALID, reason=f"No model served here {what}.")
        return found
