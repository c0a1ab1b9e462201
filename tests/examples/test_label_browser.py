"""The page in a real Chromium: twenty pairs by keyboard, undo, reload, kill, restart, finish; a phone; hostile text.

Set PREFLOOP_SCREENSHOTS to a folder to have the two pictures of docs/labelling.md made anew.
"""

import os
import re
import shutil
import signal
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from label_run import pair, serving, write_run
from prefloop import cli
from prefloop.rows import Message

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: chromium)")
expect = playwright.expect
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"width": 1280, "height": 760}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}

QUESTION = (
    "My sourdough never rises as much as in the pictures. It is winter, and my kitchen has about 17 °C. What should I "
    "change first?"
)
GOOD = """Change the time before anything else. At 17 °C the dough needs far longer than recipes say: let it rise \
until it has grown by about three quarters, which may take ten to twelve hours.

Judge by the dough and not by the clock. It is ready when it domes at the edge, shows bubbles at the side of the bowl \
and jiggles when you shake it.

If you would rather not wait, put the bowl in the oven with only the light on. That gives about 25 °C and halves the \
time."""
BAD = """Change the flour before anything else. At 17 °C the dough needs a stronger flour than recipes say: let it \
rise for exactly four hours, as longer rises make the bread sour.

Judge by the dough and not by the clock. It is ready when it domes at the edge, shows bubbles at the side of the bowl \
and jiggles when you shake it.

If you would rather not wait, add a spoon of sugar. That feeds the yeast and halves the time."""
HOSTILE = (
    "</span></div><script>window.hit = 1; document.title = 'hit'</script>"
    "<img src=x onerror=\"window.hit = 1; fetch('http://192.0.2.1/')\"><svg onload='window.hit = 1'></svg>"
    "<iframe src='javascript:parent.hit = 1'></iframe>{{7*7}} &lt;b&gt; \u202egnirts\u202c end {}"
)


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def window(chromium):
    """Open windows that note every request, page error and dialog; none may go to another place."""
    requests, errors, contexts = [], [], []

    def open_(**options):
        context = chromium.new_context(**({"viewport": DESKTOP} | options))
        contexts.append(context)
        context.on("request", lambda request: requests.append(request.url))
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.set_default_timeout(10_000)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert {urlsplit(url).hostname for url in requests} == {"127.0.0.1"}
    assert errors == []


def at(page, judged, total=20, skipped=0):
    more = f" · {skipped} skipped" if skipped else ""
    expect(page.locator("#far")).to_have_text(f"{judged} of {total}{more}")


def texts(page):
    return page.locator("#left").inner_text(), page.locator("#right").inner_text()


def side_of(page, wanted):
    """The key for the side whose text has `wanted`, as somebody who reads would press it."""
    return "ArrowLeft" if wanted in texts(page)[0] else "ArrowRight"


def stored(root):
    with sqlite3.connect(f"file:{root / 'labels.sqlite'}?mode=ro", uri=True) as found:
        rows = found.execute("select annotator, verdict from standing order by id").fetchall()
    found.close()
    return rows


def picture(page, name):
    """Keep a picture for the docs, where one is asked for."""
    if folder := os.environ.get("PREFLOOP_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / name)


def fits(page):
    """Whether nothing makes the page scroll sideways."""
    return page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")


def test_twenty_pairs_by_keyboard_over_undo_reload_kill_and_restart(window, tmp_path, monkeypatch):
    root = write_run(tmp_path / "bread", [pair(0, GOOD, BAD, question=QUESTION), *(pair(i) for i in range(1, 20))])
    page = window()
    with serving(root, "--annotator", "Ana") as (process, address):
        page.goto(address)
        at(page, 0)
        assert "token" not in page.url
        assert sorted(texts(page)) == sorted((GOOD, BAD))
        marks = page.locator("#left mark").all_inner_texts()
        assert any("time" in words or "flour" in words for words in marks)
        assert not any("Judge by the dough" in words for words in marks)
        picture(page, "label-desktop.png")
        page.keyboard.press("d")
        assert page.locator("#work.unmarked").count() == 1
        page.keyboard.press("d")

        page.keyboard.press(side_of(page, "ten to twelve hours"))
        at(page, 1)
        for number in range(1, 6):
            expect(page.locator("#prompt")).to_have_text(f"Question {number}?")
            page.keyboard.press({4: "t", 5: "x"}.get(number, side_of(page, "plain and right")))
            at(page, number + 1)
        page.keyboard.press("s")
        at(page, 6, skipped=1)
        page.keyboard.press("u")
        at(page, 6)
        expect(page.locator("#prompt")).to_have_text("Question 6?")
        page.keyboard.press("u")
        at(page, 5)
        expect(page.locator("#prompt")).to_have_text("Question 5?")
        before = texts(page)
        page.reload()
        at(page, 5)
        expect(page.locator("#prompt")).to_have_text("Question 5?")
        assert texts(page) == before
        page.keyboard.press("Control+a")  # keys with Ctrl are the browser's
        page.keyboard.press("s")
        at(page, 5, skipped=1)
        for number in range(6, 11):
            page.keyboard.press(side_of(page, "wordy and wrong") if number == 6 else side_of(page, "plain and right"))
            at(page, number, skipped=1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        page.keyboard.press(side_of(page, "plain and right"))
        expect(page.locator("#notice")).to_contain_text("Your last click is not stored yet.")
        page.keyboard.press("t")  # nothing is judged twice while one click is on its way
    assert len(stored(root)) == 11  # ten verdicts and a skip

    # The restarted server has the run's usual port, so the open page goes on by itself, with its click.
    with serving(root, "--annotator", "Ana"):
        at(page, 11, skipped=1)
        expect(page.locator("#notice")).to_be_hidden()
        for number in range(12, 20):
            page.keyboard.press(side_of(page, "plain and right"))
            at(page, number, skipped=1)
        expect(page.locator("#done-title")).to_have_text("All pairs are judged or skipped")
        page.keyboard.press("Tab")
        expect(page.locator("#again")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#prompt")).to_have_text("Question 5?")
        page.keyboard.press("b")
        at(page, 20)
        expect(page.locator("#done-title")).to_have_text("All pairs are judged")
    rows = stored(root)
    assert len(rows) == 20
    assert {name for name, _ in rows} == {"Ana"}
    found = Counter(verdict for _, verdict in rows)
    assert found["tie"] == 1
    assert found["rejected"] in (1, 2)  # pair 5 was judged by place
    assert found["chosen"] + found["rejected"] == 19

    monkeypatch.setattr(sys, "argv", ["prefloop", "label", str(root), "--export", str(tmp_path / "c.jsonl")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 20


def test_hostile_text_is_shown_and_does_nothing(window, tmp_path):
    rows = [
        pair(0, HOSTILE, f"{HOSTILE} more", question=HOSTILE),
        pair(1, "one two three", "one two four", messages=(Message("<b>user</b>", HOSTILE),)),
        pair(2, "   ", "one"),
    ]
    root = write_run(tmp_path / "<i>run<i>", rows)
    page = window()
    with serving(root) as (_, address):
        page.goto(address)
        page.locator("#name-field").fill("<img src=x onerror=alert(1)>")
        page.keyboard.press("Enter")
        at(page, 0, 3)
        assert page.locator("#run").inner_text() == "<i>run<i>"
        assert page.locator("#who").inner_text() == "<img src=x onerror=alert(1)>"
        assert page.locator("#prompt").inner_text() == HOSTILE
        assert sorted(texts(page)) == sorted((HOSTILE, f"{HOSTILE} more"))
        page.keyboard.press("a")
        at(page, 1, 3)
        assert page.locator("#prompt .role").inner_text() == "<b>user</b>"
        page.keyboard.press("t")
        at(page, 2, 3)
        assert "(empty)" in texts(page)
        page.locator("#show-agreement").click()
        expect(page.locator("#agreement")).to_contain_text("<img src=x onerror=alert(1)>")
        for kind in ("img", "iframe", "svg", "b", "i", "#prompt script"):
            assert page.locator(kind).count() == 0
        assert page.locator("script").count() == 1
        assert page.evaluate("() => window.hit") is None
        # What the Content-Security-Policy adds: even markup that reached the page would not run.
        page.evaluate(
            "() => document.body.insertAdjacentHTML('beforeend', '<img src=\"/x\" onerror=\"window.hit = 2\">')"
        )
        page.wait_for_timeout(200)
        assert page.evaluate("() => window.hit") is None


def test_a_phone_in_the_dark(window, tmp_path):
    root = write_run(tmp_path / "bread", [pair(0, GOOD, BAD, question=QUESTION), *(pair(i) for i in range(1, 20))])
    with serving(root) as (_, address):
        page = window(**PHONE, color_scheme="dark")
        page.goto(address)
        assert fits(page)
        page.locator("#name-field").fill("Ana")
        page.locator("#name-go").tap()
        at(page, 0)
        picture(page, "label-phone.png")
        assert fits(page)
        ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", ground)[:3])) < 60
        for button in page.locator("#actions button, header button").all():
            box = button.bounding_box()
            assert min(box["width"], box["height"]) >= 44, button.inner_text()
            assert box["y"] + box["height"] <= 844  # in reach, whatever the length of the texts
        left, right = (page.locator(f"#{side}").bounding_box() for side in ("left", "right"))
        assert left["y"] + left["height"] < right["y"]  # one above the other
        page.locator("[data-verdict=left]").tap()
        at(page, 1)
        page.locator("#undo").tap()
        at(page, 0)
        page.set_viewport_size({"width": 320, "height": 600})
        assert fits(page)


def test_every_control_has_a_name_and_the_keyboard_reaches_it(window, tmp_path):
    root = write_run(tmp_path / "run", [pair(i) for i in range(3)])
    with serving(root, "--annotator", "Ana") as (_, address):
        page = window()
        page.goto(address)
        at(page, 0, 3)
        for name in ("A is better", "B is better", "Tie", "Both bad", "Skip", "Undo", "Agreement", "Keys and help"):
            assert page.get_by_role("button", name=name).count() == 1
        expect(page.get_by_role("progressbar", name="0 of 3")).to_be_visible()
        expect(page.get_by_role("region", name="Prompt")).to_be_visible()
        for side in "AB":
            expect(page.get_by_role("region", name=side, exact=True)).to_be_visible()
        reached = set()
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("() => document.activeElement.textContent.trim()"))
        assert {"Ana", "Agreement", "?", "A is better←", "Both badX", "SkipS"} <= reached
        page.get_by_role("button", name="Tie").focus()
        outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
        page.keyboard.press("Enter")
        at(page, 1, 3)
        expect(page.locator("#said")).to_have_text("Stored: tie. 1 of 3 judged.")
        page.keyboard.press("?")
        expect(page.locator("#help")).to_be_visible()
        page.keyboard.press("a")  # not while the help is open
        page.keyboard.press("Escape")
        at(page, 1, 3)


def test_two_windows_under_one_name(window, tmp_path):
    root = write_run(tmp_path / "run", [pair(i) for i in range(4)])
    with serving(root) as (_, one), serving(root) as (_, two):
        first, second = window(), window()
        first.goto(one)
        first.locator("#name-field").fill("Ana")
        first.keyboard.press("Enter")
        at(first, 0, 4)
        first.keyboard.press("t")
        at(first, 1, 4)
        second.goto(two)
        second.locator("#name-field").fill("ana")
        second.keyboard.press("Enter")
        expect(second.locator("#name-taken")).to_contain_text("Ana has judged 1 pair of this run")
        second.locator("#name-mine").click()
        at(second, 1, 4)
        first.keyboard.press("t")
        expect(first.locator("#name-taken")).to_contain_text("Ana is now in use in another window")
        at(second, 1, 4)
        third = window()
        third.goto(one)
        expect(third.locator("#closed-title")).to_have_text("This address was used already")


def test_a_password_lets_several_people_in(window, tmp_path):
    root = write_run(tmp_path / "run", [pair(i) for i in range(2)])
    options = ("--host", "127.0.0.1", "--password-env", "LABEL_PASSWORD")
    with serving(root, *options, env={"LABEL_PASSWORD": "correct horse"}) as (_, address):
        for name in ("Ana", "Bo"):
            page = window()
            page.goto(address)
            if name == "Ana":
                page.locator("#password-field").fill("wrong")
                page.keyboard.press("Enter")
                expect(page.locator("#password-wrong")).to_have_text("That is not the password.")
            page.locator("#password-field").fill("correct horse")
            page.keyboard.press("Enter")
            page.locator("#name-field").fill(name)
            page.keyboard.press("Enter")
            at(page, 0, 2)
            for judged in (1, 2):
                page.keyboard.press("t" if judged == 1 else "x")
                at(page, judged, 2)
        page.locator("#show-agreement").click()
        expect(page.locator("#agreement")).to_contain_text("Ana, Bo")
        expect(page.locator("#agreement")).to_contain_text("1.00 [")
