"""The gRPC server: lifecycle, call pipeline, errors, health, metrics, logs, traces, REST codec."""

from services.core.serving.doors import Access, Admission, Capability, Engine, Principal
from services.core.serving.failure import rpc_status
from services.core.serving.ports import PortInUseError
from services.core.serving.server import Server, StopReason

__all__ = [
    "Access",
    "Admission",
    "Capability",
    "Engine",
    "PortInUseError",
    "Principal",
    "Server",
    "StopReason",
    "rpc_status",
]
