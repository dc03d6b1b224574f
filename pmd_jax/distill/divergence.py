"""Divergences between student and teacher, and their gradients without [B, T, V] logits.

The small functions take float32 log-probabilities, the student's first, and return nats per token.
`weighted_loss` is the training loss: it walks over chunks of time, computes value and gradients of
a chunk in one pass, and keeps neither logits nor their gradients. Its backward pass only scales
what the forward pass found. Gradients flow into the student alone. What it sums is a divergence, or
anything else that a TokenLoss makes of the logits of a token (grpo.py).

Numbers of this shape of loss: at 8,192 tokens and V = 151,936, 1.2 GiB of temporaries against
14.5 GiB for the plain form, at the same 8 N D V matrix operations.

Axes: B rows, T response tokens, D width, V vocabulary, F batch shards of the mesh, n tokens of one
chunk and shard. Chunks are cut over time so that rows stay where they are, and each batch shard
has its own accumulator of the head's gradient, summed once at the end: no logits and no head
gradient travel between devices within the loop.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pmd_jax.policy.model import logits
from pmd_jax.policy.selection import top_k_ids
from pmd_jax.policy.sharding import constrain

DivergenceName = Literal["reverse_kl", "forward_kl", "jensen_shannon"]
LogProbs = Float[Array, "*batch V"]
TAIL_FLOOR = -1e-7  # SDPO's bound on log of the kept mass, which keeps the tail's logarithm finite


def forward_kl(student: LogProbs, teacher: LogProbs) -> Float[Array, "*batch"]:
    """KL(teacher || student): the student must cover every teacher mode. SDPO's alpha 0."""
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def reverse_kl(student: LogProbs, teacher: LogProbs) -> Float[Array, "*batch"]:
    """KL(student || teacher), the paper's printed objective. SDPO's alpha 1."""
    return jnp.sum(jnp.exp(student) * (student - teacher), axis=-1)


def jensen_shannon(
    student: LogProbs, teacher: LogProbs, alpha: float = 0.5
) -> Float[Array, "*batch"]:
    """(1 - alpha) KL(P || M) + alpha KL(Q || M) with M = (1 - alpha) P + alpha Q.

    P is the student, Q the teacher; gradients flow through P inside M too. At most log 2. SDPO's
    alpha strictly between 0 and 1; 0.5 is what its SciKnowEval runs use.
    """
    mixture = jnp.logaddexp(student + jnp.log1p(-alpha), teacher + jnp.log(alpha))
    return (1 - alpha) * forward_kl(mixture, student) + alpha * forward_kl(mixture, teacher)


DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jensen_shannon": jensen_shannon,
}


def with_tail(logprobs: Float[Array, "*batch K"]) -> Float[Array, "*batch K+1"]:
    """Appends one bucket with the probability of everything outside the kept tokens."""
    kept = jax.nn.logsumexp(logprobs, axis=-1, keepdims=True)
    tail = jnp.log(-jnp.expm1(jnp.minimum(kept, TAIL_FLOOR)))
    return jnp.concatenate([logprobs, tail], axis=-1)


def on_student_top_k(
    student: LogProbs, teacher: LogProbs, top_k: int, tail: bool
) -> tuple[Float[Array, "*batch K"], Float[Array, "*batch K"]]:
    """Both distributions on the student's top_k tokens, with a tail bucket or renormalised.

    With the tail a divergence never exceeds the full one and tends to it as top_k -> V.
    """
    ids = top_k_ids(lax.stop_gradient(student), top_k)
    kept, matched = (jnp.take_along_axis(x, ids, axis=-1) for x in (student, teacher))
    if tail:
        return with_tail(kept), with_tail(matched)
    return jax.nn.log_softmax(kept), jax.nn.log_softmax(matched)


@dataclasses.dataclass(frozen=True)
class DivergenceConfig:
    """Which divergence. top_k 0 takes the whole vocabulary, exactly; tail counts only with top_k.

    temperature: of both distributions, as the rollouts were sampled.
    """

    reads_teacher: ClassVar[bool] = True

    name: DivergenceName = "reverse_kl"
    top_k: int = 0
    tail: bool = True
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ValueError(f"top_k: must be at least 0 (0: whole vocabulary); got {self.top_k}")
        if self.temperature <= 0:
            raise ValueError(f"temperature: must be above 0; got {self.temperature}")

    def of_tokens(self, student: LogProbs, teacher: LogProbs, facts: Facts) -> Array:
        return token_divergence(self, student, teacher)


def token_divergence(
    config: DivergenceConfig, student: LogProbs, teacher: LogProbs
) -> Float[Array, "*batch"]:
    if config.top_k:
        student, teacher = on_student_top_k(student, teacher, config.top_k, config.tail)
    return DIVERGENCES[config.name](student, teacher)


class Facts(NamedTuple):
    """What is known of each response token before the loss.

    token: its id. weight: what its loss counts. Only policy gradients read the others: the
    advantage of its rollout, its log-probability under the policy before the first update of the
    step (`old`; None: the policy's own, as in the first update), and under the sampler.
    """

    token: Int[Array, "*batch"]
    weight: Float[Array, "*batch"]
    advantage: Float[Array, "*batch"] | None = None
    old: Float[Array, "*batch"] | None = None
    sampled: Float[Array, "*batch"] | None = None


@runtime_checkable
class TokenLoss(Protocol):
    """What a token costs, in nats, by the log-probabilities of both sides at `temperature`.

    reads_teacher: where it is False, the teacher's logits are never computed.
    """

    @property
    def temperature(self) -> float: ...

    @property
    def reads_teacher(self) -> bool: ...

    def of_tokens(self, student: LogProbs, teacher: LogProbs, facts: Facts) -> Array: ...


class PerToken(NamedTuple):
    """What the loss knows of each response token [B, T], in nats; never differentiated.

    divergence: what the loss weighs and sums. student and teacher: log-probability of the sampled
    token at temperature 1.
    """

    divergence: Float[Array, "B T"]
    student: Float[Array, "B T"]
    teacher: Float[Array, "B T"]
    entropy: Float[Array, "B T"]


def of_token(values: Float[Array, "*batch V"], token: Int[Array, "*batch"]) -> Array:
    """The value of each token's own id."""
    return jnp.take_along_axis(values, token[..., None], axis=-1)[..., 0]


def _cut(x: Array, shards: int, chunk: int) -> Array:
    """[B, T, ...] -> [T / chunk, F, n, ...]"""
    b, t = x.shape[:2]
    x = x.reshape(shards, b // shards, t // chunk, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 2, 0).reshape(t // chunk, shards, -1, *x.shape[4:])


def _join(x: Array, rows: int, chunk: int) -> Array:
    """The inverse of `_cut`: [T / chunk, F, n, ...] -> [B, T, ...]"""
    chunks, shards = x.shape[:2]
    x = x.reshape(chunks, shards, rows // shards, chunk, *x.shape[3:])
    return jnp.moveaxis(x, 0, 2).reshape(rows, chunks * chunk, *x.shape[4:])


def _chunk_value(config: TokenLoss, student_logits, teacher_logits, facts: Facts):
    """Weighted sum [F] over one chunk, and what is known per token."""
    log_p = jax.nn.log_softmax(student_logits / config.temperature)
    log_q = jax.nn.log_softmax(teacher_logits / config.temperature)
    divergence = config.of_tokens(log_p, log_q, facts)

    def of_sampled(logits: Array) -> Array:
        return of_token(logits, facts.token) - jax.nn.logsumexp(logits, axis=-1)

    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    known = (divergence, of_sampled(student_logits), of_sampled(teacher_logits), entropy)
    return jnp.sum(divergence * facts.weight, axis=-1), lax.stop_gradient(PerToken(*known))


def _scan(config, chunk, shards, arguments, gradients: bool):
    """One pass over the chunks: the sum, what is known per token and, if asked, the gradients."""
    head, student, teacher_head, teacher, facts = arguments
    rows = student.shape[0]
    head = constrain(head.astype(student.dtype), "vocab", None)
    teacher_head = constrain(teacher_head.astype(teacher.dtype), "vocab", None)
    f32 = {"preferred_element_type": jnp.float32}

    def body(carry, xs):
        total, d_head = carry
        h_student, h_teacher, of_chunk = xs
        student_logits = logits(head, h_student)
        teacher_logits = logits(teacher_head, h_teacher) if config.reads_teacher else student_logits

        def value(student_logits):
            each, known = _chunk_value(config, student_logits, teacher_logits, of_chunk)
            return jnp.sum(each), known

        if not gradients:
            more, known = value(student_logits)
            return (total + more, d_head), (known, ())
        more, pull, known = jax.vjp(value, student_logits, has_aux=True)
        d_logits = pull(jnp.float32(1))[0].astype(student.dtype)
        d_head = d_head + jnp.einsum("fnv,fnd->fvd", d_logits, h_student, **f32)
        d_student = jnp.einsum("fnv,vd->fnd", d_logits, head, **f32).astype(student.dtype)
        return (total + more, d_head), (known, d_student)

    xs = jax.tree.map(lambda x: _cut(x, shards, chunk), (student, teacher, facts))
    d_head = jnp.zeros((shards, *head.shape) if gradients else (), jnp.float32)
    if gradients:
        d_head = constrain(d_head, "batch", "vocab", None)
    (total, d_head), (known, d_student) = lax.scan(body, (jnp.float32(0), d_head), xs)
    known = PerToken(*(_join(x, rows, chunk) for x in known))
    if not gradients:
        return total, known
    return total, known, (jnp.sum(d_head, axis=0), _join(d_student, rows, chunk))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def weighted_loss(
    config: TokenLoss,
    chunk: int,
    shards: int,
    head: Float[Array, "V D"],
    student: Float[Array, "B T D"],
    teacher_head: Float[Array, "V D"],
    teacher: Float[Array, "B T D"],
    facts: Facts,
) -> tuple[Float[Array, ""], PerToken]:
    """Sum over tokens of weight * loss, in nats, and what is known of each token.

    facts: arrays [B, T]. Where config reads no teacher, the teacher known is the student.

    Differentiable in `head` and `student` only; the teacher is fixed and PerToken carries no
    gradient. chunk: time steps at once, dividing T. shards: parts of the batch axis, dividing B.
    """
    return _scan(config, chunk, shards, (head, student, teacher_head, teacher, facts), False)


def _forward(config, chunk, shards, *arguments):
    total, known, (d_head, d_student) = _scan(config, chunk, shards, arguments, True)
    return (total, known), (d_head.astype(arguments[0].dtype), d_student)


def _backward(config, chunk, shards, residuals, cotangents):
    d_head, d_student = residuals
    scale = cotangents[0]
    d_student = (d_student * scale).astype(d_student.dtype)
    return (d_head * scale).astype(d_head.dtype), d_student, None, None, None


weighted_loss.defvjp(_forward, _backward)
