"""A model that is all bookkeeping: what it answers depends on every token it can read back through the pages and slots it is given."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch

from ingot.artifacts.manifest import ModelInfo
from ingot.ops.errors import IngotError
from ingot.runtime.batch import Sampled, StepBatch, StepLayout, StepSize
from ingot.runtime.engine import Engine
from ingot.runtime.kv_cache import GroupInfo
from ingot.runtime.protocol import ExecutorInfo
from ingot.runtime.request import Delta, Request, SamplingParams
from ingot.runtime.sampler import Sampler

VOCAB, PRIME = 97, 1_000_003


class Launch:
    """A step of `RecallExecutor`: its bytes as they were when it was launched, and its samples once it was run."""

    def __init__(self, executor: "RecallExecutor", data: bytes) -> None:
        self.executor, self.data, self.sampled = executor, data, None

    def result(self) -> Sampled:
        self.executor.run_until(self)
        if isinstance(self.sampled, IngotError):
            raise self.sampled
        return self.sampled


class RecallExecutor:
    """A wrong page, slot, position or length changes its logits. Steps come as bytes and are padded, as for a worker with CUDA graphs.

    An asynchronous one runs a step at a random moment between its launch and the call of `result`, in order.
    """

    def __init__(self, info: ExecutorInfo) -> None:
        self.info = info
        self.layout = StepLayout.of(info.groups, info.max_num_seqs, info.max_model_len)
        rng = np.random.default_rng(7)
        self.weights = {name: rng.integers(1, PRIME, info.max_model_len) for name in info.groups}
        self.memory = {name: np.full(g.num_units * max(g.page_size, 1), -1, np.int64) for name, g in info.groups.items()}
        self.samples = np.zeros(self.layout.num_samples, np.int32)
        self.sampler = Sampler(info.max_num_seqs, info.max_num_batched_tokens + 1, VOCAB, torch.device("cpu"))
        self.num_steps = 0
        self.largest = (0, 0, 0)
        self.fail: Callable[[StepBatch], None] = lambda batch: None  # when it is launched
        self.fail_late: Callable[[StepBatch], None] = lambda batch: None  # when it is run
        self._queue: deque[Launch] = deque()
        self._chance = np.random.default_rng(1)

    def batch(self, size: StepSize) -> StepBatch:
        padded = StepSize(size.num_tokens + 3, size.num_seqs + 2, size.num_rows + 1, size.longest)
        return StepBatch(self.layout, size, padded, np.full(self.layout.length(padded), 12345, np.int32))

    def launch(self, batch: StepBatch) -> Launch:
        self.fail(batch)
        self.num_steps += 1
        self.largest = tuple(map(max, self.largest, batch.size[:3]))
        launch = Launch(self, batch.to_bytes())
        batch.buffer[:] = 54321
        self._queue.append(launch)
        while self._queue and (not self.info.asynchronous or self._chance.random() < 0.3):
            self._run()
        assert len(self._queue) < 3
        return launch

    def run_until(self, launch: Launch) -> None:
        while launch.sampled is None:
            self._run()

    def _run(self) -> None:
        launch = self._queue.popleft()
        batch = StepBatch.from_bytes(self.layout, launch.data)
        try:
            self.fail_late(batch)
            launch.sampled = self._compute(batch)
        except IngotError as error:
            launch.sampled = error

    def logits(self, tokens: list[int]) -> np.ndarray:
        """After these tokens, from first principles: nothing paged."""
        values = np.array(tokens) + VOCAB * np.arange(len(tokens))
        return self._logits([self._key(name, values) for name in self.info.groups])

    def _unit(self, number: int, unit: int) -> np.ndarray:
        """The memory of a page or slot of a group."""
        name, group = list(self.info.groups.items())[number]
        size = max(group.page_size, 1)
        return self.memory[name][unit * size : (unit + 1) * size]

    def _key(self, name: str, values: np.ndarray) -> int:
        """Of all these tokens, or of those in the group's window."""
        first = max(0, len(values) - self.info.groups[name].window) if self.info.groups[name].window else 0
        return int((values[first:] * self.weights[name][first : len(values)] % PRIME).sum() % PRIME)

    def _logits(self, keys: list[int]) -> np.ndarray:
        return np.random.default_rng(keys).normal(0, 2, VOCAB).astype(np.float32)

    def _compute(self, batch: StepBatch) -> Sampled:
        R = batch.size.num_rows
        a = batch.arrays
        copied = [(number, target, self._unit(number, source).copy()) for number, source, target in batch.copies.tolist()]
        for number, target, content in copied:
            self._unit(number, target)[:] = content
        values = batch.input_ids(self.samples).astype(np.int64) + VOCAB * a["positions"]
        for name, group in self.info.groups.items():
            if group.kind == "page":
                slots = a[f"slot_mapping_{name}"]
                self.memory[name][slots[slots >= 0]] = values[slots >= 0]
        logits = np.zeros((batch.padded.num_rows, VOCAB), np.float32)
        rows = {int(t): r for r, t in enumerate(a["logits_rows"][:R])}
        starts = a["cu_seqlens_q"]
        for s, length in enumerate(a["seq_lens"].tolist()):
            begin, end = int(starts[s]), int(starts[s + 1])
            if length == 0:
                continue
            seen = np.arange(length)
            recalled = {}
            for name, group in self.info.groups.items():
                if group.kind == "page":
                    page = a[f"page_table_{name}"][s][seen // group.page_size].astype(np.int64)
                    recalled[name] = self.memory[name][page * group.page_size + seen % group.page_size]
            for t in range(begin, end):
                known = length - (end - t) + 1
                keys = []
                for name, group in self.info.groups.items():
                    if group.kind == "page":
                        keys.append(self._key(name, recalled[name][:known]))
                    else:
                        slot = int(a["state_slots"][s])
                        old = 0 if known == 1 else int(self.memory[name][slot])
                        self.memory[name][slot] = (old + int(values[t]) * int(self.weights[name][known - 1])) % PRIME
                        keys.append(int(self.memory[name][slot]))
                if t in rows:
                    logits[rows[t]] = self._logits(keys)
        sampled = self.sampler(torch.from_numpy(logits), batch, torch.from_numpy(batch.input_ids(self.samples))).first(R).to_host()
        kept = sampled.token_ids[: len(self.samples)]
        self.samples[: len(kept)] = np.maximum(kept, 0)
        return sampled


GROUPS: dict[str, dict[str, tuple[str, int, int]]] = {
    "full": {"full": ("page", 4, 0)},
    "full and window": {"full": ("page", 8, 0), "window6": ("page", 4, 6)},
    "windows": {"window6": ("page", 4, 6), "window9": ("page", 4, 9)},
    "pages and slots": {"full": ("page", 4, 0), "slot": ("slot", 0, 0)},
    "slots": {"slot": ("slot", 0, 0)},
}


class Recall:
    """Engines over `RecallExecutor`, driven to the end, their integrity checked after every step."""

    vocab_size = VOCAB

    def __init__(self, asynchronous: bool) -> None:
        self.asynchronous = asynchronous

    def engine(self, groups: str = "full", *, tokens: int = 2048, max_num_seqs: int = 24, chunk: int | None = None, max_model_len: int = 120,
               max_num_rows: int = 0, eos: tuple[int, ...] = (), tokenizer: object = None, **options: object) -> Engine:  # fmt: skip
        """`tokens`: what each page group holds; `chunk`: the budget of a step, which the executor limits to 256."""
        infos = {n: GroupInfo(k, p, tokens // p if k == "page" else max_num_seqs, w) for n, (k, p, w) in GROUPS[groups].items()}
        info = ExecutorInfo(infos, max_num_seqs, 256, max_model_len, VOCAB, max_num_rows, self.asynchronous)
        model = ModelInfo("recall", "Recall", "recall", VOCAB, max_model_len, eos, "float32", 0)
        return Engine(RecallExecutor(info), tokenizer, model, max_num_batched_tokens=chunk, **options)  # type: ignore[arg-type]

    def run(self, engine: Engine, requests: list[Request], together: bool = True) -> dict[tuple[str, int], list[Delta]]:
        """The deltas of every continuation, by request id and index."""
        deltas: dict[tuple[str, int], list[Delta]] = {}
        for batch in [requests] if together else [[r] for r in requests]:
            for request in batch:
                engine.add(request)
            while engine.has_work:
                for delta in engine.step():
                    deltas.setdefault((delta.request_id, delta.index), []).append(delta)
                engine.scheduler.check_integrity()
        return deltas

    def tokens(self, engine: Engine, requests: list[Request], together: bool = True) -> dict[tuple[str, int], list[int]]:
        return {k: [t for d in deltas for t in d.token_ids] for k, deltas in self.run(engine, requests, together).items()}

    def greedy(self, engine: Engine, prompt: list[int], count: int) -> list[int]:
        """What the model says, computed without an engine."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(engine.executor.logits(tokens).argmax()))  # type: ignore[attr-defined]
        return tokens[len(prompt) :]

    def prompts(self, count: int, longest: int = 60, seed: int = 1) -> list[list[int]]:
        """Random, of every length, half of them beginning alike."""
        rng = np.random.default_rng(seed)
        stem = rng.integers(0, VOCAB, longest).tolist()
        prompts = []
        for i in range(count):
            fresh = rng.integers(0, VOCAB, int(rng.integers(1, longest + 1))).tolist()
            shared = int(rng.integers(1, longest)) if i % 2 else 0
            prompts.append((stem[:shared] + fresh)[:longest])
        return prompts

    def requests(self, prompts: list[list[int]], params: SamplingParams | Mapping[int, SamplingParams]) -> list[Request]:
        return [Request(f"r{i}", p, params if isinstance(params, SamplingParams) else params[i]) for i, p in enumerate(prompts)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These tensors are so small that a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=[False, True], ids=["synchronous", "asynchronous"])
def recall(request: pytest.FixtureRequest) -> Recall:
    return Recall(request.param)


@pytest.fixture(scope="session")
def recall_in_flight() -> Recall:
    """Asynchronous."""
    return Recall(True)
