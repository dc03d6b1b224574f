"""The peer TRL: forward and backward of SDPO's loss, at the fastest of its micro-batches.

Two pieces of TRL's own code: SDPOTrainer's paired forward passes (student on its prompt, the same
weights without gradients on the teacher's) and its divergence over the whole vocabulary. Around
them, what the Trainer would do: micro-batches with summed gradients. The loss is the mean over all
response tokens; the Trainer's own is the mean over rollouts of their means, which is equal where
responses are equally long. No clipping, no importance weights, no update of the weights.

workload["impl"] "plain" computes the same by hand with torch and transformers alone, and
workload["choice"], from an earlier prepare, skips the calibration.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tools.bench.peers.calibration import climb, fastest
from tools.bench.peers.child import serve

PAD = 0  # rows carry masks, so any token will do
SIZES = (1, 2, 4, 8, 16, 32)  # rollouts of a micro-batch that are tried
LOGITS_BYTES = 2**32  # the most that the float32 arrays of logits of a micro-batch may take
COPIES = 8  # of them that are alive at once
ALPHA = {"reverse_kl": 1.0, "forward_kl": 0.0, "jensen_shannon": 0.5}
Batch = dict[str, torch.Tensor]


def trl_per_token(model: Any, divergence: str) -> Callable[[Batch], torch.Tensor]:
    """Divergence of each response token, by TRL's trainer without its construction."""
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
    from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss

    class Bare(SDPOTrainer):
        """Only what the two forward passes read."""

        def __init__(self) -> None:
            self.model, self.temperature = model, 1.0
            self.model_kwarg_keys = {"logits_to_keep"}
            self.args = SDPOConfig.__new__(SDPOConfig)
            self.args.teacher_model_kind = "live"

    trainer = Bare()

    def per_token(batch: Batch) -> torch.Tensor:
        both = trainer._compute_teacher_student_logits(model, model, batch)
        return compute_full_logit_self_distillation_loss(
            both.student_logits, both.teacher_logits, distillation_alpha=ALPHA[divergence]
        )

    return per_token


def plain_per_token(model: Any, divergence: str) -> Callable[[Batch], torch.Tensor]:
    """The same by hand; reverse KL only."""
    if divergence != "reverse_kl":
        raise ValueError(f"divergence: the plain version is of reverse_kl only; got {divergence}")

    def logprobs(ids: torch.Tensor, mask: torch.Tensor, columns: int) -> torch.Tensor:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=columns + 1)
        return out.logits[:, :-1].float().log_softmax(-1)

    def per_token(batch: Batch) -> torch.Tensor:
        columns = batch["completion_ids"].shape[1]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        with torch.no_grad():
            teacher = logprobs(batch["teacher_input_ids"], batch["teacher_attention_mask"], columns)
        student = logprobs(ids, mask, columns)
        return (student.exp() * (student - teacher)).sum(-1)

    return per_token


@dataclasses.dataclass(frozen=True)
class Choice:
    """size: rollouts of a micro-batch. checkpointing: activations recomputed in backward."""

    size: int
    checkpointing: bool = False

    def __str__(self) -> str:
        remat = "with" if self.checkpointing else "without"
        return f"micro-batches of {self.size}, sorted by length, {remat} gradient checkpointing"


class Distill:
    """A prepared workload of kind "distill"."""

    def __init__(self, workload: dict[str, Any]):
        self.device = workload["device"]
        prompts, of = workload["student_prompts"], workload["prompt_of"]
        rows = zip(
            [prompts[i] for i in of],
            workload["teacher_prompts"],
            workload["responses"],
            strict=True,
        )
        self.rows = sorted(rows, key=lambda row: -sum(map(len, row)))
        self.tokens = sum(len(response) for *_, response in self.rows)
        dtype = getattr(torch, workload["dtype"])
        model = AutoModelForCausalLM.from_pretrained(workload["model"], dtype=dtype)
        self.model = model.to(self.device).train()
        impl = workload.get("impl", "trl")
        make = {"trl": trl_per_token, "plain": plain_per_token}[impl]
        self.per_token = make(self.model, workload["divergence"])
        self.calibration: dict[str, float] = {}
        self.choice = Choice(**workload["choice"]) if "choice" in workload else self.calibrate()
        self.use(self.choice)
        loss = {
            "trl": "SDPOTrainer's forward passes and full-vocabulary loss, outside its Trainer",
            "plain": "the loss by hand in torch",
        }[impl]
        self.about = {
            "library": "trl",
            "version": ", ".join(
                [importlib.metadata.version("trl")] * (impl == "trl")
                + [f"transformers {transformers.__version__}", f"torch {torch.__version__}"]
            ),
            "setting": f"{loss}; mean over tokens; {self.choice}",
            "choice": dataclasses.asdict(self.choice),
            "calibration": self.calibration,
        }

    def run(self) -> dict[str, Any]:
        """Forward and backward over all rollouts; the gradients stay in the model."""
        self.model.zero_grad(set_to_none=True)
        synchronize(self.device)
        began = time.perf_counter()
        size = self.choice.size
        parts = [self.part(self.rows[i : i + size]) for i in range(0, len(self.rows), size)]
        loss = float(sum(parts))
        synchronize(self.device)
        seconds = time.perf_counter() - began
        squares = [p.grad.double().square().sum() for p in self.model.parameters()]
        norm = float(torch.stack(squares).sum().sqrt())
        return {"seconds": seconds, "loss": loss, "tokens": self.tokens, "grad_norm": norm}

    def part(self, rows: list[tuple]) -> torch.Tensor:
        """The share of a micro-batch in the loss, after its backward pass."""
        batch = self.padded(rows)
        loss = (self.per_token(batch) * batch["completion_mask"]).sum() / self.tokens
        loss.backward()
        return loss.detach()

    def padded(self, rows: list[tuple]) -> Batch:
        """As the trainer pads: prompts on the left, responses on the right."""
        student, student_mask = self.pad([row[0] for row in rows], left=True)
        teacher, teacher_mask = self.pad([row[1] for row in rows], left=True)
        response, mask = self.pad([row[2] for row in rows], left=False)
        return {
            "prompt_ids": student,
            "prompt_mask": student_mask,
            "completion_ids": response,
            "completion_mask": mask,
            "teacher_input_ids": torch.cat([teacher, response], 1),
            "teacher_attention_mask": torch.cat([teacher_mask, mask], 1),
        }

    def pad(self, rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        columns = max(map(len, rows))
        ids = torch.full((len(rows), columns), PAD)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(columns - len(row), columns) if left else slice(0, len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), 1
        return ids.to(self.device), mask.to(self.device)

    # --- calibration --------------------------------------------------------------------------

    def use(self, choice: Choice) -> None:
        if choice.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def calibrate(self) -> Choice:
        """The setting with the shortest time for a rollout, of one micro-batch in the middle."""
        times: dict[Choice, float] = {}
        self.part(self.rows[-1:])  # a first time is slow
        sizes = [size for size in SIZES if size < len(self.rows)] + [len(self.rows)]
        sizes = [size for size in sizes if self.fits(size)]
        climb([Choice(size) for size in sizes], self.seconds_of, times)
        if not times:  # recomputation costs time: only where nothing fits without
            climb([Choice(size, True) for size in sizes], self.seconds_of, times)
        self.calibration = {str(c): round(t, 3) for c, t in times.items()}
        return fastest(times)

    def fits(self, size: int) -> bool:
        longest = max(len(response) for *_, response in self.rows)
        count = size * (longest + 1) * self.model.config.vocab_size
        return size == 1 or 4 * COPIES * count <= LOGITS_BYTES or self.device == "cuda"

    def seconds_of(self, choice: Choice) -> float:
        """The predicted time of all rollouts."""
        self.use(choice)
        first = (len(self.rows) - choice.size) // 2
        for _ in range(2 if self.device == "cuda" else 1):
            synchronize(self.device)
            began = time.perf_counter()
            self.part(self.rows[first : first + choice.size])
            synchronize(self.device)
        return (time.perf_counter() - began) * len(self.rows) / choice.size


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    serve({"distill": Distill})
