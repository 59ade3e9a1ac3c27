"""Whether this machine can serve what the settings name, looked at before anything is started."""

from __future__ import annotations

from services.core.catalog import Catalog
from services.core.catalog.weights import WeightsNotFound, locate
from services.core.settings import Settings


class NotServableError(Exception):
    """A model that cannot be served here; the text tells the operator what to do."""


def require_servable(settings: Settings) -> None:
    """Look for the network and the weights of every model that is loaded at the start.

    Raises CatalogError for a name that nobody knows, and NotServableError. Models that are loaded at their
    first call may get their weights until then. Opens no weights and imports no torch.
    """
    specs = Catalog.load(settings.catalog_file, settings.model_aliases).select(settings.models)
    lacking: list[str] = []
    for spec in {spec.weights_id: spec for spec in specs}.values():
        if not spec.family.built:
            raise NotServableError(f"{spec.id} cannot be served: there is no network '{spec.family}' yet.")
        if settings.model_residency == "eager":
            try:
                locate(spec, settings)
            except WeightsNotFound as error:
                lacking.append(str(error))
    if lacking:
        raise NotServableError("\n".join(lacking))
