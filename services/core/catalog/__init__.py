"""Which models exist, what each can do, and where their weights are."""

from services.core.catalog.catalog import VENDORS, Catalog
from services.core.catalog.info import model_info, models_list
from services.core.catalog.parse import CatalogError

__all__ = ["VENDORS", "Catalog", "CatalogError", "model_info", "models_list"]
