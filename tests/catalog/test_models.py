"""The facts of our own entries."""

from __future__ import annotations

import pytest

from services.core.catalog import Catalog
from services.core.catalog.types import Capability, Family, InputType, ModelSpec, OutputKind, RerankMethod

EMBEDDING = {
    "jina-embeddings-v2-base-en",
    "jina-embeddings-v2-base-zh",
    "jina-embeddings-v2-base-de",
    "jina-embeddings-v2-base-es",
    "jina-embeddings-v2-base-code",
    "jina-embeddings-v3",
    "jina-embeddings-v4",
    "jina-embeddings-v5-text-nano",
    "jina-embeddings-v5-text-small",
    "jina-embeddings-v5-omni-nano",
    "jina-embeddings-v5-omni-small",
    "jina-code-embeddings-0.5b",
    "jina-code-embeddings-1.5b",
    "jina-clip-v1",
    "jina-clip-v2",
    "jina-colbert-v1-en",
    "jina-colbert-v2",
    "elser-v2",
}
RERANKING = {
    "jina-reranker-v2-base-multilingual",
    "jina-reranker-v1-tiny-en",
    "jina-reranker-v1-turbo-en",
    "jina-reranker-v1-base-en",
    "jina-colbert-v1-en",
    "jina-colbert-v2",
    "jina-reranker-m0",
    "jina-reranker-v3",
}
CLASSIFYING = {
    "jina-embeddings-v2-base-en",
    "jina-embeddings-v2-base-zh",
    "jina-embeddings-v2-base-de",
    "jina-embeddings-v2-base-es",
    "jina-embeddings-v2-base-code",
    "jina-embeddings-v3",
    "jina-embeddings-v4",
    "jina-embeddings-v5-text-nano",
    "jina-embeddings-v5-text-small",
    "jina-code-embeddings-0.5b",
    "jina-code-embeddings-1.5b",
    "jina-clip-v1",
    "jina-clip-v2",
}
BATCHED = {"jina-embeddings-v5-text-nano", "jina-embeddings-v5-text-small"}
OURS = {"all-MiniLM-L6-v2"}
PER_CAPABILITY = {
    Capability.EMBED: EMBEDDING | OURS,
    Capability.RERANK: RERANKING | OURS | {"jina-reranker-v3.5"},
    Capability.CLASSIFY: CLASSIFYING | OURS,
    Capability.BATCH: BATCHED | OURS | {"jina-embeddings-v4"},
    Capability.CHAT: {"jina-vlm"},
}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.load()


def spec_of(catalog: Catalog, name: str) -> ModelSpec:
    spec = catalog.get(name)
    assert spec is not None, name
    return spec


@pytest.mark.parametrize("capability", Capability)
def test_every_capability_has_exactly_its_models(catalog: Catalog, capability: Capability) -> None:
    serving = {spec.id for spec in catalog.models.values() if spec.supports(capability)}
    assert serving == PER_CAPABILITY[capability]


# id, width, context, published parameters, licence
FACTS = [
    ("all-MiniLM-L6-v2", 384, 512, 22_713_216, "Apache-2.0"),
    ("jina-embeddings-v2-base-en", 768, 8192, 137_368_320, "Apache-2.0"),
    ("jina-embeddings-v2-base-de", 768, 8192, 160_813_824, "Apache-2.0"),
    ("jina-embeddings-v2-base-code", 768, 8192, 160_869_120, "Apache-2.0"),
    ("jina-embeddings-v3", 1024, 8192, 572_310_396, "CC-BY-NC-4.0"),
    ("jina-embeddings-v4", 2048, 32768, 3_934_695_552, "LicenseRef-Qwen-Research"),
    ("jina-embeddings-v5-text-nano", 768, 8192, 211_766_016 + 4 * 211_968 * 32, "CC-BY-NC-4.0"),
    ("jina-embeddings-v5-text-small", 1024, 32768, 596_049_920 + 4 * 630_784 * 32, "CC-BY-NC-4.0"),
    ("jina-embeddings-v5-omni-nano", 768, 8192, 985_984_512, "CC-BY-NC-4.0"),
    ("jina-embeddings-v5-omni-small", 1024, 32768, 1_626_268_672, "CC-BY-NC-4.0"),
    ("jina-code-embeddings-0.5b", 896, 32768, 494_032_768, "CC-BY-NC-4.0"),
    ("jina-code-embeddings-1.5b", 1536, 32768, 1_543_714_304, "CC-BY-NC-4.0"),
    ("jina-clip-v1", 768, 8192, 222_647_041, "Apache-2.0"),
    ("jina-clip-v2", 1024, 8192, 865_278_476 + 1, "CC-BY-NC-4.0"),
    ("jina-colbert-v1-en", 128, 8192, 137_368_320 + 768 * 128, "Apache-2.0"),
    ("jina-colbert-v2", 128, 8192, 559_366_144 + 1024 * 128, "CC-BY-NC-4.0"),
    ("jina-reranker-v1-tiny-en", 0, 8192, 33_046_273, "Apache-2.0"),
    ("jina-reranker-v1-turbo-en", 0, 8192, 37_771_777, "Apache-2.0"),
    ("jina-reranker-v2-base-multilingual", 0, 1024, 278_437_633, "CC-BY-NC-4.0"),
    ("jina-reranker-m0", 0, 10240, 2_444_721_665, "CC-BY-NC-4.0"),
    ("jina-reranker-v3", 512, 131072, 596_836_352, "CC-BY-NC-4.0"),
    ("jina-vlm", 0, 32768, 2_400_000_000, "CC-BY-NC-4.0"),
]


@pytest.mark.parametrize(("name", "width", "context", "parameters", "licence"), FACTS)
def test_published_figures(
    catalog: Catalog, name: str, width: int, context: int, parameters: int, licence: str
) -> None:
    spec = spec_of(catalog, name)
    found = (spec.dimensions, spec.context_length, spec.parameters, spec.licence)
    assert found == (width, context, parameters, licence)


def test_the_default_tasks_are_those_of_the_hosted_service(catalog: Catalog) -> None:
    defaults = {spec.id: spec.default_task for spec in catalog.models.values() if spec.tasks}
    assert defaults == {
        "jina-embeddings-v3": None,
        "jina-embeddings-v4": "text-matching",
        "jina-embeddings-v5-text-nano": "text-matching",
        "jina-embeddings-v5-text-small": "text-matching",
        "jina-embeddings-v5-omni-nano": "text-matching",
        "jina-embeddings-v5-omni-small": "text-matching",
        "jina-code-embeddings-0.5b": "nl2code.query",
        "jina-code-embeddings-1.5b": "nl2code.query",
        "jina-clip-v2": None,
        "elser-v2": None,
    }


@pytest.mark.parametrize(
    ("name", "task", "prompt", "adapter"),
    [
        ("jina-embeddings-v3", None, "", None),
        (
            "jina-embeddings-v3",
            "retrieval.query",
            "Represent the query for retrieving evidence documents: ",
            "retrieval.query",
        ),
        ("jina-embeddings-v3", "separation", "", "separation"),
        ("jina-embeddings-v4", None, "Query: ", "text-matching"),
        ("jina-embeddings-v4", "code.passage", "Passage: ", "code"),
        ("jina-embeddings-v5-text-nano", None, "Document: ", "text-matching"),
        ("jina-embeddings-v5-text-nano", "retrieval.query", "Query: ", "retrieval"),
        ("jina-embeddings-v5-omni-small", "clustering", "Document: ", "clustering"),
        ("jina-code-embeddings-0.5b", "code2nl.passage", "Candidate comment:\n", None),
        (
            "jina-code-embeddings-0.5b",
            None,
            "Find the most relevant code snippet given the following query:\n",
            None,
        ),
        ("jina-clip-v2", None, "", None),
        ("all-MiniLM-L6-v2", None, "", None),
    ],
)
def test_prompts_and_adapters_follow_the_task(
    catalog: Catalog, name: str, task: str | None, prompt: str, adapter: str | None
) -> None:
    spec = spec_of(catalog, name)
    assert (spec.prompt(task), spec.adapter(task)) == (prompt, adapter)


def test_request_fields_that_only_some_models_have(catalog: Catalog) -> None:
    models = [spec for spec in catalog.models.values() if spec.supports(Capability.EMBED)]

    def having(choice: str) -> set[str]:
        return {spec.id for spec in models if getattr(spec, choice)}

    assert having("late_chunking") == {"jina-embeddings-v3", "jina-embeddings-v4"}
    assert having("multivector_choice") == {"jina-embeddings-v4"}
    assert having("merged_content") == {"jina-embeddings-v5-omni-nano", "jina-embeddings-v5-omni-small"}
    assert having("input_types") == {"jina-colbert-v1-en", "jina-colbert-v2"}
    assert having("normalize_choice") == {
        spec.id for spec in models if spec.family in {Family.BERT, Family.JINA_BERT, Family.JINA_V3}
    } | {name for name in EMBEDDING if "-v5-" in name or "-clip-" in name}
    assert {spec.id for spec in models} - having("truncate_choice") == {
        "jina-colbert-v1-en",
        "jina-colbert-v2",
        "elser-v2",
    }
    assert having("matryoshka") == {
        name
        for name in EMBEDDING
        if any(part in name for part in ("v3", "v4", "-v5-", "code-emb", "clip-v2"))
    } | {"jina-colbert-v2", "all-MiniLM-L6-v2"}


def test_colbert_has_roles_and_three_widths(catalog: Catalog) -> None:
    spec = spec_of(catalog, "jina-colbert-v2")
    assert spec.input_types == (InputType.QUERY, InputType.DOCUMENT)
    assert spec.dimension_choices == (64, 96, 128)
    assert spec.max_query_length == 32
    assert spec.outputs == (OutputKind.MULTI_VECTOR,)
    assert spec.rerank is RerankMethod.LATE_INTERACTION


def test_the_listwise_rerankers_differ_only_in_weights(catalog: Catalog) -> None:
    v3, newer = spec_of(catalog, "jina-reranker-v3"), spec_of(catalog, "jina-reranker-v3.5")
    assert v3.rerank is newer.rerank is RerankMethod.LISTWISE
    assert (newer.repository, newer.revision) == ("jinaai/jina-reranker-v3.5", "main")
    for field in ("family", "max_document_length", "document_length_limit", "rerank_objects", "dimensions"):
        assert getattr(v3, field) == getattr(newer, field)


def test_models_without_published_weights_say_so(catalog: Catalog) -> None:
    assert {spec.id for spec in catalog.models.values() if not spec.repository} == {
        "elser-v2",
        "jina-reranker-v1-base-en",
    }
