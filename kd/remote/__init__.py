"""Servers over HTTP, whatever they serve."""

from kd.remote.background import Background
from kd.remote.http import Fault, client, request_bytes, request_json
from kd.remote.messages import data_uri, messages
from kd.remote.pool import Pool
from kd.remote.vllm import PROBE, check_prompt, find_card

__all__ = [
    "PROBE",
    "Background",
    "Fault",
    "Pool",
    "check_prompt",
    "client",
    "data_uri",
    "find_card",
    "messages",
    "request_bytes",
    "request_json",
]
