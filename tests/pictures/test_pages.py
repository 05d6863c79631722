"""The pages of --html in a real browser: quiet, readable on a phone, keyboard and screen reader."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from command import run_inside
from helpers import LLAMA, llama_tensors, write_checkpoint_dir

from nf4cli import engines
from nf4cli.api.evaluating import Evaluated, Measured
from nf4cli.checkpoint.discovery import open_checkpoint
from nf4cli.checkpoint.packed import PackedReader, find_weights
from nf4cli.checkpoint.reader import ShardReaders
from nf4cli.output.manifest import TensorError
from nf4cli.output.weight_figures import Stored, WeightFigures, weight_figures
from nf4cli.pictures.layers import grids, split_name
from nf4cli.pictures.pages import of_eval, of_inspect
from nf4cli.quality.evaluation.positions import by_position, worst
from nf4cli.quality.evaluation.statistics import Figure

CHROMIUM = os.environ.get("NF4_CHROMIUM") or shutil.which("chromium")
HOSTILE = "model.layers.0.</script><script>alert(1)</script>\u202e<img src=x onerror=alert(1)>&\"'"
DENSE = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.up_proj".split()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium, or set NF4_CHROMIUM to one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@cache
def page_of(names: tuple[str, ...], called: str = "model-nf4") -> bytes:
    """The page of nf4 inspect for weights of such names."""
    chance = random.Random(0)
    errors = {n: TensorError(chance.gauss(0.095, 0.004), 0.3, 4096, 5) for n in names}
    formats = (("64n", "nf4, blocksize 64, nested"), ("128", "nf4, blocksize 128"))
    weights = {
        n: Stored(*chance.choice(formats), 9000, 16384, 4096, chance.randrange(50), 0.1, 2.5, 7)
        for n in names
    }
    codes = {"nf4": [(i / 8 - 1, chance.randrange(10**6)) for i in range(16)]}
    absmax = [(2.0**i, 2.0 ** (i + 1), chance.randrange(10**5)) for i in range(-9, 2)]
    return of_inspect(called, {"": (WeightFigures(weights, codes, absmax), errors)})


def dense(layers: int) -> tuple[str, ...]:
    return tuple(f"model.layers.{i}.{kind}.weight" for i in range(layers) for kind in DENSE)


def experts() -> tuple[str, ...]:
    return tuple(
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}.weight"
        for layer in range(52)
        for expert in range(128)
        for kind in ("gate_proj", "up_proj", "down_proj")
    )


def test_pages_are_small():
    assert len(dense(80)) == 400
    assert len(page_of(dense(80))) < 2_000_000
    assert len(experts()) > 19_900
    assert len(page_of(experts())) < 6_000_000
    assert len(page_of(dense(4000))) < 6_000_000


def test_names_are_split_by_layer_and_kind():
    name = "model.layers.3.mlp.experts.7.up_proj.weight"
    assert split_name(name) == ("model.layers", 3, "mlp.experts.*.up_proj")
    assert split_name("lm_head.weight") == ("", None, "lm_head")
    (grid,) = grids(dict.fromkeys(experts(), 1.0))
    assert len(grid.layers) == 52
    assert len(grid.kinds) == 3
    assert {len(values) for values in grid.cells.values()} == {128}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("names", [(*dense(30), HOSTILE), experts()], ids=["dense", "experts"])
def test_a_page_is_quiet_and_fits(browser, tmp_path, names, width, scheme):
    file = tmp_path / "page.html"
    file.write_bytes(page_of(names, called=f"{HOSTILE}{'x' * 500}"))
    require_quiet_and_fitting(browser, file, width, scheme)
    assert "\u202e" not in file.read_text()


def require_quiet_and_fitting(browser, file: Path, width: int, scheme: str) -> None:
    """Open a page: no message, no request, no script, and no scrolling to the side."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=False
    )
    page = context.new_page()
    said: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append("a dialog"))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    assert said == []
    assert requests == [file.as_uri()]
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.querySelectorAll('script, img, link, iframe').length") == 0
    context.close()


CONTRAST = """() => {
  const style = getComputedStyle(document.documentElement);
  const canvas = document.createElement('canvas').getContext('2d');
  const light = name => {
    canvas.fillStyle = style.getPropertyValue(name).trim();
    const c = [1, 3, 5].map(i => parseInt(canvas.fillStyle.slice(i, i + 2), 16) / 255);
    const [r, g, b] = c.map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)];
    return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05); };
  const pairs = [...Array(8).keys()].flatMap(i => [[`--h${i}`, `--i${i}`], [`--c${i}`, '--ci']]);
  pairs.push(['--card', '--ink'], ['--card', '--soft'], ['--card', '--link']);
  pairs.push(['--paper', '--soft']);
  const bars = ['--a', '--b'].map(c => [c, ratio(c, '--card'), 3]);
  return [...pairs.map(([a, b]) => [a, ratio(a, b), 4.5]), ...bars].filter(([, r, l]) => !(r >= l));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_accessible(browser, tmp_path, scheme):
    file = tmp_path / "page.html"
    file.write_bytes(page_of(dense(30)))
    require_accessible(browser, file, scheme)


def require_accessible(browser, file: Path, scheme: str) -> None:
    """Open a page: enough contrast, and nothing that axe finds wrong."""
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.evaluate(CONTRAST) == []
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    context.close()


def test_a_page_is_used_with_the_keyboard(browser, tmp_path):
    file = tmp_path / "page.html"
    file.write_bytes(page_of(dense(30)))
    page = browser.new_page(viewport={"width": 360, "height": 800})
    page.goto(file.as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    box = "document.activeElement.getAttribute('role')"
    assert page.evaluate(box) == "region"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.parentElement.open")
    page.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A page of every command that writes one."""
    place = tmp_path_factory.mktemp("pages")
    model, other = place / "model", place / "other"
    for root, seed in ((model, 0), (other, 1)):
        write_checkpoint_dir(root, llama_tensors(seed=seed), LLAMA)
    out, recipe = place / "out", place / "recipe.toml"
    for words in (
        ("plan", model, recipe, "--bits", "6", "-q"),
        ("quantize", model, out, "--recipe", recipe, "-q", "--html", place / "quantize.html"),
        ("inspect", out, "--html", place / "inspect.html"),
        ("diff", out, other, "--html", place / "diff.html"),
    ):
        done = run_inside(*words)
        assert done.returncode == (words[0] == "diff"), done.stderr
    (place / "eval.html").write_bytes(page_of_eval(np.random.default_rng(0).random((4, 255))))
    return {file.stem: file for file in place.glob("*.html")}


@pytest.mark.parametrize("command", ["quantize", "inspect", "diff", "eval"])
def test_the_page_of_every_command_is_quiet_fits_and_is_accessible(browser, pages, command):
    for width, scheme in ((360, "light"), (1400, "dark")):
        require_quiet_and_fitting(browser, pages[command], width, scheme)
        require_accessible(browser, pages[command], scheme)


def page_of_eval(kl: np.ndarray, text: str = "a text") -> bytes:
    """The page of nf4 eval for a text with these divergences, float64 [windows, positions]."""
    figure = Figure(0.1, 0.05, 0.2)
    named = tuple(replace(token, before=text, token="</td>") for token in worst(kl)[:1])
    measured = Measured(kl.size, {"kl_mean": figure}, by_position(kl), named)
    done = Evaluated(Path("o"), Path("s"), text, "causal", {text: measured}, ())
    return of_eval(done, [("KL", "kl_mean", "{:.3f}")])


def test_commands_write_pages(llama, tmp_path):
    out = tmp_path / "out"
    for words in (
        ("quantize", llama, out, "-q"),
        ("inspect", out, "--json"),
        ("diff", out, llama, "--json"),
    ):
        page = tmp_path / f"{words[0]}.html"
        done = run_inside(*words, "--html", page)
        assert done.returncode == (words[0] == "diff"), done.stderr
        assert page.read_text().count("<svg") >= 2
        assert "default-src 'none'" in unescape(page.read_text())
    assert not list(tmp_path.glob(".*partial*"))


@pytest.mark.parametrize(
    ("place", "code", "words"),
    [("-", 2, "not to stdout"), (".", 2, "no ordinary file"), ("no/x.html", 4, "cannot be")],
)
def test_a_bad_place_is_refused_before_the_work(llama, tmp_path, place, code, words):
    file = place if place == "-" else tmp_path / place
    done = run_inside("quantize", llama, tmp_path / "out", "--html", file)
    assert done.returncode == code
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_page_needs_its_extra(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    done = run_inside("quantize", llama, tmp_path / "out", "--html", tmp_path / "x.html")
    assert done.returncode == 4
    assert "nf4cli[pictures]" in done.stderr
    assert not Path(tmp_path / "out").exists()


def test_the_page_of_a_pipeline_names_its_components(pipe, tmp_path):
    out = tmp_path / "out"
    done = run_inside("quantize", pipe, out, "-q", "--html", tmp_path / "q.html")
    assert done.returncode == 0, done.stderr
    done = run_inside("inspect", out, "--json", "--html", tmp_path / "i.html")
    assert done.returncode == 0, done.stderr
    for name in ("q.html", "i.html"):
        assert "Error in transformer" in (tmp_path / name).read_text()


def test_outlier_blocks_are_counted_as_numpy_counts_them(llama_nf4):
    checkpoint = open_checkpoint(llama_nf4)
    figures = weight_figures(checkpoint, engines.load("cpu"))
    with ShardReaders(checkpoint.shards) as readers:
        weights, _ = find_weights(checkpoint, readers)
        reader = PackedReader(readers, engines.load("cpu"))
        assert weights
        for name, weight in weights.items():
            absmax = reader.absmax(weight, 0, weight.blocks)
            seen = figures.weights[name]
            assert seen.blocks == absmax.size
            assert seen.largest == absmax.max()
            assert absmax[seen.block] == seen.largest
            assert seen.median == pytest.approx(np.median(absmax), rel=0.06)
    total = sum(weight.numel for weight in weights.values())
    assert sum(count for _, count in figures.codes["nf4"]) == total
    assert sum(n for *_, n in figures.absmax) == sum(w.blocks for w in weights.values())


def test_the_worst_tokens_of_hostile_text_are_only_text():
    kl = np.zeros((2, 31))
    kl[1, 4] = 3.0
    (first, *_) = worst(kl)
    assert (first.window, first.position, first.kl) == (1, 5, 3.0)
    page = page_of_eval(kl, HOSTILE).decode()
    assert "<script" not in page
    assert "<img" not in page
    assert "\u202e" not in page
    assert page.count("&lt;/td&gt;") == 1
