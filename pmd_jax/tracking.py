"""The numbers of a run in Weights & Biases and MLflow, where they are installed and asked for.

    runs/<name>/tracking/wandb.json, mlflow.json    the tracker's id of the run, and what was sent

They get what metrics.jsonl gets, evaluations as numbers of their step, and the configuration. Each
tracker is sent to by a thread of its own: one that is slow delays nothing, and one that fails is
off from then on, with one note. The files of the run stay the record.

A step is sent once. It is noted as sent before it is, so a run that is killed in between lacks one
step there, and a resumed run, which repeats what came after its checkpoint, sends none twice.

Left out: TensorBoard, which is always on (telemetry.py), samples, texts and weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

CLOSE_SECONDS = 60.0
"""How long the end of a run waits for what was not sent yet."""

PARAMS_PER_CALL = 100
METRICS_PER_CALL = 1000
MAX_PARAM_CHARS = 6000
"""Limits of MLflow's log_batch."""


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where numbers go beside the run's own files; nowhere by default.

    wandb_project: of Weights & Biases, "" for none. wandb_mode: offline writes to <run>/wandb, for
        `wandb sync`.
    mlflow_experiment: "" for no MLflow. mlflow_uri: "" for MLflow's own default; name and password
        belong into MLFLOW_TRACKING_USERNAME and _PASSWORD, since this is saved in config.json.
    """

    wandb_project: str = ""
    wandb_mode: Literal["online", "offline", "disabled"] = "online"
    mlflow_uri: str = ""
    mlflow_experiment: str = ""

    def __post_init__(self) -> None:
        if self.mlflow_uri and not self.mlflow_experiment:
            raise ValueError(
                "mlflow_experiment: must name an experiment where mlflow_uri is given; got ''"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The trackers that are asked for."""
        wandb = bool(self.wandb_project) and self.wandb_mode != "disabled"
        asked = {"wandb": wandb, "mlflow": bool(self.mlflow_experiment)}
        return tuple(name for name, is_asked in asked.items() if is_asked)


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among `values` by tag: "loss/kl" keeps its group, "loss" is in "run"."""
    return {
        name if "/" in name else f"run/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


@runtime_checkable
class Tracker(Protocol):
    """One run at a service. where: what a person is told. run_id: what a resumed run needs."""

    where: str
    run_id: str

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Raises anything where the service does."""
        ...

    def close(self, is_done: bool) -> None:
        """The run ended; well where `is_done`."""
        ...


# --- the two tenants ----------------------------------------------------------------------------


class Wandb:
    """A run of Weights & Biases, whose files lie in <run>/wandb."""

    def __init__(
        self,
        config: TrackingConfig,
        folder: Path,
        run_id: str | None,
        parameters: Mapping[str, Any],
    ):
        import wandb

        is_online = config.wandb_mode == "online"
        self._run: Any = wandb.init(
            project=config.wandb_project,
            name=folder.name,
            id=run_id,
            resume="allow" if is_online and run_id else None,  # offline, the id joins the parts
            config=dict(parameters),
            allow_val_change=run_id is not None,
            dir=str(folder),
            mode=config.wandb_mode,
            settings=wandb.Settings(console="off", silent=True),  # the terminal is the run's
        )
        self.run_id = self._run.id
        self.where = self._run.url if is_online else str(folder / "wandb")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, is_done: bool) -> None:
        self._run.finish(exit_code=0 if is_done else 1)


class Mlflow:
    """A run of an MLflow experiment. A parameter that a resumed run changed becomes a tag."""

    def __init__(
        self,
        config: TrackingConfig,
        folder: Path,
        run_id: str | None,
        parameters: Mapping[str, Any],
    ):
        import mlflow

        # By default a server that is away is asked for minutes; set by the user, theirs holds.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient(tracking_uri=config.mlflow_uri or None)
        if run_id is None:
            found = self._client.get_experiment_by_name(config.mlflow_experiment)
            experiment = (
                found.experiment_id
                if found
                else self._client.create_experiment(config.mlflow_experiment)
            )
            run_id = self._client.create_run(experiment, run_name=folder.name).info.run_id
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id = run_id
        uri = config.mlflow_uri or mlflow.get_tracking_uri()
        self.where = f"experiment {config.mlflow_experiment}, run {run_id}, at {uri}"
        self._log_parameters(parameters)

    def _log_parameters(self, parameters: Mapping[str, Any]) -> None:
        known = self._client.get_run(self.run_id).data.params
        values = {name: str(v)[:MAX_PARAM_CHARS] for name, v in _flat(parameters)}
        new = [self._entities.Param(k, v) for k, v in values.items() if k not in known]
        for start in range(0, len(new), PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=new[start : start + PARAMS_PER_CALL])
        for name, value in values.items():
            if known.get(name, value) != value:
                self._client.set_tag(self.run_id, name, value)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        now = round(1000 * time.time())
        metrics = [self._entities.Metric(name, v, now, step) for name, v in numbers.items()]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics[start : start + METRICS_PER_CALL])

    def close(self, is_done: bool) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if is_done else "FAILED")


TRACKERS: dict[str, type[Wandb] | type[Mlflow]] = {"wandb": Wandb, "mlflow": Mlflow}


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("optimizer.learning_rate", 1e-6), ..."""
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# --- sending ------------------------------------------------------------------------------------


class _Sender:
    """One tracker and the thread that sends to it. error: why it is off, "" while it is on."""

    def __init__(self, name: str, tracker: Tracker, file: Path, state: dict[str, Any]):
        self.name, self.error = name, ""
        self._tracker, self._file, self._state = tracker, file, state
        self._queue: queue.SimpleQueue[tuple[str, int, dict[str, float]] | bool]
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracking-{name}", daemon=True)
        self._thread.start()

    def send(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        self._queue.put((kind, step, numbers))

    def close(self, is_done: bool) -> None:
        """Waits for what was not sent yet, at most `CLOSE_SECONDS`."""
        self._queue.put(is_done)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() and not self.error:
            self.error = f"not all was sent within {CLOSE_SECONDS:.0f} seconds"

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            if not self.error:
                try:
                    self._handle(item)
                except Exception as error:  # whatever it is, the run goes on without the tracker
                    self.error = _first_line(error)
            if isinstance(item, bool):
                return

    def _handle(self, item: tuple[str, int, dict[str, float]] | bool) -> None:
        if isinstance(item, bool):
            self._tracker.close(item)
            return
        kind, step, numbers = item
        if step > self._state["sent"].get(kind, -1):
            self._state["sent"][kind] = step
            _write(self._file, self._state)
            self._tracker.log(step, numbers)


class Tracking:
    """All trackers of a run; none is fine. As a context manager it closes them at the end."""

    def __init__(self, senders: tuple[_Sender, ...] = ()):
        self._senders = senders
        self._told: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, as `RunWriter.log_step` returns it."""
        numbers = scalars({name: value for name, value in metrics.items() if name != "step"})
        self._send("metrics", step, numbers)

    def log_evaluation(self, step: int, name: str, scores: Mapping[str, Any]) -> None:
        """The numbers of an evaluation at a step; intervals and parts are in evaluation.json.

        name: as there; what follows a comma ("after, with memory") is a group of its own.
        """
        kind = "_".join(["evaluation", *name.partition(", ")[2].split()])
        self._send(kind, step, scalars({f"{kind}/{key}": v for key, v in scores.items()}))

    def _send(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        for sender in self._senders:
            sender.send(kind, step, numbers)

    def notes(self) -> list[str]:
        """One line for each tracker that went off since this was last asked."""
        off = [sender for sender in self._senders if sender.error and sender.name not in self._told]
        self._told.update(sender.name for sender in off)
        return [
            f"{sender.name}: off for the rest of this run ({sender.error}); metrics.jsonl has all"
            for sender in off
        ]

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for sender in self._senders:
            sender.close(is_done=kind is None)
        for note in self.notes():
            print(note, file=sys.stderr)


# --- starting -----------------------------------------------------------------------------------


def check_installed(config: TrackingConfig) -> None:
    """Raises ValueError for a tracker that is asked for and cannot be imported."""
    for name in config.names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            setting = {"wandb": "wandb_project", "mlflow": "mlflow_experiment"}[name]
            raise ValueError(
                f"config.tracking.{setting}: needs the package {name}, which cannot be imported "
                f"({_first_line(error)}); pip install {name}, or leave it empty"
            ) from error


def start_tracking(
    config: TrackingConfig, folder: Path, parameters: Mapping[str, Any], resume: bool = False
) -> Tracking:
    """Opens a run at each tracker that is asked for, on resume the one that `folder` knows.

    parameters: the resolved configuration; the section of this file is not sent.
    Raises ValueError where a tracker refuses: whoever asked for it is there to hear it.
    """
    parameters = {name: value for name, value in parameters.items() if name != "tracking"}
    places = {
        "wandb": config.wandb_project,
        "mlflow": f"{config.mlflow_uri} {config.mlflow_experiment}".strip(),
    }
    with contextlib.ExitStack() as stack:
        senders = []
        for name in config.names:
            file = folder / "tracking" / f"{name}.json"
            state = json.loads(file.read_text()) if resume and file.exists() else {}
            if state.get("place") != places[name]:  # another project knows nothing of this run
                state = {"place": places[name], "run_id": None, "sent": {}}
            try:
                tracker: Tracker = TRACKERS[name](config, folder, state["run_id"], parameters)
            except Exception as error:
                raise ValueError(
                    f"config.tracking: {name} must start a run in {places[name]}; it says "
                    f"{_first_line(error)}; {_way_out(name)}"
                ) from error
            state["run_id"] = tracker.run_id
            _write(file, state)
            sender = _Sender(name, tracker, file, state)
            stack.callback(sender.close, False)
            senders.append(sender)
            print(f"{name}: {tracker.where}")
        stack.pop_all()
    return Tracking(tuple(senders))


def _way_out(name: str) -> str:
    if name == "wandb":
        return "run `wandb login`, or give --config.tracking.wandb_mode=offline"
    return "check --config.tracking.mlflow_uri, or leave mlflow_experiment empty"


def _write(file: Path, state: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(state, indent=2) + "\n")
    os.replace(part, file)


def _first_line(error: Exception, limit: int = 200) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:limit]
