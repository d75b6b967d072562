"""What a server is started with."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, fields

from hydra.core.config_store import ConfigStore

from kd.parallel import ParallelConfig
from kd.teacher import LocalTeacherConfig, TeacherConfig
from kd.types import UserError

MIB = 1 << 20


@dataclass
class ServeConfig:
    """Where it listens, and how much it takes on."""

    host: str = "127.0.0.1"
    """Anything but an address of this machine alone needs a token."""
    port: int = 8100
    """0: a free one."""
    token: str | None = None
    """What clients must send as a bearer token; None: they need not."""
    max_length: int | None = None
    """Tokens of prompt + response; None: what the teacher has positions for, but no more than the
    two limits on tokens below have room for."""
    max_batch_tokens: int = 16384
    """Tokens that one rank reads in one forward, padding included."""
    window_ms: float = 5.0
    """How long a forward waits for more rows; nothing while another is under way."""
    max_waiting_tokens: int = 131072
    """Tokens of all rows that wait for a forward; beyond them, clients are told to come back."""
    max_requests: int = 64
    """Requests under way; the same beyond them."""
    max_request_mib: int = 64
    body_timeout_s: float = 120.0
    """For the whole body of a request to come in."""
    max_rows: int = 64
    """Of a request, as what follows, unless it says otherwise."""
    max_images: int = 64
    max_image_pixels: int = 50_000_000
    """Of one image."""
    max_request_pixels: int = 100_000_000
    """Of all images of a request."""
    max_top_k: int = 1024
    render_threads: int = 4
    """Decode images and render prompts."""

    def validate(self) -> None:
        """Refuse values out of range."""
        for limit in fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, int) and limit.name != "port" and value < 1:
                raise UserError(f"serve.{limit.name}={value}: must be at least 1")
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"serve.port={self.port}: must be 0 (a free one) to 65535")
        if not 0 <= self.window_ms <= 1000:
            raise UserError(f"serve.window_ms={self.window_ms}: must be between 0 and 1000")
        if not self.body_timeout_s > 0:
            raise UserError(f"serve.body_timeout_s={self.body_timeout_s}: must be above 0")
        for name in ("max_batch_tokens", "max_waiting_tokens"):
            if self.max_length is not None and getattr(self, name) < self.max_length:
                raise UserError(
                    f"serve.{name}={getattr(self, name)} has no room for one row of "
                    f"serve.max_length={self.max_length} tokens: raise it, or lower that"
                )
        if self.token == "":
            raise UserError("serve.token is empty: give one, or null for none")
        if self.token is not None and not _fits_a_header(self.token):
            raise UserError("serve.token: printable ASCII characters only, no space at its ends")
        if self.token is None and not _is_loopback(self.host):
            raise UserError(
                f"serve.host={self.host} can be reached from other machines: give serve.token, or "
                "set KD_SERVE_TOKEN"
            )

    def length_for(self, positions: int | None) -> int:
        """The most tokens of prompt + response for a teacher with so many positions (None: any).

        Raises UserError where `max_length` is more than that.
        """
        if self.max_length is None:
            room = min(self.max_batch_tokens, self.max_waiting_tokens)
            return room if positions is None else min(room, positions)
        if positions is not None and self.max_length > positions:
            raise UserError(
                f"serve.max_length={self.max_length}, but the teacher has room for {positions} "
                f"tokens: set serve.max_length={positions} or less, or leave it out"
            )
        return self.max_length


def _fits_a_header(token: str) -> bool:
    return token.isascii() and token.isprintable() and token == token.strip()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass
class ServerConfig:
    """Root of `python -m kd.serve`."""

    serve: ServeConfig = field(default_factory=ServeConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    traceback: bool = False
    """Show a mistake's traceback as well as its plain words."""

    @property
    def model(self) -> LocalTeacherConfig:
        """The teacher to be loaded. Raises UserError where it is none."""
        if not isinstance(self.teacher, LocalTeacherConfig):
            raise UserError("kd.serve serves a model that it loads itself: choose teacher=local")
        return self.teacher

    def validate(self) -> None:
        """Refuse what cannot work, with what to change."""
        self.serve.validate()
        self.model.validate("teacher")
        self.parallel.validate()
        if self.model.offload:
            raise UserError(
                "teacher.offload is for a teacher beside a student: set it to false; "
                "teacher.cpu_offload keeps the weights in host memory here too"
            )


def register() -> None:
    """Tell Hydra the root's schema; those of the groups are kd.config's."""
    ConfigStore.instance().store(name="serve_schema", node=ServerConfig)
