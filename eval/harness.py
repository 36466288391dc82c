"""lm-eval tasks on a model that is already loaded, so that packed layers are what is measured.

`lm_eval --model hf` would load the folder by itself, without this package; here the harness gets the live model.
Nothing is fetched when the task's data set is cached or local: see `HF_HUB_OFFLINE` and `HF_DATASETS_OFFLINE`.

DIMENSIONS are those of "A Comprehensive Evaluation of Quantization Strategies for Large Language Models" (Jin et al., 2024),
as far as lm-eval alone runs their benchmarks. MNLI stands for SNLI. FLORES-200 of English and Chinese and FollowBench, which a
larger model judges, are not there; XSum and CNN/DailyMail need other packages. Efficiency is no task: quant/eval/speed.py
measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from torch.nn import Module

from quant.eval.journal import Journal
from quant.eval.paired import mcnemar, t_test

DIMENSIONS = {
    "knowledge": ("mmlu", "ceval-valid", "gsm8k", "mnli"),
    "alignment": ("truthfulqa_mc1", "truthfulqa_mc2", "bbq"),
    "efficiency": (),
}
YAML = (".yaml", ".yml")

Results = dict[str, dict[str, float | str]]  # task -> metric -> value, metric_stderr -> value, "version" -> text
Items = dict[str, dict[str, list[float]]]  # task -> metric -> score of every item, in the order of the items


@dataclass(frozen=True, kw_only=True)
class TaskTest:
    """A model and its reference on the same items of a task, by one metric.

    lost, gained: items that only the reference, or only the model, gets right; None where scores are not 0 or 1. p_value: of
    McNemar's exact test, else of a paired t test; None for a single item.
    """

    items: int
    lost: int | None
    gained: int | None
    p_value: float | None


def split_tasks(text: str) -> tuple[list[str], bool]:
    """The tasks of a list with commas between, its dimensions replaced by their tasks, and whether efficiency is among them."""
    given = [task.strip() for task in text.split(",") if task.strip()]
    tasks = [task for name in given for task in DIMENSIONS.get(name, (name,))]
    return list(dict.fromkeys(tasks)), "efficiency" in given


class Harness:
    """lm-eval with the `tasks` it was asked for: registered names, YAML files of a task, folders of them.

    Raises ValueError when lm-eval is not installed or a task is unknown.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ValueError(
                f"--tasks needs lm-eval, which does not import ({error}): pip install 'lm-eval>=0.4.13'"
            ) from error
        folders = [task for task in tasks if Path(task).is_dir()]
        named = [task for task in tasks if task not in folders and not task.endswith(YAML)]
        for file in tasks:
            if file.endswith(YAML) and not Path(file).is_file():
                raise ValueError(f"no task file {file}; a task is an lm-eval name, the path of its YAML, or a folder of these")
        # Indexing the built-in tasks takes ten seconds: only when one is asked for by name.
        self._manager = TaskManager(include_defaults=bool(named), include_path=folders or None)
        unknown = sorted(set(named) - set(self._manager.all_tasks))
        if unknown:
            raise ValueError(
                f"unknown task {unknown[0]!r}; `lm-eval ls tasks` lists the names; {', '.join(DIMENSIONS)} are groups, and the "
                "path of a task's YAML or of a folder of these is a task, too"
            )
        self.tasks = [name for task in tasks for name in (inside(task) if task in folders else [task])]

    def run(
        self, model: Module, tokenizer: Any, side: str, journal: Journal, *, max_length: int, batch: int = 4, items: bool
    ) -> tuple[Results, Items]:
        """All tasks on `model`, kept in `journal` one by one as of `side`.

        max_length: the context in tokens, which rolling log-likelihood tasks depend on. items: also the score of every item.
        """
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=max_length)
        results: Results = {}
        scores: Items = {}
        for task in self.tasks:
            if task in results:  # as part of a group
                continue
            found = journal.once(f"{side} {task}", partial(self._one, wrapped, task, items))
            results |= found["results"]
            scores |= found["items"]
        return results, scores

    def _one(self, wrapped: Any, task: str, items: bool) -> dict[str, Any]:
        import lm_eval

        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=[task],
            task_manager=self._manager,
            bootstrap_iters=1000,  # errors of means are exact; this bounds the others (0 would drop all)
            log_samples=items,
        )
        everything = found["results"] | found.get("groups", {})
        results = {name: _plain(values, found["versions"].get(name)) for name, values in everything.items()}
        scores = {name: _scores(rows) for name, rows in found.get("samples", {}).items()}
        groups = found.get("group_subtasks", {})
        for name in results.keys() - scores.keys() if items else ():
            scores[name] = _pooled([scores[leaf] for leaf in _leaves(name, groups) if leaf in scores])
        return {"results": results, "items": scores}


def inside(folder: str) -> list[str]:
    """The groups, then the tasks that YAML files of `folder` define; ValueError where there is none."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=folder)
    found = [*manager.all_groups, *manager.all_subtasks]
    if not found:
        raise ValueError(f"no YAML file in {folder} defines a task; a task file has a line such as `task: NAME`")
    return found


def compare(items: Items, reference: Items) -> dict[str, dict[str, TaskTest]]:
    """Every metric that both models have on the same items: task -> metric -> test."""
    return {
        task: {
            metric: paired(values, reference[task][metric])
            for metric, values in metrics.items()
            if len(values) == len(reference.get(task, {}).get(metric, ()))
        }
        for task, metrics in items.items()
    }


def paired(scores: Sequence[float], reference: Sequence[float]) -> TaskTest:
    """The test of one metric, higher scores better; both hold the same items in the same order."""
    differences = [a - b for a, b in zip(scores, reference, strict=True)]
    if not {*scores, *reference} <= {0, 1}:
        return TaskTest(items=len(scores), lost=None, gained=None, p_value=t_test(differences))
    lost, gained = differences.count(-1), differences.count(1)
    return TaskTest(items=len(scores), lost=lost, gained=gained, p_value=mcnemar(lost, gained))


def _scores(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Metric -> score by item, of what lm-eval logs of a task; metrics that have no number per item are left out."""
    found: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: row["doc_id"]):
        for metric in row["metrics"]:
            if isinstance(row[metric], Real):
                found.setdefault(_named(metric, row["filter"]), []).append(float(row[metric]))
    return found


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group and of the groups in it."""
    return [leaf for child in groups.get(name, ()) for leaf in (_leaves(child, groups) or [child])]


def _pooled(parts: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """The items of all tasks of a group, by the metrics that each has."""
    shared = [metric for metric in parts[0] if all(metric in part for part in parts)] if parts else []
    return {metric: [score for part in parts for score in part[metric]] for metric in shared}


def _named(metric: str, kind: str) -> str:
    """A metric with the filter that lm-eval put before it, if it is one by name."""
    return metric if kind == "none" else f"{metric},{kind}"


def _plain(values: Mapping[str, Any], version: Any) -> dict[str, float | str]:
    """`{"acc,none": 0.3, "acc_stderr,none": 0.01}` as `{"acc": 0.3, "acc_stderr": 0.01}`; other filters keep their name."""
    plain: dict[str, float | str] = {
        _named(*key.split(",", 1)): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key
    }
    if version is not None:
        plain["version"] = str(version)
    return plain
