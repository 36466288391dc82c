"""The vLLM plugin without vLLM: how packed matrices are cut among ranks, what is refused, and in which words."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.checkpoint import quantization_config
from quant.kernels.activation import Activation
from quant.kernels.activation import from_config as rule_from
from quant.kernels.format import Fields, Format
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.fp8 import Fp8
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.rotation import by_matrix
from quant.serve import vllm
from quant.serve.vllm.names import ARCHITECTURES, architecture_of, fused_names, one_scheme
from quant.serve.vllm.shards import PackedShards, Shard, fused_shards, multiply
from quant.targets import Target

PLAIN = rule_from("none")
SCHEMES: dict[str, tuple[Format, Activation]] = {
    "int2": (IntGroup(bits=2, group=16, symmetric=True), PLAIN),
    "int3": (IntGroup(bits=3, group=32, symmetric=False), rule_from({"name": "none", "rotate": 32})),
    "int4": (IntGroup(bits=4, group=16, symmetric=False), PLAIN),
    "int8-rows": (IntGroup(bits=8, group=-1, symmetric=True), PLAIN),
    "dual": (Int4Dual(group=32), PLAIN),
    "nvfp4": (Fp4Block(kind="nvfp4"), PLAIN),
    "mxfp4": (Fp4Block(kind="mxfp4"), PLAIN),
    "fp4-rows": (FpChannel(bits=4), PLAIN),
    "e4m3": (Fp8(), PLAIN),
    "fp8-groups": (FpChannel(bits=8, group=32), PLAIN),
}


def fields(scheme: tuple[Format, Activation], n: int, k: int, seed: int = 0) -> Fields:
    """A random weight's tensors, and those of its activation rule, of which a vector differs from channel to channel."""
    draw = torch.Generator().manual_seed(seed)
    fmt, rule = scheme
    weight = by_matrix(torch.randn(n, k, generator=draw) * (1 + seed), rule.rotate)
    tokens = torch.randn(64, k, generator=draw)
    return fmt.pack(fmt.nearest(weight)) | rule.fit(tokens, tokens.abs().amax(0))


def loaded(made: PackedShards, tensors: Sequence[Fields], ids: Sequence[Any] = (None,)) -> dict[str, Tensor]:
    """The parameters after an engine gave them every tensor."""
    into = made.empty()
    for given, shard_id in zip(tensors, ids, strict=True):
        for field, value in given.items():
            made.load(field, into[field], value, shard_id)
    return into


def rank_of(scheme: tuple[Format, Activation], shards: Sequence[Shard], ranks: int = 1) -> PackedShards:
    return PackedShards(shards, *scheme, ranks, "cpu", lambda line: None)


def dense(scheme: tuple[Format, Activation], given: Fields, n: int, k: int) -> Tensor:
    return scheme[0].dequantize(scheme[0].unpack(given, n, k))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_hold_the_whole_weight_between_them(name: str, ranks: int) -> None:
    scheme, (n, k) = SCHEMES[name], (36, 192)
    whole = fields(scheme, n, k)
    want = dense(scheme, whole, n, k)
    rows, columns = [], []
    for rank in range(ranks):
        for split, parts in ((True, rows), (False, columns)):
            part = (n // ranks, k) if split else (n, k // ranks)
            made = rank_of(scheme, [Shard("a", (n, k), part, rank * part[0] if split else 0, 0 if split else rank)], ranks)
            (bound,) = made.bind(loaded(made, [whole]))
            parts.append(dense(scheme, bound.kernel.restore(bound.prepared, bound.spec), *part))
    assert torch.equal(torch.cat(rows), want)
    assert torch.equal(torch.cat(columns, 1), want)


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_a_fused_layer_computes_what_its_parts_do(name: str) -> None:
    """nvfp4 has one divisor per matrix, so its parts stay apart; int4's become one weight."""
    scheme, k, (heads, size) = SCHEMES[name], 64, (4, 16)
    sizes = (heads * size, size, size)
    parts = [fields(scheme, n, k, seed) for seed, n in enumerate(sizes)]
    x = torch.randn(3, 2, k, generator=torch.Generator().manual_seed(9))
    bias = torch.arange(32.0 + 2 * size)
    for rank in range(2):  # one head of keys for two ranks: both hold it
        shards = fused_shards(["q", "k", "v"], [32, size, size], (64 + 2 * 2 * size, k), k, rank, 2, copies=2)
        made = rank_of(scheme, shards, 2)
        bound = made.bind(loaded(made, parts, ["q", "k", "v"]))
        assert len(bound) == (1 if name == "int4" else 3)
        q, keys, values = (dense(scheme, part, n, k) for part, n in zip(parts, sizes, strict=True))
        want = x @ torch.cat([q[32 * rank : 32 * rank + 32], keys, values]).T + bias
        assert torch.linalg.norm(multiply(x, bound, bias) - want) < 1e-4 * torch.linalg.norm(want)


def test_static_inputs_are_cut_with_the_channels() -> None:
    rule = rule_from({"name": "int_static", "zeros": "channel"})
    scheme = IntGroup(bits=8, group=16, symmetric=True), rule
    whole = fields(scheme, 8, 64)
    whole["input_zero"] = torch.arange(64, dtype=torch.int32)
    made = rank_of(scheme, [Shard("a", (8, 64), (8, 32), 0, 1)], 2)
    (bound,) = made.bind(loaded(made, [whole]))
    assert torch.equal(bound.kernel.restore(bound.prepared, bound.spec)["input_zero"], torch.arange(32, 64, dtype=torch.int32))


def test_a_vocabulary_is_padded_with_zero_rows() -> None:
    scheme = SCHEMES["int8-rows"]
    whole = fields(scheme, 50, 64)
    made = rank_of(scheme, [Shard("table", (50, 64), (32, 64), row=32)], 2)
    (bound,) = made.bind(loaded(made, [whole]))
    have = dense(scheme, bound.kernel.restore(bound.prepared, bound.spec), 32, 64)
    assert torch.equal(have[:18], dense(scheme, whole, 50, 64)[32:])
    assert not have[18:].any()


@pytest.mark.parametrize("lost", ["weight_packed", "weight_scale", "weight_zero"])
def test_a_missing_tensor_is_named(lost: str) -> None:
    scheme = SCHEMES["int4"]
    made = rank_of(scheme, fused_shards(["mlp.gate_proj", "mlp.up_proj"], [8, 8], (16, 64), 64, 0, 1))
    gate, up = fields(scheme, 8, 64), fields(scheme, 8, 64, 1)
    up.pop(lost)
    with pytest.raises(ValueError, match=rf"mlp\.up_proj\.{lost} is missing from the checkpoint"):
        made.bind(loaded(made, [gate, up], [0, 1]))


def test_what_does_not_fit_is_named() -> None:
    scheme = SCHEMES["int3"]
    with pytest.raises(ValueError, match=r"down has K = 192, .* each of 4 ranks gets 48: group 32 .*; at most 3 ranks fit"):
        rank_of(scheme, [Shard("down", (8, 192), (8, 48))], 4)
    made = rank_of(scheme, [Shard("down", (8, 192), (8, 192))])
    with pytest.raises(ValueError, match=r"down\.weight_packed is torch.uint8 \[7, 72\] on disk; int_group needs .*\[8, 72\]"):
        loaded(made, [fields(scheme, 7, 192)])
    broken = fields(scheme, 8, 192)
    broken["weight_scale"][3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"down\.weight_scale holds a NaN"):
        made.bind(loaded(made, [broken]))


def test_no_kernel_and_a_slow_kernel_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    shard, lines = Shard("q", (8, 64), (8, 64)), []
    PackedShards([shard], *SCHEMES["int2"], 1, "cpu", lines.append)
    monkeypatch.setenv("LOWBIT_KERNEL", "reference")
    PackedShards([shard], *SCHEMES["int2"], 1, "cpu", lines.append)
    assert "with activation none runs on the slow reference kernel (cpu_" in lines[-1].replace("gpu_", "cpu_")
    monkeypatch.setenv("LOWBIT_KERNEL", "gpu")
    with pytest.raises(ValueError, match=r"q: no kernel for .*LOWBIT_KERNEL=gpu excludes it"):
        PackedShards([shard], *SCHEMES["int2"], 1, "cpu", lines.append)


def section(schemes: dict[str, str]) -> dict[str, Any]:
    targets = {name: Target(name, 8, 64, False, *SCHEMES[scheme]) for name, scheme in schemes.items()}
    return quantization_config(targets, [])


def test_fused_layers_have_one_scheme() -> None:
    mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    names = fused_names("model.layers.0.self_attn.qkv_proj", mapping)
    assert names == [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert fused_names("model.layers.0.self_attn.o_proj", mapping) == ["model.layers.0.self_attn.o_proj"]
    same = section(dict.fromkeys(names, "int4"))
    assert one_scheme(same, names) == SCHEMES["int4"]
    assert one_scheme(same, ["model.layers.0.mlp.up_proj"]) is None
    with pytest.raises(ValueError, match=r"q_proj is .*bits=4.* and .*v_proj is .*bits=2.*, but vLLM fuses them"):
        one_scheme(section(dict(zip(names, ["int4", "int4", "int2"], strict=True))), names)
    with pytest.raises(ValueError, match=r"and .*v_proj is float"):
        one_scheme(section(dict.fromkeys(names[:2], "int4")), names)


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        (".encoder.layers.0.layers.self_attn.qkv_proj", "model.encoder.layers.0.self_attn.qkv_proj"),
        (".decoder.layers.11.layers.mlp.fc1", "model.decoder.layers.11.fc1"),
        ("model.decoder.layers.3.mlp.fc2", "model.decoder.layers.3.fc2"),
        ("proj_out", "proj_out"),
    ],
)
def test_whisper_names_on_disk(prefix: str, name: str) -> None:
    assert ARCHITECTURES["WhisperForConditionalGeneration"].on_disk(prefix) == name


def test_what_is_not_served_is_refused() -> None:
    plain = section({"model.layers.0.mlp.up_proj": "int4"})
    assert architecture_of(plain, ["LlamaForCausalLM"]).table == "model.embed_tokens"
    with pytest.raises(ValueError, match=r"does not serve MixtralForCausalLM; it serves LlamaForCausalLM, .*use quant.load"):
        architecture_of(plain, ["MixtralForCausalLM"])
    tower = section({"audio_tower.layers.0.fc1": "int4"})
    with pytest.raises(ValueError, match=r"audio_tower\.layers\.\*\.fc1 is packed, but vLLM computes audio_tower .* in float"):
        architecture_of(tower, ["Qwen2AudioForConditionalGeneration"])
    with pytest.raises(ValueError, match="attention probabilities of 4 bits are not served"):
        architecture_of(plain | {"softmax": {"bits": 4}}, ["LlamaForCausalLM"])


def test_without_vllm_one_line_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM calls `register` whatever it serves; an interface it lacks must not stop it."""
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.linear", None)
    monkeypatch.delitem(sys.modules, "quant.serve.vllm.config", raising=False)
    with caplog.at_level(logging.ERROR):
        vllm.register()
    (line,) = caplog.messages
    assert "was made for vLLM 0.32 and cannot serve in vLLM" in line


def test_the_entry_point_is_cheap() -> None:
    code = "import quant.serve.vllm, sys; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
