"""What a run writes and shows: complete lines, one word for what is not finite, exact rewinds."""

import io
import json
import pty
import time

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from pmd_jax.telemetry import (
    EvaluationRow,
    Progress,
    RunWriter,
    StepReport,
    Stopwatch,
    duration,
    summary_table,
)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def writer(tmp_path):
    writer = RunWriter(tmp_path / "runs" / "a", tensorboard=False)
    yield writer
    writer.close()


# --- files ----------------------------------------------------------------------------------


def test_a_step_is_one_line_at_once(writer):
    writer.log_step(0, {"loss/kl_nats": 0.5, "phase": "warm", "tokens": np.int32(7)})
    (row,) = rows(writer.folder / "metrics.jsonl")  # read while the writer is open
    assert row.pop("seconds") >= 0
    assert row == {"step": 0, "loss/kl_nats": 0.5, "phase": "warm", "tokens": 7}


def test_what_is_not_finite_is_null_and_named(writer):
    writer.log_step(0, {"a": float("nan"), "b": np.float32("inf"), "c": 1.0})
    (row,) = rows(writer.folder / "metrics.jsonl")
    assert (row["a"], row["b"], row["c"]) == (None, None, 1.0)
    assert row["non_finite"] == ["a", "b"]


@pytest.mark.parametrize("value", [np.zeros(2), None, [1], {}])
def test_a_metric_is_one_number_or_text(writer, value):
    with pytest.raises(ValueError, match=r"metrics\.a: must be one number or a str; got"):
        writer.log_step(0, {"a": value})


def test_a_metric_may_not_take_a_name_of_the_line(writer):
    with pytest.raises(ValueError, match=r"metrics\.seconds: must not be one of step, seconds"):
        writer.log_step(0, {"seconds": 1.0})


def test_samples_keep_their_text_and_carry_the_step(writer):
    text = "λ = 2\u2028\r\n\ud800"
    writer.log_samples(3, [{"text": text, "tokens": np.array([1, 2])}, {"step": 3, "x": np.nan}])
    lines = (writer.folder / "samples.jsonl").read_text().split("\n")
    assert [json.loads(line) for line in lines[:2]] == [
        {"step": 3, "text": text, "tokens": [1, 2]},
        {"step": 3, "x": None},
    ]
    assert lines[2:] == [""]
    assert "λ = 2" in lines[0]  # readable as it is
    with pytest.raises(ValueError, match="step is the step of the log, 3; got 2 in a row"):
        writer.log_samples(3, [{"step": 2}])


def test_the_config_is_written_whole(writer):
    writer.write_config({"steps": 2, "sources": ("a", "b")})
    written = json.loads((writer.folder / "config.json").read_text())
    assert written == {"steps": 2, "sources": ["a", "b"]}


def test_evaluations_are_merged_by_name(writer):
    writer.write_evaluation("before", {"avg": 0.2})
    writer.write_evaluation("after", {"avg": 0.3})
    writer.write_evaluation("after", {"avg": np.float64(0.4)})
    written = json.loads((writer.folder / "evaluation.json").read_text())
    assert written == {"before": {"avg": 0.2}, "after": {"avg": 0.4}}
    assert not list(writer.folder.glob("*.part"))


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run folder: must be writable; got .*file") as error:
        RunWriter(tmp_path / place)
    assert "\n" not in str(error.value)


def test_rewind_forgets_the_step_and_later_and_a_torn_line(writer):
    for step in range(4):
        writer.log_step(step, {"a": step})
        writer.log_samples(step, [{"b": step}, {"b": -step}])
    before = (writer.folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    writer.close()
    with (writer.folder / "samples.jsonl").open("ab") as file:
        file.write('{"step": 1, "text": "λ'.encode()[:-1])  # cut inside a character

    resumed = RunWriter(writer.folder, tensorboard=False)
    resumed.rewind(2)
    assert (writer.folder / "metrics.jsonl").read_bytes() == b"".join(before[:2])
    assert [row["step"] for row in rows(writer.folder / "samples.jsonl")] == [0, 0, 1, 1]
    resumed.log_step(2, {"a": 2})
    resumed.close()
    assert [row["step"] for row in rows(writer.folder / "metrics.jsonl")] == [0, 1, 2]


def test_rewind_continues_the_clock_of_the_steps_it_keeps(writer):
    lines = ['{"step": 0, "seconds": 100.0}\n', '{"step": 1, "seconds": 500.0}\n']
    (writer.folder / "metrics.jsonl").write_text("".join(lines))
    writer.rewind(1)
    writer.log_step(1, {})
    assert 100 <= rows(writer.folder / "metrics.jsonl")[-1]["seconds"] < 200


def test_a_run_that_resumes_is_not_over(writer):
    writer.write_totals({"steps": 4})
    writer.rewind(4)
    assert not (writer.folder / "totals.json").exists()


def test_rewind_keeps_a_last_line_that_lacks_only_its_end(writer):
    (writer.folder / "samples.jsonl").write_text('{"step": 0}')
    writer.rewind(5)
    writer.log_samples(5, [{}])
    assert rows(writer.folder / "samples.jsonl") == [{"step": 0}, {"step": 5}]


def test_rewind_refuses_a_damaged_line(writer):
    (writer.folder / "metrics.jsonl").write_text('{"st\n{"step": 1, "seconds": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: must be JSON; got"):
        writer.rewind(5)
    assert (writer.folder / "metrics.jsonl").read_text().startswith('{"st\n')


def test_tensorboard_holds_the_numbers_in_groups_and_hides_what_was_rewound(tmp_path):
    writer = RunWriter(tmp_path)
    writer.rewind(4)
    writer.log_step(4, {"loss/kl": 0.5, "loss/bad": np.nan, "tokens": 7, "note": "text"})
    writer.close()
    events = read_events(*(tmp_path / "tensorboard").iterdir())
    scalars = {v.tag: v.simple_value for event in events for v in event.summary.value}
    assert scalars == {"loss/kl": 0.5, "run/tokens": 7.0}
    assert 4 in [event.step for event in events if event.session_log.status == 1]  # START


def read_events(path):
    """Records of a TensorBoard file: length (8 bytes), checksum (4), event, checksum (4)."""
    data, events = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_without_tensorboard_there_is_no_folder_for_it(writer):
    writer.log_step(0, {"a": 1})
    assert not (writer.folder / "tensorboard").exists()


# --- time per phase -------------------------------------------------------------------------


def test_stopwatch_adds_up_per_phase_and_starts_anew():
    watch = Stopwatch()
    for _ in range(2):
        with watch("rollout"):
            time.sleep(0.01)
    with pytest.raises(KeyError), watch("distill"):
        raise KeyError
    taken = watch.take()
    assert list(taken) == ["rollout", "distill"]
    assert taken["rollout"] >= 0.02 > taken["distill"]
    assert watch.take() == {}


# --- what a person watches ------------------------------------------------------------------

REPORT = StepReport(
    accuracy=0.25,
    loss_nats=0.0123,
    usable_insights=None,
    memory_sizes={"experience": 32, "insight": 8, "behavior": 0},
    tokens_per_second=1234.5,
)


def test_off_a_terminal_a_step_is_one_plain_line():
    stream = io.StringIO()
    with Progress(num_steps=3, first_step=1, console=Console(file=stream)) as progress:
        progress.phase("attempt")
        progress.step_done(1, REPORT)
        progress.note("saved [step 2]")
        progress.step_done(2, REPORT)
    first, second, third = stream.getvalue().splitlines()
    assert first == (
        "step 2/3 | accuracy 25.0% | loss 0.0123 | usable insights - | "
        "experience 32 insight 8 behavior 0 | 1,234 tokens/s | 0:00 left"
    )
    assert second == "saved [step 2]"
    assert third.startswith("step 3/3")
    assert stream.getvalue().replace("\n", "").isprintable()


def test_time_left_does_not_count_the_step_that_compiles():
    progress = Progress(num_steps=10, console=Console(file=io.StringIO()))
    progress._durations, progress._num_done = [600.0, 9.0, 10.0, 11.0], 4
    assert progress._time_left() == "1:00"
    progress._durations, progress._num_done = [600.0], 1
    assert progress._time_left() == "1:30:00"


def test_on_a_terminal_the_bar_shows_fields_and_phase(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = show_on_terminal(lambda progress: time.sleep(0.4))
    for text in ("step 1/2", "accuracy 25.0%", "reflect 0:00", "saved [step 1]", "tokens/s"):
        assert text in shown


def show_on_terminal(wait):
    main, side = pty.openpty()
    with open(side, "w") as stream, open(main, "rb", buffering=0) as screen:
        with Progress(num_steps=2, console=Console(file=stream)) as progress:
            progress.step_done(0, REPORT)
            progress.phase("reflect")
            progress.note("saved [step 1]")
            wait(progress)
        stream.flush()
        return screen.read(100_000).decode()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (3665, "1:01:05")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_the_summary_names_every_score_beside_its_baselines():
    stream = io.StringIO()
    summary_table(
        [
            EvaluationRow("before", 0.25, (0.2, 0.3), 0.3, 0.9),
            EvaluationRow("after", 0.5),
        ],
        num_samples=16,
        chance=0.255,
        constant_letter=0.31,
        memory_sizes={"experience": 1200, "insight": 40},
        loss_fraction=0.75,
        seconds=125.0,
        num_tokens=34567,
        console=Console(file=stream),
    )
    lines = [" ".join(line.replace("│", " ").split()) for line in stream.getvalue().splitlines()]
    assert "before 25.0% 20.0% to 30.0% 30.0% 90.0%" in lines
    assert "after 50.0% - - -" in lines
    assert "chance 25.5%" in lines
    assert "best constant letter 31.0%" in lines
    assert "memory 1,200 experience, 40 insight" in lines
    assert "rollouts with loss 75.0%" in lines
    assert "cost 2:05 of wall clock, 34,567 sampled tokens" in lines
    assert "\x1b" not in stream.getvalue()
