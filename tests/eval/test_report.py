"""Results survive JSON unchanged and their tables show the numbers that matter; the eval command end to end on a tiny model."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from quant.eval import evaluate, harness, loading, perplexity, report
from quant.eval.speed import Side, SpeedResult, Spread


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{(i * i) % 60}" for i in range(200)))
    return path


def rendered(show, result):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(result, console)
    return console.export_text()


def test_eval_command(folder, text, tmp_path):
    target = tmp_path / "numbers.json"
    options = ["--against", str(folder), "--text", str(text), "--length", "32", "--limit", "5", "--json", str(target)]
    outcome = CliRunner().invoke(evaluate.command, [str(folder), *options], catch_exceptions=False)
    assert outcome.exit_code == 0
    found = json.loads(target.read_text())
    assert found["text"]["windows"] == 5
    assert found["text"]["tokens"] == 5 * 31
    assert found["text"]["fidelity"]["kl_max"] == 0
    assert found["weight_bytes"] == (folder / "model.safetensors").stat().st_size
    for part in ("5 windows of 32 tokens", "200 tokens", str(text), "top-1 agreement", "100.000%"):
        assert part in " ".join(outcome.output.split())


def test_the_recorded_source_is_the_reference(folder, text, tmp_path, monkeypatch):
    said = []
    assert loading.sides(str(folder), None, said.append) == (folder, None)
    assert "without a reference" in said[0]
    monkeypatch.setattr(loading, "source", lambda path: str(folder))
    assert loading.sides(str(folder), None, said.append) == (folder, folder)
    monkeypatch.setattr(loading, "source", lambda path: str(tmp_path / "gone"))
    assert loading.sides(str(folder), None, said.append) == (folder, None)
    assert "gone" in said[-1]


def test_json_round_trip(folder, text):
    result = evaluate.evaluate(folder, folder, text=str(text), length=16)
    again = json.loads(report.as_json(result))
    assert again == asdict(result)
    assert perplexity.TextResult(**again["text"] | {"fidelity": result.text.fidelity}) == result.text


def test_refusals(folder, text, tmp_path):
    with pytest.raises(ValueError, match="--audio does not apply"):
        evaluate.evaluate(folder, None, audio="clips")
    with pytest.raises(ValueError, match="--length 65"):
        evaluate.evaluate(folder, None, text=str(text), length=65)
    with pytest.raises(ValueError, match=r"config\.json"):
        evaluate.evaluate(tmp_path, None)
    with pytest.raises(ValueError, match="cannot write"):
        report.write_json(evaluate.evaluate(folder, None, text=str(text), length=16), tmp_path / "no" / "x.json")
    (tmp_path / "config.json").write_text('{"is_encoder_decoder": true, "model_type": "t5"}')
    with pytest.raises(ValueError, match="t5"):
        loading.kind(tmp_path)


def test_speed_table_and_spread():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2.0, q1=1.5, q3=2.5)
    one = Side(
        name="model",
        model="small",
        numbers="bfloat16",
        weight_bytes=10**6,
        load_s=1.0,
        cold_s=1.25,
        bare_rss_bytes=10**8,
        loaded_rss_bytes=2 * 10**8,
        peak_rss_bytes=3 * 10**8,
        device_bytes=None,
        metrics={"decode_tokens_per_s": Spread.of([30.0])},
    )
    result = SpeedResult(
        workload="work",
        threads=2,
        dtype="bfloat16",
        device="cpu",
        repeats=1,
        warmup=0,
        versions={"torch": "x"},
        model=one,
        others=(replace(one, name="rival", peak_rss_bytes=6 * 10**8, ratios={"decode_tokens_per_s": Spread.of([1.5])}),),
        absent={"other": "not installed"},
    )
    shown = rendered(report.show_speed, result)
    for part in (
        "30 [30, 30]",
        "1.25",
        "1.5 [1.5, 1.5]",
        "300.0 MB",
        "500.0 MB",
        "other: not measured, not installed",
        "2 threads",
        "bfloat16",
        "torch x",
    ):
        assert part in shown
    read = json.loads(report.as_json(result))
    assert read | {"others": tuple(read["others"])} == asdict(result)


def test_harness_on_a_local_task(folder, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"q": f"w{i}", "options": ["w1 w2", "w3"], "gold": i % 2} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = tmp_path / "tiny.yaml"
    task.write_text(
        f"""task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: options
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""
    )
    model = loading.load(folder, torch.float32, "cpu")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    found = harness.evaluate(model, tokenizer, [str(task)], max_length=32)
    right = 0
    for row in rows:
        ids = [tokenizer(f"{row['q']} {option}", return_tensors="pt").input_ids for option in row["options"]]
        with torch.no_grad():
            scores = [-model(x, labels=x.clone().index_fill_(1, torch.tensor([0]), -100)).loss * (x.shape[1] - 1) for x in ids]
        right += int(scores[1] > scores[0]) == row["gold"]
    assert found["tiny"]["acc"] == pytest.approx(right / len(rows))
    assert found["tiny"]["version"] == "3"
    assert "acc_stderr" in found["tiny"]
    with pytest.raises(ValueError, match="no task file"):
        harness.evaluate(model, tokenizer, [str(tmp_path / "none.yaml")], max_length=32)
