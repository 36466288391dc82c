"""Rivals: names, what happens without them or when they fail, the GGUF file that is made for llama.cpp, its tokens."""

import os
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM

from quant.eval import contender, loading, report, speed
from quant.eval.rivals import base, ggml, gguf_writer
from quant.eval.rivals.base import FILES, Choice, choices
from quant.eval.speed_worker import Repeat, Workload, open_model
from quant.gguf_llama import hf_name, unpermute
from quant.gguf_writer import gguf_name
from tests.tiny import llama_folder

WORK = Workload(prompt=8, new=3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("llama"))


def test_names():
    assert choices("") == []
    first = next(iter(Choice(name="llama.cpp", variant="").rival().variants))
    assert choices("llama.cpp, torchao:int8,llama.cpp") == [
        Choice(name="llama.cpp", variant=first),
        Choice(name="torchao", variant="int8"),
    ]
    assert len(choices("llama.cpp:all")) == len(Choice(name="llama.cpp", variant="").rival().variants) > 1
    with pytest.raises(ValueError, match=r"'llamacpp'.*did you mean llama\.cpp"):
        choices("llamacpp")
    with pytest.raises(ValueError, match="variants of torchao: int4, int8"):
        choices("torchao:int3")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_rival_says_how_to_install_it(name, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda module: None)
    chosen = choices(name)
    found, absent = contender.rivals(chosen, llama, tmp_path, 1, lambda line: None)
    assert not found
    rival = chosen[0].rival()
    if rival.kind == "text":
        assert absent == {str(chosen[0]): f"not installed; pip install '{rival.distribution}{rival.pinned}'"}
    else:
        assert "runs speech models" in absent[str(chosen[0])]


def test_requirements_are_those_of_the_extra():
    """setup.py and the advice agree."""
    setup = (base.Path(__file__).parents[2] / "setup.py").read_text()
    for name in FILES:
        rival = Choice(name=name, variant="").rival()
        assert f'"{rival.distribution}{rival.pinned}"' in setup


def test_a_failing_rival_does_not_end_the_comparison(llama, monkeypatch):
    class Counted:
        def __init__(self, name, *rest):
            if name == "early":
                raise ValueError("cannot load")
            self.name, self.repeats, self.turns = name, [], 0
            self.loaded = {"load_s": 0.0, "bare_rss_bytes": 1, "loaded_rss_bytes": 2}
            self.coldest = {}
            self.last = {"peak_rss_bytes": 3, "device_bytes": None, "repeat": Repeat(metrics={})}

        def repeat(self, *, keep):
            self.turns += 1
            if self.name == "late" and self.turns == 2:
                raise RuntimeError("ended with code -11")
            if keep:
                self.repeats.append({"rtf": 2.0 if self.name == "slow" else 1.0})

        def close(self):
            pass

    def made(choices, source, scratch, threads, say):
        def side(name):
            return contender.Contender(
                name=name, model=str(source), numbers="", weight_bytes=1, load=lambda work: None, rival=True
            )

        return [side("early"), side("late"), side("slow")], {"other": "not installed"}

    monkeypatch.setattr(speed, "Worker", Counted)
    monkeypatch.setattr(contender, "rivals", made)
    result = speed.compare(llama, llama, WORK, threads=1, repeats=2, warmup=1, rivals=choices("torchao"))
    assert [side.name for side in result.others] == ["against", "slow"]
    assert result.others[1].ratios["rtf"].median == 0.5
    assert result.absent == {"other": "not installed", "early": "cannot load", "late": "ended with code -11"}
    console = report.Console(record=True, width=200)
    report.show_speed(result, console)
    assert "late: not measured, ended with code -11" in console.export_text()


def test_a_worker_whose_process_dies_is_reported():
    """Also when the workload is larger than a pipe holds."""
    work = Workload(clips=(torch.zeros(1 << 21).numpy(),))
    with pytest.raises(RuntimeError, match="measures broken ended with code"):
        speed.Worker("broken", Unreadable(), "cpu", 1, work)


class Unreadable:
    """Pickles, and does not come back."""

    def __reduce__(self):
        return exec, ("raise SystemExit(3)",)


def test_rivals_need_a_float_model(llama):
    with pytest.raises(ValueError, match="--against"):
        speed.compare(llama, None, WORK, threads=1, rivals=choices("torchao"))


def test_word_errors_count_clips_with_a_transcript(monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda folder: None)
    monkeypatch.setattr(speed, "normalizer", lambda processor, language, folder: (str.lower, "lower"))
    work = Workload(transcripts=("One two", None, "three four"))
    assert speed.word_error_rate(work, ["one two", "anything", "three five six"], None) == pytest.approx(2 / 4)
    assert speed.word_error_rate(Workload(transcripts=(None,)), ["x"], None) is None


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_holds_every_weight(tmp_path, tied):
    folder = llama_folder(tmp_path / "model", tied=tied)
    gguf_writer.write(folder, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = model.state_dict()
    if tied:
        del wanted["lm_head.weight"]
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    found = {}
    for tensor in GGUFReader(str(tmp_path / "model.gguf")).tensors:
        stem = tensor.name.split(".")[-2]
        weight = torch.tensor(tensor.data, dtype=torch.float32)
        found[hf_name(tensor.name)] = unpermute(weight, heads[stem]) if stem in heads else weight
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


def test_gguf_refuses_what_it_would_get_wrong(llama, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(llama)
    config.rope_parameters = config.rope_parameters | {"rope_type": "linear", "factor": 2.0}
    folder = tmp_path / "scaled"
    llama_folder(folder)
    config.save_pretrained(folder)
    with pytest.raises(ValueError, match="scales its rotary embedding"):
        gguf_writer.write(folder, tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="no place"):
        gguf_name("model.layers.0.self_attn.q_norm.weight")


@pytest.mark.parametrize(("name", "module"), [("llama.cpp:F16", "llama_cpp")])
def test_a_float_rival_says_the_same_tokens(name, module, llama, tmp_path):
    pytest.importorskip(module)
    (choice,) = choices(name)
    assert choice.convert(llama, tmp_path) > loading.weight_bytes(llama)
    theirs = choice.open(llama, tmp_path, 1, WORK)
    assert theirs().ids == theirs().ids == open_model(llama, "float32", "cpu", WORK)().ids


def test_what_a_rival_raises_is_one_line(llama, tmp_path):
    (choice,) = choices("llama.cpp")
    pytest.importorskip("llama_cpp")
    with pytest.raises(ValueError, match="does not load") as caught:
        choice.open(llama, tmp_path, 1, WORK)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 96, 64), (17, 80, 288)])
def test_ggml_multiplies(kind, m, n, k):
    pytest.importorskip("llama_cpp")
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((n, k), dtype=np.float32), rng.standard_normal((m, k), dtype=np.float32)
    product = ggml.Matmul(kind, weight, m, threads=1, copies=2)
    product.set_tokens(x)
    code = gguf.GGMLQuantizationType[kind]
    expected = x.astype(np.float64) @ dequantize(quantize(weight, code), code).astype(np.float64).T
    for _ in range(3):
        torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()  # torch's own use of AMX tiles, where there are some
        product()
        assert np.linalg.norm(product.result() - expected) < 0.01 * np.linalg.norm(expected)  # ggml's tokens are 8 bit


def test_a_conversion_that_crashes_is_one_line():
    with pytest.raises(ValueError, match="ended the process it ran in"):
        contender._apart(partial(os._exit, 3))


def test_a_rival_beside_a_model(llama):
    pytest.importorskip("llama_cpp")
    result = speed.compare(
        llama, llama, WORK, threads=1, dtype="float32", repeats=1, warmup=0, rivals=choices("llama.cpp:F16,ctranslate2")
    )
    against, rival = result.others
    assert rival.metrics.keys() == rival.ratios.keys() == against.metrics.keys()
    assert rival.weight_bytes > loading.weight_bytes(llama)
    assert "llama-cpp-python" in rival.numbers
    assert list(result.absent) == ["ctranslate2:int8"]
