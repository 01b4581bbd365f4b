"""A model that is all bookkeeping: what it answers depends on every token it can read back through the pages and slots it is given."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch

from ingot.artifacts.manifest import ModelInfo
from ingot.runtime.batch import Sampled, StepBatch
from ingot.runtime.engine import Engine, ExecutorInfo, GroupInfo
from ingot.runtime.request import Delta, Request, SamplingParams
from ingot.runtime.sampler import SamplingRows, sample

VOCAB, PRIME = 97, 1_000_003


class RecallExecutor:
    """A wrong page, slot, position or length changes its logits. Steps come as bytes and are padded, as for a worker with CUDA graphs."""

    def __init__(self, info: ExecutorInfo) -> None:
        self.info = info
        rng = np.random.default_rng(7)
        self.weights = {name: rng.integers(1, PRIME, info.max_model_len) for name in info.groups}
        self.memory = {name: np.full(g.num_units * max(g.page_size, 1), -1, np.int64) for name, g in info.groups.items()}
        self.num_steps = 0
        self.largest = (0, 0, 0)
        self.fail: Callable[[StepBatch], None] = lambda batch: None

    def logits(self, tokens: list[int]) -> np.ndarray:
        """After these tokens, from first principles: nothing paged."""
        values = np.array(tokens) + VOCAB * np.arange(len(tokens))
        return self._logits([self._key(name, values) for name in self.info.groups])

    def _key(self, name: str, values: np.ndarray) -> int:
        """Of all these tokens, or of those in the group's window."""
        first = max(0, len(values) - self.info.groups[name].window) if self.info.groups[name].window else 0
        return int((values[first:] * self.weights[name][first : len(values)] % PRIME).sum() % PRIME)

    def _logits(self, keys: list[int]) -> np.ndarray:
        return np.random.default_rng(keys).normal(0, 2, VOCAB).astype(np.float32)

    def step(self, batch: StepBatch) -> Sampled:
        self.fail(batch)
        self.num_steps += 1
        T, S, R = batch.num_tokens, batch.num_seqs, batch.num_rows
        self.largest = tuple(map(max, self.largest, (T, S, R)))
        batch = StepBatch.from_bytes(batch.layout, batch.to_bytes()).pad_to(T + 3, S + 2, R + 1)
        a = batch.arrays
        values = a["input_ids"].astype(np.int64) + VOCAB * a["positions"]
        for name, group in self.info.groups.items():
            if group.kind == "page":
                slots = a[f"slot_mapping_{name}"]
                self.memory[name][slots[slots >= 0]] = values[slots >= 0]
        logits = np.zeros((R + 1, VOCAB), np.float32)
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
        return sample(torch.from_numpy(logits), SamplingRows.from_batch(batch)).first(R).to_host()


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

    def engine(self, groups: str = "full", *, tokens: int = 2048, max_num_seqs: int = 24, chunk: int | None = None, max_model_len: int = 120,
               max_num_rows: int = 0, eos: tuple[int, ...] = (), tokenizer: object = None, **options: object) -> Engine:  # fmt: skip
        """`tokens`: what each page group holds; `chunk`: the budget of a step, which the executor limits to 256."""
        infos = {n: GroupInfo(k, p, tokens // p if k == "page" else max_num_seqs, w) for n, (k, p, w) in GROUPS[groups].items()}
        info = ExecutorInfo(infos, max_num_seqs, 256, max_model_len, VOCAB, max_num_rows)
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


@pytest.fixture(scope="session")
def recall() -> Recall:
    return Recall()
