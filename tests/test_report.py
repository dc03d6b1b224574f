"""The report: what its page holds for runs in every state, and what it refuses."""

import base64
import gzip
import importlib.util
import json
import re
import shutil

import pytest
from synthetic_run import BUDGETED, HOSTILE, write_large_run, write_run

pytest.importorskip("plotly", reason="pip install -r requirements-report.txt")

from tools.report import browser
from tools.report.__main__ import main
from tools.report.charts import COLOURS
from tools.report.learning import curve
from tools.report.page import STATIC
from tools.report.runs import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "synthetic")


def page(*folders, out):
    assert main([*map(str, folders), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def unpacked(text, name):
    found = re.search(rf'id="block-{name}">([^<]*)</script>', text)
    assert found, f"no block {name}"
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def words(text):
    """The page without its data, scripts and styles."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


# --- states -------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_draws_every_chart(run, tmp_path, capsys):
    text = page(run, out=tmp_path / "report.html")
    assert "MiB in" in capsys.readouterr().out
    assert "finished, 6 steps" in words(text)
    keys = [chart["key"] for chart in unpacked(text, "charts")]
    assert " ".join(keys) == (
        "accuracy scaling headroom solved concepts loss policy sizes capacity turnover age "
        "citations evenness utility duplicates leaks time degenerate"
    )
    for key in keys:
        assert f'id="plot-{key}" role="img" aria-label="' in text


def test_a_run_on_programs_has_a_chart_of_unit_tests(run, tmp_path):
    folder = tmp_path / "programs"
    shutil.copytree(run, folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    more = {"tests_passed": 0.25, "feedback/revealed": 0.03}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r | more) + "\n" for r in rows))
    scores = json.loads((folder / "evaluation.json").read_text())
    programs = {"tests_passed": 0.5, "majority": None, "majority_at": {}, "chance": None}
    programs |= {"headroom": None, "constant": None}
    (folder / "evaluation.json").write_text(
        json.dumps({name: s | programs for name, s in scores.items()})
    )
    charts = {c["key"]: c for c in unpacked(page(folder, out=tmp_path / "r.html"), "charts")}
    assert "tests passed in training" in charts["tests"]["alternative"]
    assert "25.0%" in charts["tests"]["alternative"] and "50.0%" in charts["tests"]["alternative"]
    assert "chance" not in charts["accuracy"]["alternative"]


def test_every_chart_has_words_units_and_a_table(run, tmp_path):
    for chart in unpacked(page(run, out=tmp_path / "r.html"), "charts"):
        assert chart["title"] and chart["note"] and chart["alternative"].endswith(".")
        assert chart["rows"] and all(len(row) == len(chart["columns"]) for row in chart["rows"])
        assert chart["figure"]["data"]
        assert (
            chart["figure"]["layout"]["xaxis"].get("title") or "xaxis2" in chart["figure"]["layout"]
        )


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"done": 3}, "still running or killed at step 3 of 6"),
        ({"done": 0}, "empty: no step was finished"),
    ],
)
def test_a_run_that_is_not_finished_says_so_at_the_top(tmp_path, shape, said):
    text = words(page(write_run(tmp_path / "run", **shape), out=tmp_path / "r.html"))
    assert said in text and text.index(said) < text.index('id="learning"')


def test_a_run_that_ended_with_its_budget_of_tokens_is_finished(tmp_path):
    folder = write_run(tmp_path / "run", done=3)
    assert not read_run(folder).finished
    (folder / "totals.json").write_text("{}")
    assert (read_run(folder).state, read_run(folder).finished) == ("finished, 3 steps", True)


def test_a_killed_run_loses_its_half_line_and_nothing_else(tmp_path):
    folder = write_run(tmp_path / "run", done=3)
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole + b'{"step": 3, "accur')
    (folder / "samples.jsonl").open("ab").write(b'{"step": 3, "rollout": "toy')
    found = read_run(folder)
    assert [row["step"] for row in found.metrics] == [0, 1, 2]
    assert len(found.rows) == 3 * 16
    cut = [warning for warning in found.warnings if "cut short" in warning]
    assert len(cut) == 2 and "metrics.jsonl" in cut[0] and "samples.jsonl" in cut[1]


def test_a_damaged_line_in_the_middle_is_counted(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join([lines[0], b"not json\n", *lines[2:]]))
    found = read_run(folder)
    assert "1 damaged lines of metrics.jsonl were left out." in found.warnings
    assert [row["step"] for row in found.metrics] == [0, 2, 3, 4, 5]


def test_a_run_without_memory_has_sentences_in_place_of_charts(tmp_path):
    text = page(write_run(tmp_path / "run", memory=False), out=tmp_path / "r.html")
    assert words(text).count("No run here holds a bank that can be read") == 5
    assert "capacity" not in [chart["key"] for chart in unpacked(text, "charts")]
    index = unpacked(text, "memory-0")
    assert index["entries"]["text"] == [] and len(index["rollouts"]["id"]) == 6 * 16


def test_a_checkpoint_stands_in_for_a_bank_that_is_missing_or_damaged(tmp_path):
    folder = write_run(tmp_path / "run")
    place = folder / "checkpoints" / "6" / "bank" / "bank"
    place.parent.mkdir(parents=True)
    (folder / "memory").rename(place)
    (folder / "memory").mkdir()
    (folder / "memory" / "manifest.json").write_text("{")
    found = read_run(folder)
    assert found.memory.source == "checkpoints/6/bank/bank" and found.memory.entries
    assert any("memory could not be read" in warning for warning in found.warnings)


def test_rows_of_older_runs_have_no_tokens_and_keep_their_response(tmp_path):
    text = page(write_run(tmp_path / "run", old=True), out=tmp_path / "r.html")
    first = unpacked(text, "rollouts-0-0")[0]
    assert first["pieces"] is None and first["nats"] is None and first["response"]


def test_several_runs_share_charts_and_differ_in_name(run, tmp_path):
    other = write_run(tmp_path / "other", seed=1)
    text = page(run, other, out=tmp_path / "r.html")
    assert "<h2>synthetic</h2>" in text and "<h2>synthetic (2)</h2>" in text
    charts = {chart["key"]: chart for chart in unpacked(text, "charts")}
    assert charts["solved"]["title"] == "Solved sets: synthetic and synthetic (2)"
    colours = {
        trace["name"]: trace["line"]["color"] for trace in charts["headroom"]["figure"]["data"]
    }
    assert len(set(colours.values())) == 2
    assert {row[2] for row in charts["time-1"]["rows"]} == {0.5}


# --- numbers ------------------------------------------------------------------------------------


def test_solved_sets_count_each_problem_once(run, tmp_path):
    charts = unpacked(page(run, out=tmp_path / "r.html"), "charts")
    (solved,) = [chart for chart in charts if chart["key"] == "solved"]
    for rule in ("any sample correct", "most samples correct"):
        assert sum(sum(row[2:]) for row in solved["rows"] if row[1] == rule) == 20
    scores = json.loads((run / "evaluation.json").read_text())
    both = sum(
        a > 0.5 and b > 0.5
        for a, b in zip(
            *(scores[n]["per_problem"].values() for n in ("before", "after")), strict=True
        )
    )
    assert sum(row[4] for row in solved["rows"] if row[1] == "most samples correct") == both


def test_a_curve_without_its_points_has_its_two_ends():
    scores = {"average": 0.2, "best": 0.5, "num_samples": 16}
    assert curve(scores, "pass_at", "best") == {1: 0.2, 16: 0.5}
    assert curve({**scores, "pass_at": {"16": 0.5, "2": 0.3}}, "pass_at", "best") == {
        2: 0.3,
        16: 0.5,
    }


def test_phases_are_stacked_and_their_parts_are_not(run, tmp_path):
    charts = unpacked(page(run, out=tmp_path / "r.html"), "charts")
    (time,) = [chart for chart in charts if chart["key"] == "time"]
    bars = [trace["name"] for trace in time["figure"]["data"] if trace["type"] == "bar"]
    assert bars == ["attempt", "reflect", "distill"]
    assert time["columns"][-2:] == ["within: idle", "within: sync"]


@pytest.mark.parametrize("colour", COLOURS)
def test_a_runs_colour_is_seen_on_paper_and_in_the_dark(colour):
    """A contrast of 3 at least (WCAG 2.1, 1.4.11) with both backgrounds of the page."""

    def luminance(text):
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    papers = re.findall(r"--paper: (#\w{6})", (STATIC / "page.css").read_text())
    assert len(papers) == 2
    for paper in papers:
        low, high = sorted((luminance(colour), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 3


# --- the browser's data -------------------------------------------------------------------------


def test_provenance_is_closed_from_loss_to_attempt(run, tmp_path):
    """Each cited entry of each rollout is in the index, and so is what it was read from."""
    index = unpacked(page(run, out=tmp_path / "r.html"), "memory-0")
    entries = index["entries"]
    cited = [i for row in index["rollouts"]["cited"] for i in row if isinstance(i, int)]
    assert {entries["level"][i] for i in cited} == {0, 1, 2}
    for i, level in enumerate(entries["level"]):
        known = [s for s in entries["sources"][i] if isinstance(s, int)]
        assert all(entries["level"][s] == level - 1 for s in known)
        assert level == 0 or known


def test_a_teachers_prompt_is_cut_into_what_it_shows():
    student = "<|user|>\nWhat is 1 + 1?\n<|assistant|>\n"
    prompt = (
        "<|user|>\nWhat is 1 + 1?\nStrategies from earlier correct attempts:\n\n- Add them."
        "\nCorrect solution:\n\n2\n\nCorrectly solve the original question.\n<|assistant|>\n"
    )
    found = browser.segments(student, prompt, {7: "Add them."})
    assert "".join(text for text, _, _ in found) == prompt
    assert [s for s in found if s[2] is not None] == [("Add them.", "strategies", 7)]
    assert [name for _, name, _ in found] == [
        "",
        "strategies",
        "strategies",
        "strategies",
        "sibling",
        "",
        "",
    ]
    assert browser.segments(student, student, {}) == [(student, "", None)]


def test_rollouts_beyond_the_budget_cover_every_behavior_and_every_step(tmp_path):
    found = read_run(write_run(tmp_path / "run", steps=8))
    chosen = browser.choose(found, 40, 10**9)
    assert len(chosen) == 40 and {row["step"] for row in chosen} == set(range(8))
    shown = {key for row in chosen for key in row["cited"] if key.startswith("behavior_")}
    assert shown == {k for row in found.rows for k in row["cited"] if k.startswith("behavior_")}
    most = browser.choose(found, 1000, 20 * chosen[0]["size"])
    assert sum(row["size"] for row in most) <= 20 * chosen[0]["size"]


def test_texts_beyond_the_budget_are_counted_and_the_oldest_left_go_first(run):
    entries = list(read_run(run).memory.entries.values())
    texts, cut, without = browser._texts(entries, 300)
    assert cut == 0 and without == sum(text is None for text in texts) > 0
    for entry, text in zip(entries, texts, strict=True):
        assert text is not None or entry.level == "experience"
    kept = [e for e, text in zip(entries, texts, strict=True) if text and e.level == "experience"]
    assert kept and all(entry.removed is None for entry in kept)


# --- what is untrusted --------------------------------------------------------------------------


def test_no_text_of_a_run_is_markup(tmp_path):
    text = page(write_run(tmp_path / "run", hostile=True), out=tmp_path / "r.html")
    assert HOSTILE not in text
    assert "<img" not in words(text) and "&lt;img" in words(text)
    assert any(HOSTILE in t for t in unpacked(text, "memory-0")["entries"]["text"])
    for chart in unpacked(text, "charts"):
        names = [trace.get("name") or "" for trace in chart["figure"]["data"]]
        assert not any("<" in name for name in names)


def test_the_policy_of_the_page_admits_its_own_scripts_and_no_connection(run, tmp_path):
    import hashlib

    text = page(run, out=tmp_path / "r.html")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'" in policy and "http" not in policy
    allowed = re.search(r"script-src ([^;]*)", policy)[1].split()
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert allowed == [f"'sha256-{value}'" for value in hashes]


# --- the command --------------------------------------------------------------------------------


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_folder_that_is_no_run_is_named_with_what_it_holds(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    line = refused(capsys, tmp_path)
    assert line == (
        f"error: run {tmp_path}: must hold config.json or metrics.jsonl; it holds notes.txt; name "
        "the folder of one run, such as runs/quickstart"
    )
    assert "there is none" in refused(capsys, tmp_path / "nowhere")
    assert not (tmp_path / "report.html").exists()


def test_a_file_that_is_no_report_is_kept(run, tmp_path, capsys):
    other = tmp_path / "thesis.html"
    other.write_text("<html>mine</html>")
    assert "give another name with --out" in refused(capsys, run, "--out", other)
    assert "add a name to it" in refused(capsys, run, "--out", tmp_path)
    assert other.read_text() == "<html>mine</html>"


def test_a_report_is_written_beside_its_run_and_replaced(tmp_path, capsys):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", name="two")
    assert main([str(one)]) == 0 and main([str(one)]) == 0
    assert (one / "report.html").exists()
    assert main([str(one), str(two)]) == 0
    assert (tmp_path / "report.html").exists()


def test_without_plotly_one_line_says_what_to_install(run, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refused(capsys, run)
    assert line == "error: tools.report needs plotly; pip install -r requirements-report.txt"


@pytest.mark.slow
def test_a_run_of_500_steps_and_3000_problems_keeps_the_budget(tmp_path, capsys):
    """Time is printed, not asserted: it belongs to the machine."""
    text = page(write_large_run(tmp_path / "run", **BUDGETED), out=tmp_path / "r.html")
    with capsys.disabled():
        print(f"\n{len(text) / 1e6:.1f} MB;", capsys.readouterr().out)
    assert len(text.encode()) < 40e6
    index = unpacked(text, "memory-0")
    assert len(index["rollouts"]["id"]) == browser.MAX_ROLLOUTS and index["logged"] == 32_000
