"""The report page: self-contained, escaped, complete, and its charts in bounds."""

from __future__ import annotations

import html.parser
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from chipmunk.config import Config
from chipmunk.report import charts, render
from tests.cli.command_line import chipmunk
from tests.fidelity.results import report, variant


class Page(html.parser.HTMLParser):
    """Tags that are open at the end, ids, and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in ("meta", "img", "input", "br", "hr", "link"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(found)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "action", "data") and value]
        assert tag not in ("link", "iframe", "script"), tag

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass


def written(folder: Path, *variants: dict[str, Any], decodes: bool = True) -> dict[str, Any]:
    """Results with pictures beside them."""
    chosen = variants or (variant("defaults", config={"mlp": {"top_keys": 0.2}}),)
    data = report(*chosen, decodes=decodes).to_json()
    if decodes:
        for name in ("dense", *(v["name"] for v in chosen)):
            for index in (0, 1):
                file = f"{name}-{index}.png".replace(" ", "_").replace("/", "_")
                Image.new("RGB", (32, 16), (10 * index, 20, 30)).save(folder / file)
                data["images"][f"{name}/{index}"] = file
    return json.loads(json.dumps(data))  # type: ignore[no-any-return]


def test_nothing_is_fetched_and_every_tag_is_closed(tmp_path: Path) -> None:
    text = render(written(tmp_path), tmp_path)
    page = Page(text)
    assert page.open == []
    assert page.fetched
    assert all(url.startswith("data:image/png;base64,") for url in page.fetched)
    assert "http" not in re.sub(r"data:[^\"]*", "", text)
    assert "url(" not in text
    assert "@import" not in text


def test_what_others_wrote_is_escaped(tmp_path: Path) -> None:
    data = written(tmp_path, variant("<script>alert(1)</script>", config={}))
    data["command"] = "chipmunk --prompt '<img src=x>'"
    data["notes"] = ["<b>bold</b>"]
    text = render(data, tmp_path)
    assert "a cat &lt;b&gt;" in text
    assert not re.search(r"<script|<img src=x|<b>", text)


def test_pictures_have_words_for_those_who_cannot_see_them(tmp_path: Path) -> None:
    page = Page(render(written(tmp_path), tmp_path))
    assert len(page.images) == 2 * (1 + 2 + 2), "dense, sparse and difference, and the two of the slider"
    named = [image["alt"] for image in page.images if image["alt"]]
    assert len(named) == 6
    assert all(image["alt"] is not None for image in page.images)


def test_figures_are_those_of_the_results(tmp_path: Path) -> None:
    text = render(written(tmp_path), tmp_path)
    for figure in ("32.0", "0.950", "60%", "top_keys: 0.2  # set", "skipped", "a note", "chipmunk fidelity flux"):
        assert figure in text, figure


def test_the_configuration_is_the_one_that_ran_and_not_what_todays_defaults_make_of_it(tmp_path: Path) -> None:
    """Results are read long after: defaults change, keys come and go."""
    ran = Config().model_dump(mode="json", by_alias=True)
    ran["mlp"] |= {"top_keys": 0.2, "full_step_every": 7, "gone_since": 5}
    text = render(written(tmp_path, variant("v", config={"mlp": {"top_keys": 0.2}}, settings=ran)), tmp_path)
    assert "top_keys: 0.2  # set\n" in text
    assert "full_step_every: 7\n" in text
    assert "gone_since: 5\n" in text
    assert text.count("# set\n") == 1


def test_results_of_before_settings_were_written_say_so(tmp_path: Path) -> None:
    """Near miss: `{}` is a configuration too, and all of its values were defaults nobody wrote down."""
    text = render(written(tmp_path, variant("v", config={"mlp": {"top_keys": 0.2}}), variant("w", config={})), tmp_path)
    assert "top_keys: 0.2  # set</pre>" in text
    assert "full_step_every" not in text
    assert text.count("an older Chipmunk") == 2


def test_latents_alone_make_a_page(tmp_path: Path) -> None:
    text = render(written(tmp_path, variant("v", config={}, psnr=None), decodes=False), tmp_path)
    assert "(latents)" in text
    assert "<img" not in text
    assert ">None<" not in text


def test_many_variants_give_curves_and_few_pictures(tmp_path: Path) -> None:
    families = ("fewer dense steps", "sparse", "sparse + adaptive step caching")
    rows = [
        variant(f"{family} {n}", family, None if family.startswith("fewer") else {}, psnr=25.0 + n)
        for family in families
        for n in range(4)
    ]
    text = render(written(tmp_path, *rows), tmp_path)
    assert "Fidelity over cost" in text
    assert len(Page(text).images) <= 2 * (1 + 2 * 3 + 2)
    for family in families:
        assert family in text


def test_light_dark_print_and_phones_are_styled(tmp_path: Path) -> None:
    text = render(written(tmp_path), tmp_path)
    for query in ("prefers-color-scheme: dark", "@media print", "max-width: 640px", 'name="viewport"', 'lang="en"'):
        assert query in text


def test_the_colours_of_text_stand_out(tmp_path: Path) -> None:
    """Contrast by WCAG 2: 4.5 for text, light and dark."""
    text = render(written(tmp_path), tmp_path)
    blocks = re.split(r"prefers-color-scheme: dark|box-sizing", text)
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in blocks[:2])
    for scheme in (light, {**light, **dark}):
        for name in ("ink", "quiet", "accent", *(f"c{number}" for number in range(8))):
            for ground in ("ground", "panel") if not name.startswith("c") else ("ground",):
                assert contrast(scheme[name], scheme[ground]) >= 4.5, (name, ground)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def drawings(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text)]


points = st.lists(st.tuples(st.floats(-50, 200), st.floats(-1e3, 1e3)), min_size=1, max_size=6)


@given(st.lists(points, min_size=1, max_size=9), st.booleans())
def test_lines_stay_inside_their_axes(lines: list[list[tuple[float, float]]], from_zero: bool) -> None:
    series = [charts.Series(f"s{n}", tuple(sorted(p)), n, marks=True) for n, p in enumerate(lines)]
    low = min(y for line in lines for _, y in line)
    text = charts.lines(series, "x", "y", "all", y_from=min(low, 0.0) if from_zero else None)
    for drawing in drawings(text):
        _, _, width, height = map(float, drawing.attrib["viewBox"].split())
        for line in drawing.iter("polyline"):
            for pair in line.attrib["points"].split():
                x, y = map(float, pair.split(","))
                assert -0.1 <= x <= width + 0.1
                assert -0.1 <= y <= height + 0.1


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_even_and_cover(low: float, span: float, count: int) -> None:
    found = charts.ticks(low, low + span, count)
    assert found[0] <= low + 1e-6 * span
    assert found[-1] >= low + span - 1e-6 * span
    assert 2 <= len(found) <= count + 3


def test_names_at_line_ends_do_not_overlap() -> None:
    series = [charts.Series(f"series {n}", ((0.0, 1.0), (1.0, 1.0 + n / 1000)), n) for n in range(6)]
    wide = drawings(charts.lines(series, "x", "y", "all"))[0]
    heights = sorted(float(text.attrib["y"]) for text in wide.iter("text") if (text.text or "").startswith("series"))
    assert len(heights) == 6
    assert all(b - a >= 12 for a, b in itertools.pairwise(heights))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"a": 1}')
    done = chipmunk("report", tmp_path / "other.json", "-o", tmp_path / "page.html")
    assert done.code == 2
    assert "is not what chipmunk fidelity writes" in done.err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("source", ["results.json", "."])
def test_results_become_a_page(tmp_path: Path, source: str) -> None:
    (tmp_path / "results.json").write_text(json.dumps(written(tmp_path)))
    done = chipmunk("report", tmp_path / source, "-o", tmp_path / "page.html")
    assert done.code == 0, done.err
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
