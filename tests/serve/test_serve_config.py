"""What a server is started with."""

from __future__ import annotations

import shlex
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import kd.serve.__main__ as front
from kd.config import register as register_groups
from kd.config import typed_object
from kd.launch import config_dir
from kd.serve.config import ServerConfig, register
from kd.types import UserError


def composed(overrides: str) -> ServerConfig:
    """As the front door does it."""
    register_groups()
    register()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        typed = typed_object(compose("serve", overrides=shlex.split(overrides)))
    assert isinstance(typed, ServerConfig)
    typed.validate()
    return typed


def test_a_folder_is_enough():
    config = composed("teacher.name=folder")
    assert config.model.name == "folder"
    assert (config.serve.host, config.serve.token) == ("127.0.0.1", None)
    assert config.parallel.compute_dtype == config.model.dtype == "bfloat16"


def test_the_token_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("KD_SERVE_TOKEN", "from outside")
    assert composed("teacher.name=folder").serve.token == "from outside"
    assert composed("teacher.name=folder serve.token=other").serve.token == "other"
    assert composed("teacher.name=folder serve.host=0.0.0.0").serve.host == "0.0.0.0"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_no_token(host):
    assert composed(f"teacher.name=folder serve.host={host}").serve.host == host


MISTAKES = {
    "": "teacher.name has no value",
    "teacher.name=f serve.host=0.0.0.0": "give serve.token",
    "teacher.name=f serve.host=::": "give serve.token",
    "teacher.name=f serve.host=node7": "give serve.token",
    "teacher.name=f 'serve.token=\"\"'": "serve.token is empty",
    "teacher.name=f 'serve.token=\"süß\"'": "printable ASCII",
    "teacher.name=f 'serve.token=\" a\"'": "printable ASCII",
    "teacher.name=f serve.port=65536": "serve.port=65536",
    "teacher.name=f serve.max_rows=0": "serve.max_rows=0: must be at least 1",
    "teacher.name=f serve.render_threads=0": "serve.render_threads=0",
    "teacher.name=f serve.body_timeout_s=0": "serve.body_timeout_s=0",
    "teacher.name=f serve.window_ms=-1": "serve.window_ms=-1",
    "teacher.name=f serve.max_length=0": "serve.max_length=0: must be at least 1",
    "teacher.name=f serve.max_length=16385": "serve.max_batch_tokens=16384 has no room",
    "teacher.name=f serve.max_length=10 serve.max_waiting_tokens=9": (
        "serve.max_waiting_tokens=9 has no room"
    ),
    "teacher.name=f teacher.offload=true": "teacher.offload",
    "teacher.name=f teacher.dtype=int8": "teacher.dtype=int8",
    "teacher.name=f parallel.nproc=0": "parallel.nproc=0",
    "teacher=none": "choose teacher=local",
}


@pytest.mark.parametrize(("overrides", "said"), MISTAKES.items())
def test_mistakes(overrides, said):
    with pytest.raises(UserError) as mistake:
        composed(overrides)
    assert said in str(mistake.value)


def test_the_most_tokens_of_a_row():
    serve = composed("teacher.name=f").serve
    assert [serve.length_for(n) for n in (512, 10**6, None)] == [512, 16384, 16384]
    serve = composed("teacher.name=f serve.max_waiting_tokens=99").serve
    assert serve.length_for(512) == 99
    serve = composed("teacher.name=f serve.max_length=600").serve
    assert serve.length_for(None) == serve.length_for(600) == 600
    with pytest.raises(UserError, match=r"room for 599 tokens: set serve\.max_length=599"):
        serve.length_for(599)


def test_a_package_that_is_missing_is_named(monkeypatch):
    front.check_extra()
    monkeypatch.setattr(front, "EXTRA", ("fastapi", "no-such-package"))
    with pytest.raises(UserError, match=r'no-such-package: pip install "kd-vlm\[serve\]"'):
        front.check_extra()


def test_traceback_on_request(monkeypatch):
    arguments = ["teacher.name=f", "serve.port=65536", "traceback=true"]
    monkeypatch.setattr(sys, "argv", ["kd.serve", *arguments])
    GlobalHydra.instance().clear()
    with pytest.raises(UserError, match=r"serve\.port=65536"):
        front.main()
