"""The main job on tiny models: what is loaded computes what the bytes on disk mean, and nothing is lost on the way."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import quant
from quant import checkpoint
from quant.api import compile_folder
from quant.kernels.cpu import library
from quant.linear import PackedLinear
from quant.plan import make_plan
from quant.recipe import available, load_recipe
from quant.serve import attention, pointwise, softmax, token_bits

RECIPES = tuple(available())
TWO_BITS = ("aqlm", "blockwise-w2", "db-llm", "pv-tuning", "saliency-w2")
Packed = Callable[..., Path]


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def decode(fields: dict[str, Tensor], k: int) -> Tensor:
    """The weight [N, K] that a layer's tensors mean, written from the format's definition with plain loops over bits."""
    if is_fp4(fields):
        return decode_fp4(fields, k)
    if fields["weight_packed"].dtype == torch.float8_e4m3fn:
        return small_floats(8, 4)[fields["weight_packed"].view(torch.uint8).long()] * fields["weight_scale"]
    raw = fields["weight_packed"].to(torch.int32)
    if "codebook" in fields:
        books = fields["codebook"].float()  # [books, 256, length]
        codes = raw.view(len(raw), -1, len(books))
        return sum(books[m][codes[..., m]] for m in range(len(books))).flatten(1) * fields["weight_scale"]
    if fields.get("weight_scale", raw).dim() == 3:
        return decode_planes(raw, fields["weight_scale"].float(), k)
    bits = 8 * raw.shape[1] // k
    stream = torch.stack([(raw >> b) & 1 for b in range(8)], -1).reshape(len(raw), k, bits)
    codes = sum(stream[..., b] << b for b in range(bits))
    if "row_scale" in fields:
        per = k // fields["group_scale"].shape[1]
        step, offset = (fields[f"group_{part}"].int().repeat_interleave(per, 1) for part in ("scale", "offset"))
        return (codes * step + offset).float() * fields["row_scale"].unsqueeze(1)
    scale = fields["weight_scale"].float()
    if "weight_exponents" in fields:
        return small_floats(bits, int(fields["weight_exponents"]))[codes] * scale.repeat_interleave(k // scale.shape[1], 1)
    zero = fields["weight_zero"].float() if "weight_zero" in fields else torch.full_like(scale, 2.0 ** (bits - 1))
    per = k // scale.shape[1]
    return (codes - zero.repeat_interleave(per, 1)) * scale.repeat_interleave(per, 1)


def decode_planes(raw: Tensor, scale: Tensor, k: int) -> Tensor:
    """binary_dual: of every 64 bits, 32 of the first plane, then the same columns of the second; a scale for each."""
    bits = torch.stack([(raw >> b) & 1 for b in range(8)], -1).reshape(len(raw), -1, 2, 32)
    first, second = (bits[:, :, plane].flatten(1)[:, :k] for plane in (0, 1))
    a1, a2 = scale.repeat_interleave(k // scale.shape[1], 1).unbind(-1)
    return a1 * first + a2 * second


def is_fp4(fields: dict[str, Tensor]) -> bool:
    """Only FP4 blocks have scales of one byte."""
    return "weight_scale" in fields and fields["weight_scale"].element_size() == 1


def small_floats(bits: int, exponents: int) -> Tensor:
    """The value of every code of 4 or 8 bits with that many exponent bits, as LLM-FP4 defines it: [2^bits]."""
    m, codes = bits - 1 - exponents, torch.arange(1 << bits)
    sign, p, fraction = 1 - 2 * (codes >> bits - 1), codes >> m & (1 << exponents) - 1, (codes & (1 << m) - 1) / 2**m
    bias = max(1, 2 ** (exponents - 1) - 1)
    return sign * torch.where(p == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (p - bias))


def decode_fp4(fields: dict[str, Tensor], k: int) -> Tensor:
    """MXFP4 or NVFP4, bit by bit."""
    raw = fields["weight_packed"].long()
    nibbles = torch.stack((raw % 16, raw // 16), -1).flatten(1)
    values = small_floats(4, 2)[nibbles]
    if "weight_global_scale" in fields:
        return values * (fields["weight_scale"].float() / fields["weight_global_scale"]).repeat_interleave(16, 1)
    return values * (2.0 ** (fields["weight_scale"].double() - 127)).float().repeat_interleave(32, 1)


def nvfp4_input(divisor: Tensor) -> Any:
    """Forward hook: each 16 channels of the input on the 15 values of E2M1 under an E4M3 scale, its largest at 6 or at 4."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        blocks = args[0].unflatten(-1, (-1, 16)) * divisor
        seen, lost = [], []
        for end in (6, 4):
            scale = (blocks.abs().amax(-1, keepdim=True) / end).clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
            ratio = (blocks / scale).abs().unsqueeze(-1)
            seen.append(values[(ratio - values).abs().argmin(-1)] * blocks.sign() * scale)
            lost.append((seen[-1] - blocks).square().sum(-1, keepdim=True))
        return (torch.where(lost[1] < lost[0], seen[1], seen[0]).flatten(-2) / divisor, *args[1:])

    return hook


def shifted_input(fields: dict[str, Tensor], rule: dict[str, Any]) -> Any:
    """Forward hook: each channel times its power of two, on the nearest small float under the token's largest, and back.

    Groups have scales of their own, short enough for scale times value to have 8 significant bits.
    """
    exponents = int(fields["input_exponents"])
    values = small_floats(rule["bits"], exponents).unique()
    power = 2.0 ** fields["input_shift"].float()

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        moved = args[0] * power
        groups = moved.unflatten(-1, (-1, moved.shape[-1] if rule["group"] == -1 else rule["group"]))
        scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-5) * fields["input_scale"]
        if rule["group"] != -1:
            bits = 7 - (rule["bits"] - 1 - exponents)
            mantissa, exponent = torch.frexp(scale)
            scale = torch.ldexp(torch.round(mantissa * 2**bits) / 2**bits, exponent)
        above = torch.searchsorted(values, groups / scale).clamp(1, len(values) - 1)
        low, high = values[above - 1], values[above]
        nearest = torch.where((groups / scale) - low < high - (groups / scale), low, high)
        return ((nearest * scale).flatten(-2) / power, *args[1:])

    return hook


def int8_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward hook: the input rounded to 255 levels of each token's own range."""
    scale = args[0].abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127
    return (torch.round(args[0] * (1 / scale)).clamp(-127, 127) * scale, *args[1:])


def tagged_input(model: nn.Module, name: str, clip: float) -> Any:
    """Forward hook: 255 levels for tokens that the attention before has tagged, 15 of a part of the range for the others.

    q, k, v of block 0 read all with 255.
    """
    first = name.startswith("model.layers.0.self_attn.") and not name.endswith("o_proj")

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if first:
            return int8_input(module, args)
        tags = token_bits.attentions(model)[0].token_bits.tags.value
        top, part = torch.where(tags, 127, 7).unsqueeze(-1), torch.where(tags, 1.0, clip).unsqueeze(-1)
        scale = args[0].abs().amax(-1, keepdim=True).clamp_min(1e-5) / (top / part)
        return (torch.round(args[0] * (1 / scale)).clamp(-top, top) * scale, *args[1:])

    return hook


def fp8_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward hook: the input on E4M3, each token's largest value at 448."""
    scale = args[0].abs().amax(-1, keepdim=True).clamp_min(1e-5) / 448
    return ((args[0] / scale).to(torch.float8_e4m3fn).float() * scale, *args[1:])


def static_input(scale: Tensor, zero: Tensor, bits: int) -> Any:
    """Forward hook: codes 0 .. 2^bits - 1 of one step, with a zero for all channels or for each."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        codes = (torch.round(args[0] / scale) + zero).clamp(0, 2**bits - 1)
        return ((codes - zero) * scale, *args[1:])

    return hook


def int_group_input(group: int, half: int, ratios: tuple[float, ...]) -> Any:
    """Forward hook: each group of channels on -half .. half - 1 steps, a ratio of its largest value at -half: the best one."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        groups = args[0].unflatten(-1, (-1, group))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        whole = torch.where(high > -low, high, low) / -half
        seen = torch.stack([torch.round(groups / (r * whole)).clamp(-half, half - 1) * r * whole for r in ratios])
        best = (seen - groups).square().sum(-1, keepdim=True).argmin(0, keepdim=True)
        return (seen.take_along_dim(best, 0)[0].flatten(-2), *args[1:])

    return hook


def input_hook(rule: dict[str, Any], fields: dict[str, Tensor]) -> Any:
    """The forward hook that rounds a layer's input as its rule in config.json says."""
    match rule["name"]:
        case "int8_token":
            return int8_input
        case "nvfp4":
            return nvfp4_input(fields["input_global_scale"])
        case "fp_shift":
            return shifted_input(fields, rule)
        case "int_static":
            return static_input(fields["input_scale"], fields["input_zero"], rule["bits"])
        case "int4_group" | "int6_group":
            half = {"int4_group": 8, "int6_group": 32}[rule["name"]]
            return int_group_input(rule["group"], half, (1.0, 0.9) if rule["search"] else (1.0,))
        case "fp8_token":
            return fp8_input
    raise AssertionError(rule)


def turn(x: Tensor, block: int) -> Tensor:
    """x [..., K], every block of channels by a Hadamard matrix, written as butterflies."""
    out, reach = x, 1
    while reach < block:
        pairs = out.reshape(*x.shape[:-1], -1, 2, reach)
        out = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).reshape(x.shape)
        reach *= 2
    return out / block**0.5


def twin(folder: Path, rounded: bool = True) -> Any:
    """A float model that computes what the folder's tensors mean, without any code of this package for its linears.

    Norms, activations and attention are ours: their last bit moves an int8 code now and then, and they have tests of their own.
    rounded: inputs are rounded as config.json says, not only rotated.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    section = config.quantization_config
    del config.quantization_config
    cls = getattr(transformers, config.architectures[0])
    model = cls._from_config(config, dtype=torch.float32).eval()
    if library.available():
        pointwise.install(model)
        attention.register()
        model.set_attn_implementation(attention.NAME)
    if section.get("softmax"):
        model.set_attn_implementation(softmax.register(section["softmax"]["bits"]))
    if section.get("token_thresholds"):
        token_bits.install(model, section["token_thresholds"])
    tensors = stored(folder)
    state = {n: t.float() for n, t in tensors.items() if n in model.state_dict() and t.numel()}
    for name, module in model.named_modules():
        fields = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.rpartition(".")[0] == name}
        if "weight_packed" in fields:
            state[f"{name}.weight"] = decode(fields, module.in_features)
            scheme = checkpoint.scheme_of(section, name)
            assert scheme is not None
            rule = vars(scheme[1]) | {"name": scheme[1].name}
            if block := rule["rotate"]:
                module.register_forward_pre_hook(lambda module, args, block=block: (turn(args[0], block), *args[1:]))
            if rounded and rule["name"] == "adaptive_token":
                module.register_forward_pre_hook(tagged_input(model, name, rule["clip"]))
            elif rounded and rule["name"] != "none":
                module.register_forward_pre_hook(input_hook(rule, fields))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= set(model._tied_weights_keys or ())
    model.tie_weights()
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits.float()


@pytest.fixture(scope="session")
def ids() -> Tensor:
    return torch.randint(1, 320, (2, 33), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def worst_layer(model: Any, float_twin: Any, **inputs: Tensor) -> float:
    """Largest relative error of a packed layer against the twin's layer on the very input that the packed layer saw.

    Whole models are not compared so tightly: an input on a rounding boundary may take either int8 code, and everything
    behind it then differs by a percent.
    """
    errors: list[float] = []

    def compare(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            want = float_twin.get_submodule(name)(args[0])
            errors.append(float((output - want).norm() / want.norm()))

        return hook

    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    for name, module in layers.items():
        module.register_forward_hook(compare(name))
    for mine, given in zip(token_bits.attentions(model), token_bits.attentions(float_twin), strict=True):
        if hasattr(mine, "token_bits"):  # the twin's layers run with the tags that the packed model finds
            given.token_bits = mine.token_bits
    model(**inputs)
    assert len(errors) == len(layers)
    return max(errors)


def distance(got: Tensor, want: Tensor) -> float:
    """Median over tokens of the relative error."""
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).median())


@pytest.mark.parametrize("recipe", RECIPES)
def test_loaded_model_computes_what_the_bytes_mean(
    packed: Packed, ids: Tensor, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed(recipe)
    loaded = load_recipe(recipe)
    rules = [loaded.activation_of(rule) for rule in (None, *loaded.rules)]
    activation, rotate = (any(rule.name != "none" for rule in rules), any(rule.rotate for rule in rules))
    want = logits(twin(folder), ids)
    worst = worst_layer(quant.load(folder, dtype=torch.float32), twin(folder), input_ids=ids)
    # a rotation is a sum, whose order of addition may put a value on the other side of a rounding boundary
    assert worst < (1e-2 if activation and rotate else 1e-5)
    monkeypatch.setenv("LOWBIT_KERNEL", "reference")
    exact = logits(quant.load(folder, dtype=torch.float32), ids)
    if not rotate:
        assert float((exact - want).abs().max() / want.abs().max()) < 1e-6
    assert distance(exact, want) < 1e-2
    if activation:  # float inputs are something else
        assert distance(logits(twin(folder, rounded=False), ids), want) > 1e-3


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe not in TWO_BITS])  # two bits of noise are noise
def test_result_is_close_to_the_float_model(packed: Packed, llama: Path, ids: Tensor, recipe: str) -> None:
    """W8A8 tells: a norm that smoothing divided, but that is stored as it was, puts it at a distance of 1.

    Four static bits, four for attention as well, are far off on random weights, whose logits are nearly as random.
    """
    want = logits(transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), ids)
    got = logits(quant.load(packed(recipe), dtype=torch.float32), ids)
    assert distance(got, want) < {"w8a8": 0.06, "repquant-w4a4": 0.65}.get(recipe, 0.5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_report_is_complete_and_no_worse_than_rounding(packed: Packed, recipe: str, tiny: ModuleType) -> None:
    folder = packed(recipe)
    report = json.loads((folder / "report.json").read_text())
    layers = [layer for block in report["blocks"] for layer in block["layers"]]
    disk = {name.removesuffix(".weight_packed") for name in stored(folder) if name.endswith(".weight_packed")}
    assert {layer["name"] for layer in layers} == disk
    assert len(layers) == report["totals"]["layers"] == 21
    assert list(report["totals"]["kept_in_float"]) == ["lm_head"]
    assert report["totals"]["weight_files_bytes"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert all(0 <= layer["error"] < 0.5 and layer["rtn_error"] > 0 and layer["tokens"] == 512 for layer in layers)
    down = next(layer for layer in layers if layer["name"].endswith("down_proj"))
    if load_recipe(recipe).format.get("group") == 64 and recipe != "finequant":  # K = 96: the largest that fits is taken
        assert down["format"]["group"] == 48
        assert "48" in down["note"]
    error, rtn_error = (sum(layer[key] for layer in layers) / len(layers) for key in ("error", "rtn_error"))
    assert error <= rtn_error * (1 + 1e-6)
    if recipe in ("gptq", "dgq", "nvfp4", "mxfp4"):
        assert error < 0.9 * rtn_error
    shipped = {p.name for p in folder.iterdir()}
    assert {"config.json", "recipe.yaml", "report.json", "README.md", "tokenizer.json", "model.safetensors"} <= shipped
    again = load_recipe(str(folder / "recipe.yaml"))
    if recipe == "finequant":  # what it chose has become rules
        again = again.model_copy(update={"rules": ()})
    assert again == load_recipe(recipe, tiny.small(recipe))


def test_layers_that_are_fused_share_one_divisor(packed: Packed) -> None:
    """A serving stack keeps only one of q, k, v, and one of gate, up."""
    tensors = stored(packed("nvfp4-w4a4"))
    for name in ("weight_global_scale", "input_global_scale"):
        for layer in range(3):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            for family in ([f"{attention}.{x}_proj" for x in "qkv"], [f"{mlp}.{x}_proj" for x in ("gate", "up")]):
                values = {float(tensors[f"{member}.{name}"]) for member in family}
                assert len(values) == 1, family
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("recipe", RECIPES)
def test_plan_knows_the_size(packed: Packed, llama: Path, tiny: ModuleType, recipe: str) -> None:
    plan = make_plan(str(llama), load_recipe(recipe, tiny.small(recipe)))
    assert plan.bytes_on_disk() == sum(f.stat().st_size for f in packed(recipe).glob("*.safetensors"))


def test_shards(packed: Packed, llama: Path, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.shards, "__defaults__", (30_000,))
    plan = make_plan(str(llama), load_recipe("rtn", tiny.SMALL))
    promised = plan.bytes_on_disk()
    out = compile_folder(plan, tmp_path / "out", torch.device("cpu"))
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert sum(f.stat().st_size for f in files) == promised
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {n: f.name for f in files for n in load_file(f)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(out).values())
    same_tensors(stored(out), stored(packed("rtn")))
    same_tensors(quant.load(out).state_dict(), quant.load(packed("rtn")).state_dict())


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Equal names, dtypes, shapes and bytes."""
    assert sorted(left) == sorted(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def test_transformers_loads_it_too(packed: Packed, ids: Tensor) -> None:
    ours = quant.load(packed("dgq"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(packed("dgq"), dtype="auto")
    assert not theirs.training
    assert theirs.dtype == torch.bfloat16
    same_tensors(ours.state_dict(), theirs.state_dict())
    assert torch.equal(logits(ours, ids), logits(theirs, ids))


@pytest.mark.parametrize("tied", [False, True])
def test_saved_again_it_has_the_same_bytes(packed: Packed, ids: Tensor, tmp_path: Path, tied: bool) -> None:
    folder = packed("dgq", tied=tied)
    model = quant.load(folder)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied
    before = logits(model, ids)
    text = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    assert text.shape[1] > ids.shape[1]
    model.save_pretrained(tmp_path / "again")  # bound by the forward passes above
    again = tmp_path / "again"
    same_tensors(stored(folder), stored(again))
    assert ("lm_head.weight" in stored(again)) is not tied
    section = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, again)]
    assert section[0] == section[1]
    reloaded = quant.load(again)
    assert torch.equal(logits(reloaded, ids), before)
    assert (reloaded.lm_head.weight.data_ptr() == reloaded.model.embed_tokens.weight.data_ptr()) is tied


def test_model_in_memory(packed: Packed, tiny: ModuleType, ids: Tensor) -> None:
    model = quant.quantize(tiny.llama(), "rtn", overrides=tiny.SMALL, tokenizer=tiny.tokenizer())
    same_tensors(model.state_dict(), quant.load(packed("rtn")).state_dict())
    assert torch.equal(logits(model, ids), logits(quant.load(packed("rtn")), ids))  # its folder is gone by now
    with pytest.raises(ValueError, match="tokenizer="):
        quant.quantize(tiny.llama(), "rtn")


def test_tensors_the_model_ignores_are_kept(tiny: ModuleType, llama: Path, tmp_path: Path) -> None:
    folder = copy_tree(llama, tmp_path / "source")
    extra = torch.arange(6, dtype=torch.int64)
    tiny.rewrite(folder, lambda t: t.update({"some.older.buffer": extra}))
    quant.quantize(folder, "rtn", tmp_path / "out", overrides=tiny.SMALL)
    assert torch.equal(stored(tmp_path / "out")["some.older.buffer"], extra)


def copy_tree(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_speech(packed_speech: Path, clips: Path) -> None:
    model = quant.load(packed_speech, dtype=torch.float32)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(layers) == 2 * 6 + 2 * 10
    assert all(f"model.decoder.layers.1.encoder_attn.{leaf}_proj" in layers for leaf in "qkv")
    report = json.loads((packed_speech / "report.json").read_text())
    reports = {layer["name"]: layer for block in report["blocks"] for layer in block["layers"]}
    frames = 3 * 100  # of three clips and what pads them to 2 s; also where the decoder attends to the encoder
    assert reports["model.encoder.layers.0.fc1"]["tokens"] == frames
    assert reports["model.decoder.layers.0.encoder_attn.k_proj"]["tokens"] == frames
    processor = transformers.AutoProcessor.from_pretrained(packed_speech)
    wave = torch.sin(torch.arange(16_000) / 9).numpy()
    inputs = processor(wave, sampling_rate=16_000, return_tensors="pt").input_features
    prompt = torch.tensor([[1, 2, 50, 60]])
    assert worst_layer(model, twin(packed_speech), input_features=inputs, decoder_input_ids=prompt) < 1e-5
    assert model.generate(inputs, max_new_tokens=4).shape[0] == 1


def test_copies_of_a_loaded_model_are_independent(packed: Packed, ids: Tensor) -> None:
    model = quant.load(packed("rtn"))
    before = logits(model, ids)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight.zero_()
        for module in other.modules():
            if isinstance(module, PackedLinear):
                module.unbind()
                module.weight_scale.zero_()
    assert torch.equal(logits(model, ids), before)
    assert not torch.equal(logits(other, ids), before)
