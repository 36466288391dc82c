"""`quantize push OUT REPO`: a quantized folder on the Hugging Face Hub, in one commit.

The model card, the recipe and the report go along. Where they name local files (a checkpoint, a calibration text), only the
name of the file is published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import yaml

from quant.checkpoint import read_config
from quant.models import HUB_ID, index

TEXTS = ("README.md", "recipe.yaml", "report.json")  # may name local files


@contextmanager
def told(repo: str) -> Iterator[None]:
    """What the Hub or the network refuses, as one line."""
    from huggingface_hub import errors

    no_answer: type[Exception] = vars(errors)["HTTPError"]  # httpx's in huggingface_hub 1, httpx2's in 2
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"{repo!r} is no name of a repository; give NAMESPACE/NAME")
    try:
        yield
    except errors.LocalTokenNotFoundError:
        raise ValueError("no token for the Hub; run hf auth login, or set HF_TOKEN to a token that may write") from None
    except errors.OfflineModeIsEnabled:
        raise ValueError(f"HF_HUB_OFFLINE is set, so nothing can be sent to {repo}; unset it") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        why = {401: "the token is not valid", 403: "the token may not write there", 404: "it does not exist"}
        said = error.server_message or str(error).splitlines()[0]
        raise ValueError(f"the Hub refuses {repo} ({status}: {why.get(status, said)}); see hf auth whoami") from None
    except no_answer as error:
        raise ValueError(f"cannot reach the Hub ({error}); the folder is kept, run quantize push later") from None


def require_access(repo: str) -> None:
    """Raise ValueError, in one line, unless there is a token whose user has the namespace of `repo`: before a long run."""
    from huggingface_hub import HfApi

    with told(repo):
        user = HfApi().whoami()
    own = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
    if repo.partition("/")[0] not in own:
        raise ValueError(f"{repo} lies in no namespace of {user['name']}; allowed: {', '.join(own)}")


def local_names(folder: Path) -> dict[str, str]:
    """Paths of this machine that the folder's texts hold -> the names to publish."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    given = (report.get("source"), recipe.get("calibration", {}).get("source"))
    return {text: Path(text).name for text in given if text and Path(text).exists()}


def published(folder: Path) -> dict[str, Path | bytes]:
    """Every file of the folder by its name in the repository."""
    names = sorted(local_names(folder).items(), key=lambda pair: -len(pair[0]))
    out: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_dir() or any(part.startswith(".") for part in relative.parts):
            continue
        out[relative.as_posix()] = path
        if relative.as_posix() in TEXTS:
            text = path.read_text(encoding="utf-8")
            for local, name in names:
                text = text.replace(local, name)
            out[relative.as_posix()] = text.encode()
    return out


def push(folder: Path, repo: str, private: bool = False, say: Callable[[str], None] = lambda line: None) -> str:
    """Create `repo` where it is missing and commit the folder to it; the address of the commit.

    Raises ValueError, in one line, for a folder that `quantize` did not write and for what the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    read_config(folder)
    if not (folder / "report.json").is_file():
        raise ValueError(f"{folder} has no report.json; give the folder that quantize wrote")
    index(folder)  # a weight file that is missing or cut short is named
    files = published(folder)
    require_access(repo)
    size = sum(len(data) if isinstance(data, bytes) else data.stat().st_size for data in files.values())
    say(f"{folder}: {len(files)} files, {size / 1e6:,.1f} MB, to {repo}")
    with told(repo):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        commit = api.create_commit(repo, operations, commit_message="Quantized by lowbit")
    return str(commit.commit_url)


@click.command("push")
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("repo")
@click.option("--private", is_flag=True, help="A new repository is private.")
def command(out: Path, repo: str, private: bool) -> None:
    """Publish a folder that `quantize` wrote on the Hugging Face Hub: weights, card, recipe and report in one commit."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(push(out, repo, private, lambda line: console.print(line)))
