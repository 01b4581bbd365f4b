"""The whole path on the CPU: what the compiled model says is what transformers says, however the scheduler cuts the work."""

import os
import random
from pathlib import Path

import msgspec
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from ingot.artifacts.artifact import Artifact
from ingot.compiler.build import CompileOptions, compile_model
from ingot.compiler.outline import Outline
from ingot.compiler.plan import Choice, plan
from ingot.compiler.sampling import sampling_programs
from ingot.models.source import BUNDLED
from ingot.runtime.bind import BoundPlan
from ingot.runtime.engine import Engine
from ingot.runtime.executor import Executor
from ingot.runtime.llm import LLM
from ingot.runtime.memory import plan_memory
from ingot.runtime.request import Request, SamplingParams

NUM_PROMPTS, NEW_TOKENS = 50, 16


@pytest.fixture(scope="module")
def artifact(shared_home: Path) -> Path:
    """The bundled model in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INGOT_HOME", str(shared_home))
        options = CompileOptions(target="cpu", dtype="float32", max_num_seqs=64, max_num_batched_tokens=512)
        return compile_model("bundled", options).path


@pytest.fixture(scope="module", params=["cpu", pytest.param("auto", marks=pytest.mark.gpu)])
def llm(request: pytest.FixtureRequest, shared_home: Path) -> LLM:
    """The bundled model in float32 over few pages, here and on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INGOT_HOME", str(shared_home))
        built = compile_model("bundled", CompileOptions(target=request.param, dtype="float32", max_num_seqs=64, max_num_batched_tokens=512))
    return LLM(built.path, max_num_batched_tokens=64, num_pages=40)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Held-out text from random places, 1 … 300 tokens."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(BUNDLED / "tokenizer.json")).encode((BUNDLED / "heldout.txt").read_text()).ids
    rng = random.Random(0)
    lengths = [1, 2, 15, 16, 17, 300] + [rng.randint(1, 300) for _ in range(NUM_PROMPTS - 6)]
    starts = [rng.randrange(len(ids) - 300) for _ in lengths]
    return [ids[s : s + n] for s, n in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def expected(model, prompts: list[list[int]], shared_home: Path) -> list[list[int]]:
    """transformers, greedy, one prompt at a time; the end-of-text token does not end it. Of a run's workers the first one asks it."""
    place = shared_home.with_name("said_by_transformers.json")
    if place.exists():
        return msgspec.json.decode(place.read_bytes())
    outputs = []
    with torch.no_grad():
        for prompt in prompts:
            ids, cache, tokens = torch.tensor([prompt]), None, []
            for _ in range(NEW_TOKENS):
                out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(int(ids))
            outputs.append(tokens)
    written = place.with_suffix(f".{os.getpid()}")
    written.write_bytes(msgspec.json.encode(outputs))
    written.rename(place)
    return outputs


GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-caching", "no-caching"])
@pytest.mark.parametrize("chunk", [16, 512])
def test_one_batch_of_fifty(artifact: Path, prompts: list[list[int]], expected: list[list[int]], caching: bool, chunk: int) -> None:
    llm = LLM(artifact, enable_prefix_caching=caching, max_num_batched_tokens=chunk)
    for _ in range(2 if caching else 1):  # the second time over, prompts come from the cache
        outputs = llm.generate(prompts, GREEDY)
        assert [list(o.outputs[0].token_ids) for o in outputs] == expected
    hits = llm.engine.stats().prefix_hit_tokens
    assert (hits > 0) == caching


def test_with_steps_in_flight(artifact: Path, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """As on a GPU: steps run in a thread while the next ones are scheduled, and input ids come from the samples before."""
    opened = Artifact.open(artifact)
    plans = {name: opened.plan(name) for name in opened.manifest.variants}
    memory = plan_memory(opened, plans.values(), max_model_len=512, utilization=0.9, num_pages=1024)
    engine = Engine(Executor(opened, plans, memory, asynchronous=True), None, opened.manifest.model)
    assert [o.outputs[0].token_ids for o in LLM.over(engine).generate(prompts, GREEDY)] == expected


class Replayed:
    """In place of a CUDA graph: what was captured, run again."""

    def __init__(self, plan: BoundPlan, pool: None, stream: None) -> None:
        self.replay = plan.run


@pytest.fixture
def captured(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The same kernels in plans as a GPU has them: steps padded to few sizes and replayed, tokens chosen by a plan of the entry point `sample`."""
    monkeypatch.setattr("ingot.runtime.executor.capture", Replayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    opened = Artifact.open(artifact)
    vocab_size = opened.manifest.model.vocab_size
    whole = opened.plan("tokens_512")
    plans = {
        f"decode_{n}": msgspec.structs.replace(whole, name=f"decode_{n}", max_tokens=n, max_seqs=n, max_num_new=1, max_rows=n, capture=(n,)) for n in (4, 16)
    }
    plans["tokens_512"] = msgspec.structs.replace(whole, capture=(16, 64, 512))
    for graph, (spec,) in sampling_programs(vocab_size, torch.float32, 64):
        plans[spec.name] = plan(Outline.of(graph), spec.steps, spec.name, lambda call: Choice(None, (), "as its reference"))
    memory = plan_memory(opened, plans.values(), max_model_len=512, utilization=0.9, num_pages=1024)
    return Engine(Executor(opened, plans, memory, asynchronous=True), None, opened.manifest.model)


ASKED = [
    SamplingParams(temperature=0.8, seed=1, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=7, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=2, max_tokens=15, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=9, repetition_penalty=1.3, frequency_penalty=0.5, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=11, prompt_logprobs=1, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=3, max_tokens=14, logit_bias={300: 4.0}, logprobs=0, ignore_eos=True),
]


def test_with_captured_steps(captured: Engine, artifact: Path, prompts: list[list[int]], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and mixed with requests for more than tokens, which a graph does not know of."""
    graphs, replayed = LLM.over(captured), set()
    for key, graph in captured.executor._captured.items():
        monkeypatch.setattr(graph.graph, "replay", lambda key=key, replay=graph.graph.replay: [replayed.add(key), replay()])
    assert [o.outputs[0].token_ids for o in graphs.generate(prompts[:5], GREEDY)] == expected[:5]
    assert {seqs for variant, _, seqs in replayed if variant == "tokens_512"} == {8}
    some = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))[:12]
    assert [o.outputs[0].token_ids for o in graphs.generate([prompts[i] for i in some], GREEDY)] == [expected[i] for i in some]
    assert any(seqs > 8 for variant, _, seqs in replayed if variant == "tokens_512")
    short = sorted(prompts, key=len)[: len(ASKED)]
    for mine, plain in zip(graphs.generate(short, ASKED), LLM(artifact).generate(short, ASKED), strict=True):
        assert mine.outputs[0].token_ids == plain.outputs[0].token_ids
        for ours, theirs in ((mine.outputs[0].logprobs, plain.outputs[0].logprobs), (mine.prompt_logprobs, plain.prompt_logprobs)):
            assert (ours is None) == (theirs is None)
            for a, b in zip(ours or (), theirs or (), strict=True):
                assert (a is None) == (b is None)
                assert a is None or (a.token_id, a.logprob, [t for t, _ in a.top]) == (b.token_id, pytest.approx(b.logprob, abs=1e-4), [t for t, _ in b.top])


class Counted(TorchDispatchMode):
    """What torch is asked for, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_captured_decode_step_is_three_copies_and_a_replay(captured: Engine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the buffer, of the page table to its place, of the tokens back."""
    for i, prompt in enumerate(sorted(prompts, key=len)[:9]):
        captured.add(Request(f"r{i}", prompt, SamplingParams(max_tokens=200, ignore_eos=True)))
    while any(len(s.token_ids) < s.num_prompt + 4 for s in captured.scheduler.running) or captured.scheduler.num_waiting:
        captured.step()
    replayed: list[int] = []
    for graph in captured.executor._captured.values():
        monkeypatch.setattr(graph.graph, "replay", lambda: replayed.append(1))
    with Counted() as counted:
        for _ in range(5):
            captured.step()
    assert counted.calls == ["copy_", "copy_", "copy_"] * 5
    assert len(replayed) == 5


def test_alone(artifact: Path, prompts: list[list[int]], expected: list[list[int]]) -> None:
    llm = LLM(artifact, enable_prefix_caching=False)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert list(llm.generate(prompt, GREEDY)[0].outputs[0].token_ids) == tokens


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-caching", "no-caching"])
def test_forced_preemption(artifact: Path, prompts: list[list[int]], expected: list[list[int]], caching: bool) -> None:
    """Sequences that grow past what the pages hold: some are put back and computed again, and nobody can tell."""
    short = [i for i, p in enumerate(prompts) if len(p) <= 80]
    long = SamplingParams(temperature=0.0, max_tokens=72, ignore_eos=True)
    calm = LLM(artifact, enable_prefix_caching=caching).generate([prompts[i] for i in short], long)
    llm = LLM(artifact, num_pages=28, enable_prefix_caching=caching, max_model_len=448)
    outputs = llm.generate([prompts[i] for i in short], long)
    assert llm.engine.stats().preemptions > 0
    for i, a, b in zip(short, outputs, calm, strict=True):
        assert list(a.outputs[0].token_ids) == list(b.outputs[0].token_ids)
        assert list(a.outputs[0].token_ids)[:NEW_TOKENS] == expected[i]


def test_prompt_logprobs(artifact: Path, model, prompts: list[list[int]]) -> None:
    llm = LLM(artifact, max_num_batched_tokens=64)
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        for i, token in enumerate(prompt[1:], 1):
            assert abs(output.prompt_logprobs[i].logprob - float(logits[i - 1, token])) < 1e-3


def test_rules_for_logits_are_those_of_transformers(llm: LLM, model, prompts: list[list[int]]) -> None:
    """Greedy, one batch of everything, against `generate` with one prompt at a time."""
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    words = ["import", "self.", "return"]
    stop = [tokenizer.encode("\n")[0], tokenizer.encode(" ")[0]]
    asked = [
        (SamplingParams(repetition_penalty=1.3), {"repetition_penalty": 1.3}),
        (SamplingParams(bad_words=words), {"bad_words_ids": [ids for w in words for ids in tokenizer.spellings(w)]}),
        (SamplingParams(logit_bias={stop[0]: -8.0, stop[1]: 3.0}), {"sequence_bias": {(stop[0],): -8.0, (stop[1],): 3.0}}),
        (SamplingParams(min_tokens=9, stop_token_ids=stop), {"min_new_tokens": 9, "eos_token_id": stop}),
        (SamplingParams(repetition_penalty=1.1, min_tokens=5, stop_token_ids=stop[:1], logit_bias={stop[0]: 2.0}),
         {"repetition_penalty": 1.1, "min_new_tokens": 5, "eos_token_id": stop[:1], "sequence_bias": {(stop[0],): 2.0}}),
    ]  # fmt: skip
    chosen = [p for p in prompts if 3 < len(p) < 100][: len(asked)]
    params = [msgspec.structs.replace(asked[i % len(asked)][0], temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True) for i in range(len(chosen))]
    outputs = llm.generate(chosen, params)
    for i, (prompt, output) in enumerate(zip(chosen, outputs, strict=True)):
        options = {"eos_token_id": None} | asked[i % len(asked)][1]
        with torch.no_grad():
            wanted = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=NEW_TOKENS, **options)
        assert output.outputs[0].token_ids == wanted[0, len(prompt) :].tolist(), options


def test_beams_are_those_of_transformers(llm: LLM, model, prompts: list[list[int]]) -> None:
    """Searches and plain requests in one batch, over few pages, against `generate` with one prompt at a time."""
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    newline = tokenizer.encode("\n")
    kinds = [
        (SamplingParams(beam_width=4, n=4, ignore_eos=True), {"num_beams": 4, "num_return_sequences": 4, "eos_token_id": None}),
        (SamplingParams(beam_width=3, length_penalty=0.2, stop_token_ids=newline, ignore_eos=True),
         {"num_beams": 3, "length_penalty": 0.2, "eos_token_id": newline}),
        (SamplingParams(beam_width=2, n=2, early_stopping=True, stop_token_ids=newline, ignore_eos=True),
         {"num_beams": 2, "num_return_sequences": 2, "early_stopping": True, "eos_token_id": newline}),
    ]  # fmt: skip
    chosen = [p for p in prompts if 3 < len(p) < 80][:6]
    params = [msgspec.structs.replace(kinds[i % len(kinds)][0], max_tokens=8) for i in range(len(chosen))]
    together = llm.generate([*chosen, *chosen], [*params, *[GREEDY] * len(chosen)])
    assert all(used == 0 for used, _ in llm.engine.stats().pages.values())
    llm.engine.scheduler.check_integrity()
    for i, (prompt, output) in enumerate(zip(chosen, together, strict=False)):
        with torch.no_grad():
            wanted = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False, max_new_tokens=8,
                                    return_dict_in_generate=True, output_scores=True, **kinds[i % len(kinds)][1])  # fmt: skip
        found = [c.token_ids for c in output.outputs]
        assert found == [s[: len(t)] for s, t in zip(wanted.sequences[:, len(prompt) :].tolist(), found, strict=True)]
        assert [c.score for c in output.outputs] == pytest.approx(wanted.sequences_scores.tolist(), abs=2e-4)
