"""The one settings class: ``SF_*`` environment variables over an optional YAML file over defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Everything an operator can set. Each field is the variable ``SF_<FIELD>``."""

    model_config = SettingsConfigDict(env_prefix="SF_", extra="forbid", frozen=True)

    # Where things live
    data_dir: Path = Field(
        Path("data"), description="Folder for the SQLite file and batch files; made if missing."
    )
    model_dir: Path | None = Field(None, description="Folder holding one sub-folder of weights per model id.")
    database_url: str | None = Field(None, description="SQLAlchemy URL; SQLite in SF_DATA_DIR when unset.")
    redis_url: SecretStr | None = Field(None, description="Redis URL for limits shared by several processes.")

    # Addresses
    host: str = Field("127.0.0.1", description="Address the gRPC server and the gateway listen on.")
    grpc_port: int = Field(50051, ge=0, le=65535, description="Port of the gRPC server; 0 takes a free one.")
    http_port: int = Field(8080, ge=0, le=65535, description="Port of the gateway's REST listener.")
    metrics_port: int = Field(9090, ge=0, le=65535, description="Port of /metrics; 0 takes a free one.")

    # Models
    models: tuple[str, ...] = Field(("all-MiniLM-L6-v2",), description="Model ids this process serves.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bf16 on CUDA and on CPUs with avx512_bf16 or AMX, else fp32."
    )

    # Scheduling
    max_batch_tokens: int = Field(16384, ge=1, description="Token budget of one forward pass.")
    max_queue_tokens: int = Field(1_000_000, ge=1, description="Queued tokens above which calls get 503.")

    # Requests
    max_items: int = Field(2048, ge=1, description="Items per embedding request.")
    max_body_bytes: int = Field(64 << 20, ge=1, description="Largest request body in bytes.")
    request_timeout_seconds: float = Field(60.0, gt=0, description="Deadline of a call without its own.")
    grace_seconds: float = Field(30.0, gt=0, description="Time to finish calls after SIGTERM.")

    # Access
    auth: bool = Field(True, description="false runs without API keys.")

    # Seeing
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    otlp_endpoint: str | None = Field(None, description="OTLP/gRPC endpoint for traces; none when unset.")
