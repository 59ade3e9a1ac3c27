"""Requests and answers against the served OpenAPI document, with JSON of any kind for tests by chance."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from services.core.errors import ServiceError
from services.core.serving.failure import http_body, rpc_status

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
TEXTS = st.text(max_size=10) | st.fixed_dictionaries({"text": st.text(max_size=10) | JSON})


class Described:
    """What a document says of one POST."""

    def __init__(self, document: dict[str, Any], path: str) -> None:
        self.components = document["components"]
        self.operation = document["paths"][path]["post"]
        self.schema = self.operation["requestBody"]["content"]["application/json"]["schema"]
        self.request = self.validator(self.schema)

    def validator(self, schema: dict[str, Any]) -> Draft202012Validator:
        return Draft202012Validator({**schema, "components": self.components})

    def component(self, name: str) -> Draft202012Validator:
        assert name in self.components["schemas"]
        return self.validator({"$ref": f"#/components/schemas/{name}"})

    def properties(self, model: str) -> dict[str, Any]:
        """The fields of a model's request."""
        reference = self.schema["discriminator"]["mapping"][model]
        return self.components["schemas"][reference.rpartition("/")[2]]["properties"]


def must_be_tellable(error: ServiceError) -> None:
    """Fail unless a refusal fits both wires."""
    assert error.spec.http_status in (400, 422)
    text = http_body(error, "0" * 32)
    assert text.isascii()
    assert len(text) <= 3584
    assert orjson.loads(text)["detail"]
    rpc_status(error, "0" * 32).SerializeToString()
