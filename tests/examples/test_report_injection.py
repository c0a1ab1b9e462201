"""The report and comparison pages in a real Chromium: script in prompts, completions, names and notes stays text."""

import shutil
from pathlib import Path

import pytest

from prefloop.evaluate.compare_report import page as comparison_page
from prefloop.evaluate.compare_report import result
from prefloop.evaluate.report import write_report
from prefloop.rows import HOLDOUT, TRAIN
from synthetic_run import SyntheticRun, ended, method, metric_json_named

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: chromium)")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]

HITS = (
    "<script>window.hit = 1</script>",
    "</style></title></textarea><script>window.hit = 2</script>",
    "<img src=x onerror='window.hit = 3'>",
    "<svg onload='window.hit = 4'></svg>",
    '<iframe srcdoc="<script>parent.hit = 5</script>"></iframe>',
    "\"' onmouseover='window.hit = 6' autofocus onfocus='window.hit = 7'",
    "<a href='javascript:window.hit = 8'>here</a>",
    "<details open ontoggle='window.hit = 9'>",
    "]]><!-- --><script>window.hit = 10</script>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:1/'><base href='http://127.0.0.1:1/'>",
    "<style>@import 'http://127.0.0.1:1/x.css'; * { display: none }</style>",
    "{{ 7 * 7 }} {% raw %} ${7 * 7} \u202egnirts",
)
"""Each sets `window.hit`, or loads from another place, where it is read as markup."""
HOSTILE = " ".join(HITS)


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def shown(chromium):
    """Open a page from disk; return it with the requests, dialogs and errors that it made."""
    contexts = []

    def show(path: Path):
        context = chromium.new_context()
        contexts.append(context)
        requests, noise = [], []
        context.on("request", lambda request: requests.append(request.url))
        page = context.new_page()
        page.on("dialog", lambda dialog: noise.append(dialog.message))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_timeout(200)
        return page, requests, noise

    yield show
    for context in contexts:
        context.close()


def nothing_ran(page, requests, noise, address):
    assert page.evaluate("() => window.hit") is None
    assert noise == []
    assert requests == [address]
    assert page.url == address
    for kind in ("script", "img", "iframe", "object", "embed", "form", "link", "base", "a[href^='javascript:']"):
        assert page.locator(kind).count() == 0, kind
    by_attribute = "() => [...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    assert not [name for name in page.evaluate(by_attribute) if name.startswith("on")]


def test_the_report_runs_nothing_of_what_it_shows(shown, tmp_path):
    run = SyntheticRun(tmp_path / "<i>demo", text=HOSTILE.replace("{", "{{").replace("}", "}}") + " {0}")
    run.holdout = [run.prompt(f"{HOSTILE} {i}", HOLDOUT) for i in range(3)]
    run.train = [run.prompt(f"{HOSTILE} {i}", TRAIN) for i in range(4)]
    run.begin(name=HOSTILE, recipe=HOSTILE, verdict=HOSTILE, warnings=list(HITS), judge={HOSTILE: HOSTILE})
    run.round(0, 0.4)
    run.summary["rounds"][0] |= {"why": list(HITS), "seconds": {HOSTILE: 1.0}, "tokens": {}}
    run.summary["rounds"][0]["metrics"][HOSTILE] = metric_json_named(HOSTILE)
    (run.root / "recipe.yaml").write_text(HOSTILE, encoding="utf-8")
    run.save()
    path = write_report(run.root)
    page, requests, noise = shown(path)
    nothing_ran(page, requests, noise, path.as_uri())
    text = page.locator("body").text_content()
    for hit in HITS:
        assert hit in text
    assert page.title().startswith("prefloop") or HITS[0] in page.title()


def test_the_comparison_runs_nothing_of_what_it_shows(shown, tmp_path):
    said = {"judge": HOSTILE, "sampling": HOSTILE}
    arms = [method(f"{HOSTILE} {i}", ended(shift=i, **said), ended(shift=i, **said)) for i in range(2)]
    path = tmp_path / "compare.html"
    path.write_text(comparison_page(result(arms, list(HITS), swept=False)), encoding="utf-8")
    page, requests, noise = shown(path)
    nothing_ran(page, requests, noise, path.as_uri())
    text = page.locator("body").text_content()
    for hit in HITS:
        assert hit in text


def test_the_pages_policy_stops_markup_that_reached_them_all_the_same(shown, tmp_path):
    """Even if an escape were forgotten, the page's own content security policy lets nothing run or load."""
    run = SyntheticRun(tmp_path / "demo")
    run.begin()
    path = write_report(run.root)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("</body>", f"{HITS[0]}{HITS[2]}{HITS[3]}</body>"), encoding="utf-8")
    page, requests, _ = shown(path)
    assert page.locator("script").count() == 1
    assert page.evaluate("() => window.hit") is None
    assert [r for r in requests if r.startswith("http")] == []


def test_the_search_notices_script_that_runs(shown, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(f"<!doctype html><body>{HITS[0]}</body>", encoding="utf-8")
    page, requests, noise = shown(path)
    with pytest.raises(AssertionError):
        nothing_ran(page, requests, noise, path.as_uri())
    assert page.evaluate("() => window.hit") == 1
