"""Which models exist, what each can do, and where their weights are."""

from services.core.catalog.catalog import Catalog, canonical_id
from services.core.catalog.info import model_info, models_list
from services.core.catalog.parse import CatalogError

__all__ = ["Catalog", "CatalogError", "canonical_id", "model_info", "models_list"]
