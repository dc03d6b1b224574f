"""The plan against what is planned: what it counts is exact, what it estimates is near.

Estimates are compared with XLA's own account of compiled steps, on the CPU. There XLA copies both
moments of AdamW for the whole step, because its loops write one array each while the update of a
parameter reads all three; that of TPUs writes them in one loop, in place. The plan leaves the
copies out, so the tests take them off.

Compiled for TPUs at the size of runs (jax 0.10.2, bfloat16; Qwen3-0.6B on one device, Qwen3-8B on
eight, cut over fsdp or over fsdp and tensor), the estimates of training were 0.90 to 1.06 of the
peak above the arguments, and 0.58 to 0.70 of the room that the compiler took for it, with memory
to spare. Those of sampling are compared on the CPU alone, in float32.
"""

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from toys import CONFIG, F32, GEMMA, OLMO, VARIANTS, eight_devices, params_on, write_model_folder

from pmd_jax.config import ModelSection, RunConfig
from pmd_jax.distill.batch import DistillBatch
from pmd_jax.distill.divergence import DivergenceConfig
from pmd_jax.distill.objectives import DistillConfig
from pmd_jax.distill.update import abstract_state, init_state, make_optimizer, make_train_step
from pmd_jax.memory.teacher import TeacherConfig
from pmd_jax.policy import model, programs, sampler
from pmd_jax.policy.programs import rollout_weights
from pmd_jax.policy.sampler import EngineConfig, Sampler, SamplingConfig
from pmd_jax.policy.sharding import MeshConfig, make_mesh, named, single_device_mesh
from pmd_jax.rollout import RolloutConfig
from pmd_jax.tasks.task import TaskConfig
from tools import account, plan
from tools.flops import product_flops
from tools.work import Work, abstract_mesh

QWEN = dataclasses.replace(CONFIG, family="qwen3", qk_norm="head", tied_head=False)
MIDDLE = dataclasses.replace(
    CONFIG,
    num_layers=4,
    width=256,
    mlp_width=768,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    vocab_size=8192,
    max_positions=4096,
)


def work(
    shape=(8, 16, 2, 32, 4, 32),
    config=CONFIG,
    mesh=(1, 1, 1),
    dtype="float32",
    engine=None,
    feedback=0,
    **distill,
):
    """A plan of N groups with P, S, Q, G, T as given, none of which a bucket changes.

    feedback: each rollout is told so many tokens of its own, or none.
    """
    n, p, s, q, g, t = shape
    settings = RunConfig(
        model=ModelSection("toy", dtype),
        mesh=MeshConfig(*mesh),
        task=TaskConfig(num_train=8, num_test=8, feedback=feedback > 0),
        rollout=RolloutConfig(problems_per_step=n, rollouts_per_problem=g, max_new_tokens=t),
        teacher=TeacherConfig(
            sources=(*("insights", "sibling")[:s], *["feedback"] * (feedback > 0)),
            max_prompt_tokens=q,
            feedback_tokens=feedback or 1,
        ),
        distill=DistillConfig(bucket_tokens=16, **distill),
        engine=engine or EngineConfig(),
    )
    made = Work(settings, config, abstract_mesh(settings.mesh, math.prod(mesh)), p)
    assert made.sizes == (p, s, q, g, t)
    return made


def bytes_on_first_device(tree):
    """Of the shards that the first device really holds."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    )


# --- counted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*VARIANTS, QWEN], ids=lambda c: c.family)
def test_parameters_are_those_of_the_model(config):
    params = model.abstract_params(config, single_device_mesh(), F32)
    assert sum(plan.parameters(config).values()) == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("config", [GEMMA, OLMO, QWEN], ids=lambda c: c.family)
@pytest.mark.parametrize("teacher", ["current", "ema"])
def test_the_state_is_what_a_device_of_the_mesh_holds(config, teacher):
    made, mesh = work(config=config, mesh=(2, 2, 2), teacher=teacher), eight_devices()
    optimizer = make_optimizer(made.config.optimizer, config)
    state = init_state(params_on(mesh, config=config), config, optimizer, mesh, teacher == "ema")
    lines = {line.name: line.bytes for line in account.state_lines(made)}
    assert lines["weights, float32"] == bytes_on_first_device(state.params)
    assert sum(lines.values()) == bytes_on_first_device(state)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sampler_s_copy_is_what_a_device_of_the_mesh_holds(dtype, sizes):
    made, mesh = work(config=QWEN, mesh=sizes, dtype=dtype), make_mesh(MeshConfig(*sizes))
    params = params_on(mesh, config=QWEN)
    weights = rollout_weights(params, QWEN, mesh, jnp.dtype(dtype))
    new = [leaf for name, leaf in weights.top.items() if leaf is not params[name]]
    held = bytes_on_first_device((weights.layers, new))
    assert account.num_bytes(account.held_copy(made)) == held


@pytest.mark.parametrize("max_rows", [1, 3, 9, 24, 64])
@pytest.mark.parametrize("problems", [1, 5, 8])
@pytest.mark.parametrize("kv_cache", ["dtype", "int8"])
def test_the_cache_is_what_a_device_of_the_mesh_holds(kv_cache, problems, max_rows):
    engine, mesh = EngineConfig(max_rows, min_columns=48, kv_cache=kv_cache), eight_devices()
    made = work((problems, 16, 2, 32, 4, 48), mesh=(2, 2, 2), engine=engine)
    prompts, limits = [[1] * 16] * problems, [[48] * 4] * problems
    run = Sampler(CONFIG, engine, mesh, F32), None, prompts, limits, range(problems)
    run = sampler._Run(*run, SamplingConfig(), [], 0, limits)
    shape = account.slots_of(made, max_rows)
    assert shape == run.scheduler.shape
    held = account.num_bytes(account.held_cache(made, shape))
    assert held == bytes_on_first_device(run.state)


# --- FLOPs --------------------------------------------------------------------------------------


def abstract_step(made):
    """The jitted step and its arguments as shapes, on one device."""
    mesh = single_device_mesh()
    config, ema = made.config, made.config.distill.teacher == "ema"
    optimizer = make_optimizer(config.optimizer, made.model)
    batch = DistillBatch(
        *(
            jax.ShapeDtypeStruct(
                (made.groups, *x.shape[1:]),
                x.dtype,
                sharding=named(mesh, "batch", *[None] * (x.ndim - 1)),
            )
            for x in made.group
        )
    )
    step = make_train_step(made.model, config.optimizer, config.distill, mesh, made.dtype)
    return step.jitted, (abstract_state(made.model, optimizer, mesh, ema), batch)


def compiled_step(made):
    jitted, arguments = abstract_step(made)
    with jax.set_mesh(single_device_mesh()):
        return jitted.lower(*arguments).compile()


def distill_flops(made):
    return sum(n for name, n in plan.flops(made).items() if name.startswith("distill"))


def test_own_feedback_is_computed_in_the_rows_of_responses():
    told = work((2, 16, 2, 224, 4, 32), feedback=32)
    assert told.suffix == 96  # with the closing line and the template's end
    assert told.group.prompt_of.tolist() == [[0, 1, 0, 1]]
    assert work((2, 16, 2, 224, 4, 32)).suffix == 0
    jitted, arguments = abstract_step(told)
    assert distill_flops(told) == product_flops(jitted, *arguments)


def test_feedback_that_is_most_of_a_prompt_makes_each_one_whole():
    made = work((2, 16, 4, 128, 4, 32), feedback=80)
    assert made.suffix == 0


@pytest.mark.parametrize("remat", ["context", "full", "none"])
@pytest.mark.parametrize("config", [CONFIG, GEMMA, OLMO], ids=lambda c: c.family)
def test_flops_of_a_distillation_step_are_those_of_its_program(config, remat):
    made = work((4, 32, 2, 48, 4, 32), config, remat=remat, micro_batch=2, chunk_tokens=64)
    jitted, arguments = abstract_step(made)
    assert distill_flops(made) == product_flops(jitted, *arguments)


def sampling_programs(made, mesh, monkeypatch):
    """(jitted, arguments, static arguments) of the first prefill and the first decode of a run.

    The ring is full-grown if engine.min_columns is. The longest prompts are those of one shard.
    """
    found = {}

    def insert(*arguments, real=programs.insert, **static):
        found.setdefault("prefill", (real, arguments, static))
        return arguments[1]

    def decode(*arguments, real=programs.decode, **static):
        found["decoding"] = real, arguments, static
        raise InterruptedError

    monkeypatch.setattr(programs, "insert", insert)
    monkeypatch.setattr(programs, "decode", decode)
    rollout, (p, *_, g, t) = made.config.rollout, made.sizes
    prompts = [[1] * (p - (i % made.shards > 0)) for i in range(rollout.problems_per_step)]
    engine = Sampler(made.model, made.config.engine, mesh, made.dtype)
    weights = rollout_weights(params_on(mesh, config=made.model), made.model, mesh, made.dtype)
    with pytest.raises(InterruptedError):
        engine.generate(weights, prompts, [[t] * g] * len(prompts), SamplingConfig(), [], 0)
    return found


@pytest.mark.parametrize("max_rows", [4, 8, 16])
def test_flops_of_sampling_are_those_of_its_programs(monkeypatch, max_rows):
    engine = EngineConfig(max_rows)
    made = work((4, 64, 2, 64, 4, 32), engine=engine)
    flops = {
        name: product_flops(functools.partial(jitted, **static), *arguments)
        for name, (jitted, arguments, static) in sampling_programs(
            made, single_device_mesh(), monkeypatch
        ).items()
    }
    told, steps = plan.flops(made), 4 * 4 * 32 // max_rows
    prefills = 4 // account.slots_of(made, max_rows).slots
    assert told["rollout: prefill"] == prefills * flops["prefill"]
    assert told["rollout: decode"] + told["rollout: output head"] == steps * flops["decoding"]


@pytest.mark.parametrize("remat", ["context", "none"])
def test_flops_are_near_those_that_xla_counts(monkeypatch, remat):
    """XLA counts the body of a loop once, so the loops are unrolled; it counts sums as well."""
    scan = lax.scan
    monkeypatch.setattr(lax, "scan", lambda *args, **kw: scan(*args, **{**kw, "unroll": True}))
    config = dataclasses.replace(MIDDLE, num_layers=2)
    made = work((2, 64, 2, 128, 4, 64), config, remat=remat)
    jax.clear_caches()  # traced elsewhere with loops
    assert distill_flops(made) == pytest.approx(compiled_step(made).cost_analysis()["flops"], 0.05)
    jax.clear_caches()


# --- estimated ----------------------------------------------------------------------------------

CASES = {
    "long prompts": ((1, 512, 2, 1024, 4, 32), {}),
    "long responses": ((1, 64, 2, 128, 4, 512), {}),
    "logits": ((4, 64, 1, 64, 8, 64), {"chunk_tokens": 2048}),
    "micro-batches": ((4, 64, 2, 128, 4, 64), {"micro_batch": 2}),
    "ema": ((2, 64, 2, 128, 4, 64), {"teacher": "ema"}),
    "top-K": (
        (4, 64, 2, 64, 8, 64),
        {"chunk_tokens": 2048, "divergence": DivergenceConfig("jensen_shannon", top_k=100)},
    ),
    "mixture": (
        (4, 64, 2, 64, 8, 64),
        {"chunk_tokens": 2048, "divergence": DivergenceConfig("jensen_shannon")},
    ),
}
QUICK = {
    ("long prompts", "none"),
    ("long responses", "context"),
    ("logits", "context"),
    ("micro-batches", "none"),
}


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        pytest.param(name, remat, marks=[] if (name, remat) in QUICK else [pytest.mark.slow])
        for name in CASES
        for remat in ("context", "none")
    ],
)
def test_memory_of_training_is_near_that_which_xla_needs(name, remat):
    shape, distill = CASES[name]
    made = work(shape, MIDDLE, remat=remat, **distill)
    found, lines = compiled_step(made).memory_analysis(), account.training(made).lines
    state = {line.name for line in account.state_lines(made)} | {"batch"}
    held = sum(line.bytes for line in lines if line.name in state)
    # Suffixes are all empty, and a divergence reads no advantage.
    unread = made.groups * (made.group.suffix_length.nbytes + made.group.advantage.nbytes)
    assert held == found.argument_size_in_bytes + unread
    estimate = sum(line.bytes for line in lines if line.name not in state)
    copies = 2 * account.num_bytes(account.held_params(MIDDLE, made.mesh, F32))
    ratio = estimate / (found.temp_size_in_bytes - copies)
    print(f"{name}, {remat}: estimate / XLA {ratio:.2f}")
    assert 1 / 1.5 < ratio < 1.5


SAMPLED = {
    "long prompts": ((2, 512, 1, 64, 4, 32), (1, 1, 1), EngineConfig(8, min_columns=32)),
    "long responses": ((2, 192, 1, 64, 8, 1024), (1, 1, 1), EngineConfig(16, min_columns=1024)),
    "logits": ((16, 64, 1, 64, 8, 64), (1, 1, 1), EngineConfig(64)),
    "int8": (
        (4, 512, 1, 64, 8, 256),
        (1, 1, 1),
        EngineConfig(16, min_columns=256, kv_cache="int8"),
    ),
    "mesh": ((8, 512, 1, 64, 8, 256), (2, 2, 2), EngineConfig(64, prefill_tokens=1024)),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_memory_of_sampling_is_near_that_which_xla_needs(monkeypatch, name):
    shape, sizes, engine = SAMPLED[name]
    made = work(shape, MIDDLE, sizes, engine=engine)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    seats = account.slots_of(made, engine.max_rows)
    estimates = {
        "prefill": account.prefill_bytes(made, seats),
        "decoding": account.decoding_bytes(made, seats),
    }
    for part, (jitted, arguments, static) in sampling_programs(made, mesh, monkeypatch).items():
        with jax.set_mesh(mesh):
            found = jitted.lower(*arguments, **static).compile().memory_analysis()
        ratio = estimates[part] / found.temp_size_in_bytes
        print(f"{name}, {part}: estimate / XLA {ratio:.2f}")
        assert 1 / 1.5 < ratio < 1.5


def test_more_devices_hold_less_and_more_groups_hold_more():
    shape = (8, 64, 2, 128, 4, 64)
    one, eight = (
        account.training(work(shape, MIDDLE, mesh)).bytes for mesh in [(1, 1, 1), (1, 8, 1)]
    )
    assert eight < one / 5
    sizes = list(plan.micro_batches(work(shape, MIDDLE)).values())
    assert sizes[:3] == sorted(sizes[:3]) and len(sizes) == 4


def test_the_largest_that_fits_is_the_last_below_the_budget():
    rows = plan.row_counts(work(mesh=(1, 2, 1)))
    assert list(rows) == [1, 2, 3, *range(4, 33, 4)]
    assert plan.largest(rows, (rows[16] + 1) / 1e9) == 16
    assert plan.largest(rows, 1e-9) is None
    assert list(plan.micro_batches(work(mesh=(2, 2, 1)))) == [4, 8]
    assert list(plan.micro_batches(work((3, 16, 2, 32, 4, 32), mesh=(2, 1, 1)))) == [3]


@pytest.mark.parametrize("attention", ["splash", "cudnn"])
def test_kernels_need_no_room_for_scores(attention):
    """Twice the tokens take about twice the room, where XLA's scores take four times as much."""
    grows = {}
    for name in ("xla", attention):
        config = dataclasses.replace(MIDDLE, attention=name)
        made = [work((1, n, 1, n, 2, 2 * n), config) for n in (256, 512)]
        short, long = (account.backward_bytes(w, account.sides(w, 1)[0], 1) for w in made)
        grows[name] = long / short
    assert grows["xla"] > 3 and 1.8 < grows[attention] < 2.2


@pytest.mark.parametrize("remat", ["full", "context"])
def test_what_cudnn_keeps_is_known_without_a_gpu(monkeypatch, remat):
    """To the byte where prompts and responses fill the blocks of splash."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    config = dataclasses.replace(MIDDLE, attention="cudnn")
    asked = (config, (128, 1, 128, 2, 128), remat, jnp.dtype("bfloat16"))
    assert account.kept_bytes(*asked) == account.traced_bytes(*asked)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path):
    """A folder with config.json and nothing else."""
    folder = write_model_folder(tmp_path / "toy")
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    return folder


def run(toy, *arguments):
    given = ["--config", "configs/quickstart.py", f"--config.model.path={toy}", "--devices", "2"]
    return plan.main([*given, *arguments])


def test_the_answer_as_tables_fits_80_columns_and_needs_config_json_alone(toy, capsys):
    assert run(toy, "--peak-tflops", "100", "--memory", "24", "--name", "any", "--resume") == 0
    said = capsys.readouterr().out
    for words in ("sampling: fits in 24 GB", "training: fits", "all 16", "all 4", "seconds"):
        assert words in said
    assert max(map(len, said.splitlines())) <= 80


def test_the_answer_as_json_adds_up(toy, capsys):
    assert run(toy, "--json", "--peak-tflops=100", "--mfu=0.5") == 0
    told = json.loads(capsys.readouterr().out)
    for phase in ("sampling", "training"):
        assert told[phase]["bytes"] == sum(line["bytes"] for line in told[phase]["lines"])
    assert told["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert told["seconds"].keys() == told["flops"].keys()
    assert sum(told["seconds"].values()) == pytest.approx(sum(told["flops"].values()) / 1e14)
    assert [row["gigabytes"] for row in told["fits"]] == [16, 32, 80, 95]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.mesh.data=3"], "must equal the number of devices, 2; got 3 x 1 x 1"),
        (["--config.mesh.tensor=8", "--devices=8"], "sizes that work: 1, 2"),
        (["--config.distill.micro_batch=1"], "must be a multiple of the 2 parts"),
        (["--config.model.path=nobody/no-such-model"], "config.json could not be fetched"),
        (["--config.model.path=./none"], "must hold config.json"),
        (["--config.model.path=pypi:none"], "not a known package"),
        (["--config.optimizer.lerning_rate=1"], "did you mean learning_rate"),
        (["--teacher-tokens=4096"], "must fit the model's 4096 positions"),
        (["--response-tokens=17"], "must be at most rollout.max_new_tokens, 16; got 17"),
        (["--prompt-tokens=-1"], "must be at least 1; got -1"),
        (["--mfu=0"], "--mfu: must be above 0; got 0.0"),
        (["--peak-tflops=-1"], "--peak-tflops: must be above 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(toy, capsys, arguments, message):
    assert run(toy, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1


def test_a_saved_policy_can_be_planned_with(toy, tmp_path, capsys):
    """The layout of a run's folder, without the weights, which planning never reads."""
    (tmp_path / "run" / "checkpoints" / "3" / "state").mkdir(parents=True)
    shutil.copytree(toy, tmp_path / "run" / "model")
    assert run(tmp_path / "run") == 0


def test_an_unknown_family_is_named(toy, capsys):
    (toy / "config.json").write_text('{"model_type": "mamba"}')
    assert run(toy) == 2
    assert "model_type must be one of gemma3_text" in capsys.readouterr().err
