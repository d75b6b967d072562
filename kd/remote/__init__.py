"""Servers over HTTP, whatever they serve."""

from kd.remote.background import Background
from kd.remote.http import Fault, client, request_bytes, request_json
from kd.remote.messages import data_uri, messages
from kd.remote.pool import Pool

__all__ = [
    "Background",
    "Fault",
    "Pool",
    "client",
    "data_uri",
    "messages",
    "request_bytes",
    "request_json",
]
