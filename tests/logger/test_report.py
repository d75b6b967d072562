from __future__ import annotations

import math
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from kd.logger.charts import line_chart
from kd.logger.jsonl import JsonlLogger
from kd.logger.report import main, write_report
from kd.types import UserError

EVIL = '</pre><script>alert("x")</script>&amp;<img src=https://example.com/x onerror=alert(1)>'
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, texts by class or element, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.content: list[str] = []
        """Of each element in `elements`: the text directly within it, as it stands."""
        self._at: list[int] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.content.append("")
        if tag not in VOID:
            self.open.append(tag)
            self._at.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.content.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self._at.pop()

    def handle_data(self, data):
        if self._at:
            self.content[self._at[-1]] += data
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def of(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]

    def of_class(self, name: str) -> list[tuple[str, dict[str, str | None]]]:
        """(text, attributes) of the elements of a class."""
        return [
            (text, attributes)
            for text, (_, attributes) in zip(self.content, self.elements, strict=True)
            if name in (attributes.get("class") or "").split()
        ]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    assert not list(run_dir.glob(".*"))
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def run_dir(tmp_path, record) -> Path:
    """A finished run of 6 steps, its name, settings and answers as hostile as they can be."""
    path = tmp_path / "a <b> run"
    logger = JsonlLogger(path, 192)
    logger.start({}, 6, 0)
    for step in range(1, 7):
        loss = math.nan if step == 4 else 2 / step
        train = {"train/loss": loss, "train/ce": 1.0, "train/kd": 3.0, "train/grad_norm": 0.5}
        logger.log(step, train | {"train/lr": 1e-4, "train/tokens_per_s": 23456.0})
    for step, accuracy in ((3, 0.75), (6, 0.5)):
        val = {"val/loss": 1.5, "val/accuracy": accuracy, "val/accuracy_<i>$x": 0.25}
        logger.log(step, val)
        two = [Image.new("RGB", (30, 20)), Image.new("RGB", (20, 30))]
        wrong = record(id=f"wrong-{step}", question=EVIL, student=EVIL, kind=EVIL, images=two)
        logger.samples(step, [wrong, record(id="right", correct=True, teacher=None)])
    (path / "config.yaml").write_text(f"kd_ratio: 0.5\nnote: '{EVIL}'\n")
    (path / "overrides.yaml").write_text("- kd_ratio=0.5\n")
    (path / "status.json").write_text('{"status": "finished", "step": 6, "wall_s": 3725.4}')
    return path


def test_head_says_what_run_and_how_far(run_dir):
    page = report(run_dir)
    assert page.of("h1") == ["a <b> run"] == page.of("title")
    assert "finished" in page.of("span") and "step 6 · 1:02:05" in page.of("span")


def test_a_chart_for_everything_recorded(run_dir):
    page = report(run_dir)
    assert [a["aria-label"] for a in page.attributes("svg")] == page.of("h3")
    assert page.of("h3") == [
        *("Training loss", "Validation loss", "Validation accuracy"),
        *("Gradient norm", "Learning rate", "Tokens per second"),
    ]
    assert page.of("li") == [
        *("train/loss", "train/ce", "train/kd", "val/loss", "val/accuracy", "val/accuracy_<i>$x"),
        *("train/grad_norm", "train/lr", "train/tokens_per_s"),
    ]


def test_table_has_last_and_best(run_dir):
    cells = report(run_dir).of("td")
    at = cells.index("val/accuracy")
    assert cells[at : at + 5] == ["val/accuracy", "0.5", "6", "0.75", "3"]
    at = cells.index("train/loss")
    assert cells[at : at + 5] == ["train/loss", "0.33333", "6", "0.33333", "6"]
    at = cells.index("train/tokens_per_s")
    assert cells[at : at + 4] == ["train/tokens_per_s", "23,456", "6", "val/accuracy"]


def test_values_that_are_not_finite_are_named(run_dir):
    assert "train/loss: 1 of them, first at step 4, last at step 4" in report(run_dir).of("div")


def test_gallery_shows_the_last_validation(run_dir):
    page = report(run_dir)
    assert "1 of these 2 are right, at step 6." in page.of("p")
    assert len(page.attributes("article")) == 2
    assert [a["class"] for a in page.attributes("article")] == [
        "card sample wrong",
        "card sample right",
    ]
    assert "✗ wrong" in page.of("span") and "✓ right" in page.of("span")
    assert page.of("dt") == [*("question", "reference", "student", "teacher"), *page.of("dt")[:3]]
    assert page.of("dd") == [EVIL, "three", EVIL, "three", "How many?", "three", "four"]
    assert len(page.attributes("img")) == 3


@pytest.fixture
def on_policy(run_dir, rollout) -> Path:
    """The same run, with rollouts of steps that no validation has."""
    logger = JsonlLogger(run_dir, 192)
    names = ("length_mean", "truncated", "eos", "repetition", "staleness", "tokens_per_s")
    for step in (4, 5):
        logger.log(step, {f"rollout/{name}": 0.5 for name in names})
        evil = rollout(
            **dict.fromkeys(("id", "kind", "question", "answer", "policy"), EVIL),
            tokens=["<script>", EVIL, " ", "\n", ""],
            divergence=[0.0, 1.0, math.nan, 99.0, 0.5],
            finished=True,
        )
        logger.rollouts(step, [rollout(id=f"step-{step}"), evil])
    return run_dir


def test_no_rollouts_no_section(run_dir):
    assert "Rollouts" not in report(run_dir).of("h2")


def test_rollouts_do_not_displace_the_validation(on_policy):
    page = report(on_policy)
    assert page.of("h2")[-3:] == ["Validation samples", "Rollouts", "Settings"]
    assert "1 of these 2 are right, at step 6." in page.of("p")
    assert any(text.startswith("2 of the responses that step 5") for text in page.of("p"))
    assert "step-5 · count" in page.of("span") and "step-4 · count" not in page.of("span")


def test_response_is_shown_token_by_token_with_its_numbers(on_policy, rollout):
    JsonlLogger(on_policy, 192).rollouts(7, [rollout()])
    page = report(on_policy)
    response, named = page.of_class("token")[:4], page.of_class("token")[4:]
    assert [text for text, _ in response] == ["There", " are", "↵\n", " four"]
    titles = ["token 1: 0.5 nats", "token 2: 0 nats", "token 3: 0.25 nats", "token 4: 2 nats"]
    assert [attributes["title"] for _, attributes in response] == titles
    # The 99th percentile of 0, 0.25, 0.5, 2 is 1.955.
    styles = ["--share: 0.256", "--share: 0.000", "--share: 0.128", "--share: 1.000"]
    assert [attributes["style"] for _, attributes in response] == styles
    assert [text for text, _ in named] == ["␣four", "There", "↵"]
    assert "4 tokens, mean 0.688 nats" in page.of("dd")
    assert re.match(r"1\.9[56] nats and above: the 99th percentile of the", page.of("p")[-1])


def test_rollout_says_who_responded_whether_it_was_cut_and_how_stale(tmp_path, rollout):
    rows = [
        rollout(staleness=1),
        rollout(policy="dataset", finished=True, staleness=0, tokens=[], divergence=[]),
    ]
    JsonlLogger(tmp_path, 192).rollouts(1, rows)
    page = report(tmp_path)
    assert [text for text, _ in page.of_class("chip")] == ["cut", "student", "dataset"]
    assert page.of("dd")[-3:] == ["1 step", "How many?", "three"]
    assert page.of("span")[-1] == "no token"
    terms = ["prompt", "reference", "response", "divergence", "highest", "staleness"]
    assert page.of("dt") == [*terms, "prompt", "reference", "response"]


def test_tokens_are_escaped(on_policy):
    page = report(on_policy)
    texts = [text for text, _ in page.of_class("token")][7:12]
    assert texts == ["<script>", EVIL, " ", "↵\n", "∅"]
    test_nothing_is_injected_or_fetched(on_policy)


def test_divergence_that_is_not_finite_is_outlined_and_counted(on_policy):
    page = report(on_policy)
    marked = page.of_class("nonfinite")
    assert [(text, attributes["title"]) for text, attributes in marked] == [
        (" ", "token 3: nan"),
        ("␣", "token 3: nan"),
    ]
    assert not any("style" in attributes for _, attributes in marked)
    assert "5 tokens, mean 25.1 nats, 1 not finite and left out" in page.of("dd")


def test_charts_of_rollouts(on_policy):
    page = report(on_policy)
    assert page.of("h3")[6:] == [
        *("Rollout length", "Rollouts: truncated, ended, repetition"),
        *("Staleness", "Rollout tokens per second"),
    ]
    shares = re.findall(r"<svg.*?</svg>", write_report(on_policy).read_text(), flags=re.DOTALL)[7]
    assert Page(shares).of("text")[-5:] == ["0.00", "0.25", "0.50", "0.75", "1.00"]


def test_heat_has_a_colour_in_light_and_in_dark(on_policy):
    html = write_report(on_policy).read_text()
    light, dark = re.findall(r"--heat: (\d+ \d+ \d+);", html)
    inks = re.findall(r"--ink: #(\w{6})", html)
    for ink, heat in zip(inks, (light, dark), strict=True):
        ink_rgb = tuple(bytes.fromhex(ink))
        assert contrast(ink_rgb, tuple(int(x) for x in heat.split())) >= 4.5  # WCAG AA


def contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """The contrast ratio of two sRGB colours, 1 to 21 (WCAG 2.2)."""

    def luminance(rgb: tuple[int, ...]) -> float:
        parts = [x / 255 for x in rgb]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_settings_are_shown_verbatim(run_dir):
    assert report(run_dir).of("pre") == ["- kd_ratio=0.5", f"kd_ratio: 0.5\nnote: '{EVIL}'"]


def test_nothing_is_injected_or_fetched(run_dir):
    page = report(run_dir)
    names = {name for name, _ in page.elements}
    assert not names & {"script", "iframe", "link", "object", "embed", "base", "b", "i$x"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    styles = [a.get("style") or "" for _, a in page.elements] + page.of("style")
    urls = re.findall(r"url\(([^)]*)\)|@import", " ".join(styles))
    assert all(url.startswith("#") for url in urls)
    policy = next(a for a in page.attributes("meta") if "http-equiv" in a)
    assert (policy["content"] or "").startswith("default-src 'none'; img-src data:;")


def test_image_from_elsewhere_is_left_out(run_dir):
    path = run_dir / "samples.jsonl"
    path.write_text(path.read_text().replace("data:image/png;base64,", "https://example.com/"))
    assert report(run_dir).attributes("img") == []


def test_ids_are_unique_and_references_resolve(run_dir):
    page = report(run_dir)
    ids = Counter(a["id"] for _, a in page.elements if "id" in a)
    assert set(ids.values()) == {1}
    used = {(a.get("xlink:href") or "#")[1:] for _, a in page.elements} - {""}
    assert used and used <= set(ids)


def test_colours_follow_the_page(run_dir):
    html = write_report(run_dir).read_text()
    assert "prefers-color-scheme: dark" in html
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    colours = set(re.findall(r"(?:stroke|fill): ([^;\"]+)", drawings))
    assert {"var(--series-0)", "var(--series-1)", "var(--muted)", "var(--line)"} <= colours
    assert all(colour == "none" or colour.startswith("var(") for colour in colours)
    for name in {c[4:-1] for c in colours if c.startswith("var(")}:
        assert html.count(f"{name}: #") == 2, name  # light and dark


def test_empty_run(tmp_path):
    page = report(tmp_path)
    assert page.of("p") == ["No metrics recorded yet.", "No validation samples recorded yet."]
    assert page.attributes("svg") == [] and page.of("h1") == [tmp_path.name]


def test_half_written_run(run_dir, caplog):
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = run_dir / name
        path.write_bytes(path.read_bytes()[:-20])
    (run_dir / "status.json").write_text("{")
    (run_dir / "config.yaml").write_bytes(b"a: \xff")
    page = report(run_dir)
    assert len(page.attributes("article")) == 1
    assert "finished" not in page.of("span")
    assert page.of("pre")[1] == "a: �"
    assert "status.json is broken" in caplog.text


def test_only_values_that_are_not_finite(tmp_path):
    logger = JsonlLogger(tmp_path, 192)
    logger.start({}, 6, 0)
    logger.log(1, {"train/loss": math.nan, "val/loss": math.inf})
    page = report(tmp_path)
    assert page.of("h3") == ["Training loss", "Validation loss"]
    assert page.of("td") == ["train/loss", "nan", "1", "val/loss", "inf", "1"]


def test_metrics_that_some_steps_lack(tmp_path):
    logger = JsonlLogger(tmp_path, image_px=32)
    logger.start({}, 3, 0)
    logger.log(1, {"train/loss": 3.0, "train/loss_mine": 4.0})
    logger.log(2, {"train/loss": 2.0, "train/loss_digits": 1.0})
    logger.log(3, {"train/loss": 1.0})
    page = report(tmp_path)
    assert page.of("h3") == ["Training loss", "Training loss by data set"]
    assert page.of("li") == ["train/loss", "train/loss_digits", "train/loss_mine"]


def test_report_is_replaced_whole(run_dir):
    before = write_report(run_dir).stat().st_ino
    with (run_dir / "report.html").open() as reader:
        write_report(run_dir)
        assert reader.read().rstrip().endswith("</html>")
    assert (run_dir / "report.html").stat().st_ino != before


def test_shares_are_drawn_from_0_to_1():
    flat = {"val/accuracy": [(1, 0.5), (2, 0.5)]}
    ticks = Page(line_chart("accuracy", flat, share=True).svg).of("text")
    assert ticks == ["1", "2", "step", "0.00", "0.25", "0.50", "0.75", "1.00"]
    assert "0.75" not in Page(line_chart("accuracy", flat).svg).of("text")


def test_more_lines_than_colours_differ_in_style():
    chart = line_chart("many", {f"val/accuracy_{i}": [(1, 0.1), (2, 0.2)] for i in range(10)})
    assert len({(entry.colour, entry.line) for entry in chart.legend}) == 10
    assert "stroke-dasharray" in chart.svg


def test_no_directory_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="is no directory"):
        write_report(tmp_path / "nothing")


def test_command_line(run_dir, monkeypatch, capsys):
    arguments = ["kd.logger.report", str(run_dir), str(run_dir / "nothing")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="2"):
        main()
    out, err = capsys.readouterr()
    assert out == f"{run_dir / 'report.html'}\n"
    assert err.startswith("error: ") and err.count("\n") == 1
