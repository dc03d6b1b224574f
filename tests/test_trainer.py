"""The loop on a toy model: its order, what memory may and may not touch, kill and resume."""

import dataclasses
import http.server
import json
import shutil
import signal
import threading

import numpy as np
import pytest
from scripted import Grading, make_generate
from toys import write_model_folder

from pmd_jax import settings, trainer
from pmd_jax.checkpoint import CheckpointConfig
from pmd_jax.config import ModelSection, RunConfig
from pmd_jax.distill.objectives import DistillConfig
from pmd_jax.distill.update import OptimizerConfig
from pmd_jax.evaluate import EvaluationConfig
from pmd_jax.health import HealthConfig
from pmd_jax.memory.bank import Bank, MemoryConfig
from pmd_jax.memory.reflection import ReflectionConfig
from pmd_jax.memory.teacher import TeacherConfig
from pmd_jax.policy.families import read_config
from pmd_jax.policy.policy import load_policy
from pmd_jax.policy.sharding import MeshConfig, single_device_mesh
from pmd_jax.replay import load_failed_step, replay
from pmd_jax.rollout import RolloutConfig, attempt
from pmd_jax.run import NothingLearned, train
from pmd_jax.runfolder import Lock
from pmd_jax.tasks.task import TaskConfig, load_task
from pmd_jax.telemetry import Compilations, Progress
from pmd_jax.trainer import NotFinite
from tools.replay import report

TASK = TaskConfig(
    "scicalc", response_style="direct", num_train=8, num_validation=4, num_test=4, feedback=True
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="module", autouse=True)
def scripted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_generate", make_generate)
        patch.setattr(trainer, "Grading", Grading)
        yield


@pytest.fixture(scope="module")
def whole(model, scripted, tmp_path_factory):
    """A run of four steps that nothing happened to."""
    return run(model, tmp_path_factory.mktemp("whole"))


def config_for(model, output, **changes) -> RunConfig:
    config = RunConfig(
        name="toy",
        output=str(output),
        steps=4,
        model=ModelSection(str(model), dtype="float32"),
        mesh=MeshConfig(data=8, fsdp=1),
        task=TASK,
        rollout=RolloutConfig(problems_per_step=3, rollouts_per_problem=4, max_new_tokens=8),
        reflection=ReflectionConfig(style="lines", clusters=2, min_problems_per_cluster=1),
        teacher=TeacherConfig(max_prompt_tokens=3000, top_k=1),
        distill=DistillConfig(bucket_tokens=512),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        evaluation=EvaluationConfig(num_samples=2),
        checkpoint=CheckpointConfig(every=1, keep=3),
    )
    return dataclasses.replace(config, **changes)


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


TIMES = ("seconds", "tokens_per_second", "peak_memory", "host_memory", "live_arrays")


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def run(model, output, **changes):
    return train(config_for(model, output, **changes)).folder


def test_every_step_runs_and_every_level_of_memory_reaches_a_loss(model, tmp_path):
    folder = run(
        model, tmp_path, teacher=TeacherConfig(max_prompt_tokens=3000, top_k=1, probe_every=2)
    )
    rows = lines(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row.get("loss_without_memory", 0) > 0 for row in rows] == [True, False, True, False]
    assert all(row["loss_without_memory"] != row["loss"] for row in rows[::2])
    verbs = ("attempt", "verify", "remember", "reflect", "abstract", "teach", "distill")
    verbs += ("sync", "idle", "compile")
    for row in rows:
        assert all(row[f"seconds/{verb}"] >= 0 for verb in verbs)
        assert row["loss"] > 0 and row["loss_fraction"] == 1
        assert row["teacher/with_insight"] > 0
        assert row["logprob_gap"] < 1e-4  # the sampler and the trainer agree
        assert np.isfinite([row["teacher/gain_correct"], row["teacher/gain_wrong"]]).all()
    assert rows[-1]["teacher/with_behavior"] > 0
    assert rows[-1]["memory/behaviors"] >= 1
    samples = lines(folder, "samples.jsonl")
    assert len(samples) == 4 * 3 * 4
    for row in samples:
        assert len(row["pieces"]) == len(row["token_nats"]) > 0
        assert np.mean(row["token_nats"]) == pytest.approx(row["loss_nats"], abs=1e-4)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert list(evaluation) == ["before", "after"]
    assert {"config.json", "memory", "checkpoints", "tensorboard"} <= {
        f.name for f in folder.iterdir()
    }


def test_grpo_learns_from_rewards_and_writes_no_memory_but_attempts(model, tmp_path):
    """Every other rollout is right: advantages are a half, up or down."""
    folder = run(
        model,
        tmp_path,
        steps=2,
        distill=DistillConfig(objective="grpo", bucket_tokens=512),
        teacher=TeacherConfig(sources=(), max_prompt_tokens=3000),
    )
    for row in lines(folder):
        assert row["loss_fraction"] == 1 and row["grad_norm"] > 0
        assert row["memory/experiences"] > 0 and row["memory/insights"] == 0
        assert row["teacher/with_insight"] == 0
        assert "teacher/gain_correct" not in row
    for sample in lines(folder, "samples.jsonl"):
        assert sample["advantage"] == (0.5 if sample["correct"] else -0.5)
        assert not sample["has_guidance"] and sample["loss_nats"] is not None


@pytest.mark.slow
def test_length_buckets_change_no_number_that_is_logged(model, tmp_path):
    """Problems and attempts stay in their order, whichever batch computed them."""
    one, other = (
        run(
            model,
            tmp_path / str(buckets),
            steps=1,
            mesh=MeshConfig(data=4, fsdp=1, tensor=2),
            rollout=RolloutConfig(problems_per_step=8, rollouts_per_problem=4, max_new_tokens=8),
            distill=DistillConfig(bucket_tokens=64, length_buckets=buckets),
        )
        for buckets in (1, 2)
    )
    for a, b in zip(lines(one), lines(other), strict=True):
        for name in ("loss", "grad_norm", "entropy", "teacher/gain_wrong", "teacher/prompt_tokens"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), name
        assert b["padding_fraction"] < a["padding_fraction"]
    losses = [
        [row["loss_nats"] for row in lines(folder, "samples.jsonl")] for folder in (one, other)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_what_is_cited_can_be_walked_back_to_the_rollout(whole):
    """teacher prompt -> behavior -> insight -> experience, and its text is in the prompt."""
    bank = Bank.load(whole / "memory")
    behaviors = {b.id: b for b in bank.behaviors}
    insights = {i.id: i for p in bank.problem_ids for i in bank.insights(p)}
    rollouts = {row["rollout"] for row in lines(whole, "samples.jsonl")}
    last = [row for row in lines(whole, "samples.jsonl") if row["step"] == 3]
    cited = [behaviors[name] for row in last for name in row["cited"] if name in behaviors]
    assert cited
    for row in last:
        for name in set(row["cited"]) & insights.keys():
            assert insights[name].text in row["teacher_prompt"]
            assert insights[name].text not in row["student_prompt"]
            assert set(insights[name].experience_ids) <= rollouts
    assert set(cited[0].insight_ids) & insights.keys()


def test_student_prompts_are_the_same_bytes_with_a_full_bank_and_an_empty_one(model, tmp_path):
    """Also those of evaluation: nothing in the task or the policy can see memory."""
    task, policy = load_task(TASK), load_policy(model, dtype="float32")
    problems = task.splits["train"][:3]
    before = attempt(policy, task, problems, 2, 4, 0, 0)
    run(model, tmp_path)
    assert Bank.load(tmp_path / "toy" / "memory").behaviors
    after = attempt(policy, task, problems, 2, 4, 0, 0)
    for problem in problems:
        assert before[problem.id][0] == after[problem.id][0]
        texts = [[r.text for r in result[problem.id][1]] for result in (before, after)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "killed_in",
    [1, pytest.param(2, marks=pytest.mark.slow)],
    ids=["mid_epoch", "end_of_epoch"],
)
def test_killed_and_resumed_is_the_same_run(model, whole, tmp_path, monkeypatch, killed_in):
    """Killed within a step and resumed, an epoch being two steps: the same numbers and bank."""
    config = config_for(model, tmp_path / "killed")
    real, calls = trainer.Trainer.distill, []

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == killed_in + 1:
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "distill", dies)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    outcome = train(config, resume=True)
    assert without_times(lines(outcome.folder)) == without_times(lines(whole))
    assert lines(outcome.folder, "samples.jsonl") == lines(whole, "samples.jsonl")
    assert Bank.load(outcome.folder / "memory").digest() == Bank.load(whole / "memory").digest()
    scores = [json.loads((f / "evaluation.json").read_text()) for f in (outcome.folder, whole)]
    for score in scores:
        for row in score.values():
            del row["seconds"]
    assert scores[0] == scores[1]


def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(model, tmp_path, monkeypatch, capsys):
    config = config_for(model, tmp_path, checkpoint=CheckpointConfig(every=0))
    real = trainer.Trainer.teach

    def interrupts(self, step, groups):
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return real(self, step, groups)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "teach", interrupts)
        outcome = train(config)
    assert outcome.interrupted and outcome.steps == 2
    assert "--resume" in capsys.readouterr().out
    outcome = train(config, resume=True)
    assert not outcome.interrupted and len(lines(outcome.folder)) == 4


@pytest.mark.parametrize("lifetime", ["step", "frozen"])
def test_transient_and_frozen_memory_are_values(model, whole, tmp_path, lifetime):
    memory = MemoryConfig(lifetime=lifetime) if lifetime == "step" else None
    if memory is None:
        memory = MemoryConfig(lifetime="frozen", path=str(whole / "memory"))
    folder = run(model, tmp_path, memory=memory)
    rows = lines(folder)
    if lifetime == "step":
        assert {row["memory/problems"] for row in rows} == {3}
    else:
        digests = [Bank.load(f / "memory").records() for f in (whole, folder)]
        assert digests[0]["insights"] == digests[1]["insights"]
        assert rows[0]["teacher/with_behavior"] > 0  # from the first step


def test_a_shuffled_teacher_reads_another_problem_s_memory_and_evaluation_may_read_the_bank(
    model, tmp_path
):
    shown = TeacherConfig(max_prompt_tokens=3000, top_k=1, control="shuffled")
    folder = run(
        model,
        tmp_path,
        steps=2,
        teacher=shown,
        evaluation=EvaluationConfig(num_samples=2, before=False, with_memory=True),
    )
    samples = lines(folder, "samples.jsonl")
    cited = [(row["problem"], key) for row in samples for key in row["cited"]]
    owners = [(problem, key.split("@")[0]) for problem, key in cited if "#" in key]
    assert owners and all(problem != owner for problem, owner in owners)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert list(evaluation) == ["after", "after, with memory"]
    totals = json.loads((folder / "totals.json").read_text())
    assert (totals["steps"], totals["rollouts"]) == (2, 24)
    assert totals["trained_tokens"] == sum(len(row["pieces"]) for row in samples)


def test_a_run_ends_when_it_has_sampled_its_tokens(model, tmp_path):
    folder = run(model, tmp_path, max_sampled_tokens=1)
    assert len(lines(folder)) == 1


class Writer(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server that always writes the same behavior."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        text = "When a quantity is squared, write the square down before multiplying."
        reply = {"choices": [{"message": {"role": "assistant", "content": text}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_):
        pass


def test_another_model_behind_an_endpoint_can_write_the_behaviors(model, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Writer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"openai:http://127.0.0.1:{server.server_port}/v1#writer"
        reflection = dataclasses.replace(config_for(model, tmp_path).reflection, writer=url)
        folder = run(model, tmp_path, reflection=reflection, steps=1)
        server.shutdown()
    written = [b.text for b in Bank.load(folder / "memory").behaviors]
    assert written and all("write the square down" in text for text in written)


def test_learning_rate_zero_keeps_the_policy_and_fills_the_bank(model, tmp_path):
    frozen = OptimizerConfig(learning_rate=0.0)
    folder = run(model, tmp_path, optimizer=frozen, steps=2)
    assert Bank.load(folder / "memory").sizes()["insights"] > 0
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["before"]["per_problem"] == evaluation["after"]["per_problem"]


def test_a_loss_that_is_nan_stops_with_its_batch_and_leaves_the_checkpoint(model, tmp_path):
    config = config_for(
        model, tmp_path, optimizer=OptimizerConfig(learning_rate=1e38, warmup_steps=0)
    )
    with pytest.raises(trainer.NotFinite, match=r"step \d: the loss is .*--resume"):
        train(config)
    [failed] = (tmp_path / "toy").glob("failed_step_*")
    step = int(failed.name.rpartition("_")[2])
    assert (tmp_path / "toy" / "checkpoints" / str(step)).is_dir()
    told = "\n".join(report(failed, None, 2))
    assert f"step {step} in float32 on a CPU\nloss           nan (the run: nan)" in told
    assert "not finite: gradients of" in told and "not finite from token 0 on" in told


def test_a_loss_beyond_its_limit_ends_the_run_and_is_computed_again_to_the_same(
    model, whole, tmp_path
):
    """Seen at the second step; the replay is of one device, and of the run's own precision."""
    first = lines(whole)
    limit = HealthConfig(max_loss=(first[0]["loss"] + first[1]["loss"]) / 2)
    with pytest.raises(NotFinite, match=r"step 0: the loss is .*max_loss 0.* tools\.replay"):
        run(model, tmp_path, health=limit, checkpoint=CheckpointConfig(every=0))
    saved = tmp_path / "toy" / "checkpoints" / "0"  # nothing is lost, nor the step half done
    assert Bank.load(saved / "bank" / "bank").sizes()["experiences"] == 0
    failed = load_failed_step(tmp_path / "toy" / "failed_step_0")
    assert failed.loss == first[0]["loss"]
    again = replay(
        failed, DistillConfig(), read_config(model), single_device_mesh(), np.dtype("float32")
    )
    assert again.loss == pytest.approx(failed.loss, rel=1e-5)
    assert again.grad_norm == pytest.approx(failed.grad_norm, rel=1e-4)
    with pytest.raises(ValueError, match="must be a failed_step_N"):
        load_failed_step(tmp_path)


def test_a_run_without_any_loss_is_a_failure_and_says_so(model, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "reflect", lambda *_: {})
    teacher = TeacherConfig(sources=("insights",), max_prompt_tokens=3000)
    with pytest.raises(NothingLearned, match="no rollout carried loss"):
        run(model, tmp_path, teacher=teacher, steps=1)


def test_nothing_compiles_after_the_second_step(model, tmp_path):
    config = config_for(model, tmp_path)
    task = load_task(config.task)
    policy = load_policy(model, dtype="float32")
    toy = trainer.Trainer(dataclasses.replace(config), policy, task, tmp_path)
    with Progress(5) as progress:
        for _ in range(2):
            toy.step(progress)
        compiled = Compilations()
        for _ in range(3):
            toy.step(progress)
    assert compiled.names == []


def test_sigterm_leaves_the_step_saves_the_one_before_and_loses_nothing(
    model, whole, tmp_path, monkeypatch, capsys
):
    """It comes while the second step reflects, when the bank has changed already."""
    config = config_for(model, tmp_path, checkpoint=CheckpointConfig(every=0))
    real = trainer.Trainer.reflect

    def told_to_end(self, step, news, progress):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
            self.policy.generate([[1]], max_new_tokens=1)
        return real(self, step, news, progress)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "reflect", told_to_end)
        outcome = train(config)
    assert (outcome.interrupted, outcome.steps) == ("SIGTERM", 1)
    assert "SIGTERM: saved step 1" in capsys.readouterr().out
    outcome = train(config, resume="if saved")
    assert without_times(lines(outcome.folder)) == without_times(lines(whole))
    assert Bank.load(outcome.folder / "memory").digest() == Bank.load(whole / "memory").digest()


def test_a_run_whose_newest_step_is_damaged_goes_on_from_the_one_before(
    model, whole, tmp_path, capsys
):
    config = config_for(model, tmp_path, steps=2)
    folder = train(config).folder
    bank = folder / "checkpoints" / "2" / "bank" / "bank"
    file = sorted(bank.glob("*.jsonl"))[0]
    file.write_text(file.read_text() + "x")
    train(dataclasses.replace(config, steps=4), resume=True)
    said = capsys.readouterr().out
    assert "checkpoint 2 is damaged (" in said and f"{file.name}: damaged, sha256 must be" in said
    assert (folder / "checkpoints" / "2.damaged").is_dir()
    assert without_times(lines(folder)) == without_times(lines(whole))
    for step in ("2", "3", "4"):
        shutil.rmtree(folder / "checkpoints" / step / "bank")
    with pytest.raises(ValueError, match=r"holds no complete step; 2.*lacks its memory bank"):
        train(dataclasses.replace(config, steps=5), resume=True)
    with pytest.raises(ValueError, match=r"its checkpoints are damaged \(2\.damaged, 2\.damaged-"):
        train(config, resume="if saved")  # and the log stays
    assert len(lines(folder)) == 4


def test_scores_of_steps_that_are_done_again_are_forgotten(model, tmp_path):
    """Those of another configuration too, which a resumed run may have."""
    evaluation = EvaluationConfig(num_samples=2, every=1)
    config = config_for(model, tmp_path, steps=3, evaluation=evaluation)
    folder = train(config).folder
    shutil.rmtree(folder / "checkpoints" / "3")
    shutil.rmtree(folder / "checkpoints" / "2")
    file = folder / "evaluation.json"
    stale = {name: {**of, "average": 9} for name, of in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(stale))
    train(config, resume=True)
    scores = {name: of["average"] for name, of in json.loads(file.read_text()).items()}
    assert {name for name, average in scores.items() if average == 9} == {"before", "step 1"}
    assert scores.keys() == {"before", "step 1", "step 2", "after"}


def test_a_folder_in_use_is_refused_before_anything_in_it_changes(model, tmp_path):
    config = config_for(model, tmp_path, steps=1)
    folder = train(config).folder
    left = folder / "checkpoints" / "9.orbax-checkpoint-tmp"  # the save in flight of the other
    left.mkdir()
    lock = Lock(folder / "run.lock")
    lock.take()
    with pytest.raises(ValueError, match="is in use by a run that is going on"):
        train(dataclasses.replace(config, steps=2), resume=True)
    assert left.is_dir()
    lock.release()
    assert train(dataclasses.replace(config, steps=2), resume=True).steps == 2


@pytest.mark.slow
def test_a_run_goes_on_upon_another_mesh(model, whole, tmp_path):
    """Data order and bank as if nothing had happened, losses but for rounding."""
    train(config_for(model, tmp_path, steps=2))
    folder = train(config_for(model, tmp_path, mesh=MeshConfig(fsdp=4, tensor=2)), True).folder
    assert Bank.load(folder / "memory").digest() == Bank.load(whole / "memory").digest()
    losses = [[row["loss"] for row in lines(f)] for f in (whole, folder)]
    np.testing.assert_allclose(*losses, atol=1e-6)


def test_a_run_is_not_written_over_nor_resumed_as_another(model, tmp_path):
    config = config_for(model, tmp_path, steps=1)
    train(config)
    with pytest.raises(ValueError, match="holds a run of 1 steps; continue it with --resume"):
        train(config)
    with pytest.raises(ValueError, match=r"config\.seed: must be as it was"):
        train(dataclasses.replace(config, seed=1), resume=True)
    with pytest.raises(ValueError, match="has no checkpoint to resume"):
        train(dataclasses.replace(config, name="other"), resume=True)
    with pytest.raises(ValueError, match=r"must be new, empty, or a run's own; .*config\.json"):
        train(dataclasses.replace(config, output=str(model.parent)))
    # What a loss that is NaN advises: a lower learning rate, from the last checkpoint.
    lower = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=1e-6), steps=2)
    assert train(lower, resume=True).steps == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "config.steps: must be at least 1; got 0"),
        ({"rollout.rollouts_per_problem": 1}, "must be at least 2 where teacher.sources"),
        ({"teacher.sources": ()}, "teacher.sources: must name at least one"),
        (
            {"teacher.sources": ("sibling",), "teacher.control": "random"},
            "teacher.control: 'random' needs memory to show, one of behaviors, experience, ins",
        ),
        ({"teacher.max_prompt_tokens": 20}, "max_prompt_tokens: .* alone takes"),
        ({"teacher.max_prompt_tokens": 5000}, "must fit the model's 4096 positions; got 5000"),
        ({"distill.micro_batch": 2}, "must divide rollout.problems_per_step, 3; got 2"),
        ({"distill.micro_batch": 3}, "must be a multiple of the 8 parts"),
        ({"rollout.problems_per_step": 9}, "must be at most the 8 training problems; got 9"),
        ({"rollout.temperature": 0.5}, "must equal rollout.temperature, 0.5"),
        ({"distill.objective": "grpo"}, "teacher.sources: must be empty with distill.objective"),
        (
            {"distill.objective": "grpo", "teacher.sources": (), "distill.grpo.updates": 2},
            "distill.grpo.updates: .* must divide rollout.problems_per_step, 3; got 2 times 1",
        ),
        ({"model.path": "no/such/./folder"}, "no/such"),
        ({"mesh.tensor": 3}, "data x fsdp x tensor must equal the number of devices, 8"),
        ({"name": "a/b"}, "name: must be a folder's name without '/'; got 'a/b'"),
    ],
)
def test_bad_configurations_are_named_before_any_rollout(model, tmp_path, changes, message):
    values = settings.to_config_dict(config_for(model, tmp_path))
    with values.ignore_type():
        values.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        train(settings.build(RunConfig, values))
    assert not list(tmp_path.rglob("metrics.jsonl")) or not lines(tmp_path / "toy")
