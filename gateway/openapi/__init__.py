"""The served OpenAPI document, made from the schemas that check requests and the tables that word errors."""

from gateway.openapi.document import build_openapi

__all__ = ["build_openapi"]
