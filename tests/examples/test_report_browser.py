"""The report of a run and of a comparison in a real Chromium: desktop and phone, light and dark, filtered, printed.

Set PREFLOOP_SCREENSHOTS to a folder to have pictures made of the pages that PREFLOOP_REPORT and PREFLOOP_COMPARISON
name: those of the docs.
"""

import os
import shutil
from pathlib import Path

import pytest

from prefloop.evaluate.compare_data import Ended, Measured, Method
from prefloop.evaluate.compare_report import write_comparison
from prefloop.evaluate.report import write_report
from synthetic_run import SyntheticRun

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: chromium)")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    run = SyntheticRun(tmp_path_factory.mktemp("runs") / "a-name-that-is-as-long-as-names-of-runs-tend-to-become")
    run.begin(warnings=["a_word_without_any_place_to_break_it_" * 6])
    for number, mood in enumerate((0.4, 0.7, 0.6)):
        run.round(number, mood, accepted=number != 2)
    run.summary["state"] = "done"
    run.save()
    return write_report(run.root)


@pytest.fixture(scope="module")
def compare_page(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    names = ["simpo", "iterative_dpo", "a_recipe_of_my_own_with_a_long_name learning_rate=0.0001", "spin", "dnpo"]
    methods = [
        Method(n, n, tuple(Measured(s, f"{n}/{s}", ended(i, s)) for s in (0, 1)), {}) for i, n in enumerate(names)
    ]
    write_comparison(root, methods, ["a note"], swept=False)
    return root / "compare.html"


def ended(place, seed):
    def metric(value, unit):
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 40, "unit": unit, "estimator": ""}

    scores = {f"p{i}": (((i * 7 + 3 * seed) % 11) / 10 + 0.2 * place,) for i in range(40)}
    last = {
        "judge_score": metric(0.5 + 0.2 * place, "score"),
        "kl_policy_start": metric(0.1 * (place + 1), "nats per token"),
    }
    last |= {"length": metric(60.0 + place, "tokens"), "win_rate_vs_start": metric(60.0 + 5 * place, "%")}
    first = {name: last[name] for name in ("judge_score", "length")}
    counts = dict.fromkeys(
        ("samples", "pairs", "updates", "tokens_sampled", "tokens_trained", "tokens_evaluated"), 123456
    )
    return Ended(
        scores, {name: (0.5,) for name in scores}, "lexicon", "temperature 1", "d", last, (first, last), 1, 1,
        **counts, seconds=61.0,
    )  # fmt: skip


@pytest.fixture
def visit(chromium):
    """Open a page; it may ask for nothing but itself and must not complain."""
    asked, complaints, contexts = [], [], []

    def open_(path, **options):
        context = chromium.new_context(**options)
        contexts.append(context)
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(Path(path).resolve().as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert {url.partition(":")[0] for url in asked} <= {"file"}
    assert len(asked) == len(contexts)
    assert complaints == []


def colours(page):
    return page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")


@pytest.mark.parametrize("which", ["run_page", "compare_page"])
@pytest.mark.parametrize("window", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_scrolls_sideways_in_either_theme(which, window, visit, request):
    path = request.getfixturevalue(which)
    seen = {}
    for theme in ("light", "dark"):
        page = visit(path, color_scheme=theme, **window)
        assert page.evaluate("document.documentElement.scrollWidth") <= window["viewport"]["width"]
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= window["viewport"]["width"]
        seen[theme] = colours(page)
    light, dark = (sum(map(int, seen[t][0][4:-1].split(","))) for t in ("light", "dark"))
    assert light > 600
    assert dark < 150


def test_the_verdict_comes_first(run_page, compare_page, visit):
    for path in (run_page, compare_page):
        page = visit(path, **PHONE)
        box = page.locator("h1").bounding_box()
        assert box["y"] < 200
        assert box["x"] + box["width"] <= 390


def test_examples_are_filtered_by_outcome_without_a_script(run_page, visit):
    page = visit(run_page, **DESKTOP)
    shown = page.locator("#samples article:visible")
    everything = shown.count()
    for outcome in ("gained", "lost", "changed", "blind"):
        label = page.locator(f'label[for="show-{outcome}"]')
        label.click()
        count = int(label.inner_text().rpartition("(")[2].rstrip(")"))
        assert shown.count() == count == page.locator(f"#samples article.{outcome}:visible").count()
        assert 0 < count < everything
    page.locator('label[for="show-all"]').click()
    assert shown.count() == everything
    # By keyboard too.
    page.locator("#show-all").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#show-gained").is_checked()


def test_words_that_differ_are_marked(run_page, visit):
    page = visit(run_page, **DESKTOP)
    gained = page.locator("#samples article.gained").first
    sides = [gained.locator(f".two > div:nth-child({n}) mark").all_inner_texts() for n in (1, 2)]
    assert {word.strip() for word in sides[1]} == {"happy"}
    assert {word.strip() for word in sides[0]} <= {"sad", "calm"}
    assert sides[0]


def test_both_pages_print(run_page, compare_page, visit, tmp_path):
    for path in (run_page, compare_page):
        page = visit(path, color_scheme="dark", **DESKTOP)
        page.emulate_media(media="print", color_scheme="dark")
        assert colours(page)[0] in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        printed = page.pdf(format="A4", margin={"top": "1cm", "bottom": "1cm", "left": "1cm", "right": "1cm"})
        assert printed.startswith(b"%PDF")


@pytest.mark.skipif("PREFLOOP_SCREENSHOTS" not in os.environ, reason="PREFLOOP_SCREENSHOTS names no folder")
@pytest.mark.parametrize(("variable", "name"), [("PREFLOOP_REPORT", "report"), ("PREFLOOP_COMPARISON", "compare")])
def test_pictures_for_the_docs(variable, name, visit):
    if variable not in os.environ:
        pytest.skip(f"{variable} names no page")
    for window, suffix in ((DESKTOP, "desktop"), (PHONE, "phone")):
        page = visit(os.environ[variable], **window)
        page.screenshot(path=Path(os.environ["PREFLOOP_SCREENSHOTS"]) / f"{name}-{suffix}.png")
