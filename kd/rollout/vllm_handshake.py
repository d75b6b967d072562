"""What is settled with the vLLM servers before a run starts, not at its hundredth step."""

from __future__ import annotations

import asyncio
import logging

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from kd.remote import PROBE, check_prompt, find_card
from kd.rollout.engine import Policy
from kd.rollout.vllm_servers import Servers
from kd.types import Sample, UserError

log = logging.getLogger("kd")


async def handshake(servers: Servers, policy: Policy, model: str | None) -> dict[str, str]:
    """The name of the model at every url. Raises UserError at a server of no use for `policy`."""
    names = await asyncio.gather(*(_check(servers, url, policy, model) for url in servers.urls))
    return dict(zip(servers.urls, names, strict=True))


async def _check(servers: Servers, url: str, policy: Policy, model: str | None) -> str:
    try:
        await servers.waited(lambda: servers.get(url, "/weight_info"))
    except UserError as error:
        if "(404)" not in str(error):
            raise
        raise UserError(
            f"{url} has no endpoints that change its weights: start vLLM 0.32 or newer with "
            "VLLM_SERVER_DEV_MODE=1, as scripts/vllm_server.sh does"
        ) from None
    models = await servers.waited(lambda: servers.get(url, "/v1/models"))
    card = find_card(url, models, model, policy.max_length)
    _check_sizes(url, card["root"], policy)
    await _check_tokenizer(servers, url, card["id"], policy)
    return card["id"]


def _check_sizes(url: str, root: str, policy: Policy) -> None:
    """A server with more layers than it is given weights for says nothing, and keeps its own."""
    try:
        config = AutoConfig.from_pretrained(root)
    except (OSError, ValueError):
        log.warning(
            "%s serves %s, which cannot be read here: see to it that it is the student's "
            "architecture",
            url,
            root,
        )
        return
    try:
        with torch.device("meta"):
            theirs = AutoModelForImageTextToText.from_config(config)
    except ValueError:
        raise UserError(f"{url} serves {root}, which is no model that reads images") from None
    served = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    vlm = policy.vlm
    sizes = {n: torch.empty(p.shape, device="meta") for n, p in vlm.model.named_parameters()}
    ours = {name: tuple(size.shape) for name, size in vlm.adapters.merge(sizes).items()}
    names = [name for name in ours | served if ours.get(name) != served.get(name)]
    if names:
        name = names[0]
        raise UserError(
            f"{url} serves {root}, whose weights have other sizes than the run's model: "
            f"{len(names)} differ, first {name}: {served.get(name)}, not {ours.get(name)}"
        )


async def _check_tokenizer(servers: Servers, url: str, name: str, policy: Policy) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
    request = {
        "model": name,
        "messages": messages,
        "add_generation_prompt": True,
        "chat_template_kwargs": policy.chat_template_kwargs,
    }
    reply = await servers.waited(lambda: servers.post(url, "/tokenize", request))
    check_prompt(url, prompt_ids(policy, Sample("probe", messages, [], None)), reply.get("tokens"))


def prompt_ids(policy: Policy, sample: Sample) -> list[int]:
    """The prompt as the policy is trained on it."""
    inputs = policy.prompts([sample])  # a filler row may follow
    return inputs.input_ids_BS[0][inputs.attention_mask_BS[0].bool()].tolist()
