"""What large runs need, on paper: every formula once, with numbers worked by hand.

The toy has 3 layers of width 32, MLP 64, 4 heads and 2 key-value heads of 8, 96 words, and its head
is its embedding. A layer's matrices hold 32 x 32 (q), twice 32 x 16 (k, v), 32 x 32 (o) and thrice
32 x 64 numbers, 9,216 in all; its two norms hold 64. So all layers are 27,840 numbers, 27,648 of
them in matrices, and the head is 3,072.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from toys import CONFIG, params_on, write_model_folder

from pmd_jax.config import ModelSection, RunConfig
from pmd_jax.distill.objectives import DistillConfig
from pmd_jax.memory.bank import MemoryConfig
from pmd_jax.memory.reflection import ReflectionConfig
from pmd_jax.memory.teacher import TeacherConfig
from pmd_jax.policy.programs import LocalView, rollout_weights
from pmd_jax.policy.sampler import EngineConfig
from pmd_jax.policy.sharding import MeshConfig, make_mesh
from pmd_jax.rollout import RolloutConfig
from pmd_jax.tasks.task import TaskConfig
from tools import account, memory_size, plan, roofline
from tools.memory_size import Limits, Sizes
from tools.roofline import Rates
from tools.work import Work, abstract_mesh

LAYERS, MATRICES, HEAD = 27_840, 27_648, 3_072
ENDLESS = 1e30
FAST = Rates(ENDLESS, ENDLESS, ENDLESS, ENDLESS)
V5E, V6E, V5P, H100 = ("v5e", 16), ("v6e", 8), ("v5p", 32), ("h100", 8)


def settings(mesh=(1, 1, 1), problems=4, samples=2, tokens=16, engine=None, **distill):
    return RunConfig(
        model=ModelSection("toy", "float32"),
        mesh=MeshConfig(*mesh),
        task=TaskConfig(num_train=8, num_test=8),
        rollout=RolloutConfig(
            problems_per_step=problems, rollouts_per_problem=samples, max_new_tokens=tokens
        ),
        reflection=ReflectionConfig(max_new_tokens=8, behaviors_max_new_tokens=8),
        teacher=TeacherConfig(sources=("insights",), max_prompt_tokens=32),
        distill=DistillConfig(bucket_tokens=16, **distill),
        engine=engine or EngineConfig(),
    )


def work(mesh=(1, 1, 1), processes=1, dtype="float32", **kwargs):
    config = settings(mesh, **kwargs)
    config = dataclasses.replace(config, model=ModelSection("toy", dtype))
    made = abstract_mesh(config.mesh, math.prod(mesh))
    return Work(config, CONFIG, made, 16, processes=processes)


# --- several processes --------------------------------------------------------------------------


def test_a_process_samples_its_share_on_a_mesh_of_its_own():
    """8 devices of 2 processes: 4 each, 2 x 2; of 5 problems one process has 3."""
    local = work((2, 2, 2), processes=2, problems=5).local
    assert dict(local.mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2}
    assert (local.problems, local.processes) == (3, 1)
    assert list(plan.row_counts(work((2, 2, 2), processes=2, problems=5))) == [1, 2, 4, 6]
    one = work((2, 2, 2))
    assert one.local is one


@pytest.mark.parametrize(
    ("mesh", "processes", "message"),
    [
        ((1, 8, 1), 3, "--processes: must divide the number of devices, 8; got 3"),
        ((1, 4, 2), 8, "must divide the devices of each process, 1.*sizes that work: 1$"),
    ],
)
def test_processes_that_cannot_share_the_mesh_are_refused(mesh, processes, message):
    with pytest.raises(ValueError, match=message):
        work(mesh, processes)


def held_by_first(tree):
    device = jax.devices()[0]
    shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == device)


@pytest.mark.parametrize(
    ("sizes", "processes"), [((2, 2, 2), 2), ((1, 8, 1), 2), ((1, 4, 2), 4)], ids=str
)
def test_the_weights_of_one_of_several_processes_are_what_its_devices_hold(sizes, processes):
    """Processes are played by parts of the devices, of which the first has the view."""
    mesh, made = make_mesh(MeshConfig(*sizes)), work(sizes, processes, dtype="bfloat16")
    first = list(mesh.devices.flat[: 8 // processes])
    own = make_mesh(MeshConfig(1, -1, sizes[2]), devices=first)
    view = LocalView(mesh, own, jnp.dtype("bfloat16"))(params_on(mesh))
    assert account.num_bytes(account.held_view(made)) == held_by_first(view)
    copy = rollout_weights(view, CONFIG, own, jnp.dtype("bfloat16"))
    new = [leaf for name, leaf in copy.top.items() if leaf is not view[name]]
    assert account.num_bytes(account.held_copy(made.local)) == held_by_first((copy.layers, new))
    lines = {line.name: line.bytes for line in account.sampling(made, 8).lines}
    assert lines["weights of this process, cut"] == held_by_first(view)


def test_the_view_by_hand():
    """bfloat16: matrices and head in 4 parts, norms whole, the last of them float32."""
    view = account.held_view(work((1, 4, 2), processes=2, dtype="bfloat16"))
    assert account.num_bytes(view) == 2 * (MATRICES + HEAD) // 4 + 2 * 3 * 64 + 4 * 32


# --- between devices ----------------------------------------------------------------------------


def test_of_an_array_in_four_parts_three_come_from_elsewhere():
    assert roofline.gathered(100, 4) == 75
    assert roofline.gathered(100, 1) == 0


def test_sums_over_tensor_by_hand():
    """Attention and MLP of 3 layers: 10 tokens of 32 float32 each, half sent and half received."""
    assert roofline.sums(work((1, 1, 2)), 10) == 2 * 3 * 10 * 32 * 4
    assert roofline.sums(work((1, 2, 1)), 10) == 0


@pytest.mark.parametrize("teacher", ["current", "ema"])
def test_gathers_of_an_update_by_hand(teacher):
    """2 shards, 2 micro-batches, float32: layers come twice and their gradients go once; an EMA
    teacher's layers and head come too. The head comes once a step, its gradient is summed twice."""
    made = work((1, 2, 1), micro_batch=2, teacher=teacher)
    more = teacher == "ema"
    once, each = (1 + more) * HEAD, (3 + more) * LAYERS + 2 * HEAD
    assert roofline.update_gathers(made) == (once + 2 * each) * 4 / 2


def test_replicas_add_up_their_gradients():
    """data 2, fsdp 1: no weight is sent; gradients of layers and head are summed over replicas."""
    assert roofline.update_gathers(work((2, 1, 1))) == 4 * (LAYERS + HEAD)


@pytest.mark.parametrize(("remat", "per_layer"), [("context", 5), ("none", 4)])
def test_sums_of_an_update_by_hand(remat, per_layer):
    """4 groups: students 16 + 2 x 16 tokens, teachers 32 + 2 x 16; a sum sends a token's 32 numbers
    once, over 2 devices."""
    made = work((1, 1, 2), remat=remat)
    assert made.sizes == (16, 1, 32, 2, 16)
    tokens = per_layer * 4 * 48 + 2 * 4 * 64
    assert roofline.update_sums(made) == tokens * 3 * 32 * 4


def test_sync_by_hand():
    """bfloat16 on 4 devices. The copy is whole; 3/4 of it come over the link, and memory reads the
    float32 parameters and writes the copy."""
    made, state = work((1, 4, 1), dtype="bfloat16"), 4 * ((MATRICES + HEAD) // 4 + 224)
    copy = 2 * (LAYERS + HEAD)
    link = roofline.sync(made, FAST._replace(link=1))
    assert (link.seconds, link.bound, link.received) == (copy * 3 / 4, "link", copy * 3 / 4)
    memory = roofline.sync(made, FAST._replace(hbm=1))
    assert (memory.seconds, memory.bound) == (state + copy, "memory")


def test_sync_of_two_processes_gathers_the_view_and_then_the_copy():
    made = work((1, 4, 1), processes=2, dtype="bfloat16")
    view, copy = (account.num_bytes(f) for f in (account.held_view(made), account.held_copy(made)))
    assert roofline.sync(made, FAST).received == view / 2 + copy / 2


# --- seconds ------------------------------------------------------------------------------------


def test_products_of_a_token_by_hand():
    """Two for each number of a matrix; queries of 4 heads of 8 with keys, then with values."""
    assert roofline.products_of(CONFIG) == (2 * MATRICES, 4 * 3 * 4 * 8, 2 * HEAD)


def test_decoding_by_hand():
    """One prompt of 64 columns, two rows, 2 steps, a ring of 16 columns: each step reads all
    weights and the prompt once; a column holds 2 x 3 x 2 x 8 float32."""
    made, asked = work(), (1, 2, 64, 2, 16)
    weights, column = 4 * (LAYERS + HEAD), 4 * 96
    moved = 2 * (weights + 64 * column) + 2 * (16 + 16) * column
    part = roofline.decode(made, FAST._replace(hbm=1), *asked)
    assert (part.seconds, part.bound, part.received) == (moved, "memory", 0)
    pairs = 2 * 2 * 64 + 2 * (16 + 16)
    computed = 2 * 2 * (2 * MATRICES + 2 * HEAD) + pairs * 384
    part = roofline.decode(made, FAST._replace(flops=1), *asked)
    assert (part.seconds, part.bound) == (computed, "products")


def test_the_ring_grows_in_the_first_wave_alone():
    """4 rollouts in 2 rows, chunks of 16 steps: a ring of 16 columns, then of 32, which stays."""
    engine = EngineConfig(max_rows=2, chunk=16, min_columns=16)
    made, rates = work(engine=engine), FAST._replace(hbm=1)
    column, each = 4 * 96, 4 * (LAYERS + HEAD) + 64 * 4 * 96

    def ring(samples):
        steps = samples // 2 * 20
        return (roofline.decode(made, rates, 1, samples, 64, 20, 64).seconds - steps * each) / 2

    assert ring(2) == (16 * 16 + 4 * 32) * column
    assert ring(4) == ring(2) + 20 * 32 * column


def test_an_int8_cache_reads_a_byte_and_a_share_of_a_scale():
    made = work(engine=EngineConfig(kv_cache="int8"))
    assert roofline.column_bytes(made) == 2 * 3 * 2 * (8 + 4)


def test_prefill_by_hand():
    """5 prompts of 64, 128 tokens a call: 3 calls of 2 prompts, one on each of two shards, that
    gather half of the layers each; plain attention reads all 64 x 64 pairs."""
    made = work((1, 2, 1), engine=EngineConfig(prefill_tokens=128))
    pairs = account.row_pairs("xla", 64)
    part = roofline.prefill(made, FAST._replace(flops=1), 5, 64)
    assert (part.seconds, part.bound) == (3 * (64 * 2 * MATRICES + pairs * 384), "products")
    part = roofline.prefill(made, FAST._replace(link=1), 5, 64)
    assert (part.seconds, part.bound) == (3 * 4 * LAYERS / 2, "link")
    assert part.received == part.seconds


def test_an_update_takes_its_products_or_its_gathers_and_then_its_sums():
    made = work((1, 2, 2))
    counts = roofline.flops(made)
    products = sum(n for name, n in counts.items() if name.startswith("distill")) / 4
    gathers, sums = roofline.update_gathers(made), roofline.update_sums(made)
    for flops, bound, longest in ((1, "products", products), (ENDLESS, "link", gathers)):
        part = roofline.update(made, FAST._replace(flops=flops, link=1))
        assert (part.bound, part.received) == (bound, gathers + sums)
        assert part.seconds == pytest.approx(longest + sums)


def test_exchange_by_hand():
    """A process has 2 problems of 2 responses of 10 tokens, 12 bytes each, and 2 replies of 8, 4
    bytes each: 544 bytes, sent as 1,024 to three others."""
    config = settings(problems=8, samples=2)
    assert roofline.exchange_bytes(config, 4, 10) == 3 * 1024
    assert roofline.exchange_bytes(config, 1, 10) == 0


def test_a_step_has_the_parts_that_its_sources_ask_for():
    made = work((1, 4, 2), processes=2)
    names = [part.name for part in roofline.step_parts(made, FAST)]
    assert names == ["sync", "prefill", "decode", "reflection", "update", "exchange"]
    sources = dataclasses.replace(made.config.teacher, sources=("sibling", "behaviors"))
    other = dataclasses.replace(made, config=dataclasses.replace(made.config, teacher=sources))
    assert "behaviors" in [part.name for part in roofline.step_parts(other, FAST)]
    sources = dataclasses.replace(sources, sources=("sibling",))
    other = dataclasses.replace(made, config=dataclasses.replace(made.config, teacher=sources))
    assert "reflection" not in [part.name for part in roofline.step_parts(other, FAST)]


# --- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slice_", "told"),
    [
        (V5E, ("tpu", 16, 197, 819, 90, 4)),
        (V6E, ("tpu", 32, 918, 1640, 180, 1)),
        (V5P, ("tpu", 95, 459, 2765, 180, 8)),
        (H100, ("gpu", 80, 989, 3350, 450, 1)),
    ],
    ids=lambda x: str(x[0]),
)
def test_a_chip_says_what_the_command_line_leaves_out(slice_, told):
    chip, devices = slice_
    given = ["--chip", chip, "--devices", str(devices)]
    names = "platform", "memory", "peak_tflops", "hbm", "link", "processes"
    options, _ = plan.read_options(given)
    assert tuple(getattr(options, name) for name in names) == told
    options, _ = plan.read_options([*given, "--memory=14", "--link=7", "--processes=2"])
    assert (options.memory, options.link, options.processes) == (14, 7, 2)


def test_a_link_ends_with_its_host():
    with pytest.raises(ValueError, match=r"at most 8 with --chip h100.*got 16; give --link"):
        plan.read_options(["--chip", "h100", "--devices", "16"])
    assert plan.read_options(["--chip=h100", "--devices=16", "--link=50"])[0].processes == 2


def test_without_a_chip_nothing_is_told_of_a_step():
    options, _ = plan.read_options(["--peak-tflops=100"])
    assert (options.platform, options.memory, options.processes) == ("gpu", 80, 1)
    assert options.hbm is None and options.link is None


@pytest.fixture
def toy(tmp_path):
    return write_model_folder(tmp_path / "toy")


def test_the_parts_of_a_step_add_up():
    options, _ = plan.read_options(["--chip=v5e", "--devices=8", "--mfu=0.5"])
    told = plan.step(work((1, 8, 1), processes=2), options)
    assert told["seconds"] == sum(part["seconds"] for part in told["parts"])
    assert told["received"] == sum(part["received"] for part in told["parts"])
    assert (told["assumed"]["chip"], told["assumed"]["mfu"]) == ("v5e", 0.5)


def test_a_step_as_a_table_fits_80_columns(toy, capsys):
    given = ["--config", "configs/quickstart.py", f"--config.model.path={toy}", "--chip=v5e"]
    assert plan.main([*given, "--devices=8", "--config.rollout.problems_per_step=8"]) == 0
    said = capsys.readouterr().out
    assert "8 x fsdp 1 x tensor 1, 2 processes" in said
    assert "a step, estimated: 0.4 of 197 TFLOP/s, 0.5 of 819 GB/s" in said
    assert "max_rows of each process" in said and max(map(len, said.splitlines())) <= 80


# --- memory -------------------------------------------------------------------------------------


def test_the_size_of_memory_by_hand():
    """100 problems, 2 epochs of 25 steps: 200 visits and 50 steps of events, kept for ever."""
    sizes, config = Sizes(1000, 100, 500, 10_000, 2**20, 320), settings()
    found = memory_size.estimate(sizes, config, problems=100, epochs=2)
    journal = 200 * 2**20 + 50 * 320
    assert found["state"] == 100 * 10_000 + 120 * 500
    assert (found["steps"], found["journal"]) == (50, journal)
    assert found["segments"] == pytest.approx(200.015, abs=1e-3)
    assert found["save_seconds"] == pytest.approx(2 * 200.015 * 35e-6, 1e-4)
    assert found["resume_seconds"] == pytest.approx(200 * 0.6e-3 + journal / 77e6)


def test_one_bank_is_too_much_where_a_limit_is_met():
    """The number of problems that is told takes just what the limit allows."""
    sizes, config = Sizes(1000, 100, 500, 10_000, 40_000, 320), settings()
    limits = Limits(host=1e9, save=60, resume=600)
    most = memory_size.too_many(sizes, config, 20, limits)
    assert most["memory"] == pytest.approx((1e9 - 120 * 500) / 10_000)
    for name, limit in (("save", 60), ("resume", 600)):
        found = memory_size.estimate(sizes, config, most[name], 20)
        assert found[f"{name}_seconds"] == pytest.approx(limit)


def test_a_real_bank_holds_and_writes_its_texts():
    """6 attempts of each problem are kept, and as many written at each visit: 100 tokens more are
    400 bytes more of each."""
    config = dataclasses.replace(settings(), memory=MemoryConfig())
    short, long = (memory_size.measured(config, 3, tokens) for tokens in (100, 200))
    assert long.visit - short.visit == pytest.approx(6 * 400)
    assert long.state - short.state == pytest.approx(6 * 400)
    assert long.experience - short.experience == pytest.approx(400)
    assert short.insight == long.insight and short.step == long.step
    overhead = short.state - 6 * 400  # ids, verdicts, insights, Python's own
    assert 6 * 50 < overhead < 6 * 600


def test_the_size_of_memory_as_a_table_and_as_json(toy, capsys):
    given = ["--config", "configs/quickstart.py", f"--config.model.path={toy}", "--processes=2"]
    assert memory_size.main([*given, "--epochs=2"]) == 0
    said = capsys.readouterr().out
    assert "100,000 problems, 2 epochs, responses of 16 tokens" in said and "measured" in said
    assert max(map(len, said.splitlines())) <= 80
    assert memory_size.main([*given, "--epochs=2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["estimated"]["exchanged"] > 0
    assert memory_size.main([*given, "--problems=0"]) == 2
    assert capsys.readouterr().err == "error: --problems: must be above 0; got 0\n"
