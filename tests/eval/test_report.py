"""Results survive JSON unchanged and their tables show the numbers that matter; the eval command end to end on a tiny model."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy.stats import ttest_rel
from transformers import PreTrainedTokenizerFast

from quant.eval import evaluate, harness, loading, page, perplexity, report, samples, speed
from quant.eval.journal import Journal
from quant.eval.paired import mcnemar
from quant.eval.speed import Side, SpeedResult, Spread


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{(i * i) % 60}" for i in range(200)))
    return path


def copy_with_noise(folder, target):
    """The model of `folder` with noise on every matrix."""
    shutil.copytree(folder, target)
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        tensors[name] = (
            weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=generator) if weight.ndim == 2 else weight
        )
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


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
    for part in ("5 windows of 32 tokens", "200 tokens", str(text), "top-1 agreement", "100.000%", "p = 1, not significant"):
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


SIDE = Side(
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
SPEED = SpeedResult(
    workload="work",
    threads=2,
    dtype="bfloat16",
    device="cpu",
    repeats=1,
    warmup=0,
    versions={"torch": "x"},
    model=SIDE,
    others=(replace(SIDE, name="rival", peak_rss_bytes=6 * 10**8, ratios={"decode_tokens_per_s": Spread.of([1.5])}),),
    absent={"other": "not installed"},
)


def test_speed_table_and_spread():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2.0, q1=1.5, q3=2.5)
    result = SPEED
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


def test_samples_go_alike_to_the_first_difference(folder, text, tmp_path):
    """Both are greedy: after `same` tokens the two models, given the same ids, choose different tokens."""
    other = copy_with_noise(folder, tmp_path / "other")
    result = evaluate.evaluate(other, folder, text=str(text), length=32, samples=3)
    model, reference = (loading.load(path, torch.float32, "cpu") for path in (other, folder))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert len(result.samples) == 3
    assert any(sample.same is not None for sample in result.samples)
    for sample in result.samples:
        prompt = tokenizer(sample.prompt, return_tensors="pt").input_ids[0]
        assert len(prompt) == 16
        a, b = (samples.continuation(side, prompt) for side in (model, reference))
        assert (sample.model, sample.reference) == tuple(tokenizer.decode(ids, skip_special_tokens=True) for ids in (a, b))
        at = sample.same
        assert torch.equal(a[:at], b[:at])
        if at is not None:
            ids = torch.cat([prompt, a[:at]])[None]
            chosen = [int(side(ids).logits[0, -1].argmax()) for side in (model, reference)]
            assert chosen == [int(a[at]), int(b[at])]
            assert chosen[0] != chosen[1]
    assert json.loads(report.as_json(result)) == asdict(result)


def test_samples_are_refused_where_there_is_nothing_to_compare(folder, text):
    with pytest.raises(ValueError, match="give --against"):
        evaluate.evaluate(folder, None, text=str(text), length=32, samples=1)
    with pytest.raises(ValueError, match="the text has 6 windows"):
        evaluate.evaluate(folder, folder, text=str(text), length=32, samples=7)


def test_a_killed_command_goes_on_with_the_same_numbers(folder, text, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    other = copy_with_noise(folder, tmp_path / "other")
    options = [str(other), "--against", str(folder), "--text", str(text), "--length", "32", "--samples", "2"]
    ran = []
    score = perplexity.score

    def stopping(scorer, ref_scorer, ids, start):
        ran.append(start)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return score(scorer, ref_scorer, ids, start)

    monkeypatch.setattr(perplexity, "score", stopping)
    assert CliRunner().invoke(evaluate.command, options).exit_code != 0
    found = {}
    for name in ("resumed", "whole"):
        file = tmp_path / f"{name}.json"
        CliRunner().invoke(evaluate.command, [*options, "--json", str(file)], catch_exceptions=False)
        found[name] = json.loads(file.read_text())
    assert ran == [0, 1, 2, 3, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert (found["resumed"]["resumed"], found["whole"]["resumed"]) == (3, 0)
    for part in ("text", "samples"):
        assert found["resumed"][part] == found["whole"][part]
    assert list((tmp_path / "cache" / "eval").iterdir()) == []


def test_what_a_killed_run_kept_is_for_the_same_models_data_and_options_only(folder, tmp_path):
    model, file = shutil.copytree(folder, tmp_path / "model"), tmp_path / "text.txt"
    file.write_text("w1 w2")
    given = [model, folder, [str(file)], [32, "float32"]]
    found = [evaluate.identity(*given)]
    assert evaluate.identity(*given) == found[0]
    found.append(evaluate.identity(*given[:3], [32, "bfloat16"]))
    found.append(evaluate.identity(model, None, *given[2:]))
    file.write_text("w1 w2 w3")
    found.append(evaluate.identity(*given))
    (model / "model.safetensors").write_bytes(b"")
    found.append(evaluate.identity(*given))
    assert len({*found}) == 5


def test_page_holds_every_number_and_nothing_from_outside(folder, text, tmp_path, read_page):
    pytest.importorskip("matplotlib")
    other = copy_with_noise(folder, tmp_path / "other")
    result = evaluate.evaluate(other, folder, text=str(text), length=32, samples=2)
    evil = replace(result.samples[0], prompt="<script>alert(1)</script>", reference="a <b> c", model="a <b> d")
    test = harness.TaskTest(items=40, lost=7, gained=3, p_value=0.34375)
    result = replace(
        result,
        samples=[evil],
        tasks={"quiz": {"acc": 0.5, "acc_stderr": 0.08}},
        reference_tasks={"quiz": {"acc": 0.6, "acc_stderr": 0.07}},
        task_tests={"quiz": {"acc": test}},
    )
    page.write(result, tmp_path / "page.html")
    shown = read_page(tmp_path / "page.html")
    assert json.loads(shown.parts["pre"]) == asdict(result)
    fidelity = result.text.fidelity
    for part in (
        f"{result.text.perplexity:.4f}",
        f"p = {result.text.p_value:.2g}",
        f"{fidelity.kl_mean:.6f}",
        f"{fidelity.kl_p90:.5f}",
        f"{fidelity.kl_p95:.5f}",
        f"{fidelity.kl_max:.5f}",
        f"{1 - fidelity.top1:.3%}",
        f"{fidelity.flips_lost:.3%}",
        "0.5000 ± 0.0800",
        "7 of 40",
        "p = 0.34, not significant",
        "<script>alert(1)</script>",
        "KL divergence of a token (nats)",
        f"transformers {result.versions['transformers']}",
    ):
        assert part in shown.text
    assert shown.parts["mark"] == "cd"  # where the texts part
    with pytest.raises(ValueError, match="cannot write"):
        page.write(result, tmp_path / "no" / "page.html")


def test_efficiency_is_measured_not_asked_of_lm_eval(folder, text, monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "compare", lambda *given, **options: seen.append(given) or SPEED)
    result = evaluate.evaluate(folder, folder, text=str(text), length=32, tasks="efficiency")
    assert result.efficiency == SPEED
    assert result.tasks == {}
    assert seen[0][:2] == (folder, folder)
    assert seen[0][2].prompt == 32  # no longer than the windows
    assert "30 [30, 30]" in rendered(report.show, result)
    assert harness.split_tasks("alignment, efficiency, bbq,x") == ([*harness.DIMENSIONS["alignment"], "x"], True)


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: options
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""
GROUP = """group: both
task: [tiny, small]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


def test_harness_on_local_tasks(folder, tmp_path, monkeypatch):
    """Accuracy and flips of each item are those of the models' own likelihoods; a group pools the items of its tasks."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    quiz = {
        name: [{"q": f"w{i + at}", "options": [f"w{i % 7}", f"w{30 + i % 5}"], "gold": i % 2} for i in range(size)]
        for name, size, at in (("tiny", 16, 0), ("small", 9, 30))
    }
    place = tmp_path / "tasks"
    place.mkdir()
    for name, rows in quiz.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (place / f"{name}.yaml").write_text(TASK.format(name=name, rows=tmp_path / f"{name}.jsonl"))
    (place / "group.yaml").write_text(GROUP)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    chosen = harness.Harness([str(place)])
    assert chosen.tasks == ["both", "small", "tiny"]
    journal = Journal(tmp_path / "journal")
    found, right = [], []
    for path in (copy_with_noise(folder, tmp_path / "other"), folder):
        model = loading.load(path, torch.float32, "cpu")
        found.append(chosen.run(model, tokenizer, path.name, journal, max_length=32, items=True))
        right.append({name: [is_right(model, tokenizer, row) for row in rows] for name, rows in quiz.items()})
    tests = harness.compare(found[0][1], found[1][1])
    for sides in right:
        sides["both"] = [*sides["tiny"], *sides["small"]]
    for name in ("tiny", "small", "both"):
        a, b = (sides[name] for sides in right)
        for (results, _), sides in zip(found, right, strict=True):
            assert results[name]["acc"] == pytest.approx(sum(sides[name]) / len(sides[name]))
        lost, gained = (sum(x and not y for x, y in zip(*pair, strict=True)) for pair in ((b, a), (a, b)))
        assert tests[name]["acc"] == harness.TaskTest(items=len(a), lost=lost, gained=gained, p_value=mcnemar(lost, gained))
    assert tests["both"]["acc"].lost + tests["both"]["acc"].gained > 0
    assert found[0][0]["tiny"]["version"] == "3"
    assert "acc_stderr" in found[0][0]["tiny"]
    monkeypatch.setattr(harness.Harness, "_one", lambda *given: pytest.fail("a task that was known ran again"))
    assert chosen.run(model, tokenizer, folder.name, Journal(tmp_path / "journal"), max_length=32, items=True) == found[1]
    with pytest.raises(ValueError, match="no task file"):
        harness.Harness([str(tmp_path / "none.yaml")])
    with pytest.raises(ValueError, match="defines a task"):
        harness.Harness([str(folder)])


ROLLING = """task: passage
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{q}}}}"
metric_list: [{{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}]
"""


def test_lm_eval_finds_the_same_on_the_dequantized_model(packed, tmp_path, monkeypatch):
    """Packed weights with float tokens are those weights, whoever asks."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out, rows = packed("gptq"), tmp_path / "rows.jsonl"
    quiz = [{"q": f"the number {i} is", "options": ["odd", "even"], "gold": 1 - i % 2} for i in range(12)]
    rows.write_text("\n".join(map(json.dumps, quiz)))
    for name, text in (("tiny", TASK.format(name="tiny", rows=rows)), ("passage", ROLLING.format(rows=rows))):
        (tmp_path / f"{name}.yaml").write_text(text)
    chosen = harness.Harness([str(tmp_path / "tiny.yaml"), str(tmp_path / "passage.yaml")])
    model, tokenizer = loading.load(out, torch.float32, "cpu"), PreTrainedTokenizerFast.from_pretrained(out)
    ours, ours_by_item = chosen.run(model, tokenizer, "packed", Journal(), max_length=32, items=True)
    dense, dense_by_item = chosen.run(model.dequantize(), tokenizer, "dense", Journal(), max_length=32, items=True)
    assert ours["tiny"] == dense["tiny"]
    assert ours_by_item["tiny"] == dense_by_item["tiny"]
    assert ours["passage"]["byte_perplexity"] == pytest.approx(dense["passage"]["byte_perplexity"], rel=1e-5)


def is_right(model, tokenizer, row):
    ids = [tokenizer(f"{row['q']} {option}", return_tensors="pt").input_ids for option in row["options"]]
    with torch.no_grad():
        scores = [-model(x, labels=x.clone().index_fill_(1, torch.tensor([0]), -100)).loss * (x.shape[1] - 1) for x in ids]
    return int(scores[1] > scores[0]) == row["gold"]


def test_scores_that_are_not_right_or_wrong_get_a_t_test():
    scores, reference = [0.1, 0.5, 0.7, 0.2], [0.2, 0.55, 0.9, 0.25]
    found = harness.paired(scores, reference)
    assert (found.lost, found.gained) == (None, None)
    assert found.p_value == pytest.approx(ttest_rel(scores, reference).pvalue)


def test_the_dimensions_name_tasks_that_lm_eval_has():
    root = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    places = {"mmlu": "mmlu/default", "ceval-valid": "ceval", "mnli": "glue/mnli"}
    for names in harness.DIMENSIONS.values():
        for name in names:
            place = root / places.get(name, name.partition("_mc")[0])
            lines = {line.strip() for file in place.glob("*.yaml") for line in file.read_text().splitlines()}
            assert {f"task: {name}", f"group: {name}"} & lines, name
