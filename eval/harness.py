"""lm-eval tasks on a model that is already loaded, so that packed layers are what is measured.

`lm_eval --model hf` would load the folder by itself, without this package; here the harness gets the live model.
Nothing is fetched when the task's data set is cached or local: see `HF_HUB_OFFLINE` and `HF_DATASETS_OFFLINE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.nn import Module


def evaluate(
    model: Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    max_length: int,
    batch: int = 4,
    limit: int | None = None,
    shots: int | None = None,
) -> dict[str, dict[str, float | str]]:
    """Results {task: {metric: value, metric_stderr: value, "version": ...}} of lm-eval `tasks`.

    A task is a registered name or the path of a task's YAML file. `max_length` is the context in tokens, which
    rolling log-likelihood tasks depend on; `limit` takes the first items of each task only. Raises ValueError when
    lm-eval is not installed or a task is unknown.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"--tasks needs lm-eval, which does not import ({error}): pip install 'lm-eval>=0.4.13'") from error

    named = [task for task in tasks if not task.endswith((".yaml", ".yml"))]
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"no task file {file}; a task is an lm-eval name or the path of its YAML")
    # Indexing the built-in tasks takes ten seconds: only when one is asked for by name, or included by a file.
    manager = TaskManager(include_defaults=bool(named))
    unknown = sorted(set(named) - set(manager.all_tasks))
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}; `lm-eval ls tasks` lists the names, or give the path of a task's YAML")

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=max_length)
    found = lm_eval.simple_evaluate(
        model=harness,
        tasks=[*named, *(str(file) for file in files)],
        task_manager=manager,
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=1000,  # errors of means are exact; this bounds the others (0 would drop all)
        log_samples=False,
    )
    return {task: _plain(values, found["versions"].get(task)) for task, values in found["results"].items()}


def _plain(values: dict[str, Any], version: Any) -> dict[str, float | str]:
    """`{"acc,none": 0.3, "acc_stderr,none": 0.01}` as `{"acc": 0.3, "acc_stderr": 0.01}`; other filters keep their name."""
    plain: dict[str, float | str] = {}
    for key, value in values.items():
        if isinstance(value, int | float) and "," in key:
            plain[key.removesuffix(",none")] = float(value)
    if version is not None:
        plain["version"] = str(version)
    return plain
