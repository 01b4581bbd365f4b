"""Checkpoints in safetensors: read lazily, one tensor at a time, and turned into the weights of transformers' module tree.

A file's header says every name, dtype and shape; data is mapped, and read when a tensor is used. Pickled formats are refused.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ingot.ops import formats
from ingot.ops.errors import IngotError
from ingot.ops.graph import Recipe, Weight

from . import quantization
from .quantization.method import KV_SCALES
from .recorder import Recorder, RecorderError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_MOST_HEADER_BYTES = 100 << 20  # the format's own limit


class CheckpointError(IngotError):
    """A checkpoint is absent, damaged, or does not fit its model; the message lists the files or tensors."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes `begin` … `begin + nbytes` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class Checkpoint:
    """The tensors of a folder of safetensors, by name. Opening it reads headers only."""

    def __init__(self, folder: Path, headers: dict[Path, bytes], infos: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self.infos = infos
        self._headers = headers
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, folder: Path | str) -> Checkpoint:
        """Open `model.safetensors`, or the shards named in `model.safetensors.index.json`. CheckpointError if there are none or one is damaged."""
        folder = Path(folder)
        headers: dict[Path, bytes] = {}
        infos: dict[str, TensorInfo] = {}
        for file in _files(folder):
            headers[file], found = _read_header(file)
            if repeated := found.keys() & infos.keys():
                raise CheckpointError(f"{file}: {_list(repeated)} is in another shard too")
            infos |= found
        return cls(folder, headers, infos)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Tensors by name: views of the mapped file, whose pages are read when they are used. Not to be written to."""
        return _Tensors(self)

    @property
    def meta(self) -> Mapping[str, torch.Tensor]:
        """Meta tensors by name: dtype and shape without data."""
        return _Tensors(self, meta=True)

    def with_files(self, folder: Path, prefix: str) -> Checkpoint:
        """This checkpoint and the tensors of a folder's safetensors, these by their names behind `prefix`."""
        more = {f"{prefix}{n}": info for file in sorted(folder.glob("*.safetensors")) for n, info in _read_header(file)[1].items()}
        return Checkpoint(self.folder, self._headers, self.infos | more)

    def fingerprint(self) -> str:
        """SHA-256 over headers (names, dtypes, shapes) and up to 64 KiB of every tensor, 16 pieces evenly spread.

        Cheap enough for a look-up in the store, and different for two fine-tunes of one model; a build hashes all of the data.
        """
        digest = hashlib.sha256()
        for header in sorted(self._headers.values()):
            digest.update(hashlib.sha256(header).digest())
        for _, info in sorted(self.infos.items()):
            data = self._map(info.file)
            if info.nbytes <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(data[info.begin : info.begin + info.nbytes])
                continue
            for i in range(_SAMPLES):
                at = info.begin + (info.nbytes - _SAMPLE_BYTES) * i // (_SAMPLES - 1)
                digest.update(data[at : at + _SAMPLE_BYTES])
        return digest.hexdigest()

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as f:
                # Private and writable, because torch warns about read-only buffers; it is never written to, so it costs no memory.
                self._maps[file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


class _Tensors(Mapping[str, torch.Tensor]):
    def __init__(self, checkpoint: Checkpoint, meta: bool = False) -> None:
        self._checkpoint = checkpoint
        self._meta = meta

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self._checkpoint.infos[name]
        if self._meta or info.nbytes == 0:  # nothing can be mapped of an empty tensor
            return torch.empty(info.shape, dtype=info.dtype, device="meta" if self._meta else "cpu")
        data = self._checkpoint._map(info.file)
        return torch.frombuffer(data, dtype=info.dtype, count=math.prod(info.shape), offset=info.begin).view(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.infos)

    def __len__(self) -> int:
        return len(self._checkpoint.infos)


def _files(folder: Path) -> list[Path]:
    if (single := folder / "model.safetensors").is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / f for f in _shards(index)]
        if absent := [f.name for f in files if not f.is_file()]:
            raise CheckpointError(f"{index} names shards that are not there: {_list(absent)}; download the checkpoint again")
        return files
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(f"{folder} has several safetensors files and no model.safetensors.index.json that says which belong to the model")
    if pickled := sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in folder.glob(pattern)):
        what = f"{folder} has only pickled weights ({_list(pickled)}), which can run code when they are read"
        raise CheckpointError(f"{what}; save the model again with `save_pretrained`, which writes safetensors")
    raise CheckpointError(f"{folder} has no safetensors file; add one, or compile with --dummy-weights")


def _shards(index: Path) -> list[str]:
    """Names of the files that an index speaks of, all of them in its folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{index} is no index of a checkpoint ({e!r}); download it again") from None
    if outside := [n for n in names if not re.fullmatch(r"[^/]+\.safetensors", str(n))]:
        raise CheckpointError(
            f"{index} names shards outside its folder: {_list(list(map(str, outside)))}; do not use this checkpoint, and ask where it came from"
        )
    return names


def _read_header(file: Path) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header as stored, and what it says. Format: 8 bytes length (little-endian), JSON, data (huggingface.co/docs/safetensors)."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = f.read(length) if length <= min(size - 8, _MOST_HEADER_BYTES) else b""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        infos = {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            if any(type(n) is not int or n < 0 for n in (begin, end, *entry["shape"])):
                raise ValueError(f"{name} has a size or an offset that is none")
            infos[name] = TensorInfo(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin, end - begin)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{file} is not a safetensors file, or its header is damaged ({e!r}); download it again") from None
    for name, info in infos.items():
        if info.begin + info.nbytes > size:
            raise CheckpointError(f"{file} is cut short: {name} ends at byte {info.begin + info.nbytes}, the file at {size}; download it again")
        if info.nbytes != math.prod(info.shape) * info.dtype.itemsize:
            raise CheckpointError(f"{file}: {name} is said to be {info.dtype} {list(info.shape)} and to have {info.nbytes} bytes; download it again")
    in_order = sorted((i.begin, i.begin + i.nbytes, n) for n, i in infos.items() if i.nbytes)
    for (_, end, first), (begin, _, second) in pairwise(in_order):
        if begin < end:
            raise CheckpointError(f"{file}: {first} and {second} overlap; download it again")
    return header, infos


def pack(recipe: Recipe, checkpoint: Checkpoint, constants: Mapping[str, torch.Tensor], dtype: torch.dtype, out: torch.Tensor | None = None,
         memo: dict[Any, Any] | None = None) -> torch.Tensor:  # fmt: skip
    """The weight that `recipe` makes, contiguous and of `dtype`; written to `out` if given. `memo`: see `Recipe.run`.

    Parts of a cat or stack are copied straight to their place, so that memory grows by the result alone.
    """
    meta_constants = {n: c.to("meta") for n, c in constants.items()}

    def shape(r: Recipe) -> torch.Size:
        return r.run(checkpoint.meta, meta_constants).shape

    def fill(r: Recipe, target: torch.Tensor) -> None:
        match r.op:
            case "cat":
                pieces = target.split([shape(i)[r.params[0]] for i in r.inputs], r.params[0])
            case "stack":
                pieces = target.unbind(r.params[0])
            case "transpose":
                pieces = (target.transpose(*r.params),)
            case _:
                target.copy_(r.run(checkpoint.tensors, constants, memo))
                return
        for part, piece in zip(r.inputs, pieces, strict=True):
            fill(part, piece)

    out = torch.empty(shape(recipe), dtype=dtype) if out is None else out
    fill(recipe, out)
    return out


def check_finite(packed: torch.Tensor, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """CheckpointError when a packed weight holds NaN or infinity, with the name of the tensor that it comes from."""
    if _finite(packed):
        return
    if guilty := [n for n in dict.fromkeys(recipe.sources) if not _finite(checkpoint.tensors[n])]:
        raise CheckpointError(f"{checkpoint.infos[guilty[0]].file}: {_list(guilty)} holds NaN or infinity; download the checkpoint again, or take another one")
    raise CheckpointError(f"{checkpoint.folder}: values of {_list(recipe.sources)} are too large for {packed.dtype}; compile with --dtype bfloat16")


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return True
    if tensor.itemsize == 1:  # no arithmetic is defined on them
        return all(bool(piece.float().isfinite().all()) for piece in tensor.reshape(-1).split(1 << 24))
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))  # one pass at the speed of memory; NaN goes through


def dummy(name: str, weight: Weight, seed: int) -> Recipe:
    """A recipe ("seed", (seed, mean, std)) for random values of a size that keeps activations finite; see `ops.dummy.generate`.

    Matrices get std 1/√(last dim), vectors (norms, scales) are near 1, biases and sinks near 0. A weight made from constants stays as it is.
    """
    if not weight.recipe.sources and weight.recipe.op != "seed":
        return weight.recipe
    own = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "little")
    if weight.recipe.reshaped.op == "pack":
        form, _, part, _, k, _ = weight.recipe.reshaped.params
        return Recipe("seed", (own, *(round(m, 9) for m in formats.get(form).moments(part, k))))
    if len(weight.shape) > 1:
        return Recipe("seed", (own, 0.0, round(weight.shape[-1] ** -0.5, 6)))
    mean = 0.0 if re.search(r"(bias|sinks|A_log)$", name) else 1.0
    return Recipe("seed", (own, mean, 0.02))


def recipes(
    checkpoint: Checkpoint, config: PretrainedConfig, parameters: Mapping[str, tuple[tuple[int, ...], torch.dtype]], model: PreTrainedModel | None = None
) -> dict[str, Recipe]:
    """How each of `parameters` (shape, dtype, by transformers' name) comes from the checkpoint's tensors.

    Follows transformers' own conversion mapping (renamings, stacked experts, base-model prefixes) and tied weights in both directions.
    `model` is the model on meta, if the caller has it already. CheckpointError lists every tensor that is missing, surplus or of a wrong shape.
    """
    model = _meta_model(config) if model is None else model
    method = quantization.method_of(config)
    stored, dequantized = _logical(checkpoint, method)
    made, surplus, problems = _convert(stored, model)
    made = {n: (r.substituted(dequantized), shape) for n, (r, shape) in made.items()}
    result: dict[str, Recipe] = {}
    missing = []
    for name, (shape, _) in parameters.items():
        if method is not None and method.kv_cache and name.endswith(KV_SCALES):
            if name in checkpoint.infos:
                result[name] = Recipe("reshape", tuple(shape), (Recipe("tensor", (name,)),))
            else:
                missing.append(f"{name}, which quantization_config.kv_cache_scheme promises")
            continue
        same = _tied(model, name)
        found = next((made[n] for n in (name, *same) if n in made), None)
        if found is None:
            missing.append(f"{name} {list(shape)}")
        elif tuple(found[1]) != tuple(shape):
            problems.append(f"{name} should be {list(shape)} and is {list(found[1])}, from {_list(found[0].sources)}")
        else:
            result[name] = found[0]
        problems += [p for n in same if name in made and n in made and (p := _untied(checkpoint, name, n, made))]
    lines = [f"missing: {m}" for m in missing] + [f"surplus: {s} {list(stored.infos[s].shape)}" for s in surplus]
    lines += [f"wrong: {p}" for p in dict.fromkeys(problems)]
    if lines:
        raise CheckpointError(f"the checkpoint in {checkpoint.folder} does not fit {type(model).__name__} with its config.json:\n  " + "\n  ".join(lines))
    return result


def _logical(checkpoint: Checkpoint, method: quantization.Method | None) -> tuple[Checkpoint, dict[str, Recipe]]:
    """The checkpoint as it would be if it were not quantized, to be asked for names and shapes, and the weights that are."""
    if method is None:
        return checkpoint, {}
    shapes, recipes = quantization.logical(method, checkpoint.tensors, checkpoint.meta)
    some = next(iter(checkpoint.infos.values()))
    infos = {n: checkpoint.infos[n] if n not in recipes else TensorInfo(some.file, torch.bfloat16, tuple(s), 0, 0) for n, s in shapes.items()}
    return Checkpoint(checkpoint.folder, {}, infos), recipes


def _meta_model(config: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # names and shapes are those of the ordinary model
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _convert(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[dict[str, tuple[Recipe, torch.Size]], list[str], list[str]]:
    """(recipe and shape by parameter name, names that nothing uses, what went wrong), as `convert_and_load_state_dict_in_model` would."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    declared: dict[str, Any] = model.state_dict()
    recorder = Recorder()

    groups: dict[str, Any] = {}
    surplus = []
    ignorable = re.compile("|".join([*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]))
    for name in sorted(checkpoint.infos, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, declared)
        if renamed not in declared and name in declared:  # stored under its new name already
            renamed, pattern = name, None
        if renamed not in declared:
            if not (ignorable.search(name) or ignorable.search(renamed) or _of_a_head(name, checkpoint, model)):
                surplus.append(name)
            continue
        transform = groups.get(renamed)
        if transform is None:
            transform = WeightRenaming(name, renamed) if pattern is None else copy.deepcopy(by_pattern[pattern])
            groups[renamed] = transform
        source: Any = functools.partial(recorder.source, name, checkpoint.infos[name].shape, checkpoint.infos[name].dtype)
        transform.add_tensor(renamed, name, name if pattern is None else pattern, source)

    made: dict[str, tuple[Recipe, torch.Size]] = {}
    problems = []
    with torch.inference_mode(), recorder:
        for renamed, transform in groups.items():
            sources = sorted({n for names in transform.layer_targets.values() for n in names}, key=dot_natural_key)
            try:
                for target, tensor in transform.convert(renamed, model=model, config=model.config).items():
                    tensor = tensor[0] if isinstance(tensor, list) else tensor
                    made[target] = recorder.recipe(tensor), tensor.shape
            except RecorderError:
                raise
            except (RuntimeError, ValueError, AttributeError) as e:
                problems.append(f"{renamed} cannot be made from {_list(sources)}: {str(e).splitlines()[0]}")
                made.setdefault(renamed, (Recipe("tensor", (sources[0],)), torch.Size(declared[renamed].shape)))
    return made, surplus, problems


def _of_a_head(name: str, checkpoint: Checkpoint, model: PreTrainedModel) -> bool:
    """Whether `model` is the base of what was saved, and the tensor belongs to what was on top of it, as an encoder's masked-token head does."""
    prefix = f"{model.base_model_prefix}."
    return model.base_model is model and any(n.startswith(prefix) for n in checkpoint.infos) and not name.startswith(prefix)


def _tied(model: PreTrainedModel, name: str) -> list[str]:
    """The other names of the weight `name`."""
    ties: dict[str, str] = model.all_tied_weights_keys
    root = ties.get(name, name)
    return [n for n in (root, *(target for target, source in ties.items() if source == root)) if n != name]


def _untied(checkpoint: Checkpoint, a: str, b: str, made: Mapping[str, tuple[Recipe, torch.Size]]) -> str | None:
    """What is wrong if two tied weights are both stored, and differ."""
    values = [made[n][0].run(checkpoint.tensors, {}) for n in sorted((a, b))]
    if torch.equal(*values):
        return None
    return f"{' and '.join(sorted((a, b)))} are tied by the config and differ; set tie_word_embeddings to false in config.json"


def _list(names: Any) -> str:
    names = sorted(names) if isinstance(names, (set, frozenset)) or not isinstance(names, list) else names
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
