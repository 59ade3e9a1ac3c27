"""The processor of networks that read one text at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from services.core.catalog.types import InputType, Modality, ModelSpec
from services.core.content import Fit, Input, Usage
from services.core.modeling.types import (
    EncodeItem,
    Prepared,
    PrepareOptions,
    TextTokenizer,
    Tokens,
    UnfitInputError,
)


class TextProcessor:
    """Texts to items; see ``types.Processor``. Prompts, adapters and the context are the catalogue's."""

    def __init__(
        self, spec: ModelSpec, documents: TextTokenizer, queries: TextTokenizer | None = None
    ) -> None:
        """``queries`` writes the queries of a model that gives them another form than documents."""
        self._spec = spec
        self.fit: Fit | None = None
        self.documents = documents
        self.queries = queries or documents

    def tokenizer(self, role: InputType) -> TextTokenizer:
        """Return what writes the texts of one side of a search."""
        return self.queries if role is InputType.QUERY else self.documents

    def limit(self, options: PrepareOptions) -> int:
        """Return the longest sequence in tokens."""
        longest = self._spec.max_tokens
        shortest = self.tokenizer(options.role).special_length + 1
        return max(min(options.limit or longest, longest), shortest)

    def expected(self, kind: Modality) -> int:
        """Raise UnfitInputError: there is no other kind."""
        raise UnfitInputError(f"Model '{self._spec.id}' takes text only, not '{kind}'.")

    def prepare(self, inputs: Sequence[Input], options: PrepareOptions) -> list[Prepared]:
        """Make one item of each text, behind the task's prompt."""
        texts = only_texts(inputs, self._spec)
        tokenized = self.tokenize(texts, self._spec.prompt(options.task), options)
        sizes = [len(ids) for ids, _, _ in tokenized]
        if not all(sizes):
            text = texts[sizes.index(0)]
            raise UnfitInputError(f"Model '{self._spec.id}' finds no tokens in the text {text[:40]!r}.")
        adapter = self._spec.adapter(options.task)
        if options.multivector:
            return [_of_each_token(each, adapter) for each in tokenized]
        return [
            Prepared(EncodeItem(ids, adapter), Usage(min(length, size)), truncated)
            for size, (ids, length, truncated) in zip(sizes, tokenized, strict=True)
        ]

    def tokenize(self, texts: Sequence[str], prompt: str, options: PrepareOptions) -> list[Tokens]:
        """Tokenise ``prompt + text`` for each text, cut to the limit."""
        tokenizer = self.tokenizer(options.role)
        return tokenizer.encode_batch(texts, prompt, truncate_to=self.limit(options))

    def names(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of ``ids`` as the vocabulary writes them."""
        return self.documents.names(ids)


def _of_each_token(tokens: Tokens, adapter: str | None) -> Prepared:
    size = len(tokens.ids)
    spans = tuple((place, place + 1) for place in range(size))
    usage = Usage(min(tokens.length, size))
    return Prepared(EncodeItem(tokens.ids, adapter, spans), usage, tokens.truncated, size)


def only_texts(inputs: Sequence[object], spec: ModelSpec) -> Sequence[str]:
    """Return ``inputs``, which have to be texts; raises UnfitInputError in the name of a model otherwise."""
    for each in inputs:
        if not isinstance(each, str):
            raise UnfitInputError(f"Model '{spec.id}' takes text only.")
    return cast("Sequence[str]", inputs)
