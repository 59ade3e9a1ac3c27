"""The models in your own process, through the engine that the services use.

from search_foundation import load

with load("all-MiniLM-L6-v2") as model:
    vectors = model.encode(["hello world", "good morning"])
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar, cast
from uuid import uuid4
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from services.chat.logic import Chat
from services.chat.parsing import ChatParser
from services.core.call import Call
from services.core.catalog import Catalog, CatalogError
from services.core.catalog.folder import inspect
from services.core.catalog.types import Capability, Modality, ModelSpec
from services.core.content import Content, Media
from services.core.errors import ServiceError
from services.core.inference import Engine, EngineStartError, ScoreOptions
from services.core.inference.loading import (
    Loader,
    WeightBytes,
    load_model,
    model_weight_bytes,
    weight_bytes_in,
)
from services.core.media.room import MediaRoom
from services.core.media.sniffing import sniff
from services.core.modeling.device import choose_dtype
from services.core.modeling.families.table import Network
from services.core.modeling.registry import load_network
from services.core.requests.content import Accepted, read_content, read_one
from services.core.settings import ConfigurationError, Settings, load_settings
from services.embed.logic import Embedder
from services.embed.parsing import RequestParser
from services.embed.schema import request_schema
from services.embed.types import EmbedResult, MultiVectorResult, Result

T = TypeVar("T")
Vectors: TypeAlias = NDArray[np.float32]
One: TypeAlias = str | bytes | Path | Mapping[str, Any]
Encoded: TypeAlias = Vectors | list[Vectors] | list[dict[str, float]]

_NO_LIMIT = 1 << 31

_ARGUMENTS = {"input": "inputs", "input_type": "role", "return_multivector": "multivector"}
"""Arguments by the names that they have in a request."""


class ModelError(ValueError):
    """A model that cannot be loaded, or something asked of it that it does not do; the text says which."""


def load(
    model: str | Path,
    *,
    entry: str | None = None,
    model_dir: str | Path | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> Model:
    """Load a model of the catalogue by its id, or the weights in a directory, and warm it up.

    Of a directory ``entry`` names the catalogue's entry; by default that is the directory's name, or what
    ``search-foundation models pull`` wrote down. ``model_dir`` is where weights lie by id, as
    ``SF_MODEL_DIR``. ``device`` is auto, cpu, cuda or cuda:N. Raises ModelError.
    """
    changes: dict[str, Any] = {"device": device, "dtype": dtype, "workers": 1, "model_residency": "eager"}
    if model_dir is not None:
        changes["model_dir"] = Path(model_dir)
    try:
        settings = load_settings()
        catalog = Catalog.load(settings.catalog_file, settings.model_aliases)
        directory = Path(model) if isinstance(model, Path) or Path(model).is_dir() else None
        spec = _entry(catalog, entry, directory) if directory else _named(catalog, str(model))
    except (CatalogError, ConfigurationError) as error:
        raise ModelError(str(error)) from None
    return Model(spec, catalog, settings.model_copy(update={**changes, "models": (spec.id,)}), directory)


class Model:
    """A model in memory. Threads may share it; ``close`` or a ``with`` block lets it go.

    Processes forked from the one that loaded it share its weights on a CPU: each starts threads of its own at
    its first call. ``spec`` is the catalogue's entry: widths, tasks, context, licence.
    """

    def __init__(self, spec: ModelSpec, catalog: Catalog, settings: Settings, directory: Path | None) -> None:
        self.spec = spec
        self._catalog = catalog
        self._settings = settings
        self._load, self._weight_bytes = _from(directory) if directory else (load_model, model_weight_bytes)
        self._options = frozenset(request_schema(spec, _NO_LIMIT).model_fields)
        self._network: Network | None = None
        self._on_cuda = False
        self._closed = False
        self._engine: Engine | None = None
        self._media: MediaRoom | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._left_behind: list[object] = []
        self._starting = threading.Lock()
        self._start()
        _models.add(self)

    def _start(self) -> None:
        """Start the engine over the network that is there already, or that is loaded now."""

        def load(spec: ModelSpec, settings: Settings, device: torch.device) -> Network:
            if self._network is None:
                self._network = self._load(spec, settings, device)
                self._on_cuda = device.type == "cuda"
            return self._network

        def expected(spec: ModelSpec, settings: Settings, device: torch.device) -> int:
            return self._weight_bytes(spec, settings, device) if self._network is None else 0

        self._loop = asyncio.new_event_loop()
        run_forever = self._loop.run_forever
        self._thread = threading.Thread(target=run_forever, name="search-foundation", daemon=True)
        self._thread.start()
        try:
            self._media = self._run(_media_room(self._settings))
            engine = self._run(
                Engine.start(
                    self._settings, self._catalog, load=load, weight_bytes=expected, opener=self._media
                )
            )
        except EngineStartError as error:
            self.close()
            raise ModelError(str(error)) from None
        self._engine = engine
        self._parser = RequestParser(self._catalog, engine.served, max_items=_NO_LIMIT)
        self._embedder = Embedder(engine, self._settings)
        self._chat_parser = ChatParser(self._catalog, engine.served, max_answer=_NO_LIMIT)
        self._chat = Chat(engine, default=self._settings.chat_answer_tokens, seconds=float(_NO_LIMIT))

    def forget_threads(self) -> None:
        """Called in a forked process, which has none of the threads.

        What they used is kept as it is: to close the loop would change what its owner waits for.
        """
        self._left_behind += (self._loop, self._thread, self._engine, self._media)
        self._engine = self._loop = self._media = None
        self._starting = threading.Lock()

    def encode(
        self,
        inputs: One | Sequence[One],
        *,
        task: str | None = None,
        role: Literal["query", "document"] | None = None,
        dimensions: int | None = None,
        normalized: bool | None = None,
        late_chunking: bool | None = None,
        multivector: bool | None = None,
        truncate: bool | None = None,
    ) -> Any:
        """Embed one input or several, in order: texts, and with some models pictures, sounds and films.

        Such a file is its bytes, its path, or an object as in a request, as ``{"image": "https://..."}``,
        whose value may be bytes or a path too. So is a PDF, which stands alone and gives a vector for each
        page. With models that take groups ``{"content": [...]}`` joins several to one vector.

        Returns, by the kind of model and for several inputs: (inputs, width) float32; or a list of (vectors,
        width) float32, one vector for each token; or a list of dicts of tokens and their weights, the largest
        first. For one input the first element of that. Options mean what they mean in a request to
        ``/v1/embeddings``, and None the model's default. ``role`` is ``input_type`` there; ``multivector``,
        which asks a model that can do both for a vector of each token, is ``return_multivector``. Raises
        ModelError for an option that the model does not have, a value out of its range, a text that is too
        long, or a file that cannot be had.
        """
        alone = isinstance(inputs, str | bytes | Path | Mapping)
        several = [inputs] if alone else list(inputs)
        options = {
            "task": task,
            "input_type": role,
            "dimensions": dimensions,
            "normalized": normalized,
            "late_chunking": late_chunking,
            "return_multivector": multivector,
            "truncate": truncate,
        }
        values = [_field(each) for each in cast("Sequence[One]", several)]
        given = {name: value for name, value in options.items() if value is not None}
        if alone and isinstance(values[0], dict) and "pdf" in values[0]:
            return self._encode(values[0], given)
        encoded = self._encode(values, given)
        return encoded[0] if alone else encoded

    def score(
        self,
        query: One,
        documents: Sequence[One],
        *,
        max_document_length: int | None = None,
        truncate: bool = True,
    ) -> Vectors:
        """Score each of ``documents`` by ``query``, (documents,) float32 in their order; higher is better.

        By the kind of model these are cosines, sums of the best cosine of each token of the query, or numbers
        between 0 and 1. With some models query and documents may be pictures, as ``encode`` takes them.
        Raises ModelError for a model that does not rerank, and as ``encode`` does.
        """
        engine = self._open()
        if not self.spec.supports(Capability.RERANK):
            raise ModelError(f"{self.spec.id} does not score documents")
        if not documents:
            return np.empty(0, np.float32)
        options = ScoreOptions(truncate=truncate, max_document_length=max_document_length)
        asked, *contents = (self._content(each) for each in (query, *documents))
        scores = self._run(engine.scorer(self.spec.id).score(asked, contents, options, _call()))
        return scores.values

    def chat(
        self, messages: str | Sequence[Mapping[str, Any]], images: Sequence[bytes | Path] = (), **options: Any
    ) -> str:
        """Answer a conversation: what one user says, or messages as in a request to ``/v1/chat/completions``.

        ``images`` are files that stand before the text of one user, their bytes or paths. Options mean what
        they mean in a request: ``max_tokens``, ``temperature``, ``stop``, ``response_format`` and so on.
        Raises ModelError for a model that does not answer, and for messages or options that it does not take.
        """
        return "".join(self.chat_stream(messages, images, **options))

    def chat_stream(
        self, messages: str | Sequence[Mapping[str, Any]], images: Sequence[bytes | Path] = (), **options: Any
    ) -> Iterator[str]:
        """As ``chat``, the answer in pieces as it comes; whoever stops reading ends it."""
        self._open()
        if not self.spec.supports(Capability.CHAT):
            raise ModelError(f"{self.spec.id} does not answer conversations")
        turns = _turns(messages, images)
        pieces = self._pieces({"model": self.spec.id, "messages": turns, **options})
        try:
            while (piece := self._run(anext(pieces, None))) is not None:  # type: ignore[arg-type]
                yield piece
        finally:
            self._run(pieces.aclose())  # type: ignore[arg-type]

    async def _pieces(self, fields: dict[str, Any]) -> AsyncGenerator[str]:
        request = self._chat_parser.parse(fields, _argument)
        async with self._chat.answer(request, _call()) as answer:
            async for piece in answer:
                yield piece.text

    def close(self) -> None:
        """Let the model go; later calls raise ModelError."""
        self._closed = True
        self._network = None
        if not threading.main_thread().is_alive():
            # The interpreter is ending, and with it what would be stopped in order.
            return
        if self._engine is not None:
            self._run(self._engine.stop(5.0))
            self._engine = None
        if self._media is not None:
            self._run(self._media.aclose())
            self._media = None
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = None

    def __repr__(self) -> str:
        return f"Model({self.spec.id!r}{', closed' if self._closed else ''})"

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, value: list[Any] | dict[str, Any], options: dict[str, Any]) -> Encoded:
        self._open()
        if not self.spec.supports(Capability.EMBED):
            raise ModelError(f"{self.spec.id} does not embed texts; it scores documents")
        if lacking := sorted(options.keys() - self._options):
            raise ModelError(f"{self.spec.id} has no option '{_ARGUMENTS.get(lacking[0], lacking[0])}'")
        if not value:
            return np.empty((0, options.get("dimensions") or self.spec.dimensions), np.float32)
        fields = {"model": self.spec.id, "input": value, **options}
        return _plain(self._run(self._embed(fields)))

    def _content(self, one: One) -> Content:
        try:
            return read_one(_field(one), partial(read_content, accepted=Accepted.by(self.spec)))
        except ValidationError as error:
            raise ModelError("; ".join(each["msg"] for each in error.errors())) from None

    async def _embed(self, fields: dict[str, Any]) -> Result:
        return await self._embedder.embed(self._parser.parse(fields, _argument), _call())

    def _open(self) -> Engine:
        if self._closed:
            raise ModelError(f"{self.spec.id} is closed")
        with self._starting:
            if self._engine is None:
                if self._on_cuda:
                    raise ModelError(
                        f"{self.spec.id} was loaded on CUDA before this process was forked; load it here"
                    )
                self._start()
        assert self._engine is not None
        return self._engine

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except ServiceError as error:
            raise ModelError(error.detail) from None


_models: WeakSet[Model] = WeakSet()


def _forget_threads() -> None:
    for model in _models:
        model.forget_threads()


os.register_at_fork(after_in_child=_forget_threads)


def _named(catalog: Catalog, name: str) -> ModelSpec:
    if catalog.get(name) is None and os.sep in name:
        raise ModelError(f"'{name}' is neither a directory nor a model of the catalogue")
    return catalog.require(name)


def _entry(catalog: Catalog, entry: str | None, directory: Path) -> ModelSpec:
    if entry is not None:
        return catalog.require(entry)
    if not directory.is_dir():
        raise ModelError(f"{directory} is no directory")
    if (named := catalog.get(directory.resolve().name)) is not None:
        return named
    pulled = inspect(directory).repository
    found = [spec for spec in catalog.models.values() if pulled and spec.repository == pulled]
    if not found:
        raise ModelError(f"It is not known which model {directory} holds: name it with 'entry'.")
    return found[0]


def _from(directory: Path) -> tuple[Loader, WeightBytes]:
    """Make what loads and weighs the weights in ``directory`` whatever the entry says of places."""

    def load_from(spec: ModelSpec, settings: Settings, device: torch.device) -> Network:
        network = load_network(spec, directory, device=device, dtype=choose_dtype(device, settings.dtype))
        network.warm_up()
        return network

    def expected(spec: ModelSpec, settings: Settings, device: torch.device) -> int:
        return weight_bytes_in(directory, spec, settings, device)

    return load_from, expected


async def _media_room(settings: Settings) -> MediaRoom:
    return MediaRoom(settings)


def _turns(
    messages: str | Sequence[Mapping[str, Any]], images: Sequence[bytes | Path]
) -> list[dict[str, Any]]:
    """Put a conversation into the form that it has in a request."""
    if not isinstance(messages, str):
        if images:
            raise ModelError("images stand before a text; in messages they are parts")
        return [dict(message) for message in messages]
    fields = [cast("dict[str, Any]", _field(image)) for image in images]
    return [
        {
            "role": "user",
            "content": [
                *(next(iter(field.values())) for field in fields),
                {"type": "text", "text": messages},
            ],
        }
    ]


def _field(one: One) -> str | dict[str, Any]:
    """Put an input into the form that it has in a request."""
    if isinstance(one, Mapping):
        return {name: _value(name, value) for name, value in one.items()}
    if isinstance(one, Path):
        one = _read(one)
    if isinstance(one, bytes):
        found = sniff(one).kind
        kind = Modality(found) if found in _FILES else Modality.IMAGE
        return {str(kind): Media(kind, one)}
    return one


_FILES = frozenset({Modality.IMAGE, Modality.PDF, Modality.AUDIO, Modality.VIDEO})


def _value(name: str, value: Any) -> Any:
    """Put what stands under ``name`` in an object into the form of a request: files, and parts of a group."""
    if name == "content" and isinstance(value, Sequence) and not isinstance(value, str | bytes):
        parts = [_field(cast(One, part)) for part in cast("Sequence[Any]", value)]
        return [{"text": part} if isinstance(part, str) else part for part in parts]
    if name in _FILES and isinstance(value, bytes | Path):
        return Media(Modality(name), value if isinstance(value, bytes) else _read(value))
    return value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


def _call() -> Call:
    return Call(uuid4().hex)


def _argument(_model: str | None, location: Sequence[str | int]) -> str:
    """Word where an error is by the name of the argument."""
    first, *rest = location or ("input",)
    return _ARGUMENTS.get(str(first), str(first)) + "".join(f"[{step}]" for step in rest)


def _plain(result: Result) -> Encoded:
    if isinstance(result, EmbedResult):
        return result.vectors
    if isinstance(result, MultiVectorResult):
        return list(result.vectors)
    return [
        dict(zip(vector.tokens, cast("list[float]", vector.weights.tolist()), strict=True))
        for vector in result.vectors
    ]
