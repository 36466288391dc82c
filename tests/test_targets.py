"""Rules over the module tree: what is packed how, what stays, and which wishes are refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from quant.kernels.activations.int4_group import Int4Group
from quant.kernels.activations.int_token import Int8Token
from quant.kernels.activations.none import Unquantized
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.recipe import Recipe
from quant.stacks import find_stacks
from quant.targets import Selection, select


class Block(nn.Module):
    """The linears of a transformer block; k is their width, except that of `down_proj`."""

    def __init__(self, k: int, wide: int) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.attn.add_module(name, nn.Linear(k, 48, bias=name == "q_proj"))
        self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj = nn.Linear(k, wide), nn.Linear(k, wide), nn.Linear(wide, k)


class Model(nn.Module):
    def __init__(self, k: int = 576, wide: int = 1536) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(k, wide) for _ in range(2))
        self.lm_head = nn.Linear(k, 100)


def choose(*rules: dict[str, Any], model: nn.Module | None = None, **changes: Any) -> Selection:
    values: dict[str, Any] = {"name": "mine", "description": "d", "format": {"name": "int_group", "group": 128}}
    values |= {"activation": "none", "passes": [{"gptq": None}], "rules": rules}
    model = model or Model()
    return select(model, find_stacks(model), Recipe(**values | changes))


def refusal(*rules: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        choose(*rules, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_linear_of_every_block_and_no_head() -> None:
    selection = choose()
    assert len(selection.targets) == 14
    assert list(selection.kept) == ["lm_head"]
    assert "head" in selection.kept["lm_head"]
    q = selection.targets["layers.0.attn.q_proj"]
    assert (q.n, q.k, q.bias, q.activation) == (48, 576, True, Unquantized())
    assert not selection.targets["layers.0.attn.k_proj"].bias


def test_groups_are_fitted_to_k_and_said() -> None:
    targets = choose().targets
    q, down = targets["layers.0.attn.q_proj"], targets["layers.1.mlp.down_proj"]
    assert q.format == IntGroup(group=96)
    assert q.note == "group 96: 128 does not divide K = 576"
    assert down.format == IntGroup(group=128)
    assert down.note == ""
    assert choose(format={"name": "int_group", "group": -1}).targets["layers.0.attn.q_proj"].format == IntGroup(group=-1)


def test_the_first_rule_that_matches_decides() -> None:
    selection = choose(
        {"match": "layers.0.mlp.down_proj", "format": {"bits": 8}, "activation": "int8_token"},
        {"match": "*.down_proj", "skip": True},
        {"match": "*.o_proj", "format": {"group": 64, "symmetric": True}},
    )
    down = selection.targets["layers.0.mlp.down_proj"]
    assert (down.format, down.activation) == (IntGroup(bits=8, group=128), Int8Token())
    assert selection.kept["layers.1.mlp.down_proj"] == "rule '*.down_proj'"
    assert selection.targets["layers.1.attn.o_proj"].format == IntGroup(group=64, symmetric=True)
    assert selection.targets["layers.1.attn.q_proj"].format == IntGroup(group=96)


def test_a_rule_for_another_format_starts_from_its_defaults() -> None:
    rule = {"match": "*", "format": {"name": "int4_dual"}}
    targets = choose(rule, passes=[{"rtn": None}], format={"name": "int_group", "bits": 3}).targets
    assert {t.format for t in targets.values()} == {Int4Dual()}


def test_a_rule_that_decides_nothing_is_an_error() -> None:
    assert "'*.wq' decides no layer; it must match names such as layers.0.attn.q_proj" in refusal(
        {"match": "*.wq", "skip": True}
    )
    shadowed = refusal({"match": "*_proj", "format": {"bits": 3}}, {"match": "*.o_proj", "skip": True})
    assert "'*.o_proj'" in shadowed
    assert "skip all" in refusal({"match": "*", "skip": True})


@pytest.mark.parametrize(
    "rule",
    [
        {"match": "*.k_proj", "format": {"bits": 8}},
        {"match": "*.v_proj", "skip": True},
        {"match": "layers.1.attn.q_proj", "activation": "int8_token"},
        {"match": "*.up_proj", "format": {"group": 64}},
        {"match": "*.gate_proj", "skip": True},
    ],
)
def test_fused_neighbours_need_one_scheme(rule: dict[str, Any]) -> None:
    assert "need one scheme" in refusal(rule)


def test_fused_neighbours_may_leave_together() -> None:
    selection = choose({"match": "*.[qkv]_proj", "skip": True}, {"match": "layers.1.mlp.[gu]*_proj", "format": {"bits": 8}})
    assert len(selection.targets) == 8
    assert selection.targets["layers.1.mlp.up_proj"].format == IntGroup(bits=8, group=96)


def test_a_k_that_no_group_fits_names_the_ways_out() -> None:
    said = refusal(model=Model(k=577))
    assert "layers.0.attn.q_proj has K = 577" in said
    assert "skip: true" in said
    assert "group: -1" in said


def test_what_the_pass_cannot_write_is_refused_by_layer() -> None:
    said = refusal(passes=[{"dgq": None}])
    assert said.startswith("layers.0.attn.q_proj cannot be quantized: dgq writes int4_dual")


def test_blocks_of_a_fixed_length_are_not_refitted() -> None:
    fp4: dict[str, Any] = {"format": {"name": "fp4_block", "kind": "mxfp4"}, "passes": [{"rtn": None}]}
    targets = choose(**fp4).targets
    assert {t.format for t in targets.values()} == {Fp4Block(kind="mxfp4")}
    assert not any(t.note for t in targets.values())
    said = refusal(model=Model(k=592), **fp4)  # 16 divides it, 32 does not
    assert said.startswith("layers.0.attn.q_proj cannot be quantized: mxfp4 has blocks of 32")
    assert said.endswith("add the rule {match: layers.0.attn.q_proj, skip: true}")


def test_a_rule_of_several_patterns_needs_one_that_matches() -> None:
    targets = choose({"match": ["*.out_proj", "*.o_proj", "*.down_proj"], "format": {"bits": 8}}).targets
    wide = {name for name, target in targets.items() if target.format == IntGroup(bits=8, group=target.format.group)}
    assert wide == {name for name in targets if name.endswith(("o_proj", "down_proj"))} != set()
    assert "decides no layer" in refusal({"match": ["*.out_proj", "*.fc2"], "skip": True})


def test_groups_of_inputs_are_fitted_to_k() -> None:
    activation = {"name": "int4_group", "group": 128, "rotate": 64}
    target = choose(activation=activation, model=Model(k=576)).targets["layers.0.attn.q_proj"]
    assert target.activation == Int4Group(group=96, rotate=64)
    assert target.note.endswith("inputs: group 96: 128 does not divide K = 576")
    said = refusal(model=Model(k=584), activation=activation, format={"name": "int_group", "bits": 8, "group": -1})
    assert said.endswith("add the rule {match: layers.0.attn.q_proj, activation: none}")


def test_a_head_in_a_format_with_one_scale_for_all_rows_is_refused() -> None:
    model = Model()
    model.get_output_embeddings = lambda: model.lm_head
    model.all_tied_weights_keys = {}
    said = refusal(model=model, head={"name": "fp4_block", "kind": "nvfp4"})
    assert said.startswith("lm_head cannot be packed: a table is packed slice by slice, and weight_global_scale spans all")
    head = choose(model=model, head={"name": "fp4_block", "kind": "mxfp4"}).table
    assert head is not None
    assert head.format == Fp4Block(kind="mxfp4")
