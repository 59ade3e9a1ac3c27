"""Calls of the clients of ``make test``; see ``told.py`` for what is printed."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from told import BASE, CHAT, CLIP, KEY, MODEL, NOPE, PICTURE, QUERY, TEXTS, V1, call, main, ranked

QUESTION = [{"role": "user", "content": "hello"}]


# OpenAI's SDK: base64 unless told otherwise.


def openai_client() -> Any:
    from openai import OpenAI

    return OpenAI(base_url=V1, api_key=KEY, max_retries=0)


@call
def openai_embed() -> Any:
    return [each.embedding for each in openai_client().embeddings.create(model=MODEL, input=TEXTS).data]


@call
def openai_embed_short() -> Any:
    answer = openai_client().embeddings.create(
        model=MODEL, input=TEXTS, dimensions=8, encoding_format="float"
    )
    return [each.embedding for each in answer.data]


@call
def openai_pictures() -> Any:
    import base64
    from pathlib import Path

    picture = base64.b64encode(Path(PICTURE).read_bytes()).decode()
    answer = openai_client().embeddings.create(model=CLIP, input=[{"image": picture}])  # type: ignore[list-item]
    return [each.embedding for each in answer.data]


@call
def openai_models() -> Any:
    return [each.id for each in openai_client().models.list()]


@call
def openai_refused() -> Any:
    return openai_client().embeddings.create(model=NOPE, input=TEXTS)


# litellm


def litellm_embedding(model: str, **fields: Any) -> Any:
    import litellm

    answer = litellm.embedding(model=model, api_key=KEY, input=TEXTS, **fields)
    return [each["embedding"] for each in answer.data]


def seen() -> list[dict[str, Any]]:
    picture = base64.b64encode(Path(PICTURE).read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    return [{"role": "user", "content": [{"type": "text", "text": "hello"}, image]}]


def litellm_chat(**fields: Any) -> Any:
    import litellm

    return litellm.completion(
        **{"messages": QUESTION, **fields}, model=f"openai/{CHAT}", api_base=V1, api_key=KEY, max_retries=0
    )


@call
def litellm_embed_as_openai() -> Any:
    return litellm_embedding(f"openai/{MODEL}", api_base=V1)


@call
def litellm_embed_as_jina() -> Any:
    return litellm_embedding(f"jina_ai/{MODEL}", api_base=f"{V1}/embeddings")


@call
def litellm_rerank() -> Any:
    import litellm

    answer = litellm.rerank(
        model=f"jina_ai/{MODEL}", api_base=BASE, api_key=KEY, query=QUERY, documents=TEXTS
    )
    return [[each["index"], each["relevance_score"]] for each in answer.results]


@call
def litellm_rerank_as_cohere() -> Any:
    import litellm

    answer = litellm.rerank(
        model=f"cohere/{MODEL}", api_base=f"{BASE}/v2/rerank", api_key=KEY, query=QUERY, documents=TEXTS
    )
    return [[each["index"], each["relevance_score"]] for each in answer.results]


@call
def litellm_answer() -> Any:
    return litellm_chat().choices[0].message.content


@call
def litellm_stream() -> Any:
    return "".join(chunk.choices[0].delta.content or "" for chunk in litellm_chat(stream=True))


@call
def litellm_picture() -> Any:
    return litellm_chat(messages=seen()).choices[0].message.content


@call
def litellm_refused() -> Any:
    return litellm_chat(temperature=3)


# Cohere's SDK, of the line that LangChain's integration stands on


def cohere_client() -> Any:
    import cohere

    return cohere.ClientV2(api_key=KEY, base_url=BASE)


def cohere_client_of_old() -> Any:
    import cohere

    return cohere.Client(api_key=KEY, base_url=BASE)


def cohere_embed(**fields: Any) -> Any:
    answer = cohere_client().embed(model=MODEL, texts=TEXTS, input_type="search_document", **fields)
    return answer.embeddings


@call
def cohere_embed_float() -> Any:
    return cohere_embed(embedding_types=["float"]).float_


@call
def cohere_embed_int8() -> Any:
    return cohere_embed(embedding_types=["int8"]).int8


@call
def cohere_embed_v1() -> Any:
    return cohere_client_of_old().embed(model=MODEL, texts=TEXTS, input_type="search_query").embeddings


@call
def cohere_pictures() -> Any:
    import base64
    from pathlib import Path

    uri = "data:image/png;base64," + base64.b64encode(Path(PICTURE).read_bytes()).decode()
    answer = cohere_client().embed(model=CLIP, images=[uri], input_type="image", embedding_types=["float"])
    return answer.embeddings.float_


@call
def cohere_rerank() -> Any:
    return ranked(cohere_client().rerank(model=MODEL, query=QUERY, documents=TEXTS).results)


@call
def cohere_rerank_v1() -> Any:
    answer = cohere_client_of_old().rerank(model=MODEL, query=QUERY, documents=TEXTS, return_documents=True)
    assert [each.document.text for each in answer.results] == [TEXTS[each.index] for each in answer.results]
    return ranked(answer.results)


@call
def cohere_refused() -> Any:
    return cohere_client().rerank(model=NOPE, query="a", documents=TEXTS)


# Voyage


def voyage() -> Any:
    import voyageai

    return voyageai.Client(api_key=KEY, base_url=V1, max_retries=0)


@call
def voyage_embed() -> Any:
    return voyage().embed(TEXTS, model=MODEL, input_type="document").embeddings


@call
def voyage_embed_int8() -> Any:
    return voyage().embed(TEXTS, model=MODEL, output_dtype="int8", output_dimension=8).embeddings


@call
def voyage_pictures() -> Any:
    from PIL import Image

    with Image.open(PICTURE) as picture:
        picture.load()
        return voyage().multimodal_embed([[picture]], model=CLIP).embeddings


@call
def voyage_rerank() -> Any:
    return ranked(voyage().rerank(QUERY, TEXTS, model=MODEL).results)


@call
def voyage_refused() -> Any:
    return voyage().embed(TEXTS, model=NOPE)


# Gemini


def gemini() -> Any:
    from google import genai

    return genai.Client(api_key=KEY, http_options={"base_url": BASE})


@call
def gemini_embed() -> Any:
    client = gemini()
    answer = client.models.embed_content(model=MODEL, contents=TEXTS)
    return [each.values for each in answer.embeddings]


@call
def gemini_refused() -> Any:
    client = gemini()  # which closes when it is left
    return client.models.embed_content(model=NOPE, contents=TEXTS)


# Ollama


def ollama_client() -> Any:
    import ollama

    return ollama.Client(host=BASE, headers={"Authorization": f"Bearer {KEY}"})


@call
def ollama_embed() -> Any:
    return ollama_client().embed(model=MODEL, input=TEXTS).embeddings


@call
def ollama_models() -> Any:
    return [each.model for each in ollama_client().list().models]


@call
def ollama_refused() -> Any:
    return ollama_client().embed(model=NOPE, input=TEXTS)


# Hugging Face, which speaks the form of Text Embeddings Inference


def hugging_face() -> Any:
    from huggingface_hub import InferenceClient

    return InferenceClient(model=f"{BASE}/embed", token=KEY)


@call
def hugging_face_embed() -> Any:
    return hugging_face().feature_extraction(TEXTS).tolist()


@call
def hugging_face_refused() -> Any:
    return hugging_face().feature_extraction("word " * 900)


# LangChain


def langchain_openai(model: str) -> Any:
    from langchain_openai import OpenAIEmbeddings

    return OpenAIEmbeddings(
        model=model, base_url=V1, api_key=KEY, check_embedding_ctx_length=False, max_retries=0
    )


def langchain_chat() -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=CHAT, base_url=V1, api_key=KEY, max_retries=0)


@call
def langchain_openai_embed() -> Any:
    return langchain_openai(MODEL).embed_documents(TEXTS)


@call
def langchain_openai_refused() -> Any:
    return langchain_openai(NOPE).embed_documents(TEXTS)


@call
def langchain_openai_answer() -> Any:
    return langchain_chat().invoke("hello").content


@call
def langchain_openai_picture() -> Any:
    return langchain_chat().invoke(seen()).content


@call
def langchain_openai_answer_refused() -> Any:
    return langchain_chat().bind(temperature=3).invoke("hello")


@call
def langchain_openai_stream() -> Any:
    return "".join(chunk.content for chunk in langchain_chat().stream("hello"))


def langchain_jina(model: str) -> Any:
    from langchain_community.embeddings import jina

    jina.JINA_API_URL = f"{V1}/embeddings"
    return jina.JinaEmbeddings(model_name=model, jina_api_key=KEY)


@call
def langchain_jina_embed() -> Any:
    return langchain_jina(MODEL).embed_documents(TEXTS)


@call
def langchain_jina_pictures() -> Any:
    return langchain_jina(CLIP).embed_images([PICTURE])


@call
def langchain_jina_rerank() -> Any:
    from langchain_community.document_compressors import jina_rerank

    jina_rerank.JINA_API_URL = f"{V1}/rerank"
    answer = jina_rerank.JinaRerank(model=MODEL, jina_api_key=KEY).rerank(TEXTS, QUERY)
    return [[each["index"], each["relevance_score"]] for each in answer]


@call
def langchain_jina_refused() -> Any:
    return langchain_jina(NOPE).embed_documents(TEXTS)


def langchain_cohere(model: str) -> Any:
    from langchain_cohere import CohereEmbeddings

    return CohereEmbeddings(model=model, cohere_api_key=KEY, base_url=BASE, max_retries=0)


@call
def langchain_cohere_embed() -> Any:
    return langchain_cohere(MODEL).embed_documents(TEXTS)


@call
def langchain_cohere_rerank() -> Any:
    from langchain_cohere import CohereRerank

    answer = CohereRerank(model=MODEL, cohere_api_key=KEY, base_url=BASE).rerank(TEXTS, QUERY)
    return [[each["index"], each["relevance_score"]] for each in answer]


@call
def langchain_cohere_refused() -> Any:
    return langchain_cohere(NOPE).embed_documents(TEXTS)


# LlamaIndex


def nodes() -> Any:
    from llama_index.core.schema import NodeWithScore, TextNode

    return [NodeWithScore(node=TextNode(text=text, id_=str(at))) for at, text in enumerate(TEXTS)]


def llama_index_ranked(reranker: Any) -> Any:
    found = reranker.postprocess_nodes(nodes(), query_str=QUERY)
    return [[int(each.node.node_id), each.score] for each in found]


def llama_index_openai(model: str) -> Any:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    return OpenAILikeEmbedding(model_name=model, api_base=V1, api_key=KEY, max_retries=0)


def llama_index_jina(model: str, **fields: Any) -> Any:
    from llama_index.embeddings.jinaai import JinaEmbedding

    embedding = JinaEmbedding(model=model, api_key=KEY, **fields)
    embedding._api.api_url = f"{V1}/embeddings"  # it has no argument for it
    return embedding


@call
def llama_index_openai_embed() -> Any:
    return llama_index_openai(MODEL).get_text_embedding_batch(TEXTS)


@call
def llama_index_openai_refused() -> Any:
    return llama_index_openai(NOPE).get_text_embedding_batch(TEXTS)


@call
def llama_index_jina_embed() -> Any:
    return llama_index_jina(MODEL).get_text_embedding_batch(TEXTS)


@call
def llama_index_jina_bits() -> Any:
    return llama_index_jina(MODEL, encoding_documents="binary").get_text_embedding_batch(TEXTS)


@call
def llama_index_jina_pictures() -> Any:
    return [llama_index_jina(CLIP).get_image_embedding(PICTURE)]


@call
def llama_index_jina_rerank() -> Any:
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    return llama_index_ranked(JinaRerank(model=MODEL, base_url=V1, api_key=KEY, top_n=2))


@call
def llama_index_jina_refused() -> Any:
    return llama_index_jina(NOPE).get_text_embedding_batch(TEXTS)


@call
def llama_index_tei_embed() -> Any:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    return TextEmbeddingsInference(MODEL, base_url=BASE, auth_token=KEY).get_text_embedding_batch(TEXTS)


@call
def llama_index_tei_rerank() -> Any:
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    return llama_index_ranked(TextEmbeddingInference(base_url=BASE, auth_token=f"Bearer {KEY}"))


# Haystack


def haystack(model: str) -> Any:
    from haystack.utils import Secret
    from haystack_integrations.components.embedders.jina import JinaDocumentEmbedder

    return JinaDocumentEmbedder(
        api_key=Secret.from_token(KEY), model=model, base_url=f"{V1}/embeddings", progress_bar=False
    )


def haystack_texts() -> Any:
    from haystack import Document

    return [Document(content=text, id=str(at)) for at, text in enumerate(TEXTS)]


@call
def haystack_embed() -> Any:
    return [each.embedding for each in haystack(MODEL).run(haystack_texts())["documents"]]


@call
def haystack_embed_query() -> Any:
    from haystack.utils import Secret
    from haystack_integrations.components.embedders.jina import JinaTextEmbedder

    embedder = JinaTextEmbedder(api_key=Secret.from_token(KEY), model=MODEL, base_url=f"{V1}/embeddings")
    return [embedder.run(TEXTS[0])["embedding"]]


@call
def haystack_pictures() -> Any:
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.embedders.jina import JinaDocumentImageEmbedder

    embedder = JinaDocumentImageEmbedder(
        api_key=Secret.from_token(KEY), model=CLIP, base_url=f"{V1}/embeddings"
    )
    (document,) = embedder.run([Document(meta={"file_path": PICTURE})])["documents"]
    return [document.embedding]


@call
def haystack_rerank() -> Any:
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.jina import JinaRanker

    ranker = JinaRanker(api_key=Secret.from_token(KEY), model=MODEL, base_url=f"{V1}/rerank")
    found = ranker.run(query=QUERY, documents=haystack_texts())["documents"]
    return [[int(each.id), each.score] for each in found]


@call
def haystack_refused() -> Any:
    return haystack(NOPE).run(haystack_texts())


# Pydantic AI


def pydantic_ai(model: str) -> Any:
    from pydantic_ai import Embedder
    from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
    from pydantic_ai.providers.openai import OpenAIProvider

    return Embedder(OpenAIEmbeddingModel(model, provider=OpenAIProvider(base_url=V1, api_key=KEY)))


@call
async def pydantic_ai_embed() -> Any:
    return [list(each) for each in (await pydantic_ai(MODEL).embed_documents(TEXTS)).embeddings]


@call
async def pydantic_ai_refused() -> Any:
    return await pydantic_ai(NOPE).embed_documents(TEXTS)


if __name__ == "__main__":
    main()
