"""What other vendors' fields mean here: each is put into our own words, or refused.

Voyage and Cohere say ``input_type``, Gemini ``task_type``, Text Embeddings Inference ``prompt_name``; Voyage
says ``output_dtype``. A field that would change the vector is never passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from services.core.catalog.types import InputType, ModelSpec, OutputKind
from services.core.errors import FieldError, ServiceError, validation_error
from services.core.requests.foreign import ForeignBody, only
from services.core.requests.parsing import Locate, rest_location
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
"""Fields that say what vectors are for; the first that is given counts, and all must mean something."""
_OWN_NAMES = ("task", "task_type")
_OWN_ENCODINGS = ("embedding_type", "encoding_type", "embedding_types")
_LAYOUTS = (None, "float", "base64")
"""Values of ``encoding_format`` that say nothing of the kind of numbers."""

TRANSLATED = (*_NAMES, "output_dtype")
FOREIGN_NAMES = ("output_dimension", "output_dimensionality", "truncation", "normalize")
"""Other vendors' names of fields that some models do not have; where ours are ignored, these are refused."""


def natural(spec: ModelSpec) -> Mapping[str, object]:
    """What a model does of its own, by the fields that would ask for it."""
    width = dict.fromkeys(("dimensions", "output_dimension", "output_dimensionality"), spec.dimensions)
    return {**width, **dict.fromkeys(("truncate", "truncation", "normalized", "normalize"), True)}


class NotHonoured(ForeignBody):
    """Fields of other vendors that mean something that is not done here."""

    truncate_prompt_tokens: Annotated[
        Any, only("Say 'truncate: true'; texts are cut at the model's own length", -1)
    ] = None
    truncation_direction: Annotated[Any, only("Texts are cut at their right end only", "right", "Right")] = (
        None
    )
    truncation_side: Annotated[Any, only("Texts are cut at their right end only", "right")] = None
    add_special_tokens: Annotated[Any, only("Special tokens are always added", True)] = None
    embed_dtype: Annotated[Any, only("Numbers are told by 'embedding_type' or 'output_dtype'", "float32")] = (
        None
    )
    endianness: Annotated[Any, only("base64 is always little-endian", "little", "native")] = None
    modality: Annotated[Any, only("Media are told by their fields, as {'image': ...}", "text")] = None
    title: Annotated[Any, only("Put the title before the text")] = None


_SIDES = {
    "query": InputType.QUERY,
    "search_query": InputType.QUERY,
    "document": InputType.DOCUMENT,
    "search_document": InputType.DOCUMENT,
    "passage": InputType.DOCUMENT,
    "RETRIEVAL_QUERY": InputType.QUERY,
    "QUESTION_ANSWERING": InputType.QUERY,
    "FACT_VERIFICATION": InputType.QUERY,
    "CODE_RETRIEVAL_QUERY": InputType.QUERY,
    "RETRIEVAL_DOCUMENT": InputType.DOCUMENT,
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
        self._kinds = ("float",) if set(spec.outputs) == {OutputKind.SPARSE} else tuple(_PACKED)

    def translate(self, fields: dict[str, Any], locate: Locate) -> dict[str, Any]:
        """Return fields with what others say in our words; the same if nothing foreign is among them.

        Raises ``ServiceError`` VALIDATION_ERROR for a word that means nothing to the model, and for what is
        not done here.
        """
        NotHonoured.look(fields, locate)
        changed: dict[str, Any] = {}
        if fields.get("output_dtype") is not None:
            changed |= self._encoding(fields, locate)
        for name in reversed(_NAMES):
            if (word := fields.get(name)) is not None:
                meant = self._purpose(name, word, locate)
                if name in _OWN_NAMES and not meant:
                    changed.pop("task", None)
                changed |= meant
        return {**fields, **changed} if changed else fields

    def described(self) -> dict[str, Any]:
        """JSON schemas of the fields of other vendors that mean something to the model."""
        sides = [word for word in INPUT_TYPES if self._means("input_type", word)]
        prompts = [word for word in (*PROMPT_NAMES, *self._own) if self._means("prompt_name", word)]
        fields: dict[str, Any] = {
            "input_type": {
                "enum": [*sides, None],
                "description": "Voyage and Cohere: the model's task or side for it.",
            },
            "prompt_name": {
                "enum": [*dict.fromkeys(prompts), None],
                "description": "Text Embeddings Inference: the model's task or side for it.",
            },
            "output_dtype": {
                "enum": [*self._kinds, None],
                "description": "Voyage: as `embedding_type`, which goes before it; the bytes of such numbers "
                "where `encoding_format` is `base64`.",
            },
        }
        if words := [word for word in TASK_TYPES if word in self._tasks or word in self._sides]:
            fields["task_type"] = {
                "enum": [*self._own, NO_TASK, *words, None],
                "description": "Gemini: the model's task or side for it.",
            }
        return {name: {"title": name, **field} for name, field in fields.items()}

    def _means(self, name: str, word: str) -> bool:
        try:
            self._meaning(name, word, rest_location)
        except ServiceError:
            return False
        return True

    def _encoding(self, fields: Mapping[str, Any], locate: Locate) -> dict[str, Any]:
        kind = fields["output_dtype"]
        if not isinstance(kind, str) or kind not in self._kinds:
            choices = ", ".join(f"'{each}'" for each in self._kinds)
            raise self._refusal("output_dtype", kind, f"Input should be one of {choices}", locate)
        layout = fields.get("encoding_format")
        if any(fields.get(name) is not None for name in _OWN_ENCODINGS) or layout not in _LAYOUTS:
            return {}
        return {"embedding_type": _PACKED[kind] if layout == Encoding.BASE64 else kind}

    def _task(self, name: str, word: str, locate: Locate) -> str | None:
        if word != NO_TASK and word not in self._tasks:
            raise self._refusal(name, word, self._nothing(word), locate)
        return self._tasks.get(word)

    def _purpose(self, name: str, word: object, locate: Locate) -> dict[str, Any]:
        if name not in _OWN_NAMES:
            return self._meaning(name, word, locate)
        if self._has_tasks:
            if isinstance(word, str) and word in (NO_TASK, *TASK_TYPES):
                return {"task": self._task(name, word, locate)}
            return {}
        if self._sides and isinstance(word, str) and word in TASK_TYPES:
            return {"input_type": self._side(name, word, locate)}
        return {}

    def _side(self, name: str, word: str, locate: Locate) -> str:
        if word not in self._sides:
            raise self._refusal(name, word, self._nothing(word), locate)
        return self._sides[word].value

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
