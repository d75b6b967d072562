"""What is settled with the vLLM servers before a run starts, not at its hundredth step."""

from __future__ import annotations

import asyncio
import logging

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from kd.rollout.engine import Policy
from kd.rollout.vllm_servers import Servers
from kd.types import Sample, UserError

log = logging.getLogger("kd")

# Words of several languages, digits, spaces and symbols: what tokenizers cut up differently.
PROBE = "How many of the 1234567 naïve “Straßen”\n\n  are in 東京?   x_i := {y} -> 3.14e-5 <b> 😀"


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
    served = (await servers.waited(lambda: servers.get(url, "/v1/models")))["data"]
    card = next((card for card in served if model in (None, card["id"])), None)
    if card is None:
        known = ", ".join(card["id"] for card in served)
        raise UserError(f"{url} does not serve {model}, but {known}")
    if card["max_model_len"] < policy.max_length:
        raise UserError(
            f"{url} has room for {card['max_model_len']} tokens, the run needs "
            f"{policy.max_length}: start it with --max-model-len {policy.max_length}"
        )
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
    ours = {name: tuple(p.shape) for name, p in policy.vlm.model.named_parameters()}
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


def check_prompt(url: str, ours: list[int], theirs: list[int] | None) -> None:
    """Refuse a server that reads another prompt than the one trained on."""
    if ours == theirs:
        return
    theirs = theirs or []
    same = zip(ours, theirs, strict=False)
    first = next((i for i, (a, b) in enumerate(same) if a != b), min(len(ours), len(theirs)))
    raise UserError(
        f"{url} reads a prompt of {len(theirs)} tokens where the run has {len(ours)}; they differ "
        f"from token {first} on ({theirs[first : first + 3]}, not {ours[first : first + 3]})\n"
        "Serve a folder with the run's own tokenizer, chat template and image processor "
        "(processor.min_pixels and max_pixels are part of it)"
    )
