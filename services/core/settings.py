"""The one settings class: ``SF_*`` environment variables over an optional YAML file over defaults."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TextIO

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

PREFIX = "SF_"
CONFIG_VARIABLE = "SF_CONFIG"
"""Names the YAML file; the one variable with the prefix that is not a field."""


def _listed(value: Any) -> Any:
    """Read a list as it is typed in a variable: ``a,b``, or in JSON."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f'not a list, as a,b or ["a", "b"] ({error})') from None
    return [item.strip() for item in value.split(",") if item.strip()]


_READ_LISTS = (NoDecode, BeforeValidator(_listed))
Words = Annotated[tuple[str, ...], *_READ_LISTS]
Networks = Annotated[tuple[IPvAnyNetwork, ...], *_READ_LISTS]


class Tier(BaseModel):
    """Limits of one plan, per key; ``None`` means no such limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrency: int | None = Field(default=None, ge=1, description="Calls in flight at once.")
    unfinished_jobs: int | None = Field(default=None, ge=1, description="Batch jobs that have not ended.")
    unfinished_lines: int | None = Field(
        default=None, ge=1, description="Lines of such jobs that are not done."
    )
    unfinished_webhooks: int | None = Field(
        default=None, ge=1, description="Ends of jobs that are to be told."
    )
    stored_bytes: int | None = Field(
        default=None, ge=1, description="Inputs and outputs of jobs, uploaded files."
    )
    classifiers: int | None = Field(default=None, ge=1, description="In place of SF_MAX_CLASSIFIERS.")


TIERS: Mapping[str, Tier] = {
    "free": Tier(
        requests_per_minute=500,
        tokens_per_minute=1_000_000,
        concurrency=5,
        unfinished_jobs=20,
        unfinished_lines=100_000,
        unfinished_webhooks=40,
        stored_bytes=2 << 30,
    ),
    "tier1": Tier(
        requests_per_minute=500,
        tokens_per_minute=10_000_000,
        concurrency=50,
        unfinished_jobs=200,
        unfinished_lines=1_000_000,
        unfinished_webhooks=400,
        stored_bytes=20 << 30,
    ),
    "tier2": Tier(
        requests_per_minute=5_000,
        tokens_per_minute=100_000_000,
        concurrency=500,
        unfinished_jobs=2_000,
        unfinished_lines=10_000_000,
        unfinished_webhooks=4_000,
        stored_bytes=200 << 30,
    ),
    "unlimited": Tier(),
}


class Settings(BaseSettings):
    """Everything an operator can set. Each field is the variable ``SF_<FIELD>``."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Variables win over what is passed in, since what is passed in came from the YAML file."""
        return env_settings, init_settings

    # Where things live
    data_dir: Path = Field(
        Path("data"), description="Folder for the SQLite file and batch files; made if missing."
    )
    model_dir: Path | None = Field(None, description="Folder holding one sub-folder of weights per model id.")
    disk_reserve_bytes: int | None = Field(
        None,
        ge=0,
        description="Free bytes on the disk of SF_DATA_DIR below which nothing new is stored; a twentieth of "
        "the disk, at most 1 GiB, when unset.",
    )
    database_url: SecretStr | None = Field(
        None, description="postgresql:// or sqlite:/// URL; SQLite in SF_DATA_DIR when unset."
    )
    database_timeout_seconds: float = Field(
        5.0, gt=0, description="Longest wait for a database connection, lock or statement."
    )
    redis_url: SecretStr | None = Field(None, description="Redis URL for limits shared by several processes.")
    redis_timeout_seconds: float = Field(
        0.25, gt=0, description="Longest wait for Redis before limits are kept in process."
    )

    # Addresses
    host: str = Field("127.0.0.1", description="Address the gRPC server and the gateway listen on.")
    grpc_port: int = Field(
        50051,
        ge=0,
        le=65535,
        description="Port of the gRPC server; 0 takes a free one. `up` takes the next free one for each of "
        "these ports that is taken and not set.",
    )
    http_port: int = Field(8080, ge=0, le=65535, description="Port of the gateway's REST listener.")
    metrics_port: int = Field(9090, ge=0, le=65535, description="Port of /metrics; 0 takes a free one.")
    admin_port: int = Field(
        9901, ge=0, le=65535, description="Loopback port of Envoy's admin pages and statistics."
    )
    gateway_file: Path | None = Field(
        None,
        description="YAML file of the gateway's own settings (pools, TLS, CORS); see docs/gateway.md.",
    )

    # Models
    models: Words = Field(
        ("all-MiniLM-L6-v2",), min_length=1, description="Model ids this process serves, as `a,b`."
    )
    catalog_file: Path | None = Field(
        None, description="YAML file of your own catalogue entries and aliases; see docs/models.md."
    )
    model_aliases: Mapping[str, str] = Field(
        {}, description='JSON object: further name -> model id, as {"my-embedder": "all-MiniLM-L6-v2"}.'
    )
    default_model: str | None = Field(
        None,
        description="Model of calls that cannot name one (those of Text Embeddings Inference); the first of "
        "SF_MODELS that can answer when unset, and where this one cannot.",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bf16 on CUDA and on CPUs with avx512_bf16 or AMX, else fp32."
    )
    cpu_instructions: str = Field(
        "auto",
        description="What networks are computed with on a CPU: auto is the best set that it has of amx, "
        "avx512_bf16, avx512, avx2, neon, portable; torch leaves the compiled kernels out.",
    )
    model_residency: Literal["eager", "lazy"] = Field(
        "eager",
        description="eager loads all models at the start; lazy loads each when it is called, and unloads "
        "what was used least recently when SF_DEVICE_MEMORY_BYTES would be passed.",
    )
    device_memory_bytes: int | None = Field(
        None,
        ge=1,
        description="Memory of the device for the weights of all models of a process; nine tenths of what is "
        "free at the start when unset, with SF_WORKERS at most an equal part of all for each.",
    )
    model_idle_seconds: float | None = Field(
        None, gt=0, description="With lazy: an unused model is unloaded after this time; never when unset."
    )

    # Scheduling
    max_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Token budget of one forward pass; on CUDA found for each model unless given.",
    )
    max_queue_tokens: int = Field(1_000_000, ge=1, description="Queued tokens above which calls get 503.")

    # Chat
    chat_cache_bytes: int = Field(
        4 << 30,
        ge=1,
        description="Memory of the device for the keys and values of conversations, for each model that "
        "answers, beside its weights; it bounds how many are answered at a time and how long they are.",
    )
    chat_answer_tokens: int = Field(
        256, ge=1, description="Longest answer of a chat request that does not say it, in tokens."
    )
    chat_max_answer_tokens: int = Field(
        8192, ge=1, description="Longest answer that a chat request may ask for, in tokens."
    )
    chat_timeout_seconds: float = Field(
        240.0, gt=0, description="Longest time for a whole answer, of calls without a deadline of their own."
    )
    chat_heartbeat_seconds: float = Field(
        10.0, gt=0, description="After this time without a token a streamed answer sends a comment."
    )

    sparse_top_k: int | None = Field(
        None, ge=1, description="Entries of a sparse vector (ELSER) to answer, the largest; all when unset."
    )
    sparse_threshold: float = Field(
        0.0, ge=0, description="Weights of a sparse vector up to this are left out."
    )

    # Requests
    max_items: int = Field(2048, ge=1, description="Items per embedding request.")
    max_classify_items: int = Field(512, ge=1, description="Items per classify or train request.")
    max_classifiers: int = Field(16, ge=1, description="Classifiers per API key.")
    max_classifier_labels: int = Field(16, ge=2, description="Labels of one classifier.")
    label_cache_bytes: int = Field(
        64 << 20, ge=0, description="Memory for the vectors of labels already seen; 0 keeps none."
    )
    max_documents: int = Field(2048, ge=1, description="Documents per rerank request.")
    rerank_objects: bool = Field(
        False, description='true answers every reranked string as {"text": ...}, which some clients need.'
    )
    max_body_bytes: int = Field(64 << 20, ge=1, description="Largest request body in bytes.")
    max_text_body_bytes: int = Field(
        16 << 20,
        ge=1,
        description="Largest body of a call that carries texts only: all but batch jobs, unless a model of "
        "the process takes more than texts.",
    )
    max_body_values: int = Field(
        262_144, ge=1, description="JSON values of one request; of a typed message a quarter as many fields."
    )
    max_bodies_bytes: int = Field(
        256 << 20,
        ge=1,
        description="Bytes of all request bodies that a process works on at a time; beyond, calls get 503.",
    )
    request_timeout_seconds: float = Field(60.0, gt=0, description="Deadline of a call without its own.")
    stream_window: int = Field(
        64, ge=1, description="Messages of one EmbedStream worked on at a time; beyond, it is not read."
    )
    max_concurrent_calls: int = Field(4096, ge=1, description="Calls in flight above which a call gets 503.")

    # Batch
    object_store: str | None = Field(
        None,
        description="s3://bucket/prefix or gs://bucket/prefix for batch files; in SF_DATA_DIR when unset. "
        "Credentials come from the cloud's own variables.",
    )
    batch_models: Annotated[tuple[str, ...] | None, *_READ_LISTS] = Field(
        None,
        min_length=1,
        description="Those of SF_MODELS that batch jobs may name, aliases included; all that can when unset.",
    )
    batch_chunk_tokens: int = Field(
        16_384, ge=1, description="About how much of a batch job is embedded, stored and charged at a time."
    )
    batch_concurrency: int = Field(3, ge=1, description="Such parts that a process works on at once.")
    batch_expire_seconds: float = Field(
        86_400.0, gt=0, description="From making a batch job to deleting its files."
    )
    batch_input_buckets: Words = Field(
        (),
        description="s3:// and gs:// URLs below which batch jobs may read their input, as "
        "`s3://inputs,gs://more`.",
    )
    batch_max_input_bytes: int = Field(
        1 << 30, ge=1, description="Largest input file of a batch job, packed or unpacked."
    )
    batch_heartbeat_seconds: float = Field(
        5.0, gt=0, description="A batch worker that misses six beats is taken for dead; others go on."
    )
    worker_id: str | None = Field(
        None, description="Name of this batch worker, the same after a restart; the host's name when unset."
    )
    public_url: str | None = Field(
        None,
        description="Where callers reach the gateway, for the URLs in answers; as they called it when unset.",
    )

    # Pictures and PDFs
    media_max_bytes: int = Field(8 << 20, ge=1, description="Largest picture or PDF of a request, in bytes.")
    media_max_film_bytes: int = Field(
        32 << 20, ge=1, description="Largest sound or film of a request, in bytes."
    )
    media_max_seconds: float = Field(600.0, gt=0, description="Longest sound or film, in seconds.")
    media_max_frames: int = Field(20_000, ge=1, description="Most frames of a film.")
    media_max_pixels: int = Field(64_000_000, ge=1, description="Most pixels of a picture or of one frame.")
    media_max_pages: int = Field(64, ge=1, description="Most pages of a PDF.")
    media_upright: bool = Field(
        False,
        description="true turns photographs and films as they say they stand; their vectors then differ from "
        "the hosted service's, which takes pixels as they are stored.",
    )
    media_fetch_seconds: float = Field(20.0, gt=0, description="Longest time to fetch one file.")
    media_bytes_in_flight: int = Field(
        384 << 20,
        ge=1,
        description="Bytes of callers' files, encoded and decoded, that all calls of a process hold "
        "together, from before they come to the end of the passes that read them; beyond, calls wait for "
        "each other.",
    )
    media_decoders: int | None = Field(
        None,
        ge=1,
        description="Processes that decode, started with the first file; one for each core, at most 8, "
        "when unset.",
    )
    media_decoder_memory_bytes: int = Field(
        1 << 30,
        ge=1 << 28,
        description="Address space of such a process; a file that needs more is refused.",
    )
    media_decoder_seconds: float = Field(
        10.0, gt=0, description="CPU time that decoding one picture, PDF or sound may take."
    )
    media_film_decoder_seconds: float = Field(
        60.0, gt=0, description="CPU time that decoding one film may take."
    )

    # Outgoing requests
    fetch_allow_networks: Networks = Field(
        (),
        description="Networks, as `10.1.0.0/16`, that URLs given by callers may lead to though not public.",
    )
    fetch_timeout_seconds: float = Field(
        300.0, gt=0, description="Longest time to fetch all of a URL that a caller gave."
    )
    webhook_secret: SecretStr | None = Field(
        None,
        description="Signs webhooks: `whsec_` and base64, or a word; two, with a space between, while "
        "receivers change over. When unset, one is made and kept in the database: "
        "`search-foundation webhooks secret` prints it.",
    )

    # Process
    workers: int = Field(1, ge=1, description="Processes sharing the gRPC port, each with its own models.")
    cores: int | None = Field(
        None,
        ge=1,
        description="CPU cores to compute on, all workers together; all that the process may run on when "
        "unset. A container without a CPU limit sees every core of its host.",
    )
    grace_seconds: float = Field(30.0, gt=0, description="SIGTERM to exit, at most; calls in flight finish.")
    drain_seconds: float = Field(
        3.0,
        ge=0,
        description="Part of the grace in which health says NOT_SERVING and calls are still taken.",
    )
    ports_file: Path | None = Field(None, description="JSON file the bound ports are written to when ready.")

    # TLS of the gRPC server
    tls_cert: Path | None = Field(None, description="PEM certificate chain; TLS is on when set.")
    tls_key: Path | None = Field(None, description="PEM key of SF_TLS_CERT.")
    tls_client_ca: Path | None = Field(None, description="PEM CA that callers' certificates must come from.")

    # Access
    auth: bool = Field(True, description="false runs without API keys.")
    keys_file: Path | None = Field(
        None, description="YAML file of hashed keys; then the only source unless SF_DATABASE_URL is set."
    )
    key_cache_seconds: float = Field(
        5.0, gt=0, description="Longest time until a revoked or changed key is noticed."
    )
    tiers: Mapping[str, Tier] = Field(TIERS, description="Plans by name, added to the built-in ones.")
    default_tier: str = Field("unlimited", description="Tier of keys made without one and of keyless calls.")
    ip_requests_per_minute: int | None = Field(None, ge=1, description="Request limit per client address.")
    trusted_proxies: Networks = Field(
        (),
        description="Networks, as `10.1.0.0/16`, of the gateways in front: only their word for a caller's "
        "address is believed. `up` adds this machine.",
    )
    reflection: bool = Field(
        True, description="false hides the contract: gRPC reflection needs no key and answers everybody."
    )

    # Seeing
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="auto writes short lines on a terminal, and JSON elsewhere."
    )
    access_log: bool = Field(True, description="One log line per call.")
    otlp_endpoint: str | None = Field(None, description="OTLP/gRPC endpoint for traces; none when unset.")

    def logs_text(self, stream: TextIO) -> bool:
        """Whether what is logged to ``stream`` is for a reader: short lines, no JSON."""
        return self.log_format == "text" or (self.log_format == "auto" and stream.isatty())

    @field_validator("tiers")
    @classmethod
    def _keep_builtin_tiers(cls, tiers: Mapping[str, Tier]) -> Mapping[str, Tier]:
        return {**TIERS, **tiers}

    @model_validator(mode="after")
    def _default_tier_exists(self) -> Self:
        if self.default_tier not in self.tiers:
            raise ValueError(
                f"default_tier '{self.default_tier}' is not one of the tiers {sorted(self.tiers)}"
            )
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("SF_TLS_CERT and SF_TLS_KEY go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("SF_TLS_CLIENT_CA needs SF_TLS_CERT")
        return self


class ConfigurationError(Exception):
    """The settings do not hold; the message is a sentence for the operator."""


def load_settings(config: Path | None = None) -> Settings:
    """Read the YAML file ``config`` (or the one ``SF_CONFIG`` names), then ``SF_*`` over it.

    Raises ConfigurationError for a variable, key or value that is not a setting's.
    """
    if config is None and (named := os.environ.get(CONFIG_VARIABLE)):
        config = Path(named)
    _refuse_unknown({name for name in os.environ if name.startswith(PREFIX)} - {CONFIG_VARIABLE})
    values = _read_yaml(config) if config else {}
    try:
        return Settings(**values)
    except SettingsError as error:
        raise ConfigurationError(_not_read(error)) from error
    except ValidationError as error:
        raise ConfigurationError(_sentence(error)) from error


def _refuse_unknown(variables: set[str]) -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(variables):
        if name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigurationError(f"Unknown setting {name}.{hint}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"Cannot read the settings file {path}: {error}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigurationError(f"The settings file {path} must hold a mapping of names to values.")
    return {str(name): value for name, value in values.items()}


def _not_read(error: SettingsError) -> str:
    """Word that a variable is no JSON; pydantic tells its field by a sentence alone, and never the value."""
    named = re.search(r'field "(\w+)"', str(error))
    variable = PREFIX + named[1].upper() if named else "a variable"
    return f"Wrong settings: {variable}: not a JSON object ({error.__cause__})."


def _sentence(error: ValidationError) -> str:
    problems: list[str] = []
    for item in error.errors(include_url=False, include_context=False):
        if not item["loc"]:
            problems.append(item["msg"].removeprefix("Value error, "))
            continue
        field, *inside = (str(part) for part in item["loc"])
        name = ".".join([PREFIX + field.upper(), *inside])
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown setting '{field}'")
        else:
            # The value may be a secret: only the rule it breaks is told.
            problems.append(f"{name}: {item['msg'].removeprefix('Value error, ')}")
    return f"Wrong settings: {'; '.join(problems)}."
