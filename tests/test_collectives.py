"""What devices hold and what they send each other, on meshes of eight; sizes that are refused.

XLA decides what is sent: `allowed` says how much of what at most, with the reason, and what it does
not name must not be sent at all. It counts numbers, not bytes, because XLA sends bfloat16 as
float32 on a CPU. Nor does XLA scatter sums there: the gradient of a layer is an all-reduce, of
which each device keeps its part. For a TPU it makes reduce-scatters of the same program.
"""

import dataclasses
import functools
import math
from collections import Counter

import jax
import numpy as np
import pytest
from hlo import Collective, collectives, shapes
from toys import CONFIG, F32, VARIANTS, eight_devices, make_sampler, params_on, toy_batch

from pmd_jax.distill.batch import place
from pmd_jax.distill.objectives import DistillConfig, check_micro_batch
from pmd_jax.distill.update import (
    OptimizerConfig,
    abstract_state,
    init_state,
    make_optimizer,
    make_train_step,
)
from pmd_jax.policy import cache, programs
from pmd_jax.policy.sampler import SamplingConfig
from pmd_jax.policy.scheduler import Shape
from pmd_jax.policy.sharding import MeshConfig, check_divides, make_mesh, mesh_sizes, named

# Sizes by which a shape tells whether it holds a layer, the vocabulary or tokens, cut or whole.
MODEL = dataclasses.replace(
    CONFIG, vocab_size=352, mlp_width=80, num_heads=8, num_kv_heads=4, head_dim=6
)
L, D, V, HEADS, KV_HEADS, MLP = 3, 32, 352, 48, 24, 80
OPTIMIZER = OptimizerConfig()
LAYER = D * (2 * HEADS + 2 * KV_HEADS + 3 * MLP)  # numbers in the matrices of a layer
GROUPS, ROLLOUTS, PROMPT, RESPONSE, CHUNKS = 16, 4, 64, 64, 4
STUDENT = PROMPT + ROLLOUTS * RESPONSE  # tokens of a group
TEACHER = 2 * PROMPT + ROLLOUTS * RESPONSE


# --- the parser ---------------------------------------------------------------------------------

PROGRAM = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[]}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %all-reduce.2 = (f32[8,4]{1,0:T(8,128)}, /*index=1*/bf16[]) all-reduce(%a, %b), to_apply=%add
  ROOT %out = (s32[], f32[2]{0}) tuple(%i, %c)
}

%outer (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %while.1 = (s32[], f32[2]{0}) while(%p), condition=%going, body=%inner, \
backend_config={"known_trip_count":{"n":"3"}}
  %start = (f32[2]{0}, f32[8]{0}) all-gather-start(%c), dimensions={0}
  ROOT %done = f32[8]{0} all-gather-done(%start)
}

%going (p: (s32[], f32[2])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), metadata={op_name="all-reduce(of nothing)"}
}

%branch (p: f32[2]) -> f32[2] {
  %s = (f32[6]{0}, f32[2]{0}, u32[], u32[]) reduce-scatter-start(%p), to_apply=%add
  ROOT %d = f32[2]{0} reduce-scatter-done(%s)
}

ENTRY %main (p: f32[8,4]) -> f32[] {
  %while.2 = (s32[], f32[2]{0}) while(%p), condition=%going, body=%outer
  %either = f32[2]{0} conditional(%i, %p, %p), branch_computations={%branch, %branch}
  ROOT %permuted = f32[] collective-permute(%last), source_target_pairs={{0,1}}
}
"""


def test_collectives_are_read_from_a_program_with_all_its_loops():
    assert collectives(PROGRAM) == [
        Collective("all-reduce", ((8, 4), ()), (0, 3)),
        Collective("all-gather", ((8,),), (0,)),
        Collective("reduce-scatter", ((2,),), ()),
        Collective("reduce-scatter", ((2,),), ()),
        Collective("collective-permute", ((),), ()),
    ]


# --- the training step --------------------------------------------------------------------------


def sort_of(shape, mesh) -> str:
    """What an array of this shape holds."""
    _, fsdp, tensor = mesh.shape.values()
    dims = tuple(sorted(n for n in shape if n > 1))
    widths = [n // tensor for n in (HEADS, KV_HEADS, MLP)]
    if shape[:1] == (L,):
        return "all layers"
    if {V, V // 2, V // tensor} & set(dims):
        return "vocabulary" if len(dims) == 2 and D % dims[0] == 0 else "logits"
    if dims in {tuple(sorted((rows, n))) for n in widths for rows in (D, D // fsdp)}:
        return "layer"
    return {(): "number", (D,): "norm"}.get(dims, "tokens")


def numbers_sent(text, mesh) -> Counter:
    """{(what, how, in which loop): numbers} of a program, in the results on one device."""
    found: Counter = Counter()
    for c in collectives(text):
        where = {L: "layers", CHUNKS: "chunks"}.get(c.loops[-1] if c.loops else 0, "step")
        for shape in c.shapes:
            found[sort_of(shape, mesh), c.kind, where] += c.times * math.prod(shape)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """The compiled distillation step. micro_batch: groups computed at once."""

    mesh: jax.sharding.Mesh
    micro_batch: int
    ema: bool
    batch: object
    compiled: jax.stages.Compiled

    @functools.cached_property
    def text(self) -> str:
        return self.compiled.as_text()

    @functools.cached_property
    def sent(self) -> Counter:
        return numbers_sent(self.text, self.mesh)

    @property
    def groups(self) -> int:
        """Of a micro-batch, on one device."""
        return self.micro_batch // self.mesh.shape["data"] // self.mesh.shape["fsdp"]


def allowed(step: Step) -> dict[tuple[str, str, str], int]:
    """How many numbers of what a step may send at most, by the loop in which it does."""
    data, fsdp, tensor = step.mesh.shape.values()
    over_fsdp, over_tensor, over_batch = fsdp > 1, tensor > 1, data * fsdp > 1
    micro_batches = GROUPS // step.micro_batch
    layers = micro_batches * L * LAYER // tensor  # every matrix once in each micro-batch
    forward = 3 if step.ema else 2  # of the student, of its teacher if it is another, and again
    table = V * D // tensor  # the embedding, which is the head too
    hidden = micro_batches * step.groups * D  # of one token of each group of a device
    responses = hidden // D * ROLLOUTS * RESPONSE
    read = hidden * (STUDENT + TEACHER) * over_fsdp
    reported = 4 * GROUPS * ROLLOUTS * RESPONSE
    sums = 2 * TEACHER + (2 + 1 + 5) * STUDENT
    numbers = {("number", "all-reduce", where): 100 for where in ("step", "chunks")}
    return numbers | {
        # Each layer, for every pass over it; the last is the backward pass, which recomputes.
        ("layer", "all-gather", "layers"): layers * forward * over_fsdp,
        # Gradients over fsdp, then the part that a device keeps over data.
        ("layer", "all-reduce", "layers"): layers * over_batch
        + layers // fsdp * (over_fsdp and data > 1),
        ("norm", "all-reduce", "layers"): micro_batches * L * 2 * D * over_batch,
        ("norm", "all-reduce", "step"): micro_batches * D * over_batch,
        # Over heads and MLP: 2 sums in a forward pass, 1 recomputed, and in the backward pass 1 for
        # each of q, k, v, gate and up. (A TPU makes 2 of these 5.)
        ("tokens", "all-reduce", "layers"): L * hidden * sums * over_tensor,
        # Of a response token, over the vocabulary: its gradient, and what each part of it found.
        ("tokens", "all-reduce", "chunks"): responses * (D + 13) * over_tensor,
        # For the heads of student and teacher and, where tensor cuts them, to look tokens up.
        ("vocabulary", "all-gather", "step"): table * (5 if over_tensor else 2) * over_fsdp,
        ("vocabulary", "collective-permute", "step"): table
        // fsdp
        * (2 + micro_batches)
        * (over_fsdp and over_tensor),
        # The gradient as embedding and that as head.
        ("vocabulary", "all-reduce", "step"): table * micro_batches * 2 * over_batch,
        # First hidden states, or their tokens, between who has a part of the embedding and who
        # computes the group; and what the report says of each response token.
        ("tokens", "all-gather", "step"): read + reported,
        ("tokens", "all-to-all", "step"): read + hidden * STUDENT * over_fsdp,
        ("tokens", "all-reduce", "step"): hidden * (STUDENT + TEACHER) * over_tensor,
    }


@functools.cache
def compiled_step(data, fsdp, tensor, micro_batch, teacher="ema") -> Step:
    mesh = make_mesh(MeshConfig(data, fsdp, tensor))

    def placed(x):
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=named(mesh, "batch", *[None] * (x.ndim - 1))
        )

    tokens = np.zeros((GROUPS, ROLLOUTS, RESPONSE), np.int32)
    batch = toy_batch(num_groups=GROUPS)
    batch = batch._replace(response=tokens, sampled_logprobs=tokens.astype(np.float32))
    batch = jax.tree.map(placed, batch)
    chunk_tokens = micro_batch * ROLLOUTS * RESPONSE // CHUNKS
    config = DistillConfig(teacher=teacher, micro_batch=micro_batch, chunk_tokens=chunk_tokens)
    optimizer, ema = make_optimizer(OPTIMIZER, MODEL), teacher == "ema"
    step = make_train_step(MODEL, OPTIMIZER, config, mesh, F32)
    with jax.set_mesh(mesh):
        lowered = step.jitted.lower(abstract_state(MODEL, optimizer, mesh, ema), batch)
        return Step(mesh, micro_batch, ema, batch, lowered.compile())


# data, fsdp, tensor and micro_batch: 8 groups or all 16
MORE = [(2, 2, 2, 16), (1, 8, 1, 8), (1, 8, 1, 16), (1, 4, 2, 8), (1, 4, 2, 16), (1, 2, 4, 8)]
MORE += [(1, 2, 4, 16), (2, 4, 1, 8), (8, 1, 1, 8), (4, 1, 2, 8), (1, 4, 2, 8, "current")]


@pytest.fixture(
    scope="module",
    params=[(2, 2, 2, 8), *(pytest.param(m, marks=pytest.mark.slow) for m in MORE)],
    ids=lambda m: "-".join(map(str, m)),
)
def step(request) -> Step:
    return compiled_step(*request.param)


def test_a_step_sends_what_is_expected_and_nothing_else(step):
    limits = allowed(step)
    more = {what: (n, limits.get(what, 0)) for what, n in step.sent.items()}
    assert not {what: pair for what, pair in more.items() if pair[0] > pair[1]}
    layers = "layer", "all-gather", "layers"
    assert step.sent[layers] == limits[layers]  # exactly, so that the reading is known to work


def test_no_layers_but_one_and_no_logits_travel(step):
    """So no gradient, moment or EMA of the whole model does; no logits of even one token."""
    assert not {what for what, *_ in step.sent} & {"all layers", "logits"}


def test_logits_exist_for_one_chunk_and_hidden_states_for_one_device(step):
    scored = step.groups * ROLLOUTS * RESPONSE // CHUNKS
    vocabulary = V // step.mesh.shape["tensor"]
    arrays = set(shapes(step.text))
    logits = [math.prod(s) for s in arrays if sort_of(s, step.mesh) == "logits"]
    assert max(logits) == scored * vocabulary
    assert {(step.groups, tokens, D) for tokens in (STUDENT, TEACHER)} <= arrays
    assert not {(step.micro_batch, tokens, D) for tokens in (STUDENT, TEACHER)} & arrays


def test_the_state_is_donated_and_cut_over_all_devices_that_the_table_names(step):
    """Weights, EMA and two moments, float32; three counters, int32."""
    data, fsdp, tensor = step.mesh.shape.values()
    norms = (2 * L + 1) * D
    held = 4 * (4 if step.ema else 3) * ((L * LAYER + V * D) // (fsdp * tensor) + norms) + 3 * 4
    batch = sum(math.prod(x.shape) * x.dtype.itemsize for x in step.batch) // (data * fsdp)
    memory = step.compiled.memory_analysis()
    assert memory.alias_size_in_bytes == held
    assert held < memory.argument_size_in_bytes <= held + batch
    (before, _), _ = step.compiled.input_shardings
    after, _ = step.compiled.output_shardings
    assert jax.tree.leaves(after) == jax.tree.leaves(before)


# --- what devices hold --------------------------------------------------------------------------

UNTIED = dataclasses.replace(MODEL, tied_head=False)
SIZES = [(1, 8, 1), (1, 4, 2), (1, 2, 4), (2, 2, 2), (2, 4, 1), (8, 1, 1), (2, 1, 4)]


def ways(x) -> int:
    """Into how many equal parts an array is cut."""
    if isinstance(x, jax.Array):
        [part] = {shard.data.nbytes for shard in x.addressable_shards}
        return x.nbytes // part
    return math.prod(x.shape) // math.prod(x.sharding.shard_shape(x.shape))


def assert_matrices_cut(tree, parts) -> int:
    """Norms and counters are whole, all else is cut into so many parts; how many are."""
    leaves = [(jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(tree)]
    wanted = {name: 1 if x.ndim == 0 or "norm" in name else parts for name, x in leaves}
    assert {name: ways(x) for name, x in leaves} == wanted
    return sum("norm" not in name and x.ndim > 0 for name, x in leaves)


@pytest.mark.parametrize("config", [*VARIANTS, UNTIED], ids=["llama", "gemma", "olmo", "untied"])
def test_weights_ema_and_moments_are_cut_over_fsdp_and_tensor(config):
    for sizes in SIZES:
        if config.num_kv_heads % sizes[2] == 0:
            mesh, optimizer = make_mesh(MeshConfig(*sizes)), make_optimizer(OPTIMIZER, config)
            state = abstract_state(config, optimizer, mesh, ema=True)
            count = assert_matrices_cut(state, sizes[1] * sizes[2])
            assert count == 4 * (8 if config.tied_head else 9)


def test_a_new_state_is_made_in_its_parts():
    mesh = eight_devices()
    state = init_state(params_on(mesh), CONFIG, make_optimizer(OPTIMIZER, CONFIG), mesh, ema=True)
    assert assert_matrices_cut(state, 4) == 4 * 8


def test_weights_for_decoding_are_cut_over_tensor_alone():
    """So that a decode step sends none of them."""
    _, weights = make_sampler(eight_devices())
    assert assert_matrices_cut((weights.top, weights.layers), 2) == 1 + 3 * 7


@pytest.mark.parametrize("int8", [False, True])
def test_the_cache_is_cut_over_all_devices(int8):
    """Rows and slots over data and fsdp, heads over tensor."""
    for sizes in [(1, 8, 1), (2, 2, 2), (1, 2, 4)]:
        mesh = make_mesh(MeshConfig(*sizes))
        shape = Shape(8 // sizes[2], 2, 4, 2)
        state = cache.empty_state(MODEL, shape, 64, 32, mesh, F32, int8)
        segments = jax.tree.leaves((state["prompt"], state["ring"]))
        assert {ways(x) for x in segments} == {8} and len(segments) == 2 * L * (4 if int8 else 2)
        assert ways(state["first_hidden"]) == 8 // sizes[2]


# --- sampling -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(2, 2, 2), (1, 8, 1)], ids=["2x2x2", "1x8x1"])
def sampling(request):
    """A mesh, and the text of the first prefill and decode: 4 samples of 16 prompts, 48 columns."""
    mesh, found = make_mesh(MeshConfig(*request.param)), {}

    def insert(*arguments, real=programs.insert, **static):
        found["prefill"] = real.lower(*arguments, **static).compile().as_text()
        return arguments[1]

    def decode(*arguments, real=programs.decode, **static):
        found["decode"] = real.lower(*arguments, **static).compile().as_text()
        raise InterruptedError

    sampler, weights = make_sampler(mesh, config=MODEL)
    cuts = SamplingConfig(top_k=5, top_p=0.9)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(programs, "insert", insert)
        patch.setattr(programs, "decode", decode)
        sampler.generate(weights, [[1] * 40] * 16, [[8] * 4] * 16, cuts, [], 0)
    return mesh, found


@pytest.mark.slow
def test_prefill_gathers_each_layer_once_and_sends_nothing_of_the_cache(sampling):
    mesh, programs = sampling
    data, fsdp, tensor = mesh.shape.values()
    sent, halves = numbers_sent(programs["prefill"], mesh), tensor > 1
    hidden = 16 // (data * fsdp) * 48 * D
    assert sent.pop(("layer", "all-gather", "layers")) == L * LAYER // tensor
    limits = {
        ("tokens", "all-reduce", "layers"): halves * L * 2 * hidden,  # over heads and MLP
        ("vocabulary", "all-gather", "step"): halves * V * D // fsdp,  # to look tokens up
        ("vocabulary", "collective-permute", "step"): halves * V * D // (fsdp * tensor),
        ("tokens", "all-gather", "step"): hidden,
        ("tokens", "all-to-all", "step"): hidden,
    }
    assert all(n <= limits.get(what, 0) for what, n in sent.items()), sent


@pytest.mark.slow
def test_a_decode_step_sends_no_weights_no_cache_and_no_logits(sampling):
    """Without tensor, only whether all rows are done; else at most a hidden state of each row."""
    mesh, programs = sampling
    sent = collectives(programs["decode"])
    rows = 64 // (mesh.shape["data"] * mesh.shape["fsdp"])
    most = max(math.prod(shape) for c in sent for shape in c.shapes)
    assert most == (rows * D if mesh.shape["tensor"] > 1 else 1)
    assert {c.kind for c in sent} <= {"all-reduce", "collective-permute"}


# --- sizes that do not divide -------------------------------------------------------------------


def refusal(call, *arguments) -> str:
    with pytest.raises(ValueError) as refused:
        call(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (16, -1, 1), (1, 3, -1), (2, 8, 1)])
def test_a_mesh_that_is_not_all_devices_is_refused_with_sizes_that_divide_them(sizes):
    message = refusal(make_mesh, MeshConfig(*sizes))
    assert "data x fsdp x tensor must equal the number of devices, 8; got " in message
    assert message.endswith("each must be one of 1, 2, 4, 8, or -1 for what the others leave")


@pytest.mark.parametrize("sizes", [(0, -1, 1), (-1, -1, 1), (1, -2, 1)])
def test_sizes_that_are_none_are_refused(sizes):
    message = refusal(mesh_sizes, MeshConfig(*sizes), 8)
    assert message.startswith("mesh: sizes must be positive, one of them may be -1; got [")


@pytest.mark.parametrize(
    ("change", "sizes", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 6}, (1, 2, 4), "attention heads 6, key-value heads 6"),
        ({"num_kv_heads": 2}, (1, 2, 4), "key-value heads 2; got 4; sizes that work: 1, 2"),
        ({"mlp_width": 84}, (1, 1, 8), "MLP width 84; got 8; sizes that work: 1, 2, 4"),
        ({"vocab_size": 354}, (1, 2, 4), "vocabulary 354; got 4; sizes that work: 1, 2"),
        ({"vocab_size": 353}, (1, 4, 2), "vocabulary 353; got 2; sizes that work: 1"),
        ({"width": 36}, (1, 8, 1), "mesh.fsdp: must divide the model's model width 36; got 8; "),
        ({"width": 36}, (2, 4, 1), ""),
        ({"num_kv_heads": 8}, (1, 1, 8), ""),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused_with_sizes_that_do(
    change, sizes, message
):
    config = dataclasses.replace(MODEL, **{"num_heads": 8, "mlp_width": 80} | change)
    mesh = make_mesh(MeshConfig(*sizes))
    if not message:
        check_divides(config, mesh)
    else:
        found = refusal(check_divides, config, mesh)
        assert message in found and "; sizes that work: 1" in found


def test_a_micro_batch_that_the_mesh_does_not_divide_is_refused_and_a_step_is_filled_up():
    message = refusal(check_micro_batch, DistillConfig(micro_batch=6), 4, 24)
    assert "must be a multiple of the 4 parts that the mesh cuts a batch into" in message
    assert message.endswith("got 6; sizes that work with 24 problems a step: 0, 4, 8, 12, 24")
    check_micro_batch(DistillConfig(micro_batch=8), 4, 24)
    check_micro_batch(DistillConfig(), 4, 24)
    batch = place(toy_batch(num_groups=5, multiple_of=4), eight_devices())
    assert ways(batch.response) == 4 and not batch.has_guidance[5:].any()
