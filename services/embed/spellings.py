"""What other vendors' fields mean here: each is put into our own words, or refused.

Voyage and Cohere say ``input_type``, Gemini ``task_type``, Text Embeddings Inference ``prompt_name``; Voyage
says ``output_dtype``. A field that would change the vector is never passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.core.catalog.types import InputType, ModelSpec
from services.core.errors import FieldError, validation_error
from services.core.requests.parsing import Locate
from services.embed.types import Encoding

_QUERY = ("retrieval.query", "nl2code.query")
_PASSAGE = ("retrieval.passage", "nl2code.passage")
_CODE = ("nl2code.query", "code.query", "retrieval.query")
_CLUSTERING = ("clustering", "separation")
_CLASSIFICATION = ("classification",)
_SIMILARITY = ("text-matching",)

_TASKS: Mapping[str, tuple[str, ...]] = {
    "query": _QUERY,
    "document": _PASSAGE,
    "passage": _PASSAGE,
    "search_query": _QUERY,
    "search_document": _PASSAGE,
    "classification": _CLASSIFICATION,
    "clustering": _CLUSTERING,
    "RETRIEVAL_QUERY": _QUERY,
    "RETRIEVAL_DOCUMENT": _PASSAGE,
    "QUESTION_ANSWERING": ("qa.query", *_QUERY),
    "FACT_VERIFICATION": _QUERY,
    "CODE_RETRIEVAL_QUERY": _CODE,
    "SEMANTIC_SIMILARITY": _SIMILARITY,
    "CLASSIFICATION": _CLASSIFICATION,
    "CLUSTERING": _CLUSTERING,
}
"""Tasks that a word may mean, the first that a model has."""

INPUT_TYPES = ("query", "document", "search_query", "search_document", "classification", "clustering")
"""Values of ``input_type``: of Voyage, then of Cohere."""
TASK_TYPES = tuple(word for word in _TASKS if word.isupper())
"""Values of Gemini's ``task_type``, but for the one that means none."""
PROMPT_NAMES = ("query", "document", "passage")
"""Values of ``prompt_name`` beside the tasks themselves."""
NO_TASK = "TASK_TYPE_UNSPECIFIED"
_PACKED = {
    "float": (Encoding.BASE64,),
    "int8": (Encoding.INT8_BASE64,),
    "uint8": (Encoding.UINT8_BASE64,),
    "binary": (Encoding.BINARY_BASE64,),
    "ubinary": (Encoding.UBINARY_BASE64,),
}
"""What ``output_dtype`` means beside ``encoding_format: base64``: the bytes of such numbers."""

_NAMES = ("task", "task_type", "input_type", "prompt_name")
"""Fields that say what vectors are for; the first that is given counts."""

_SIDES = {
    "query": InputType.QUERY,
    "search_query": InputType.QUERY,
    "document": InputType.DOCUMENT,
    "search_document": InputType.DOCUMENT,
    "passage": InputType.DOCUMENT,
}


class Spellings:
    """Puts the fields of one model's requests into our own words."""

    def __init__(self, spec: ModelSpec) -> None:
        self._model = spec.id
        self._has_tasks = bool(spec.tasks)
        self._own = spec.tasks
        self._tasks = {
            word: next(task for task in tasks if task in spec.tasks)
            for word, tasks in _TASKS.items()
            if not set(spec.tasks).isdisjoint(tasks)
        }
        self._sides = _SIDES if spec.input_types else {}

    def translate(self, fields: dict[str, Any], locate: Locate) -> dict[str, Any]:
        """Return fields with what others say in our words; the same if nothing foreign is among them.

        Raises ``ServiceError`` VALIDATION_ERROR for a word that means nothing to the model.
        """
        changed: dict[str, Any] = {}
        if fields.get("output_dtype") is not None:
            changed["embedding_type"] = self._encoding(fields, locate)
        name = next((each for each in _NAMES if fields.get(each) is not None), None)
        if name in ("task", "task_type"):
            if self._has_tasks and fields[name] in (NO_TASK, *TASK_TYPES):
                changed["task_type"] = changed["task"] = self._task(name, fields[name], locate)
        elif name is not None:
            changed |= self._meaning(name, fields[name], locate)
        return {**fields, **changed} if changed else fields

    def _encoding(self, fields: Mapping[str, Any], locate: Locate) -> object:
        kind = fields["output_dtype"]
        if not isinstance(kind, str) or kind not in _PACKED:
            choices = ", ".join(f"'{each}'" for each in _PACKED)
            raise self._refusal("output_dtype", kind, f"Input should be one of {choices}", locate)
        return _PACKED[kind] if fields.get("encoding_format") == Encoding.BASE64 else kind

    def _task(self, name: str, word: str, locate: Locate) -> str | None:
        if word != NO_TASK and word not in self._tasks:
            raise self._refusal(name, word, self._nothing(word), locate)
        return self._tasks.get(word)

    def _meaning(self, name: str, word: object, locate: Locate) -> dict[str, Any]:
        known = (*PROMPT_NAMES, *self._own) if name == "prompt_name" else INPUT_TYPES
        if not isinstance(word, str) or word not in known:
            choices = ", ".join(f"'{each}'" for each in known)
            raise self._refusal(name, word, f"Input should be one of {choices}", locate)
        if word in self._own:
            return {"task": word}
        if word in self._tasks:
            return {"task": self._tasks[word]}
        if word in self._sides:
            return {"input_type": self._sides[word].value}
        if self._has_tasks or self._sides or name == "prompt_name":
            raise self._refusal(name, word, self._nothing(word), locate)
        # To a model that has neither tasks nor sides both sides of a search are the same.
        return {}

    def _nothing(self, word: str) -> str:
        return f"Model '{self._model}' has nothing that '{word}' means"

    def _refusal(self, name: str, word: object, message: str, locate: Locate) -> Exception:
        return validation_error([FieldError(locate(self._model, (name,)), message, "literal_error", word)])
