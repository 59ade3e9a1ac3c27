"""The checkpoint's chat template: from messages to the text that its model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.core.modeling.checkpoints.checkpoint import CheckpointError, read_json
from services.core.modeling.types import UnfitInputError

_MOST_BYTES = 1 << 20


class ChatTemplate:
    """A template of the checkpoint's, run where it reaches nothing but what it is given."""

    def __init__(self, source: str, where: Path, variables: Mapping[str, Any]) -> None:
        """``variables`` are given to each rendering. CheckpointError if ``source`` is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = _refuse  # pyright: ignore[reportArgumentType]
        environment.globals["strftime_now"] = _now  # pyright: ignore[reportArgumentType]
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"{where}: not a readable chat template: {error}") from error
        self._variables = dict(variables)

    @classmethod
    def load(cls, directory: Path, variables: Mapping[str, Any]) -> ChatTemplate:
        """Read it from where checkpoints keep it. CheckpointError if there is none."""
        plain = directory / "chat_template.jinja"
        if plain.is_file():
            if plain.stat().st_size > _MOST_BYTES:
                raise CheckpointError(f"{plain}: larger than {_MOST_BYTES:,} bytes")
            return cls(plain.read_text("utf-8"), plain, variables)
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            path = directory / name
            if path.is_file() and isinstance(source := read_json(path).get("chat_template"), str):
                return cls(source, path, variables)
        raise CheckpointError(f"{directory}: no chat template")

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a conversation that the assistant is to go on with.

        Raises UnfitInputError for one that the template refuses.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._variables)
        except SecurityError as error:
            raise CheckpointError(f"the chat template does what templates must not: {error}") from error
        except TemplateError as error:
            raise UnfitInputError(f"The model does not take these messages: {error}.") from None


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
