"""Servers over HTTP, whatever they serve."""

from kd.remote.http import Fault, client, request_bytes, request_json
from kd.remote.messages import data_uri, messages
from kd.remote.pool import Pool

__all__ = ["Fault", "Pool", "client", "data_uri", "messages", "request_bytes", "request_json"]
