"""Checkpoints against transformers' own loading, their errors, and the memory they take."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ingot.models.checkpoint import Checkpoint, CheckpointError, check_finite, dummy, pack, recipes
from ingot.models.recorder import Recorder, RecorderError
from ingot.ops.dummy import generate
from ingot.ops.graph import Recipe, Weight

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen3": SMALL | {"head_dim": 8, "tie_word_embeddings": True},
    "mixtral": SMALL | {"num_local_experts": 5},
    "deepseek_v3": SMALL
    | MLA
    | {"moe_intermediate_size": 16, "n_routed_experts": 12, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gpt_oss": SMALL
    | {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "gemma2": SMALL | {"head_dim": 8},
    "phi3": SMALL | {"pad_token_id": 0},
    "mamba2": {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8, "num_hidden_layers": 2, "vocab_size": 97},
}


def model_of(model_type: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MODELS[model_type] | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # biases and norms would all be zeros and ones
    return model


def parameters_of(model: PreTrainedModel) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters()}


def check(model: PreTrainedModel, folder: Path) -> dict[str, Recipe]:
    checkpoint = Checkpoint.open(folder)
    made = recipes(checkpoint, model.config, parameters_of(model))
    for name, parameter in model.named_parameters():
        value = pack(made[name], checkpoint, {}, parameter.dtype)
        assert value.is_contiguous()
        assert torch.equal(value, parameter), name
    return made


@pytest.fixture
def llama(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("model_type", MODELS)
def test_every_parameter_equals_transformers(model_type: str, tmp_path: Path) -> None:
    model = model_of(model_type)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check(model, tmp_path)


def test_experts_are_stacked_by_number(tmp_path: Path) -> None:
    """Twelve experts: 10 and 11 come after 9, not after 1."""
    model = model_of("deepseek_v3")
    model.save_pretrained(tmp_path)
    recipe = check(model, tmp_path)["model.layers.2.mlp.experts.gate_up_proj"]
    assert recipe.op == "cat"
    assert recipe.sources[10:13] == [f"model.layers.2.mlp.experts.{n}.weight" for n in ("10.gate_proj", "11.gate_proj", "0.up_proj")]


def test_persistent_buffers_can_be_asked_for(tmp_path: Path) -> None:
    """DeepSeek's router has a bias that is stored as a buffer."""
    model = model_of("deepseek_v3")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).normal_()
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    recipe = recipes(checkpoint, model.config, {name: ((12,), torch.float32)})[name]
    assert torch.equal(pack(recipe, checkpoint, {}, torch.float32), model.get_buffer(name))


def test_names_without_the_base_model_prefix(llama: tuple[PreTrainedModel, Path]) -> None:
    model, folder = llama
    tensors = {n.removeprefix("model."): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    assert check(model, folder)["model.norm.weight"] == Recipe("tensor", ("norm.weight",))


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_embeddings_both_ways(kept: str, tmp_path: Path) -> None:
    model = model_of("qwen3")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[kept] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file)
    shape = tuple(model.lm_head.weight.shape)
    wanted = parameters_of(model) | {"lm_head.weight": (shape, torch.float32)}
    made = recipes(Checkpoint.open(tmp_path), model.config, wanted)
    assert made["lm_head.weight"] == made["model.embed_tokens.weight"] == Recipe("tensor", (kept,))


def test_tied_embeddings_that_differ_are_an_error(tmp_path: Path) -> None:
    model = model_of("qwen3")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    check(model, tmp_path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(CheckpointError, match="tie_word_embeddings to false"):
        check(model, tmp_path)


def test_one_error_lists_everything(llama: tuple[PreTrainedModel, Path]) -> None:
    model, folder = llama
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.randn(48, 31)
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.randn(48, 32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(4)  # in old checkpoints, and computed today
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        check(model, folder)
    lines = str(error.value).splitlines()
    assert "LlamaForCausalLM" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "missing: model.norm.weight [32]",
        "missing: lm_head.weight [97, 32]",
        "surplus: model.layers.9.mlp.up_proj.weight [48, 32]",
        "wrong: model.layers.1.mlp.up_proj.weight should be [48, 32] and is [48, 31], from model.layers.1.mlp.up_proj.weight",
    ]


@pytest.mark.parametrize("damage", ["absent", "narrow"])
def test_a_damaged_expert_is_named(damage: str, tmp_path: Path) -> None:
    model = model_of("mixtral")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.block_sparse_moe.experts.3.w1.weight"))
    tensors[name] = tensors[name][:, 1:].contiguous()
    if damage == "absent":
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"wrong: model\.layers\.1\.mlp\.experts\.gate_up_proj .*experts\.0\.w1\.weight") as error:
        check(model, tmp_path)
    assert len(str(error.value).splitlines()) == 2


def test_folders_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors file"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        Checkpoint.open(tmp_path)
    for name in ("a", "b"):
        save_file({name: torch.randn(3)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="several safetensors files"):
        Checkpoint.open(tmp_path)


def test_absent_shards_are_named(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        Checkpoint.open(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(5, 3), "b": torch.randn(7)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        Checkpoint.open(tmp_path)
    file.write_bytes(whole.replace(b"[5,3]", b"[5,4]"))
    with pytest.raises(CheckpointError, match=r"a is said to be torch\.float32 \[5, 4\]"):
        Checkpoint.open(tmp_path)
    for bad in (whole[:20], b"", b"\xff" * 64, whole.replace(b"F32", b"F33"), (2).to_bytes(8, "little") + b"[]"):
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            Checkpoint.open(tmp_path)


def header_of(file: Path, entries: dict[str, Any], data: bytes = bytes(64)) -> None:
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    ("shape", "offsets", "said"),
    [
        ([4], [0, 16], "a and b overlap"),
        ([-2, -2], [24, 40], "a size or an offset that is none"),
        ([4], [-16, 0], "a size or an offset that is none"),
        ([4], [40, 24], "a is said to be"),
        ([2.0, 2], [24, 40], "a size or an offset that is none"),
        ([1 << 40, 1 << 40], [24, 40], "a is said to be"),
        ([4], [1 << 60, (1 << 60) + 16], "cut short"),
        ([4], [24], "not enough values"),
    ],
)
def test_headers_that_lie(shape: list[Any], offsets: list[int], said: str, tmp_path: Path) -> None:
    header_of(
        tmp_path / "model.safetensors",
        {"b": {"dtype": "F32", "shape": [5], "data_offsets": [4, 24]}, "a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}},
    )
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(tmp_path)


def test_header_bombs_are_not_opened(tmp_path: Path) -> None:
    """A header that says it is longer than the format allows is not read, and one that is nested without end is refused."""
    file = tmp_path / "model.safetensors"
    with file.open("wb") as f:
        f.write((1 << 33).to_bytes(8, "little"))
        f.truncate((1 << 33) + 8)  # sparse
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint.open(tmp_path)
    bomb = b"[" * 1_000_000
    file.write_bytes(len(bomb).to_bytes(8, "little") + bomb)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "deep/model.safetensors", "..", "", 7])
def test_an_index_that_points_outside_is_refused(name: Any, tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"names shards outside its folder: .*do not use"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["x"]}}', "[" * 100_000])
def test_an_index_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is no index"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_found_by_name(dtype: torch.dtype, bad: float, tmp_path: Path) -> None:
    tensors = {n: torch.randn(37, 5).to(dtype) for n in "abc"}
    save_file(tensors, tmp_path / "model.safetensors")
    recipe = Recipe("cat", (0,), tuple(Recipe("tensor", (n,)) for n in "abc"))
    checkpoint = Checkpoint.open(tmp_path)
    check_finite(pack(recipe, checkpoint, {}, dtype), recipe, checkpoint)
    damaged = tensors["b"].float()
    damaged[36, 4] = bad
    if dtype == torch.float8_e4m3fn:  # which has no infinity
        damaged[36, 4] = float("nan")
    save_file(tensors | {"b": damaged.to(dtype)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: b holds NaN or infinity"):
        check_finite(pack(recipe, checkpoint, {}, dtype), recipe, checkpoint)


def test_values_that_a_dtype_cannot_hold_are_told(tmp_path: Path) -> None:
    save_file({"a": torch.full((3,), 1e5)}, tmp_path / "model.safetensors")
    checkpoint, recipe = Checkpoint.open(tmp_path), Recipe("tensor", ("a",))
    with pytest.raises(CheckpointError, match=r"values of a are too large for torch\.float16; compile with --dtype bfloat16"):
        check_finite(pack(recipe, checkpoint, {}, torch.float16), recipe, checkpoint)


def test_every_dtype_and_shape_reads_back(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32, torch.int16]
    dtypes += [torch.int8, torch.uint8]
    tensors = {str(d): (torch.randn(5, 3) * 50).to(d) for d in dtypes}
    tensors |= {"bool": torch.randn(3) > 0, "scalar": torch.tensor(1.5), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    read = Checkpoint.open(tmp_path).tensors
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].to(torch.float64), tensor.to(torch.float64))


def test_fingerprint_sees_names_shapes_and_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    large = torch.randn(300, 200)

    def fingerprint(**tensors: torch.Tensor) -> str:
        save_file(tensors, tmp_path / "model.safetensors")
        return Checkpoint.open(tmp_path).fingerprint()

    small = torch.randn(7, 3)
    nudged = small.clone()
    nudged[6, 2] += 1e-3
    prints = [
        fingerprint(a=large, b=small), fingerprint(a=large, c=small), fingerprint(a=large, b=small.reshape(3, 7)),
        fingerprint(a=large, b=nudged), fingerprint(a=large + 1e-3, b=small),
    ]  # fmt: skip
    assert len(set(prints)) == len(prints)
    assert fingerprint(a=large, b=small) == prints[0]


def test_packing_keeps_one_weight_in_memory(tmp_path: Path) -> None:
    """Anonymous memory grows by the weight that is packed, though its parts, stacked and concatenated, are as large again."""
    part = 4 << 20
    names = {f"{kind}.{i}": torch.randn(part // 4 // 256, 256) for kind in ("gate", "up") for i in range(8)}
    save_file(names, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    stacks = [Recipe("stack", (0,), tuple(Recipe("tensor", (f"{kind}.{i}",)) for i in range(8))) for kind in ("gate", "up")]
    recipe = Recipe("transpose", (1, 2), (Recipe("cat", (1,), tuple(stacks)),))
    expected = torch.cat([torch.stack([names[f"{k}.{i}"] for i in range(8)]) for k in ("gate", "up")], 1).transpose(1, 2).bfloat16()
    del names
    before = _peak_anonymous(reset=True)
    packed = pack(recipe, checkpoint, {}, torch.bfloat16)
    grown = _peak_anonymous() - before
    assert torch.equal(packed, expected)
    assert grown < packed.nbytes + part, f"{grown >> 20} MiB for a weight of {packed.nbytes >> 20} MiB"


def _peak_anonymous(reset: bool = False) -> int:
    """Peak bytes of the heap and anonymous maps: the peak resident size less the pages of files at that moment."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return (int(fields["VmHWM"].split()[0]) << 10) - (int(fields["RssFile"].split()[0]) << 10)


def test_pack_into_a_given_tensor(llama: tuple[PreTrainedModel, Path]) -> None:
    model, folder = llama
    checkpoint = Checkpoint.open(folder)
    scale = torch.randn(32, 32)
    recipe = Recipe("cat", (0,), (Recipe("tensor", ("model.layers.0.self_attn.q_proj.weight",)), Recipe("constant", ("scale",))))
    out = torch.randn(64, 32, dtype=torch.bfloat16)
    assert pack(recipe, checkpoint, {"scale": scale}, torch.bfloat16, out) is out
    assert torch.equal(out, torch.cat([model.model.layers[0].self_attn.q_proj.weight, scale]).bfloat16())


def test_recorder_says_what_torch_does() -> None:
    """Everything that a conversion may do to a tensor, run as a recipe on real data."""
    tensors = {n: torch.randn(4, 6, 5) for n in "ab"}

    def moved(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        return [
            torch.stack([a, b], -1), torch.cat([a, b], 1).contiguous(), *a.chunk(3, 1), *b.split([1, 3], 0), *a.unbind(1),
            a.reshape(2, 2, 6, 5).transpose(1, 2).reshape(a.shape), b.permute(2, -3, 1), a[1:3], a[:, -2],
            a.unsqueeze(1), a[:1].squeeze(0), b[0].t(), a.flatten(1),
        ]  # fmt: skip

    recorder = Recorder()
    with torch.inference_mode(), recorder:
        made = moved(*(recorder.source(n, (4, 6, 5), torch.float32) for n in "ab"))
    for tensor, expected in zip(made, moved(tensors["a"], tensors["b"]), strict=True):
        assert torch.equal(recorder.recipe(tensor).run(tensors, {}), expected)


def test_recorder_refuses_arithmetic() -> None:
    recorder = Recorder()
    with torch.inference_mode(), recorder:
        source = recorder.source("a", (4, 3), torch.float32)
        for compute in (lambda: source * 2, lambda: source[::2]):
            with pytest.raises(RecorderError, match="a recipe cannot say"):
                compute()
        with pytest.raises(RecorderError, match="not in the checkpoint"):
            recorder.recipe(torch.ones(3))


def test_dummy_weights_are_seeded_and_tame() -> None:
    def weight(*shape: int) -> Weight:
        return Weight(Recipe("tensor", ("x",)), torch.bfloat16, shape)

    matrix, norm, bias = (dummy(n, weight(*s), 3) for n, s in (("a_weight", (50, 64)), ("norm_weight", (999,)), ("q_bias", (999,))))
    assert len({r.params[0] for r in (matrix, norm, bias)} | {dummy("a_weight", weight(50, 64), 4).params[0]}) == 4
    assert matrix == dummy("a_weight", weight(50, 64), 3)
    a, b = (generate(*matrix.params, shape=(50, 64), dtype=torch.bfloat16) for _ in range(2))
    assert torch.equal(a, b)
    assert abs(a.float().std() - 1 / 8) < 0.01
    assert abs(generate(*norm.params, shape=(999,), dtype=torch.float32).mean() - 1) < 0.01
    assert abs(generate(*bias.params, shape=(999,), dtype=torch.float32).mean()) < 0.01
    constant = Weight(Recipe("constant", ("inv_freq",)), torch.float32, (8,))
    assert dummy("inv_freq", constant, 3) == constant.recipe


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mamba2", "deepseek_v3"])
def test_a_dummy_model_gives_finite_logits(model_type: str) -> None:
    model = model_of(model_type, torch_dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        recipe = dummy(name, Weight(Recipe("tensor", (name,)), parameter.dtype, tuple(parameter.shape)), 0)
        parameter.data = generate(*recipe.params, shape=tuple(parameter.shape), dtype=parameter.dtype)
    logits = model(torch.randint(0, 97, (1, 23))).logits
    assert logits.isfinite().all()
    assert 0.01 < logits.std() < 100
