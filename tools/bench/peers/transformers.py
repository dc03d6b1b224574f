"""The peer transformers: a rollout by `generate`, at the fastest of its settings on this machine.

Ways that are tried, each at several batch sizes:

* generate: left-padded batches sorted by length; every row prefills its own prompt, as
  num_return_sequences does too. With a dynamic or a static cache.
* shared: the same, but each prompt is prefilled once by hand and its cache given to its samples.
* continuous: transformers' continuous batching, which puts a new request in a finished one's place.

A calibration measures the prefill and a few decode steps of one batch and predicts the whole.
workload["ways"] keeps only the named ways; workload["choice"], from an earlier prepare, skips it.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria

from tools.bench.peers.batches import (
    STEPS,
    Row,
    cut,
    predicted,
    report,
    rows_of,
    sizes_for,
)
from tools.bench.peers.calibration import climb, fastest
from tools.bench.peers.child import serve

PAD = 0  # rows carry masks, so any token will do
WAYS = ("generate", "shared", "continuous")
PAGE = 32  # tokens of a page of its cache: prompts are shared by whole pages
BATCH_TOKENS = 1024  # tokens of a step of continuous batching, prompts and decoding together


@dataclasses.dataclass(frozen=True)
class Choice:
    """way: one of WAYS. size: rows of a batch, or concurrent requests. cache: of generate."""

    way: str
    size: int
    cache: str = "dynamic"

    def __str__(self) -> str:
        if self.way == "continuous":
            return f"continuous batching of {self.size} requests"
        prompts = "each prompt prefilled once" if self.way == "shared" else "a prompt for every row"
        return f"generate, sorted by length, batches of {self.size}, {self.cache} cache, {prompts}"


class Lengths(StoppingCriteria):
    """Ends every row at its own length."""

    eos_token_id = None  # its presence makes generate pad the rows that have ended

    def __init__(self, lengths: list[int], columns: int, device: str):
        self.lengths = torch.tensor(lengths, device=device)
        self.columns = columns

    def __call__(self, input_ids, scores, **kwargs):
        return self.lengths <= input_ids.shape[1] - self.columns


class Timed(Lengths):
    """Lengths that note when each step ended."""

    def __init__(self, lengths: list[int], columns: int, device: str):
        super().__init__(lengths, columns, device)
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids, scores, **kwargs):
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return super().__call__(input_ids, scores)


def sampling(temperature: float) -> dict[str, Any]:
    """Temperature 0 is greedy; nothing is cut off."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Rollout:
    """A prepared workload of kind "rollout"."""

    def __init__(self, workload: dict[str, Any]):
        self.device, self.prompts = workload["device"], workload["prompts"]
        self.rows = rows_of(workload)
        dtype = getattr(torch, workload["dtype"])
        model = AutoModelForCausalLM.from_pretrained(workload["model"], dtype=dtype)
        self.model = model.to(self.device).eval()
        self.config = GenerationConfig(
            **sampling(workload["temperature"]),
            pad_token_id=PAD,
            eos_token_id=None,
        )
        self.model.generation_config = self.config  # what is None would be taken from the model's
        torch.manual_seed(workload["seed"])
        self.calibration: dict[str, float] = {}
        if "choice" in workload:
            self.choice = Choice(**workload["choice"])
        else:
            self.choice = self.calibrate(workload.get("ways", WAYS))
        self.about = {
            "library": "transformers",
            "version": f"{transformers.__version__}, torch {torch.__version__}",
            "setting": str(self.choice),
            "choice": dataclasses.asdict(self.choice),
            "calibration": self.calibration,
        }

    def run(self) -> dict[str, Any]:
        """Does the work once; the tokens have come to the host when the clock stops."""
        began = time.perf_counter()
        rows, responses = self.work(self.choice)
        return report(rows, responses, time.perf_counter() - began)

    def work(self, choice: Choice) -> tuple[list[Row], list[list[int]]]:
        if choice.way == "continuous":
            rows = sorted(self.rows, key=lambda row: (-row.length, row.prompt))
            return rows, self.continuous(choice, rows)
        cache = self.prefill() if choice.way == "shared" else None
        done: list[Row] = []
        responses: list[list[int]] = []
        for batch in cut(self.rows, choice.size):
            columns = self.columns(batch, cache)
            stop = Lengths([row.length for row in batch], columns, self.device)
            tokens = self.generate(choice, batch, stop, cache)[:, columns:].tolist()
            done += batch
            responses += [made[: row.length] for made, row in zip(tokens, batch, strict=True)]
        return done, responses

    # --- generate -----------------------------------------------------------------------------

    def padded(self, prompts: list[list[int]], columns: int) -> dict[str, torch.Tensor]:
        ids = torch.full((len(prompts), columns), PAD)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, columns - len(prompt) :] = torch.tensor(prompt)
            mask[i, columns - len(prompt) :] = 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def columns(self, batch: list[Row], shared: Any) -> int:
        """Of the padded prompts: of all where their cache is shared, else of the batch's."""
        prompts = self.prompts if shared else [self.prompts[row.prompt] for row in batch]
        return max(map(len, prompts))

    @torch.inference_mode()
    def prefill(self) -> Any:
        """The cache of all prompts but for their last tokens, which generate reads itself."""
        columns = max(map(len, self.prompts))
        inputs = {k: v[:, :-1] for k, v in self.padded(self.prompts, columns).items()}
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        out = self.model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
        return out.past_key_values

    @torch.inference_mode()
    def generate(self, choice: Choice, batch: list[Row], stop: Lengths, shared: Any):
        kwargs: dict[str, Any] = {}
        if shared is not None:
            cache = transformers.DynamicCache(config=self.model.config)
            which = torch.tensor([row.prompt for row in batch], device=self.device)
            for i, layer in enumerate(shared.layers):
                cache.update(layer.keys[which], layer.values[which], i)
            kwargs["past_key_values"] = cache
        elif choice.cache == "static":
            kwargs["cache_implementation"] = "static"
        return self.model.generate(
            **self.padded([self.prompts[row.prompt] for row in batch], stop.columns),
            max_new_tokens=int(stop.lengths.max()),
            stopping_criteria=[stop],
            **kwargs,
        )

    # --- continuous batching ------------------------------------------------------------------

    def continuous(self, choice: Choice, rows: list[Row]) -> list[list[int]]:
        """The tokens of each row; the requests queue in the order of `rows`."""
        return [list(one.generated_tokens) for one in self.requests(choice, rows)]

    def requests(self, choice: Choice, rows: list[Row]) -> list[Any]:
        longest = max(len(self.prompts[row.prompt]) + row.length for row in rows)
        sizes: dict[str, Any] = {"max_requests_per_batch": choice.size}
        if self.device == "cpu":  # elsewhere it sizes itself: the memory is there to be used
            sizes["page_size"] = PAGE
            sizes["num_blocks"] = choice.size * (-(-longest // PAGE) + 1)
            sizes["max_batch_tokens"] = BATCH_TOKENS
        with self.model.continuous_batching_context_manager(
            generation_config=self.config,
            continuous_batching_config=transformers.ContinuousBatchingConfig(**sizes),
            block=True,
        ) as manager:
            ids = [
                manager.add_request(
                    self.prompts[row.prompt],
                    max_new_tokens=row.length,
                    eos_token_id=-1,
                    record_timestamps=True,
                )
                for row in rows
            ]
            results: dict[str, Any] = {}
            while len(results) < len(ids):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error:
                        raise RuntimeError(f"continuous batching: {result.error}")
                    results[result.request_id] = result
                elif result is None and not manager.is_running():
                    raise RuntimeError("continuous batching: its thread ended before its requests")
        return [results[i] for i in ids]

    # --- calibration --------------------------------------------------------------------------

    def calibrate(self, ways: Sequence[str]) -> Choice:
        """The setting with the shortest predicted time."""
        times: dict[Choice, float] = {}
        few = self.rows[:2]
        stop = Lengths([2, 2][: len(few)], self.columns(few, None), self.device)
        self.generate(Choice("generate", 2), few, stop, None)  # a first time is slow
        sizes = sizes_for(len(self.rows))
        # Both ways decode alike, so the size that is best for the cheaper one does for the other.
        shared: dict[Choice, float] = {}
        climb([Choice("shared", size) for size in sizes], self.seconds_of, shared)
        if "shared" in ways:
            times |= shared
        if "generate" in ways:
            size = fastest(shared).size
            each = [Choice("generate", size, cache) for cache in ("dynamic", "static")]
            climb(each, self.seconds_of, times)
        if "continuous" in ways:
            climb([Choice("continuous", size) for size in sizes], self.seconds_of, times)
        self.calibration = {str(c): round(t, 3) for c, t in times.items()}
        return fastest(times)

    def seconds_of(self, choice: Choice) -> float:
        """The predicted time of the workload."""
        measure = self.time_continuous if choice.way == "continuous" else self.time_generate
        if self.device == "cuda":
            measure(choice)  # kernels, graphs and compilation
        return measure(choice)

    def time_generate(self, choice: Choice) -> float:
        batches = cut(self.rows, choice.size)
        batch = batches[len(batches) // 2]
        began = time.perf_counter()
        shared = self.prefill() if choice.way == "shared" else None
        synchronize(self.device)
        once = time.perf_counter() - began  # all prompts, for all batches
        stop = Timed([STEPS + 1] * len(batch), self.columns(batch, shared), self.device)
        began = time.perf_counter()
        self.generate(choice, batch, stop, shared)
        prefill = stop.times[0] - began
        # The median step stands where half of the longest row's tokens would have been made; the
        # cache grows little beside its prompt, so it is taken for all of them.
        step = sorted(b - a for a, b in itertools.pairwise(stop.times))[STEPS // 2]
        return once + predicted(self.rows, choice.size, prefill, step)

    def time_continuous(self, choice: Choice) -> float:
        """From as many requests as run at once, long enough that all of them decode together."""
        some = self.rows[: choice.size]
        tokens = sum(len(self.prompts[row.prompt]) for row in some)
        length = -(-tokens // BATCH_TOKENS) + STEPS + 1
        began = time.perf_counter()
        made = self.requests(choice, [Row(row.prompt, row.sample, length) for row in some])
        seconds = time.perf_counter() - began
        decoding = max(one.timestamps[0] for one in made)  # the last prompt was read
        together = [[t for t in one.timestamps if t >= decoding] for one in made]
        steps = sorted(b - a for times in together for a, b in itertools.pairwise(times))
        step = steps[len(steps) // 2]
        prefill = max(seconds - step * max(map(len, together)), 0)
        wanted = sum(row.length for row in self.rows)
        return prefill * len(self.rows) / choice.size + step * wanted / choice.size


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    serve({"rollout": Rollout})
