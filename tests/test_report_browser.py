"""The report's page in a real Chromium: what a reader can do with it, by mouse, by keys, by link.

Times are printed, never asserted: they belong to the machine.
"""

import os
import re
import shutil
import time
from urllib.parse import quote

import pytest
from synthetic_run import write_large_run, write_run

pytest.importorskip("playwright", reason="needs: pip install -r requirements-browser.txt")
pytest.importorskip("plotly", reason="needs: pip install -r requirements-browser.txt")

from playwright.sync_api import sync_playwright

from tools.report.__main__ import write
from tools.report.browser import browse, text_of
from tools.report.runs import read_run

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def chromium():
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("needs a Chromium: apt-get install chromium, or name one with CHROMIUM=<path>")
    with sync_playwright() as driver:
        root = os.name == "posix" and os.geteuid() == 0
        browser = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox"] if root else []
        )
        yield browser
        browser.close()


class Report:
    """A page that is open, with all that went wrong on it."""

    def __init__(self, chromium, path, fragment="", **settings):
        self.problems, self.requests = [], []
        self.page = chromium.new_context(**settings).new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        began = time.perf_counter()
        self.page.goto(f"file://{path}{fragment}")
        self.page.wait_for_selector("body[data-ready]")
        self.seconds = time.perf_counter() - began

    def count(self):
        """Entries in the list, as the page tells."""
        return int(re.match(r"[\d,]+", self.page.inner_text("#count"))[0].replace(",", ""))

    def filtered(self, n):
        """Waits until the list holds n."""
        self.page.wait_for_function(
            "n => document.querySelector('#count').textContent.replaceAll(',', '')"
            ".startsWith(`${n} `)",
            arg=n,
        )

    def heading(self, text):
        """Waits until the detail is headed by text."""
        self.page.wait_for_function(
            "text => document.querySelector('#detail h3')?.textContent.includes(text)", arg=text
        )

    def width(self):
        return self.page.evaluate("document.documentElement.scrollWidth")


class Built:
    """A run, its entries, and its report."""

    def __init__(self, folder, make=write_run, **shape):
        self.run = read_run(make(folder / "run", **shape))
        self.entries = list(self.run.memory.entries.values())
        self.index = browse(self.run).index
        self.path = folder / "report.html"
        self.told = write([folder / "run"], self.path)

    def of(self, level):
        return [entry for entry in self.entries if entry.level == level]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Each text of it holds markup that sets window.hacked, if it is taken for markup."""
    return Built(tmp_path_factory.mktemp("small"), steps=8, hostile=True)


@pytest.fixture
def report(chromium, built):
    opened = []

    def of(fragment="", path=None, **settings):
        opened.append(Report(chromium, path or built.path, fragment, **settings))
        return opened[-1]

    yield of
    for each in opened:
        assert each.problems == []
        assert [url for url in each.requests if not url.startswith("file:")] == []
        assert each.page.evaluate("window.hacked") is None
        each.page.context.close()


def memory(**query):
    return "#memory?" + "&".join(f"{name}={quote(str(v), safe='')}" for name, v in query.items())


# --- figures ------------------------------------------------------------------------------------


def test_every_chart_is_drawn_and_its_table_opens(report):
    page = report().page
    plots = page.locator(".plot")
    for i in range(plots.count()):
        plots.nth(i).scroll_into_view_if_needed()
        plots.nth(i).locator("svg.main-svg").first.wait_for()
    details = page.locator("#data-accuracy")
    details.locator("summary").click()
    assert details.locator("tbody tr").count() == 9  # steps 0 to 7, and the evaluation after 8


def test_printing_draws_what_was_not_seen(report):
    page = report().page
    assert page.locator("svg.main-svg").count() < page.locator(".plot").count()
    assert page.pdf()[:4] == b"%PDF"
    drawn = page.evaluate(
        "[...document.querySelectorAll('.plot')].every(p => p.querySelector('svg'))"
    )
    assert drawn


# --- search and filters -------------------------------------------------------------------------


def test_search_finds_the_entries_with_all_words(report, built):
    opened = report()
    assert opened.count() == len(built.entries)
    words = text_of(built.entries[3]).split()[:2]
    expected = sum(
        all(w in f"{e.id} {e.fields.get('name', '')} {text_of(e)}".lower() for w in words)
        for e in built.entries
    )
    assert 0 < expected < len(built.entries)
    opened.page.fill("#q", " ".join(words).upper())
    opened.filtered(expected)
    opened.page.click("button[type=reset]")
    opened.filtered(len(built.entries))
    opened.page.fill("#q", "nothing says this")
    opened.filtered(0)
    assert opened.page.locator(".row").count() == 0


def test_filters_narrow_by_level_kind_subject_step_and_ratio(report, built):
    opened = report()
    page = opened.page
    insights = built.of("insight")
    page.select_option("#level", "1")
    opened.filtered(len(insights))
    page.select_option("#kind", "lesson")
    lessons = [e for e in insights if e.kind == "lesson"]
    opened.filtered(len(lessons))
    page.select_option("#subject", "physics")
    lessons = [e for e in lessons if built.run.subject(e.problem_id) == "physics"]
    opened.filtered(len(lessons))
    page.fill("#from", "2")
    page.fill("#to", "6")
    lessons = [e for e in lessons if 2 <= e.fields["step"] <= 6]
    opened.filtered(len(lessons))
    ratio = sorted(e.fields["success_ratio"] for e in lessons)[len(lessons) // 2]
    page.fill("#low", str(ratio))
    lessons = [e for e in lessons if e.fields["success_ratio"] >= ratio]
    opened.filtered(len(lessons))
    page.select_option("#at", "gone")
    opened.filtered(sum(e.removed is not None for e in lessons))
    assert "level=1" in page.url and "subject=physics" in page.url


def test_a_link_restores_filters_and_entry_and_back_goes_back(report, built):
    insight = built.of("insight")[-1]
    opened = report(memory(level=1, q="train", entry=insight.id))
    page = opened.page
    opened.heading("Insight of")
    assert page.input_value("#q") == "train" and page.input_value("#level") == "1"
    assert opened.count() == len(built.of("insight"))
    page.locator("#detail a", has_text=re.compile(r"\w")).first.click()
    opened.heading("Experience of")
    page.go_back()
    opened.heading("Insight of")
    assert (
        report(memory(entry="no such entry"))
        .page.inner_text("#detail")
        .startswith("no such entry is not in this report")
    )


# --- provenance ---------------------------------------------------------------------------------


def follow(opened, title, heading):
    """Clicks the first link under a heading of the detail."""
    opened.page.locator(f"#detail h4:has-text('{title}') + ul a").first.click()
    opened.heading(heading)


def test_loss_is_walked_back_to_the_attempt_and_forward_again(report, built):
    """rollout -> behavior -> insight -> experience -> insight -> behavior -> prompt with loss."""
    rollouts = built.index["rollouts"]
    behaviors = {i for i, level in enumerate(built.index["entries"]["level"]) if level == 2}
    shown = next(i for i, cited in enumerate(rollouts["cited"]) if behaviors & set(cited))
    opened = report(memory(rollout=rollouts["id"][shown]))
    page = opened.page
    opened.heading(rollouts["id"][shown])
    assert "nats per token" in page.inner_text("#detail")
    marked = page.locator(".prompt mark[title=behaviors] a").first
    marked.click()
    opened.heading("behavior_")
    follow(opened, "Abstracted from insights", "Insight of")
    insight = page.locator("#detail dd").first.inner_text()
    follow(opened, "Read from experiences", "Experience of")
    attempt = page.locator("#detail dd").first.inner_text()
    follow(opened, "Insights read from it", "Insight of")
    assert page.locator("#detail dd").first.inner_text() == insight
    assert attempt.split("@")[0] == insight.split("@")[0]
    follow(opened, "Behaviors abstracted from it", "behavior_")
    follow(opened, "Teacher prompts that show it", "Rollout")
    assert page.locator(".prompt mark a").count() > 0
    assert "nats per token" in page.inner_text("#detail dl")


def test_an_experience_leads_to_its_rollout_and_back(report, built):
    index = built.index
    one = next(e for e in built.of("experience") if e.id in index["rollouts"]["id"])
    opened = report(memory(entry=one.id))
    opened.page.locator("#detail h4:has-text('Its rollout') + p a").click()
    opened.heading(f"Rollout {one.id}")
    opened.page.locator("#detail h4:has-text('What became of it') + p a").click()
    opened.heading("Experience of")


def test_tokens_are_shaded_by_divergence_and_tell_their_number(report, built):
    opened = report(memory(level="rollout"))
    page = opened.page
    page.locator(".row").first.click()
    opened.heading("Rollout")
    tokens = page.locator(".tokens span")
    shades = tokens.evaluate_all("all => all.map(t => t.style.backgroundColor)")
    assert len(set(shades)) > 2
    tokens.nth(1).hover()
    assert re.match(r"token 2 of \d+, \".*\": \d\.\d{4} nats", page.inner_text(".readout"))


# --- the difference of two steps ------------------------------------------------------------------


def test_a_diff_shows_what_came_went_and_changed(report, built):
    expected = {"added": 0, "removed": 0, "changed": 0}
    for entry in built.entries:
        before, after = entry.at(2), entry.at(5)
        if (before is None) != (after is None):
            expected["removed" if after is None else "added"] += 1
        elif before != after and entry.level != "experience":
            expected["changed"] += 1
    assert all(expected.values())
    opened = report()
    opened.page.fill("#a", "2")
    opened.page.fill("#b", "5")
    opened.filtered(sum(expected.values()))
    said = ", ".join(f"{n} {name}" for name, n in expected.items())
    assert said in opened.page.inner_text("#count")
    for name, n in expected.items():
        opened.page.select_option("#change", name)
        opened.filtered(n)
        assert opened.page.inner_text(".row .head >> nth=0").startswith(name)
    opened.page.locator(".row").first.click()
    opened.page.locator("#detail h4:has-text('Difference: changed')").wait_for()
    assert "After step 2" in opened.page.inner_text("#detail")


# --- keyboard, phone, dark ----------------------------------------------------------------------


def test_everything_is_reached_by_keys_alone(report, built):
    opened = report(memory(level=1))
    page = opened.page
    page.focus("#q")
    for _ in range(40):
        if page.evaluate("document.activeElement.id") == "list":
            break
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "list"
    outline = "getComputedStyle(document.querySelector('#list .row.active')).outlineStyle"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(outline) == "solid"
    page.keyboard.press("ArrowDown")
    assert page.get_attribute("#list", "aria-activedescendant") == "row-2"
    page.keyboard.press("Enter")
    opened.heading("Insight of")
    assert page.locator("#detail dd").first.inner_text() == built.of("insight")[-3].id
    assert page.evaluate("document.activeElement.id") == "detail"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    opened.heading("Experience of")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "list"
    page.keyboard.press("End")
    last = f"row-{len(built.of('insight')) - 1}"
    assert page.get_attribute("#list", "aria-activedescendant") == last
    assert page.locator(f"#{last}").is_visible()


def test_tokens_are_read_by_arrow_keys(report, built):
    opened = report(memory(rollout=built.index["rollouts"]["id"][0]))
    opened.heading("Rollout")
    opened.page.focus(".tokens")
    opened.page.keyboard.press("ArrowRight")
    assert opened.page.inner_text(".readout").startswith("token 2 of")
    opened.page.keyboard.press("End")
    n = opened.page.locator(".tokens span").count()
    assert opened.page.inner_text(".readout").startswith(f"token {n} of {n},")


@pytest.mark.parametrize("kind", ["none", "entry", "behavior", "rollout"])
def test_a_phone_never_scrolls_sideways(report, built, kind):
    query = {
        "none": {},
        "entry": {"entry": built.of("insight")[0].id},
        "behavior": {"entry": built.of("behavior")[0].id, "a": 1, "b": 4},
        "rollout": {"rollout": built.index["rollouts"]["id"][0]},
    }[kind]
    opened = report(memory(**query), viewport={"width": 390, "height": 844}, has_touch=True)
    page = opened.page
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator("svg.main-svg").first.wait_for()
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert opened.width() == 390


def test_dark_mode_colours_page_and_charts_and_follows_a_change(report):
    page = report(color_scheme="dark").page
    paper = "getComputedStyle(document.body).backgroundColor"
    tick = "getComputedStyle(document.querySelector('#plot-accuracy .xtick text')).fill"
    page.locator("#plot-accuracy svg.main-svg").first.wait_for()
    dark = page.evaluate(paper), page.evaluate(tick)
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"before => {tick} !== before", arg=dark[1])
    light = page.evaluate(paper), page.evaluate(tick)
    assert dark == ("rgb(22, 24, 27)", "rgb(228, 228, 225)")
    assert light == ("rgb(255, 255, 255)", "rgb(28, 29, 31)")


def test_runs_side_by_side_are_switched_in_the_browser(report, tmp_path):
    one, two = (
        write_run(tmp_path / "one", name="one"),
        write_run(tmp_path / "two", name="two", seed=1),
    )
    write([one, two], tmp_path / "both.html")
    opened = report(path=tmp_path / "both.html")
    entries = list(read_run(two).memory.entries.values())
    opened.page.select_option("#run", "two")
    opened.filtered(len(entries))
    assert "run=two" in opened.page.url
    opened.page.select_option("#level", "1")
    opened.filtered(sum(entry.level == "insight" for entry in entries))
    opened.page.locator(".row").first.click()
    opened.heading("of toy/")


# --- size ---------------------------------------------------------------------------------------


def test_ten_thousand_entries_stay_responsive(report, tmp_path, capsys):
    """Only rows in sight are in the document, wherever the list is scrolled."""
    large = Built(
        tmp_path,
        write_large_run,
        steps=60,
        problems=600,
        problems_per_step=24,
        rollouts=8,
        words=60,
    )
    n = len(large.entries)
    assert n >= 10_000
    opened = report(path=large.path)
    page, times = opened.page, {"open": opened.seconds}
    assert opened.count() == n

    def timed(name, action, wait):
        began = time.perf_counter()
        action()
        wait()
        times[name] = time.perf_counter() - began

    rows = page.locator(".row")
    assert 5 < rows.count() < 60
    page.focus("#list")
    timed(
        "last row",
        lambda: page.keyboard.press("End"),
        lambda: page.wait_for_selector(f"#row-{n - 1}"),
    )
    assert rows.count() < 60
    assert page.get_attribute(f"#row-{n - 1}", "aria-posinset") == str(n)
    found = sum(
        "lattice" in f"{e.fields.get('name', '')} {text_of(e)}".lower() for e in large.entries
    )
    timed("first search", lambda: page.fill("#q", "lattice"), lambda: opened.filtered(found))
    timed(
        "filter",
        lambda: page.select_option("#level", "2"),
        lambda: opened.filtered(
            sum("lattice" in f"{e.id} {text_of(e)}".lower() for e in large.of("behavior"))
        ),
    )
    timed(
        "open an entry",
        lambda: page.goto(f"file://{large.path}{memory(entry=large.entries[-1].id)}"),
        lambda: page.wait_for_selector("#detail h3"),
    )
    with capsys.disabled():
        said = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())
        print(f"\n{n:,} entries, {large.told}: {said}")
