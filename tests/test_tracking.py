"""Trackers, played by small fakes: what they get, how often, and what happens when they fail."""

import dataclasses
import json
import sys
import threading
import types

import numpy as np
import pytest
from test_trainer import config_for, lines, model, scripted  # noqa: F401  fixtures

from pmd_jax import run, settings, tracking
from pmd_jax.run import prepare, train
from pmd_jax.telemetry import RunWriter
from pmd_jax.tracking import Tracking, TrackingConfig, check_installed, scalars, start_tracking

BOTH = TrackingConfig("project", "offline", "http://server", "experiment")


class Service:
    """What both fakes share: runs by id, as the service would show them. fails: raise on log."""

    def __init__(self):
        self.runs = {}
        self.fails = False
        self.gate = threading.Event()
        self.gate.set()

    def open(self, run_id, **about):
        run_id = run_id or f"id{len(self.runs)}"
        self.runs.setdefault(run_id, {"log": [], "ends": [], "params": {}, "tags": {}})
        self.runs[run_id].update(about)
        return run_id

    def log(self, run_id, step, numbers):
        self.gate.wait()
        if self.fails:
            raise ConnectionError("no route to host\nand a long story")
        self.runs[run_id]["log"].append((step, dict(numbers)))

    @property
    def run(self):
        [only] = self.runs.values()
        return only

    def logged(self, name):
        return [(step, numbers[name]) for step, numbers in self.run["log"] if name in numbers]


@pytest.fixture
def wandb(monkeypatch):
    service, module = Service(), types.ModuleType("wandb")

    class Run:
        def __init__(self, run_id):
            self.id, self.url = run_id, "https://wandb/run"

        def log(self, numbers, step):
            service.log(self.id, step, numbers)

        def finish(self, exit_code):
            service.runs[self.id]["ends"].append(exit_code)

    def init(id, project, name, config, **settings):
        return Run(service.open(id, project=project, name=name, params=config, settings=settings))

    module.init, module.Settings = init, dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    return service


@pytest.fixture
def mlflow(monkeypatch):
    """Like the real one it refuses a parameter that changes, and more than a batch may hold."""
    service, module = Service(), types.ModuleType("mlflow")
    entities = types.SimpleNamespace(
        Param=lambda key, value: (key, value),
        Metric=lambda key, value, timestamp, step: (key, value, step),
    )

    class MlflowClient:
        def __init__(self, tracking_uri):
            assert tracking_uri == "http://server"

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return name

        def create_run(self, experiment, run_name):
            run_id = service.open(None, project=experiment, name=run_name, status="RUNNING")
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

        def get_run(self, run_id):
            params = dict(service.runs[run_id]["params"])
            return types.SimpleNamespace(data=types.SimpleNamespace(params=params))

        def update_run(self, run_id, status):
            service.runs[run_id]["status"] = status

        def set_terminated(self, run_id, status):
            service.runs[run_id]["status"] = status

        def set_tag(self, run_id, name, value):
            service.runs[run_id]["tags"][name] = value

        def log_batch(self, run_id, metrics=(), params=()):
            assert len(params) <= 100 and len(metrics) <= 1000
            for key, value in params:
                assert service.runs[run_id]["params"].setdefault(key, value) == value
            if metrics:
                numbers = {key: value for key, value, _ in metrics}
                service.log(run_id, metrics[0][2], numbers)

    module.entities, module.MlflowClient = entities, MlflowClient
    module.get_tracking_uri = lambda: "default"
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return service


# --- what is sent ---------------------------------------------------------------------------


def test_both_get_the_numbers_of_metrics_jsonl_the_configuration_and_the_end(
    wandb, mlflow, tmp_path
):
    parameters = {"steps": 3, "optimizer": {"learning_rate": 0.5}, "tracking": {"secret": 1}}
    parameters |= {f"more{i}": i for i in range(300)}
    writer = RunWriter(tmp_path)
    with start_tracking(BOTH, tmp_path, parameters) as tracker:
        tracker.log_evaluation(0, "before", {"average": 0.25, "split": "test", "interval": (0, 1)})
        tracker.log_evaluation(0, "before, with memory", {"average": 0.5})
        for step in range(2):
            metrics = {"loss": 0.5, "loss/kl": step, "word": "x", "bad": np.float32("nan")}
            tracker.log(step, writer.log_step(step, metrics))
    written = lines(tmp_path)
    for service in (wandb, mlflow):
        assert service.run["name"] == tmp_path.name
        assert service.logged("evaluation/average") == [(0, 0.25)]
        assert service.logged("evaluation_with_memory/average") == [(0, 0.5)]
        assert service.logged("run/loss") == [(0, 0.5), (1, 0.5)]
        assert service.logged("loss/kl") == [(0, 0.0), (1, 1.0)]
        assert service.logged("run/seconds") == [(row["step"], row["seconds"]) for row in written]
        assert service.run["log"][-1][1].keys() == {"run/loss", "loss/kl", "run/seconds"}
    assert wandb.run["params"]["optimizer"] == {"learning_rate": 0.5}
    assert mlflow.run["params"]["optimizer.learning_rate"] == "0.5"
    assert len(mlflow.run["params"]) == 302 and "tracking" not in wandb.run["params"]
    assert wandb.run["ends"] == [0] and mlflow.run["status"] == "FINISHED"


def test_a_run_that_fails_is_marked_as_failed(wandb, mlflow, tmp_path):
    with pytest.raises(KeyError), start_tracking(BOTH, tmp_path, {}):
        raise KeyError("a bug")
    assert wandb.run["ends"] == [1] and mlflow.run["status"] == "FAILED"


def test_tags_are_those_of_tensorboard():
    values = {"loss": 1, "loss/kl": 0.5, "name": "x", "bad": float("inf"), "none": None}
    assert scalars(values) == {"run/loss": 1.0, "loss/kl": 0.5}


# --- resuming -------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_in_its_own_run_and_sends_no_step_twice(wandb, mlflow, tmp_path):
    def part(logged, resume, steps):
        with start_tracking(BOTH, tmp_path, {"steps": steps}, resume) as tracker:
            for step in logged:
                tracker.log(step, {"loss": 10 * step})

    part(range(3), False, steps=4)
    part(range(1, 5), True, steps=5)
    for service in (wandb, mlflow):
        assert service.logged("run/loss") == [(step, 10.0 * step) for step in range(5)]
    assert mlflow.run["params"]["steps"] == "4" and mlflow.run["tags"] == {"steps": "5"}
    assert mlflow.run["status"] == "FINISHED"


def test_a_step_whose_sending_was_cut_off_is_not_sent_again(wandb, tmp_path):
    config = dataclasses.replace(BOTH, mlflow_experiment="", mlflow_uri="")
    wandb.fails = True
    with start_tracking(config, tmp_path, {}) as tracker:
        tracker.log(0, {"loss": 1})
    wandb.fails = False
    with start_tracking(config, tmp_path, {}, resume=True) as tracker:
        tracker.log(0, {"loss": 1})
        tracker.log(1, {"loss": 2})
    assert wandb.logged("run/loss") == [(1, 2.0)]


def test_another_project_and_a_run_that_starts_anew_get_runs_of_their_own(wandb, mlflow, tmp_path):
    for config, resume in (
        (BOTH, False),
        (dataclasses.replace(BOTH, wandb_project="other"), True),
        (BOTH, False),
    ):
        with start_tracking(config, tmp_path, {}, resume) as tracker:
            tracker.log(0, {"loss": 1})
    assert len(wandb.runs) == 3 and len(mlflow.runs) == 2
    assert all(len(one["log"]) == 1 for one in wandb.runs.values())


# --- failing --------------------------------------------------------------------------------


def test_a_tracker_that_fails_is_off_with_one_note_and_the_other_goes_on(
    wandb, mlflow, tmp_path, capsys
):
    wandb.fails = True
    with start_tracking(BOTH, tmp_path, {}) as tracker:
        for step in range(3):
            tracker.log(step, {"loss": 1})
    note = "wandb: off for the rest of this run (ConnectionError: no route to host); "
    assert capsys.readouterr().err == f"{note}metrics.jsonl has all\n"
    assert tracker.notes() == [] and wandb.run["log"] == [] and wandb.run["ends"] == []
    assert len(mlflow.run["log"]) == 3


def test_a_tracker_that_hangs_delays_neither_a_step_nor_for_long_the_end(
    wandb, mlflow, tmp_path, monkeypatch
):
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.2)
    wandb.gate.clear()
    tracker = start_tracking(BOTH, tmp_path, {})
    for step in range(3):
        tracker.log(step, {"loss": 1})  # returns, though the first is not sent yet
    with tracker:
        pass
    assert wandb.run["log"] == [] and len(mlflow.run["log"]) == 3
    assert tracker._senders[0].error == "not all was sent within 0 seconds"
    wandb.gate.set()


def test_a_tracker_that_refuses_at_start_says_so_and_closes_the_others(wandb, mlflow, tmp_path):
    sys.modules["mlflow"].MlflowClient = lambda tracking_uri: 1 / 0
    with pytest.raises(ValueError, match=r"mlflow must start a run in http://server exp"):
        start_tracking(BOTH, tmp_path, {})
    assert wandb.run["ends"] == [1]


def test_what_is_not_asked_for_is_not_imported(monkeypatch, tmp_path):
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)  # any import of it fails
    for config in (TrackingConfig(), TrackingConfig(wandb_project="p", wandb_mode="disabled")):
        check_installed(config)
        with start_tracking(config, tmp_path, {}) as tracker:
            tracker.log(0, {"loss": 1})
    assert list(tmp_path.iterdir()) == []
    for config, message in (
        (TrackingConfig(wandb_project="p"), r"wandb_project: needs .*; pip install wandb, or"),
        (TrackingConfig(mlflow_experiment="e"), r"mlflow_experiment: .*; pip install mlflow, or"),
    ):
        with pytest.raises(ValueError, match=message):
            check_installed(config)
    with pytest.raises(ValueError, match=r"mlflow_experiment: must name an experiment where"):
        TrackingConfig(mlflow_uri="http://server")


# --- in a run -------------------------------------------------------------------------------


def test_a_missing_package_is_told_before_a_model_is_loaded(tmp_path, monkeypatch, model):  # noqa: F811
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(run, "_load", lambda *_: pytest.fail("loads the model first"))
    config = config_for(model, tmp_path, tracking=TrackingConfig(wandb_project="p"))
    with pytest.raises(ValueError, match="pip install wandb"):
        prepare(config)


def test_a_run_of_before_is_resumed_with_trackers_that_fail_without_harm(
    tmp_path,
    monkeypatch,
    capsys,
    wandb,
    mlflow,
    model,  # noqa: F811
):
    config = config_for(model, tmp_path, tracking=BOTH)
    folder = train(config).folder
    steps = [row["step"] for row in lines(folder)]
    for service in (wandb, mlflow):
        assert [step for step, _ in service.logged("run/loss")] == steps
        assert [s for s, _ in service.logged("evaluation/average")] == [0, config.steps]
    before = json.loads((folder / "config.json").read_text())
    del before["tracking"]  # as an older version wrote it
    (folder / "config.json").write_text(json.dumps(before))
    wandb.fails = True
    longer = dataclasses.replace(config, steps=config.steps + 1)
    capsys.readouterr()
    assert train(longer, resume=True).steps == longer.steps
    told = capsys.readouterr()
    assert (told.out + told.err).count("wandb: off for the rest of this run") == 1
    assert [step for step, _ in mlflow.logged("run/loss")] == [*steps, config.steps]
    assert json.loads((folder / "config.json").read_text())["tracking"] == settings.to_dict(BOTH)


def test_no_trackers_is_fine():
    with Tracking() as tracker:
        tracker.log(0, {"loss": 1})
        assert tracker.notes() == []
