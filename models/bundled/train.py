"""Train the bundled model: a 10.5 M-parameter Qwen3 decoder of Python text.

The text is what ships with Python itself: the standard library's sources, its
test suite and the `pydoc` topics.  About 2 % of the files, chosen by a hash of
their names, never reach the training set: half of them (validation) serve to
compare settings, the other half (held-out) gives the reported perplexity and
is written next to the weights.

    python models/bundled/train.py --out DIR [--stdlib LIB ...] [--minutes 5]
    python models/bundled/train.py --write-corpus FILE --stdlib LIB ...
    python models/bundled/train.py --out DIR --corpus FILE

Needs torch, transformers, tokenizers and safetensors, and a GPU to be quick.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import lzma
import math
import sysconfig
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCAB = 4096
LENGTH = 2048  # positions
EOS, IM_START, IM_END = SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
HELDOUT_CHARS = 200_000
# Words with one leading mark, single digits, punctuation, newlines, indentation.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = ["def read_file(path):\n", "class Stack:\n", "import os\nimport sys\n\n"]
Corpus = dict[str, str]  # file name -> text


def collect(libraries: Iterable[Path]) -> Corpus:
    """Read the text files of `libraries` (newest Python first), skipping near-copies.

    A file is a near-copy if at least half of its longer lines were seen before, as in
    the same module of another Python version.
    """
    corpus: Corpus = {}
    seen: set[str] = set()
    for library in libraries:
        for path in sorted(library.rglob("*")):
            name = path.relative_to(library).as_posix()
            if path.suffix not in {".py", ".txt", ".rst"} or "site-packages" in name or not path.is_file():
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # test data in other encodings
            if len(text) < 200 or sum(map(str.isdigit, text)) > len(text) / 5:
                continue  # next to empty, or a table of numbers
            lines = [line for line in map(str.strip, text.split("\n")) if len(line) >= 12]
            if 2 * sum(line in seen for line in lines) > len(lines):
                continue
            seen.update(lines)
            if name == "pydoc_data/topics.py":
                topics = ast.parse(text).body[-1]
                assert isinstance(topics, ast.Assign)
                for topic, body in ast.literal_eval(topics.value).items():
                    corpus[f"pydoc/{topic}.txt"] = body
            else:
                corpus.setdefault(name, text)
    return corpus


def split(corpus: Corpus) -> tuple[list[str], list[str], list[str]]:
    """Divide the texts into training, validation and held-out ones by file name.

    Only the last component of the name counts, so that a file that moved between
    Python versions stays on one side.
    """
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for name in sorted(corpus):
        bucket = int(hashlib.sha256(Path(name).name.encode()).hexdigest(), 16) % 100
        parts[{0: 1, 1: 2}.get(bucket, 0)].append(corpus[name])
    sizes = itertools.accumulate(map(len, parts[2]))
    return parts[0], parts[1], [text for text, size in zip(parts[2], sizes, strict=True) if size <= HELDOUT_CHARS]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer; texts survive a round trip and gain `EOS` in front."""
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Tokenize `texts` on all cores; each result begins with the end-of-text token."""
    return [np.array(encoding.ids, dtype=np.int64) for encoding in tokenizer.encode_batch(texts)]


def batches(documents: list[np.ndarray], length: int, rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches [rows, length + 1] forever, documents in a new order every epoch."""
    rng = np.random.default_rng(seed)
    rest = np.empty(0, dtype=np.int64)
    while True:
        stream = np.concatenate([rest, *(documents[i] for i in rng.permutation(len(documents)))])
        count = (len(stream) - 1) // (length * rows) * rows
        rest = stream[count * length :]
        starts = rng.permutation(count) * length
        for chosen in starts.reshape(-1, rows):
            yield torch.from_numpy(np.stack([stream[i : i + length + 1] for i in chosen]))


def build_model(dropout: float) -> Qwen3ForCausalLM:
    """Make a fresh model; while it trains, attention and MLP outputs are subject to dropout."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).train()

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, dropout, module.training)

    for layer in model.model.layers if dropout else []:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    return model


def summed_loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Sum of the next-token losses of a batch [rows, length + 1]."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, documents: list[np.ndarray]) -> float:
    """Mean loss per token over the documents, each cut into windows of `LENGTH`."""
    model.eval()
    total, count = torch.zeros((), device=model.device), 0
    for ids in documents:
        for start in range(0, len(ids) - 1, LENGTH):
            window = torch.from_numpy(ids[start : start + LENGTH + 1]).to(model.device)[None]
            total += summed_loss(model, window)
            count += window.shape[1] - 1
    model.train()
    return total.item() / count


def train(documents: list[np.ndarray], validation: list[np.ndarray], args: argparse.Namespace) -> tuple[Qwen3ForCausalLM, dict[str, float]]:
    """Train for `--epochs` epochs or `--minutes` minutes, whichever ends first.

    Matrices are trained by Muon and the rest by AdamW; the learning rate warms up over
    100 steps and falls to zero along a cosine of the share of the budget that is used.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    with torch.device(device):
        model = build_model(args.dropout)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": [model.model.embed_tokens.weight]}, {"params": vectors, "weight_decay": 0.0}]
    muon = torch.optim.Muon(matrices, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(groups, weight_decay=args.weight_decay, betas=(0.9, 0.95))
    step_loss = torch.compile(summed_loss, dynamic=False) if args.compile else summed_loss
    tokens, length = sum(map(len, documents)), args.length
    rows = max(1, args.batch_tokens // length)
    steps = max(1, round(args.epochs * tokens / (rows * length)))
    started, step, used, reported = time.monotonic(), 0, 0.0, 0.0
    recent: deque[torch.Tensor] = deque(maxlen=200)
    for batch in batches(documents, length, rows, args.seed):
        if step <= 10:  # the first steps compile, which is no part of the budget
            started = time.monotonic()
        used = max(step / steps, (time.monotonic() - started) / (60 * args.minutes))
        if used >= 1 and step > 10:
            break
        lr = args.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(used, 1)))
        loss = step_loss(model, batch.to(device, non_blocking=True)) / (rows * length)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in muon.param_groups + adamw.param_groups:
            group["lr"] = lr
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.detach())
        step += 1
        if used >= reported + 0.1:
            reported, seconds = used, time.monotonic() - started
            losses = f"train {torch.stack(list(recent)).mean().item():.4f} validation {evaluate(model, validation):.4f}"
            print(f"step {step} epoch {step * rows * length / tokens:.1f} {seconds:.0f} s {losses}", flush=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # what is saved is what is measured
    report = {"epochs": step * rows * length / tokens, "minutes": (time.monotonic() - started) / 60}
    return model, report | {"train_loss": torch.stack(list(recent)).mean().item(), "validation_loss": evaluate(model, validation)}


@torch.no_grad()
def sample(model: Qwen3ForCausalLM, tokenizer: Tokenizer, prompt: str, temperature: float) -> str:
    """Continue `prompt` by 96 tokens; greedily if the temperature is 0."""
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)
    for _ in range(96):
        logits = model(input_ids=ids).logits[:, -1]
        token = torch.multinomial((logits / temperature).softmax(-1), 1) if temperature else logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
    return tokenizer.decode(ids[0].tolist(), skip_special_tokens=False)


def save(out: Path, model: Qwen3ForCausalLM, tokenizer: Tokenizer, heldout: list[str]) -> None:
    """Write the model folder: bf16 weights, configuration, tokenizer and held-out text."""
    out.mkdir(parents=True, exist_ok=True)
    unused = "_name_or_path id2label label2id problem_type return_dict output_attentions output_hidden_states chunk_size_feed_forward is_encoder_decoder"
    config = {key: value for key, value in model.config.to_dict().items() if key not in unused.split()}
    config |= {"architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "additional_special_tokens": [IM_START, IM_END],
        "model_max_length": LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": 0, "eos_token_id": [0, 2], "pad_token_id": 0}
    for name, value in ("config", config), ("generation_config", generation), ("tokenizer_config", tokenizer_config):
        (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(out / "tokenizer.json"))
    weights = {name: value.bfloat16() for name, value in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied to the embedding
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "heldout.txt").write_text(EOS.join(heldout), encoding="utf-8", newline="")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    parser.add_argument("--out", type=Path, default=Path("bundled"), help="folder to write the model to")
    parser.add_argument("--stdlib", type=Path, nargs="+", default=[Path(sysconfig.get_paths()["stdlib"])], help="newest first")
    parser.add_argument("--corpus", type=Path, help="read the text from this file instead")
    parser.add_argument("--write-corpus", type=Path, help="only collect the text, into this file")
    budget = {"minutes": 5.0, "epochs": 40.0, "batch-tokens": 65536, "length": LENGTH}
    settings = {"lr": 4e-3, "weight-decay": 0.5, "dropout": 0.15, "seed": 0}
    for name, default in (budget | settings).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    corpus = json.loads(lzma.decompress(args.corpus.read_bytes())) if args.corpus else collect(args.stdlib)
    if args.write_corpus:
        args.write_corpus.write_bytes(lzma.compress(json.dumps(corpus).encode()))
        return
    parts = split(corpus)
    tokenizer = train_tokenizer(parts[0])
    training, validation, heldout = (encode(tokenizer, texts) for texts in parts)
    print(f"{len(training)} texts, {sum(map(len, training)) / 1e6:.2f} M tokens", flush=True)
    model, report = train(training, validation, args)
    report["heldout_loss"] = loss = evaluate(model, heldout)
    report["heldout_perplexity"] = math.exp(loss)
    report["heldout_bits_per_character"] = loss / math.log(2) * sum(len(ids) - 1 for ids in heldout) / sum(map(len, parts[2]))
    save(args.out, model, tokenizer, parts[2])
    print(json.dumps(report))
    for prompt in PROMPTS:
        for temperature in (0.0, 0.7):
            print(f"--- temperature {temperature}\n{sample(model.eval(), tokenizer, prompt, temperature)}")


if __name__ == "__main__":
    main()
