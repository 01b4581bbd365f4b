"""Writes a checkpoint of random bfloat16 weights for a config.json: what start-up and packing are timed with where no real one is.

    python benchmarks/random_checkpoint.py CONFIG_DIR OUT_DIR
    ingot bench startup OUT_DIR --server

Sharded safetensors of at most 4 GB with an index, made on the GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SHARD_BYTES = 4 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.config))
    tied = model._tied_weights_keys if model.config.tie_word_embeddings else ()
    shapes = {name: tensor.shape for name, tensor in model.state_dict(keep_vars=True).items() if name not in (tied or ())}
    args.output.mkdir(parents=True)
    shutil.copy(args.config / "config.json", args.output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(shard, args.output / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        shard[name] = (1 + 0.1 * weight if len(shape) == 1 else weight * shape[-1] ** -0.5).cpu()
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            write()
    write()
    total = sum(2 * shape.numel() for shape in shapes.values())
    (args.output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    print(json.dumps({"bytes": total, "shards": len(set(index.values()))}))


if __name__ == "__main__":
    main()
