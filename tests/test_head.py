"""The packed output head: one table, in tied models also the embedding; exact in memory, on disk and in the plan."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
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
from quant.api import compile_folder
from quant.cli import main
from quant.embedding import PackedEmbedding, TiedHead, UnpackableHead, fill_table, find_head, pack_table
from quant.eval.perplexity import Scorer
from quant.kernels.activations.none import Unquantized
from quant.kernels.dispatch import MatmulSpec, load_all
from quant.kernels.format import Format
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.linear import PackedLinear
from quant.plan import make_plan
from quant.recipe import load_recipe

TABLE = "model.embed_tokens"
HEADS = ["8", "4", "{name: int_group, bits: 3, group: 32}", "{name: int_group, bits: 8, group: -1, symmetric: true}"]
ROOT = Path(quant.__file__).parents[1]
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made(head, tied): the folder of a tiny Llama, its float source beside it; not to be changed."""
    found: dict[tuple[str, bool], Path] = {}

    def folder(head: str = "8", tied: bool = True) -> Path:
        if (head, tied) not in found:
            root = tmp_path_factory.mktemp("head")
            source = tiny.llama_folder(root / "float", tied=tied)
            compile_folder(plan_of(source, tiny, head), root / "packed", torch.device("cpu"))
            found[head, tied] = root / "packed"
        return found[head, tied]

    return folder


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 320, (2, 12), generator=torch.Generator().manual_seed(1))


def plan_of(source: Path, tiny: ModuleType, head: str, recipe: str = "rtn") -> Any:
    return make_plan(str(source), load_recipe(recipe, [*tiny.SMALL, f"head={head}"]))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return quant.load(folder, dtype=dtype, compile=False)


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def packed_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fields of packed layers."""
    return {name: value for name, value in state.items() if re.search(r"\.(weight_|group_|row_)", name)}


def table_on_disk(folder: Path, fmt: Format, layer: str = TABLE, n: int = 320, k: int = 64) -> Tensor:
    """What the stored bytes of a table stand for, float32 [n, k]."""
    fields = {name: value for name, value in stored(folder).items() if name.startswith(f"{layer}.weight_")}
    return fmt.dequantize(fmt.unpack({name.rpartition(".")[2]: value for name, value in fields.items()}, n, k))


@pytest.mark.parametrize(
    "fmt", [*(IntGroup(bits=b, group=32) for b in (2, 3, 4, 8)), IntGroup(bits=8, group=-1, symmetric=True)]
)
def test_rows_of_every_kernel_are_rows_of_the_weight(fmt: IntGroup) -> None:
    n, k = 70, 160  # neither whole blocks of rows nor whole tiles of columns
    codes = fmt.nearest(torch.randn(n, k, generator=torch.Generator().manual_seed(0)))
    rows = torch.tensor([69, 0, 31, 32, 33, 69])
    spec = MatmulSpec(n=n, k=k, format=fmt, activation=Unquantized(), device="cpu")
    # layouts for GPUs are made and read by torch on any device
    serving = [kernel for kernel in load_all() if kernel.name == "gpu_wna16" or kernel.refuses(spec) is None]
    assert len(serving) >= 2
    for kernel in serving:
        got = kernel.rows(kernel.prepare(fmt.pack(codes), spec), rows, spec)
        assert torch.equal(got.codes, codes.codes[rows]), kernel.name
        assert got.params.keys() == codes.params.keys()
        assert all(torch.equal(got.params[name], codes.params[name][rows]) for name in got.params), kernel.name


@pytest.mark.parametrize("fmt", [IntGroup(bits=4, group=32), Int4Dual(group=32)], ids=str)
def test_a_table_is_packed_in_slices_as_in_one_piece(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(70, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes = fmt.nearest(weight.float())
    want, exact = fmt.pack(codes), fmt.dequantize(codes)
    monkeypatch.setattr("quant.embedding.CHUNK_ROWS", 32)
    fields, error = pack_table(weight, fmt)
    assert same(fields, want)
    assert error == pytest.approx(float((weight.float() - exact).norm() / weight.float().norm()), rel=1e-5)
    filled = torch.full_like(weight, torch.nan)
    fill_table(filled, fields, fmt)
    assert torch.equal(filled, exact.bfloat16())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_the_plan_knows_what_is_written(made: Made, tiny: ModuleType, head: str, tied: bool) -> None:
    folder = made(head, tied)
    plan = plan_of(folder.parent / "float", tiny, head)
    assert plan.bytes_on_disk() == (folder / "model.safetensors").stat().st_size
    names, table = set(stored(folder)), TABLE if tied else "lm_head"
    fmt = plan.selection.table.format
    assert {name for name in names if name.startswith(f"{table}.")} == {f"{table}.{field}" for field in fmt.fields(320, 64)}
    assert ("model.embed_tokens.weight" in names) is not tied
    assert "lm_head.weight" not in names
    report = json.loads((folder / "report.json").read_text())["totals"]
    weight = load_file(folder.parent / "float" / "model.safetensors")[f"{table}.weight"].float()
    error = float((weight - table_on_disk(folder, fmt, table)).norm() / weight.norm())
    size = sum(value.nbytes for name, value in stored(folder).items() if name.startswith(f"{table}.weight_"))
    want = {"name": table, "tied": tied, "format": fmt.config(), "weights": 320 * 64, "bytes": size}
    assert report["head"] == want | {"bits_per_weight": 8 * size / (320 * 64), "error": pytest.approx(error, rel=1e-4)}
    assert report["layers"] == 21
    assert report["kept_in_float"] == {}
    card = (folder / "README.md").read_text()
    assert ("packed head and input embedding" in card) is tied
    assert "packed head" in card


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_lookup_and_logits_are_those_of_the_dequantized_table(
    made: Made, tiny: ModuleType, ids: Tensor, head: str, dtype: torch.dtype
) -> None:
    folder = made(head)
    model = load(folder, dtype)
    fmt = plan_of(folder.parent / "float", tiny, head).selection.table.format
    table = table_on_disk(folder, fmt).to(dtype)
    embedding = model.model.embed_tokens
    assert torch.equal(embedding(ids), table[ids])
    assert torch.equal(embedding.weight, table)
    assert torch.equal(model.lm_head.weight, table)
    assert embedding(ids[:, :0]).shape == (2, 0, 64)
    twin = copy.deepcopy(model)
    twin.model.embed_tokens = nn.Embedding.from_pretrained(table)
    twin.lm_head = nn.Linear(64, 320, bias=False, dtype=torch.float32)
    twin.lm_head.weight.data = table_on_disk(folder, fmt)
    with torch.no_grad():
        want = twin.lm_head(twin.model(input_ids=ids).last_hidden_state.float())
        got = model(input_ids=ids).logits
    assert got.dtype == dtype
    assert float((got.float() - want).norm() / want.norm()) < (3e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_again_it_has_the_same_bytes(made: Made, ids: Tensor, tmp_path: Path, tied: bool) -> None:
    folder = made("4", tied)
    model = load(folder, torch.bfloat16)
    assert type(model.lm_head) is (TiedHead if tied else PackedLinear)
    assert type(model.model.embed_tokens) is (PackedEmbedding if tied else nn.Embedding)
    with torch.no_grad():
        before = model(ids).logits
        model.tie_weights()  # has nothing left to tie
        assert torch.equal(model(ids).logits, before)
        model.to(torch.float32)
    assert same(packed_part(model.state_dict()), packed_part(stored(folder)))
    model = load(folder, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path / "again")
    assert same(stored(folder), stored(tmp_path / "again"))
    sections = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, tmp_path / "again")]
    assert sections[0] == sections[1]
    again = load(tmp_path / "again", torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, before)
    again.save_pretrained(tmp_path / "third")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "third" / "model.safetensors").read_bytes()


def test_it_behaves_as_any_model_in_transformers(made: Made, ids: Tensor) -> None:
    folder = made()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert (model.dtype, model.model.embed_tokens.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    base = transformers.AutoModel.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert model.get_input_embeddings().num_embeddings == 320
    assert model.get_input_embeddings().embedding_dim == 64
    assert model.get_output_embeddings() is model.lm_head
    assert not [name for name in model.state_dict() if name.startswith("lm_head")]
    assert not [name for name, _ in model.named_parameters() if "embed_tokens" in name or "lm_head" in name]
    with torch.no_grad():
        for other in (model.to(torch.float16), model.to(torch.float32), model.to(torch.bfloat16)):
            assert other.dtype == other(ids).logits.dtype == other.model.embed_tokens(ids).dtype
    text = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    assert text.shape[1] > ids.shape[1]
    assert transformers.LlamaForCausalLM._tied_weights_keys  # the class still ties other models
    scorer = Scorer(model, ids[:1])
    assert scorer.split
    assert torch.equal(torch.cat(list(scorer.slices(ids)), 1), model(ids).logits[:, :-1])
    for wrong in (-1, 320):
        with pytest.raises(IndexError, match=f"{wrong}.*ids 0 to 319"):
            model(torch.tensor([[1, wrong]]))


def test_a_copy_is_whole_and_has_its_own_table(made: Made, ids: Tensor) -> None:
    model = load(made())
    with torch.no_grad():
        want = model(ids).logits
        other = copy.deepcopy(model)
        assert other.lm_head.embedding is other.model.embed_tokens is not model.model.embed_tokens
        other.model.embed_tokens.unbind()
        other.model.embed_tokens.weight_packed.zero_()
        assert torch.equal(model(ids).logits, want)
        assert not torch.equal(other(ids).logits, want)


def test_without_us_transformers_refuses(made: Made) -> None:
    code = """
import sys, transformers
transformers.utils.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    try:
        transformers.LlamaForCausalLM.from_pretrained(folder)
    except (RuntimeError, ValueError):
        print("refused")
assert "quant" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(made()), str(made("8", tied=False))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.stdout.split() == ["refused", "refused"], done.stderr


def test_blocks_are_calibrated_behind_the_packed_embedding(tiny: ModuleType, tmp_path: Path) -> None:
    """They come out as for a float model that has the rounded table, and not as for the model that was given."""
    source = tiny.llama_folder(tmp_path / "float", tied=True)
    runs = {}
    for head in ("2", "null"):
        runs[head] = compile_folder(plan_of(source, tiny, head, "gptq"), tmp_path / head, torch.device("cpu"))
    fmt = plan_of(source, tiny, "2").selection.table.format
    table = table_on_disk(runs["2"], fmt)
    tiny.rewrite(source, lambda tensors: tensors.update({f"{TABLE}.weight": table.float()}))
    rounded = compile_folder(plan_of(source, tiny, "null", "gptq"), tmp_path / "rounded", torch.device("cpu"))

    def blocks(folder: Path) -> dict[str, Tensor]:
        return {name: value for name, value in stored(folder).items() if ".layers." in name}

    assert same(blocks(runs["2"]), blocks(rounded))
    assert not same(blocks(runs["2"]), blocks(runs["null"]))


def test_a_stopped_run_ends_with_the_same_bytes(made: Made, tiny: ModuleType, tmp_path: Path) -> None:
    folder = made("4")

    def stop(done: int, total: int, block: Any) -> None:
        if done == 2:
            raise KeyboardInterrupt

    source = folder.parent / "float"
    with pytest.raises(KeyboardInterrupt):
        compile_folder(plan_of(source, tiny, "4"), tmp_path / "out", torch.device("cpu"), stop)
    compile_folder(plan_of(source, tiny, "4"), tmp_path / "out", torch.device("cpu"))
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    totals = [json.loads((f / "report.json").read_text())["totals"] for f in (tmp_path / "out", folder)]
    assert totals[0]["blocks_resumed"] == 2
    assert totals[0]["head"] == totals[1]["head"]


def test_whisper_ties_its_projection(tiny: ModuleType, clips: Path, tmp_path: Path) -> None:
    source = tiny.whisper_folder(tmp_path / "float")
    sets = ["head=8", f"calibration.source={clips}"]
    plan = make_plan(str(source), load_recipe("rtn", sets))
    out = compile_folder(plan, tmp_path / "out", torch.device("cpu"))
    assert plan.bytes_on_disk() == (out / "model.safetensors").stat().st_size
    model = load(out)
    table = table_on_disk(out, plan.selection.table.format, "model.decoder.embed_tokens")
    tokens = torch.tensor([[1, 5, 319, 0]])
    assert torch.equal(model.model.decoder.embed_tokens(tokens), table[tokens])
    features = torch.randn(1, 80, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = model.model(features, decoder_input_ids=tokens).last_hidden_state
        got = model(features, decoder_input_ids=tokens).logits
        text = model.generate(features, max_new_tokens=5)
    assert float((got - seen @ table.T).norm() / got.norm()) < 1e-6
    assert text.shape[0] == 1
    model.save_pretrained(tmp_path / "again")
    assert same(stored(out), stored(tmp_path / "again"))


def test_plan_and_inspect_say_so(made: Made, tiny: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    folder = made()
    sets = [part for override in [*tiny.SMALL, "head=8"] for part in ("--set", override)]
    capfd.readouterr()
    assert main([str(folder.parent / "float"), "--recipe", "rtn", "--plan", *sets]) == 0
    out = capfd.readouterr().out
    assert "packed head and input embedding: 20,480 weights at 8.250 bits, 0.0 MB (21,120 bytes)" in out
    assert "model.embed_tokens" in out
    assert "for 22 layers" in out
    assert main(["inspect", str(folder)]) == 0
    out = capfd.readouterr().out
    assert "22 packed layers" in out
    assert "packed head and input embedding at 8.250 bits per weight" in out


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("5", "no 5-bit codes; allowed: 2, 3, 4, 6, 8"),
        ("yes", "head: input should be a valid dictionary, given True"),
        ("small", "head: input should be a valid dictionary, given 'small'"),
        ("{name: int_gruop}", "unknown format 'int_gruop'"),
        ("{name: int_group, bit: 8}", "has no parameter 'bit'"),
        ("{name: int_group, group: 8}", "model.embed_tokens has K = 64, which no multiple of 16 up to group 8 divides"),
    ],
)
def test_a_bad_head_gets_one_line(made: Made, capfd: pytest.CaptureFixture[str], head: str, said: str) -> None:
    capfd.readouterr()
    assert main([str(made().parent / "float"), "--recipe", "rtn", "--plan", "--set", f"head={head}"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line


def test_a_table_that_cannot_be_packed_is_refused(made: Made, tiny: ModuleType, tmp_path: Path) -> None:
    class Scaled(nn.Embedding):
        """As in models that multiply what they look up."""

    model = tiny.llama(tied=True)
    assert find_head(model).tied
    model.model.embed_tokens = Scaled(320, 64)
    with pytest.raises(ValueError, match=r"not a plain embedding.*head: null"):
        find_head(model)
    with pytest.raises(ValueError, match=r"LlamaModel has no linear output head.*head: null"):
        find_head(tiny.llama().model)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    with pytest.raises(ValueError, match="to one table"):
        find_head(transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, tie_word_embeddings=True)))

    twice = Path(shutil.copytree(made().parent / "float", tmp_path / "twice"))
    tiny.rewrite(twice, lambda tensors: tensors.update({"lm_head.weight": tensors[f"{TABLE}.weight"].clone()}))
    with pytest.raises(ValueError, match=r"stored under lm_head\.weight, model\.embed_tokens\.weight; .*head: null"):
        plan_of(twice, tiny, "8")
    make_plan(str(twice), load_recipe("rtn"))


def test_a_damaged_table_is_named(made: Made, tiny: ModuleType, tmp_path: Path) -> None:
    def damaged(change: Callable[[dict[str, Tensor]], Any]) -> str:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made("4"), folder)
        tiny.rewrite(folder, change)
        with pytest.raises(ValueError, match=r".") as caught:
            load(folder)
        return str(caught.value)

    assert "model.embed_tokens.weight_zero is missing" in damaged(lambda t: t.pop(f"{TABLE}.weight_zero"))
    assert "[319, 32] on disk" in damaged(lambda t: t.update({f"{TABLE}.weight_packed": t[f"{TABLE}.weight_packed"][1:]}))
    assert "model.embed_tokens.weight_scale holds a NaN" in damaged(lambda t: t[f"{TABLE}.weight_scale"].fill_(torch.nan))
    folder = Path(shutil.copytree(made().parent / "float", tmp_path / "source"))
    tiny.rewrite(folder, lambda t: t[f"{TABLE}.weight"].fill_(torch.inf))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight holds a NaN or an infinity"):
        compile_folder(plan_of(folder, tiny, "8"), tmp_path / "out", torch.device("cpu"))


@pytest.mark.parametrize("recipe", ["dgq", "gptq", "qoq", "rtn"])
def test_recipes_pack_the_head_of_models_that_allow_it(
    tiny: ModuleType, tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.llama_folder(tmp_path / "float", tied=True)
    plan = make_plan(str(source), load_recipe(recipe))
    assert plan.packed[TABLE].format == IntGroup(bits=8, group=64, symmetric=True)
    assert plan.note == ""

    def refuse(model: Any) -> None:
        raise UnpackableHead("it has two heads; leave it in float with head: null")

    monkeypatch.setattr("quant.targets.find_head", refuse)
    plan = make_plan(str(source), load_recipe(recipe))
    assert TABLE not in plan.packed
    assert "lm_head" in plan.selection.kept
    assert plan.recipe.head is None
    assert plan.note == "the head stays in float: it has two heads; leave it in float with head: null"
    with pytest.raises(UnpackableHead, match="two heads"):  # who asks for it gets it or an error
        make_plan(str(source), load_recipe(recipe, ["head=4"]))
    assert make_plan(str(source), load_recipe(recipe, ["head=null"])).note == ""


def test_a_head_that_stays_in_float_is_told_once(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.llama_folder(tmp_path / "float", tied=True)

    def refuse(model: Any) -> None:
        raise UnpackableHead("it has two heads; leave it in float with head: null")

    monkeypatch.setattr("quant.targets.find_head", refuse)
    assert main([str(source), "--recipe", "rtn", "--plan"]) == 0
    assert capsys.readouterr().out.replace("\n", " ").count("the head stays in float: it has two heads") == 1
    overrides = [one for one in tiny.SMALL if not one.startswith("head")]
    with pytest.warns(UserWarning, match="the head stays in float: it has two heads"):
        quant.quantize(source, "rtn", tmp_path / "packed", overrides=overrides)
