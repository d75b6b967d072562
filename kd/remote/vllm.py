"""What is asked of every vLLM server before a run counts on it."""

from __future__ import annotations

from typing import Any

from kd.types import UserError

# Words of several languages, digits, spaces and symbols: what tokenizers cut up differently.
PROBE = "How many of the 1234567 naïve “Straßen”\n\n  are in 東京?   x_i := {y} -> 3.14e-5 <b> 😀"


def find_card(url: str, models: dict[str, Any], name: str | None, max_length: int) -> dict:
    """The entry of `/v1/models` under `name` (None: the first). Raises UserError without one."""
    served = models["data"]
    card = next((card for card in served if name in (None, card["id"])), None)
    if card is None:
        known = ", ".join(card["id"] for card in served)
        raise UserError(f"{url} does not serve {name}, but {known}")
    if card["max_model_len"] < max_length:
        raise UserError(
            f"{url} has room for {card['max_model_len']} tokens, the run needs "
            f"{max_length}: start it with --max-model-len {max_length}"
        )
    return card


def check_prompt(url: str, ours: list[int], theirs: list[int] | None) -> None:
    """Refuse a server that reads another prompt than the run's."""
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
