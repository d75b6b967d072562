from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Conversations with no, one or two images: neighbours differ, so ranks do, too."""
    lines = []
    for i in range(24):
        count = (0, 1, 0, 2)[i % 4]
        names = [f"{i}_{k}.png" for k in range(count)]
        for k, name in enumerate(names):
            Image.new("RGB", (64 + 32 * k, 64), (10 * i, 5 * i, 90 * k)).save(tmp_path / name)
        parts = [{"type": "image", "path": name} for name in names]
        ask = {"type": "text", "text": f"How many pictures are in row {i}?"}
        messages = [
            {"role": "user", "content": [*parts, ask]},
            {"role": "assistant", "content": f"There are {count} of them" + " indeed" * (i % 3)},
        ]
        lines.append(json.dumps({"messages": messages}))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path
