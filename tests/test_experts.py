"""Mixtures of experts: an expert's linear is a linear like any other, on every path from the plan to generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import quant
from quant.calibrate import Chain, Sample, capture
from quant.experts import Experts, refuses, routed, routers, stacks_of, still_stacked, unstack
from quant.linear import PackedLinear
from quant.models import Weights, index
from quant.plan import make_plan
from quant.recipe import load_recipe
from quant.stacks import empty_model
from quant.targets import families

KINDS = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GraniteMoe")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """folder(kind): a float mixture; not to be changed."""
    root = tmp_path_factory.mktemp("mixtures")
    return lambda kind: root / kind if (root / kind).exists() else tiny.mixture_folder(root / kind, kind)


@pytest.fixture(scope="module")
def packed_mixture(folder: Callable[[str], Path], tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """packed_mixture(kind, recipe="gptq"): the folder that a run wrote; not to be changed."""
    root = tmp_path_factory.mktemp("packed")

    def make(kind: str, recipe: str = "gptq") -> Path:
        out = root / f"{kind}-{recipe}"
        if not out.exists():
            quant.quantize(folder(kind), recipe, out, overrides=[*tiny.SMALL, "calibration.expert_tokens=8"])
        return out

    return make


def float_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def loop(experts: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts one token and one slot after another, with dense weights in float64."""
    out = torch.zeros_like(hidden, dtype=torch.float64)
    for token in range(len(hidden)):
        for slot in range(index.shape[1]):
            expert = experts.get_submodule(str(int(index[token, slot])))
            gate, up, down = (expert.get_submodule(f"{p}_proj").weight.double() for p in ("gate", "up", "down"))
            x = hidden[token].double()
            out[token] += weights[token, slot].double() * (down @ (nn.functional.silu(gate @ x) * (up @ x)))
    return out


def route(tokens: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [tokens, 64], two distinct experts below `count` for each token, their weights."""
    torch.manual_seed(seed)
    weights, picked = torch.rand(tokens, count).topk(2)
    return torch.randn(tokens, 64), picked, weights


@kinds
def test_taken_apart_a_float_model_computes_what_it_did(folder: Callable[[str], Path], kind: str) -> None:
    model = float_model(folder(kind))
    ids = torch.randint(0, 320, (2, 17))
    wanted = model(ids).logits
    stacked = {name: p for name, p in model.named_parameters() if p.dim() == 3}
    unstack(model)
    assert len(stacks_of(model)) == 2
    for name, experts in stacks_of(model).items():
        for i in range(experts.count):
            expert = experts.get_submodule(str(i))
            rows = torch.cat([expert.gate_proj.weight, expert.up_proj.weight])
            assert rows.shape == stacked[f"{name}.gate_up_proj"][i].shape
            for part, value in zip(("gate", "up"), stacked[f"{name}.gate_up_proj"][i].chunk(2), strict=True):
                expert.get_submodule(f"{part}_proj").weight.data = value
            expert.down_proj.weight.data = stacked[f"{name}.down_proj"][i]
    assert not any(p.dim() == 3 for p in model.parameters())
    given = model(ids).logits
    assert float((given - wanted).norm()) < 1e-5 * float(wanted.norm())


@kinds
def test_every_parameter_has_its_tensor_on_disk(folder: Callable[[str], Path], kind: str) -> None:
    plan, model = make_plan(str(folder(kind)), load_recipe("rtn")), float_model(folder(kind))
    weights = plan.weights()
    for name, parameter in model.named_parameters():
        if parameter.dim() != 3:
            assert torch.equal(weights.read(plan.disk[name]).float(), parameter), name
            continue
        owner, _, leaf = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        for i, whole in enumerate(parameter):
            for part, value in zip(parts, whole.chunk(len(parts)), strict=True):
                assert torch.equal(weights.read(plan.disk[f"{owner}.{i}.{part}.weight"]).float(), value), name


@kinds
def test_the_plan_shows_experts_and_is_exact(folder: Callable[[str], Path], packed_mixture: Any, kind: str) -> None:
    plan, out = make_plan(str(folder(kind)), load_recipe("gptq", ["head=null"])), packed_mixture(kind)
    experts = [t for t in plan.targets.values() if ".experts." in t.name]
    assert len(experts) == 2 * 4 * 3
    assert (out / "model.safetensors").stat().st_size == plan.bytes_on_disk()
    assert not any("gate.weight" in name or "router" in name for name in plan.targets)
    gates = {name for name in plan.selection.kept if name.endswith("shared_expert_gate")}
    assert len(gates) == (2 if kind == "Qwen2Moe" else 0)
    assert all(plan.selection.kept[name] == "chooses or weighs experts" for name in gates)


@kinds
def test_packed_experts_are_the_loop_over_dense_experts(packed_mixture: Any, kind: str) -> None:
    model = quant.load(packed_mixture(kind), dtype=torch.float32)
    for experts in stacks_of(model).values():
        assert all(isinstance(m, PackedLinear) for n, m in experts.named_modules() if n.endswith("_proj"))
        for tokens in (1, 5, 40):
            hidden, picked, weights = route(tokens, experts.count, seed=tokens)
            for _ in range(3):  # siblings are joined on the way
                given = experts(hidden, picked, weights)
                wanted = loop(experts, hidden, picked, weights)
                assert float((given.double() - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_an_expert_without_tokens_does_no_work(packed_mixture: Any) -> None:
    model = quant.load(packed_mixture("Mixtral"), dtype=torch.float32)
    experts = next(iter(stacks_of(model).values()))
    idle = experts.get_submodule("3")
    for layer in idle.children():
        layer.forward = lambda x: pytest.fail("an expert without tokens was run")  # type: ignore[method-assign, assignment]
    hidden, picked, weights = route(40, 3)
    experts(hidden, picked, weights)
    assert all(layer.kernel is None for layer in idle.children())
    assert experts(hidden[:0], picked[:0], weights[:0]).shape == (0, 64)


def test_routes_cover_every_token_once_for_each_of_its_experts() -> None:
    _, picked, _ = route(50, 7)
    picked[picked == 6] = 9  # what a parallel runtime gives tokens of other machines
    seen = torch.full_like(picked, -1)
    for index_, tokens, slots in routed(picked, 6):
        assert (seen[tokens, slots] == -1).all()
        seen[tokens, slots] = index_
        assert tokens.equal(tokens.sort().values)
    assert torch.equal(seen, torch.where(picked < 6, picked, -1))


@kinds
def test_every_way_of_loading_gives_the_same_model(packed_mixture: Any, kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = packed_mixture(kind)
    ours = quant.load(out, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path / "again")
    ids = torch.randint(1, 320, (2, 12))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        wanted = ours(ids).logits
        for model in (theirs, quant.load(tmp_path / "again", dtype=torch.float32)):
            assert torch.equal(model(ids).logits, wanted)
            text = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
            assert torch.equal(model.generate(ids, **text), ours.generate(ids, **text))
    with safe_open(out / "model.safetensors", "pt") as first, safe_open(tmp_path / "again/model.safetensors", "pt") as second:
        assert set(first.keys()) == set(second.keys())
        assert all(torch.equal(first.get_tensor(n), second.get_tensor(n)) for n in first.keys())  # noqa: SIM118


@pytest.mark.parametrize("kind", ["Mixtral", "GraniteMoe"])
def test_dequantized_experts_are_those_of_the_float_class(packed_mixture: Any, folder: Any, kind: str, tmp_path: Path) -> None:
    """Merged again in memory, and on disk under the names of the float checkpoint."""
    model = quant.load(packed_mixture(kind), dtype=torch.float32)
    ids = torch.randint(1, 320, (2, 12))
    with torch.no_grad():
        packed = model(ids).logits
        model.dequantize()
        dense = model(ids).logits
    assert not stacks_of(model)
    assert float((dense - packed).norm()) < 1e-5 * float(packed.norm())
    model.save_pretrained(tmp_path / "dense")
    names = index(tmp_path / "dense")
    assert {n: e.shape for n, e in names.items()} == {n: e.shape for n, e in index(folder(kind)).items()}
    with torch.no_grad():
        again = float_model(tmp_path / "dense")
        assert float((again(ids).logits - dense).norm()) < 1e-6 * float(dense.norm())  # torch's kernels for the norms
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_names_on_disk_are_those_of_the_source(packed_mixture: Any) -> None:
    names = index(packed_mixture("Mixtral"))
    assert "model.layers.1.block_sparse_moe.experts.3.w1.weight_packed" in names
    section = json.loads((packed_mixture("Mixtral") / "config.json").read_text())["quantization_config"]
    assert "model.layers.*.block_sparse_moe.experts.*.w2" in [rule["match"] for rule in section["rules"]]


def test_a_damaged_expert_is_named(packed_mixture: Any, tiny: ModuleType, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(packed_mixture("Mixtral"), tmp_path / "broken")
    tiny.rewrite(broken, lambda t: t.pop("model.layers.0.block_sparse_moe.experts.2.w3.weight_scale"))
    with pytest.raises(ValueError, match=r"experts.2.w3.weight_scale is missing from the checkpoint"):
        quant.load(broken)


def test_stacked_tensors_of_another_shape_are_refused(folder: Callable[[str], Path], tiny: ModuleType, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(folder("GraniteMoe"), tmp_path / "broken")

    def cut(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.block_sparse_moe.input_linear.weight"
        tensors[name] = tensors[name][:, 1:].contiguous()

    tiny.rewrite(broken, cut)
    with pytest.raises(ValueError, match=r"input_linear.weight is \[4, 191, 64\] on disk; config.json asks for \[4, 192, 64\]"):
        make_plan(str(broken), load_recipe("rtn"))


def test_statistics_count_the_tokens_of_each_expert(folder: Callable[[str], Path]) -> None:
    """Padding is left out, and an expert that a sample does not reach keeps what it saw before."""
    model = float_model(folder("Mixtral"))
    apart = empty_model(folder("Mixtral"))
    plan = make_plan(str(folder("Mixtral")), load_recipe("rtn"))
    block = apart.model.layers[0]
    weights = Weights(folder("Mixtral"))
    for name, _ in list(block.named_parameters()):
        owner = block.get_submodule(name.rpartition(".")[0])
        value = weights.read(plan.disk[f"model.layers.0.{name}"]).float()
        setattr(owner, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
    torch.manual_seed(0)
    hidden = [torch.randn(2, 9, 64), torch.randn(2, 3, 64)]
    masks = [{9: torch.arange(9) < torch.tensor([[9], [4]])}, {}]
    calls = []
    for h in hidden:
        places = torch.arange(h.shape[1]).unsqueeze(0)
        calls.append(((), {"position_embeddings": model.model.rotary_emb(h, places), "attention_mask": None}))
    seen: dict[int, list[Tensor]] = {}
    router = block.mlp.gate

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        flat = args[0].reshape(-1, 64)
        keep = masks[len(seen.setdefault(-1, []))].get(9, torch.ones(len(flat), dtype=torch.bool)).flatten()
        seen[-1].append(flat)
        for token in keep.nonzero().flatten().tolist():
            for expert in output[2][token].tolist():
                seen.setdefault(expert, []).append(flat[token])

    handle = router.register_forward_hook(watch)
    chain = Chain(hidden, calls)
    for i in range(2):
        chain.run(block, i)
    handle.remove()
    targets = [f"model.layers.0.{n}" for n, m in block.named_modules() if isinstance(m, nn.Linear)]
    samples = [Sample({}, m) for m in masks]
    for float_chain in (None, Chain(list(hidden), calls)):
        groups = {g.names[0]: g for g in capture("model.layers.0", block, targets, float_chain, chain, samples, 1)}
        for expert in range(4):
            group = groups[f"model.layers.0.mlp.experts.{expert}.gate_proj"]
            assert group.names[1] == f"model.layers.0.mlp.experts.{expert}.up_proj"
            x = torch.stack(seen[expert])
            assert group.stats.tokens == len(x)
            assert torch.allclose(group.stats.gram, x.T @ x, rtol=1e-4, atol=1e-4)
            assert group.stats.drift is None


def test_experts_with_few_tokens_are_named_and_quantized_without_data(tiny: ModuleType, tmp_path: Path) -> None:
    """Of five logits v, 2 v, 0, -v, -2 v the third is never among the highest two: expert 2 of block 0 gets no token."""
    source = tiny.mixture_folder(tmp_path / "float", "Olmoe", experts=5)

    def cut_off(tensors: dict[str, Tensor]) -> None:
        gate = tensors["model.layers.0.mlp.gate.weight"]
        gate.copy_(torch.tensor([1.0, 2, 0, -1, -2]).unsqueeze(1) * gate[0])

    tiny.rewrite(source, cut_off)
    for recipe in ("gptq", "dgq"):  # dgq folds and searches on the way
        sets = [*tiny.SMALL, "calibration.expert_tokens=8"]
        out = tmp_path / recipe
        model = quant.quantize(source, recipe, out, overrides=sets)
        report = json.loads((out / "report.json").read_text())
        layers = {layer["name"]: layer for block in report["blocks"] for layer in block["layers"]}
        blind = [name for name, layer in layers.items() if not layer["data"]]
        assert report["totals"]["quantized_without_data"] == blind
        assert {f"model.layers.0.mlp.experts.2.{p}_proj" for p in ("gate", "up", "down")} <= set(blind)
        assert all(layers[name]["tokens"] < 8 for name in blind)
        counts = [layers[f"model.layers.0.mlp.experts.{e}.up_proj"]["tokens"] for e in range(5)]
        assert sum(counts) == 2 * 512
        assert model(torch.randint(0, 320, (1, 9))).logits.isfinite().all()


def test_all_experts_of_a_layer_are_one_family(folder: Callable[[str], Path]) -> None:
    plan = make_plan(str(folder("Qwen2Moe")), load_recipe("rtn"))
    sizes = {first.family: 1 + len(rest) for first, *rest in families(plan.targets)}
    assert sizes["model.layers.1.mlp.experts.*.gate_proj"] == 8
    assert sizes["model.layers.1.mlp.experts.*.down_proj"] == 4
    assert sizes["model.layers.1.mlp.shared_expert.gate_proj"] == 2
    with pytest.raises(ValueError, match="need one scheme"):
        make_plan(str(folder("Qwen2Moe")), load_recipe("rtn", ['rules=[{match: "*.experts.3.*", format: {bits: 8}}]']))
    with pytest.raises(ValueError, match="need one scheme"):
        make_plan(str(folder("Qwen2Moe")), load_recipe("rtn", ['rules=[{match: "*.experts.3.*", skip: true}]']))
    rules = 'rules=[{match: "*.1.mlp.experts.*", skip: true}, {match: "*_gate", format: {bits: 8}}]'
    plan = make_plan(str(folder("Qwen2Moe")), load_recipe("rtn", [rules]))
    assert sum(".experts." in name for name in plan.targets) == 12
    assert "model.layers.0.mlp.shared_expert_gate" in plan.targets


def test_finequant_gives_all_experts_of_a_layer_what_one_of_them_needs(
    folder: Callable[[str], Path], tiny: ModuleType, tmp_path: Path
) -> None:
    import shutil

    source = shutil.copytree(folder("Qwen3Moe"), tmp_path / "float")
    odd = "model.layers.1.mlp.experts.3.up_proj"

    def plant(tensors: dict[str, Tensor]) -> None:
        tensors[f"{odd}.weight"][:, 5] *= 40

    sets = [*tiny.SMALL, "finequant.smallest=16"]
    before = make_plan(str(source), load_recipe("finequant", sets)).targets
    tiny.rewrite(source, plant)
    plan = make_plan(str(source), load_recipe("finequant", sets))
    for name, target in plan.targets.items():
        assert (target.format == before[name].format) == (target.family != plan.targets[odd].family), name
    assert {t.format for t in plan.targets.values() if t.family == plan.targets[odd].family} == {plan.targets[odd].format}
    model = quant.quantize(source, "finequant", tmp_path / "out", overrides=sets)
    assert (tmp_path / "out/model.safetensors").stat().st_size == plan.bytes_on_disk()
    experts = stacks_of(model)["model.layers.1.mlp.experts"]
    hidden, picked, weights = route(30, 4)
    given, wanted = experts.float()(hidden, picked, weights), loop(experts, hidden, picked, weights)
    assert float((given.double() - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_experts_left_in_float_load_beside_packed_ones(folder: Callable[[str], Path], tiny: ModuleType, tmp_path: Path) -> None:
    for kind in ("Mixtral", "GraniteMoe"):
        sets = [*tiny.SMALL, 'rules=[{match: "*.1.*.experts.*", skip: true}]']
        model = quant.quantize(folder(kind), "rtn", tmp_path / kind, overrides=sets)
        source = float_model(folder(kind))
        (first, second), stacks = stacks_of(model).values(), [p for p in source.parameters() if p.dim() == 3]
        assert isinstance(first.get_submodule("2.up_proj"), PackedLinear)
        kept = second.get_submodule("2.up_proj").weight
        assert any(torch.equal(kept.float(), p[2, 96:]) for p in stacks if p.shape[1] == 192)
        assert model(torch.randint(0, 320, (1, 9))).logits.isfinite().all()


def test_other_weights_of_three_dimensions_are_named() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3))
    block.mixture = nn.Module()
    block.mixture.weight = nn.Parameter(torch.zeros(2, 4, 4))
    block.place = nn.Parameter(torch.zeros(1, 8, 4))
    model = nn.ModuleList([block])
    assert set(still_stacked(model, ("0.",))) == {"0.mixture.weight"}
    assert not still_stacked(model, ("1.",))


def test_experts_of_another_build_stay_in_float_and_are_named(tmp_path: Path, tiny: ModuleType) -> None:
    """gpt-oss stores its experts transposed and interleaved, with biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        layer_types=["full_attention"] * 2,
        pad_token_id=0,
        eos_token_id=0,
    )
    GptOssForCausalLM(config).save_pretrained(tmp_path / "float")
    tiny.tokenizer().save_pretrained(tmp_path / "float")
    model = empty_model(tmp_path / "float")
    assert not stacks_of(model)
    assert not routers(model)
    assert "is_transposed" in str(refuses(model.model.layers[0].mlp.experts))
    packed = quant.quantize(tmp_path / "float", "rtn", tmp_path / "out", overrides=tiny.SMALL)
    kept = json.loads((tmp_path / "out/report.json").read_text())["totals"]["kept_in_float"]
    assert "is_transposed" in kept["model.layers.1.mlp.experts.down_proj"]
    assert packed(torch.randint(0, 320, (1, 9))).logits.isfinite().all()
