"""The page and the pictures of an inspection: all numbers are there, bounded, and nothing of a text runs or is lost."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groundup.report import inspection_page
from groundup.report.inspection import Inspection
from groundup.report.inspection_page import render_inspection, shown_positions, write_inspection, write_inspection_json
from groundup.report.inspection_plots import drawable, write_inspection_plots
from groundup.runtime import GroundupError

T, K, L, H, N = 13, 3, 2, 5, 11
HOSTILE = "</script><script>alert(1)</script>"
TOKENS = ("<s>", "·a", HOSTILE, "↵", r"\xe4", "中", "$x_1^2$", '"', "·long" * 7, "👋", "&amp;", "z", "·end")


def made(**changes: Any) -> Inspection:
    rng = np.random.default_rng(7)
    attention = np.tril(rng.random((L, H, N, N))).astype(np.float32)
    attention /= attention.sum(-1, keepdims=True)
    values: dict[str, Any] = dict(
        model="tiny & small", ids_T=np.arange(T), tokens=TOKENS, notes=tuple(f"id {n}" for n in range(T)), start=1,
        n_bytes=29, logprob_T=np.concatenate([[np.nan], -rng.random(T - 1) * 20]),
        rank_T=np.concatenate([[0], rng.integers(1, 900, T - 1)]), entropy_T=rng.random(T) * 9,
        next_ids_TK=rng.integers(0, T, (T, K)), next_probabilities_TK=np.sort(rng.random((T, K)) / K)[:, ::-1],
        layers=(3, 8), attention_LHNN=attention, lens_ids_LNK=rng.integers(0, T, (L, N, K)),
        lens_probabilities_LNK=np.sort(rng.random((L, N, K)) / K)[..., ::-1], lens_probability_LN=rng.random((L, N)),
        lens_rank_LN=rng.integers(1, 5, (L, N)), names=dict(enumerate(TOKENS)), left_out=("the rest",),
    )  # fmt: skip
    return Inspection(**values | changes)


class Page(HTMLParser):
    """The page as a browser takes it apart."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "wbr", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.attributes if name == tag]

    def scripts(self) -> list[str]:
        return [text for tag, text in self.texts if tag == "script"]


def test_all_numbers_are_on_the_page_and_its_script_can_read_them() -> None:
    found = made()
    page = Page(render_inspection(found))
    assert page.open == []
    spans = [span for span in page.all("span") if "data-t" in span]
    assert [span["data-shown"] for span in spans] == list(TOKENS)
    shades = [float(str(span["style"]).removeprefix("--s: ")) for span in spans]
    expected = [0.0, *(0.85 * np.minimum(1, found.bits[1:] / inspection_page.MOST_BITS))]
    np.testing.assert_allclose(shades, expected, atol=6e-4)
    numbers = json.loads(page.scripts()[0])
    for position, token in enumerate(numbers["tokens"]):
        texts, probabilities = zip(*token["expected"], strict=True) if token["expected"] else ((), ())
        wanted = found.expected(position)
        assert list(texts) == [text for text, _ in wanted]
        np.testing.assert_allclose(probabilities, [p for _, p in wanted], atol=1e-5)
    assert f"rank {found.rank_T[4]:,}" in numbers["tokens"][4]["facts"]
    attention = numbers["attention"]
    assert (attention["size"], attention["heads"], attention["layers"]) == (N, H, [3, 8])
    assert all(len(label) <= inspection_page.LONGEST_LABEL for label in attention["labels"])
    weights = (np.frombuffer(base64.b64decode(attention["weights"]), np.uint8) / 255.0) ** 2
    rows, columns = np.tril_indices(N)
    np.testing.assert_allclose(weights.reshape(L, H, -1), found.attention_LHNN[:, :, rows, columns], atol=2 / 255)
    cells = page.all("td")[: L * N]
    assert [("hit" in (cell.get("class") or "")) for cell in cells] == (found.lens_rank_LN == 1).ravel().tolist()
    text = "".join(text for _, text in page.texts)
    assert f"{found.bits_per_byte:.3f}" in text
    assert "the rest" in text


def test_nothing_is_loaded_and_nothing_runs_but_the_pages_own_script() -> None:
    text = render_inspection(made())
    page = Page(text)
    assert len(page.all("script")) == 2  # the numbers, which are data, and the script
    script = page.scripts()[1]
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "alert" not in script
    assert not re.search(r"https?:|src=|url\(|@import|\son\w+=\"", text)


def test_what_is_too_much_is_cut_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection_page, "MOST_WEIGHTS", L * H * 28)  # 28 = 7 * 8 / 2
    monkeypatch.setattr(inspection_page, "MOST_CELLS", L * 9)
    monkeypatch.setattr(inspection_page, "MOST_TOKENS", 12)
    assert shown_positions(made()) == 7
    page = Page(render_inspection(made(left_out=())))
    assert json.loads(page.scripts()[0])["attention"]["size"] == 7
    assert len([span for span in page.all("span") if "data-t" in span]) == 12
    assert len([cell for cell in page.all("td") if "--p" in (cell.get("style") or "")]) == L * 9
    text = "".join(text for _, text in page.texts)
    for line in ("the first 7 of 11 positions", "the first 9 of 11 positions", "up to token 12 of 13"):
        assert line in text


def test_a_single_token_that_nothing_stands_before(tmp_path: Path) -> None:
    one = made(
        ids_T=np.array([0]), tokens=("a",), notes=("id 0",), start=0, n_bytes=0, logprob_T=np.array([np.nan]),
        rank_T=np.array([0]), entropy_T=np.array([2.0]), next_ids_TK=np.zeros((1, K), int),
        next_probabilities_TK=np.full((1, K), 0.2), attention_LHNN=np.ones((L, H, 1, 1)),
        lens_ids_LNK=np.zeros((L, 1, K), int), lens_probabilities_LNK=np.full((L, 1, K), 0.2),
        lens_probability_LN=np.full((L, 1), np.nan), lens_rank_LN=np.zeros((L, 1), int),
    )  # fmt: skip
    assert "bits per byte" not in render_inspection(one)
    write_inspection_plots(one, tmp_path)
    assert json.loads(write_inspection_json(one, tmp_path / "one.json").read_text())["bits_per_byte"] is None


@pytest.mark.filterwarnings("error")  # such as of a glyph that the font lacks
def test_pictures_of_every_layer(tmp_path: Path) -> None:
    from matplotlib.image import imread

    paths = write_inspection_plots(made(), tmp_path / "new")
    assert [path.name for path in paths] == [
        "surprise.png", "lens.png", "attention-layer-03.png", "attention-layer-08.png",
    ]  # fmt: skip
    for path in paths:
        pixels = (imread(path)[:, :, :3] * 255).astype(int)
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, path.name
        assert (pixels[0] == 255).all()  # nothing is cut off at the upper edge
    assert drawable("a中\u0378") == r"a\u4e2d\u0378"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (write_inspection, write_inspection_json):
        with pytest.raises(GroundupError, match="cannot write"):
            write(made(), tmp_path / "file" / "page.html")


@pytest.mark.browser
def test_in_a_browser_the_maps_are_drawn(tmp_path: Path) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs chromium, chromium-browser or google-chrome")
    page = write_inspection(made(), tmp_path / "page.html")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    sizes = dict(re.findall(r'<canvas id="(\w+)"[^>]*width="(\d+)"', dom))
    assert sizes == {"map": str(96 + 22 * N + 1), "grid": str(34 * H)}  # set by the script, which the policy lets run
