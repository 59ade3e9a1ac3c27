"""Hooks of schemathesis, in its own process: valid requests reach what is served, and answers are counted.

Schemas of other vendors' forms take any string as a model and any as a file's id, so that nearly all requests
made by chance would end at the first look. The file that ``SCHEMA_ANSWERS_FILE`` names gets the number of
answers by operation, mode and status.
"""

from __future__ import annotations

import atexit
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, cast

import schemathesis

from tests.stack import MODEL

_UPLOAD = "POST /openai/v1/files"
_served: dict[str, str] = {"model": MODEL}
_answers: Counter[tuple[str, str, int]] = Counter()


@schemathesis.hook
def filter_body(context: Any, body: Any) -> bool:
    """Leave out forms with an empty list, which is sent as no field at all: a valid request."""
    form = context.operation.label == _UPLOAD and isinstance(body, dict)
    return not (form and [] in cast("dict[str, Any]", body).values())


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Put what is served in the place of invented names, in requests that are meant to be valid."""
    if not case.meta.generation.mode.is_positive:
        return
    for fields in (case.body, case.path_parameters):
        if isinstance(fields, dict):
            named = cast("dict[str, Any]", fields)
            named.update({name: one for name, one in _served.items() if isinstance(named.get(name), str)})


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Count the answer, and remember the id of a file that is there now."""
    label = case.operation.label
    _answers[label, case.meta.generation.mode.value, response.status_code] += 1
    if label == _UPLOAD and response.status_code == 200:
        _served["input_file_id"] = json.loads(response.content)["id"]


@atexit.register
def _write() -> None:
    lines = [[*what, number] for what, number in _answers.items()]
    Path(os.environ["SCHEMA_ANSWERS_FILE"]).write_text(json.dumps(lines))
