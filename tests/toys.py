"""A toy policy and toy batches, small enough to check by eye and cut evenly over 8 devices."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from pmd_jax.distill.batch import DistillBatch, DistillGroup, build_batch
from pmd_jax.policy import model
from pmd_jax.policy.families import ModelConfig
from pmd_jax.policy.programs import rollout_weights
from pmd_jax.policy.rope import Rope
from pmd_jax.policy.sampler import EngineConfig, Sampler
from pmd_jax.policy.sharding import MeshConfig, make_mesh, single_device_mesh
from pmd_jax.policy.weights import hf_pieces
from pmd_jax.records import Rollout

CONFIG = ModelConfig(
    family="llama",
    num_layers=3,
    width=32,
    mlp_width=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=96,
    max_positions=256,
    rope=Rope(10_000.0),
    norm_eps=1e-5,
    tied_head=True,
)
GEMMA = dataclasses.replace(
    CONFIG,
    family="gemma3_text",
    sliding=(True, False, True),
    window=6,
    sliding_rope=Rope(1_000.0),
    norms="both",
    norm_offset=1.0,
    qk_norm="head",
    activation="gelu_tanh",
    embed_scale=32**0.5,
    query_scale=0.3,
)
OLMO = dataclasses.replace(
    CONFIG,
    family="olmo3",
    rope=Rope(10_000.0, "yarn", 4.0, original_positions=16, attention_factor=1.2),
    sliding=(True, True, False),
    window=9,
    sliding_rope=Rope(10_000.0),
    norms="after",
    qk_norm="projection",
)
VARIANTS = (CONFIG, GEMMA, OLMO)  # every branch of model.block, window and rotary table
F32 = jnp.dtype("float32")


def eight_devices():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@functools.cache
def _weights(seed, config):
    params = model.init_params(config, jax.random.key(seed), single_device_mesh())
    wide = jax.tree.map(lambda w: 3 * w if w.ndim > 1 + (w.shape[0] == 3) else w, params)
    return jax.tree.map(np.asarray, wide)


def toy_params(seed=0, config=CONFIG):
    """Random weights, three times the usual spread so that distributions are far from flat."""
    return jax.tree.map(jnp.array, _weights(seed, config))


def params_on(mesh, seed=0, config=CONFIG):
    """Fresh buffers on the mesh: a donated tree never takes another test's weights along."""
    shardings = jax.tree.map(lambda x: x.sharding, model.abstract_params(config, mesh, F32))
    return jax.device_put(toy_params(seed, config), shardings)


def make_sampler(mesh=None, params=None, config=CONFIG, num_tokens=None, **engine):
    """A sampler and its weights on a mesh."""
    mesh = mesh or single_device_mesh()
    params = params if params is not None else params_on(mesh, config=config)
    weights = rollout_weights(params, config, mesh, F32)
    return Sampler(config, EngineConfig(**engine), mesh, F32, num_tokens), weights


@functools.partial(jax.jit, static_argnums=2)
def _padded_logprobs(params, tokens, config):
    hidden = model.causal_hidden(params, tokens, config, F32)
    return jax.nn.log_softmax(model.logits(model.head_of(params), hidden))


def full_logprobs(params, tokens, config=CONFIG):
    """[T, V] log-probabilities after each token, from one plain forward pass."""
    padded = jnp.asarray(np.pad(tokens, (0, -len(tokens) % 128)), jnp.int32)  # few sizes compile
    return np.asarray(_padded_logprobs(params, padded[None], config))[0, : len(tokens)]


def toy_groups(num_groups=4, num_rollouts=4, seed=0, same_prompts=False) -> list[DistillGroup]:
    """Groups whose rollouts read two different teacher prompts; the last rollout has no guidance.

    same_prompts: every teacher prompt is the student's.
    """
    rng = np.random.default_rng(seed)

    def tokens(low, high):
        return rng.integers(1, CONFIG.vocab_size, rng.integers(low, high)).tolist()

    groups = []
    for i in range(num_groups):
        student = tokens(5, 20)
        teachers = [tokens(8, 30), tokens(8, 30)]
        responses = [np.asarray(tokens(2, 12), np.int32) for _ in range(num_rollouts)]
        rollouts = [
            Rollout(f"toy/{i}", 0, g, "", r, rng.uniform(-4, -1, len(r)).astype(np.float32), "stop")
            for g, r in enumerate(responses)
        ]
        read = [teachers[g % 2] for g in range(num_rollouts)]
        guided = [g < num_rollouts - 1 for g in range(num_rollouts)]
        if same_prompts:
            read = [student] * num_rollouts
        groups.append(DistillGroup(student, read, guided, rollouts))
    return groups


def told_apart(groups, beginning=70, seed=1) -> list[DistillGroup]:
    """The same groups, their teacher prompts alike but for up to 20 tokens at their end.

    The second rollout is told nothing more, as one without feedback.
    """
    rng = np.random.default_rng(seed)

    def tokens(size):
        return rng.integers(1, CONFIG.vocab_size, size).tolist()

    def prompts(group):
        alike = tokens(rng.integers(beginning - 10, beginning))
        return [alike + tokens(0 if g == 1 else 20 - g) for g in range(len(group.rollouts))]

    return [dataclasses.replace(group, teacher_prompts=prompts(group)) for group in groups]


def each_alone(groups) -> list[DistillGroup]:
    """Every rollout as a group of its own, which shares nothing."""
    return [
        DistillGroup(group.student_prompt, [prompt], [guided], [rollout])
        for group in groups
        for prompt, guided, rollout in zip(
            group.teacher_prompts, group.has_guidance, group.rollouts, strict=True
        )
    ]


def toy_batch(multiple_of=1, **kwargs) -> DistillBatch:
    return build_batch(toy_groups(**kwargs), multiple_of=multiple_of)


# --- a toy model as a Hugging Face folder ---------------------------------------------------

SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTES = 256 + len(SPECIAL)
TEXT_CONFIG = ModelConfig(
    family="llama",
    num_layers=2,
    width=32,
    mlp_width=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=264,  # divides by 8; the tokenizer defines 259
    max_positions=4096,
    rope=Rope(10_000.0),
    norm_eps=1e-5,
    tied_head=True,
)


def toy_tensors(config, seed=0):
    """A toy's weights as the tensors of a Hugging Face file."""
    tensors: dict[str, np.ndarray] = {}
    for name, rows in hf_pieces(toy_params(seed, config), config, np.float32):
        tensors[name] = np.concatenate([tensors[name], rows]) if name in tensors else rows
    return tensors


def write_model_folder(folder: Path, config=TEXT_CONFIG, seed=0) -> Path:
    """A model whose tokens are bytes, with a ChatML template."""
    folder.mkdir(parents=True)
    hf_config = {
        "model_type": config.family,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope.theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "eos_token_id": 258,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(hf_config))
    tensors = toy_tensors(config, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return write_tokenizer(folder)


def write_tokenizer(folder: Path) -> Path:
    """Bytes as tokens 0 to 255 and three special ones, with a ChatML template."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 258]}))
    template = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(template))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *SPECIAL])}
    tokenizer = FastTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
