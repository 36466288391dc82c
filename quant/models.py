"""Where models come from: a folder, a demo wheel or the hub; and their tensors, read one at a time.

Only safetensors and JSON are read. Every check that can fail on a damaged or unsuitable folder is made by `resolve`, before
any work is done, from file sizes and headers alone.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
HUB_SKIPPED = {"model": ["*/*", "consolidated*"], "dataset": []}  # other copies of the same weights
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit


class Entry(NamedTuple):
    """One tensor in a safetensors file; `start` and `stop` are byte positions in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def resolve(model: str | Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """A local folder in Hugging Face layout for a folder, `demo:NAME` or hub id `org/name`; its files are checked.

    Raises ValueError (one line) when nothing is found or the folder cannot be used.
    """
    name = str(model)
    if name.startswith("demo:"):
        from quant.demo import fetch

        folder = fetch(name.removeprefix("demo:"), say=say)
    elif Path(model).is_dir():
        folder = Path(model)
    elif Path(model).exists():
        raise ValueError(f"{name} is a file; give the folder that holds config.json and the safetensors files")
    elif isinstance(model, str) and HUB_ID.fullmatch(name):
        folder = from_hub(name, HUB_FILES)
    else:
        raise ValueError(f"{name} does not exist; give a model folder, a hub id such as org/name, or demo:NAME")
    check(folder)
    return folder


def check(folder: Path) -> None:
    """Raise ValueError, naming the file, unless `folder` has a readable config.json and complete safetensors weights."""
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder} has no config.json; give a model folder in Hugging Face layout")
    read_json(config)
    index(folder)


def model_class(folder: Path) -> tuple[Any, Any]:
    """The transformers config of `folder` and the model class that it names. Raises ValueError when either cannot be had."""
    import transformers

    from quant import adopted

    adopted.register()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each config class has its own complaints, some of them over many lines
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ValueError(f"{folder}/config.json cannot be used: {reason}") from error
    names = config.architectures if isinstance(config.architectures, list) else []
    found = (adopted.CLASSES.get(str(name)) or getattr(transformers, str(name), None) for name in names)
    cls = next((c for c in found if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)), None)
    if cls is None:
        version = transformers.__version__
        raise ValueError(f"{folder}/config.json names architecture {names or 'none'}; transformers {version} has no such model")
    return config, cls


def from_hub(name: str, files: list[str], kind: Literal["model", "dataset"] = "model") -> Path:
    """Download (or find in the hub's cache) the files of hub repository `name` that match the patterns `files`.

    Raises ValueError when the repository is unknown or gated, or when it is not cached and the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=files, ignore_patterns=HUB_SKIPPED[kind]))
    except GatedRepoError as error:
        raise ValueError(f"{kind} {name} is gated on the hub; accept its terms there and run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{name} is neither here nor a {kind} on the hub; check the spelling") from error
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        # the hub client wraps a missing network in several classes, one per layer and version
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        instead = "a folder or demo:smollm2-135m" if kind == "model" else "local files"
        raise ValueError(f"{name} is not here and the hub cannot be reached ({reason}); give {instead}") from error


def index(folder: Path) -> dict[str, Entry]:
    """Tensor name -> where it lies, for all weights of `folder`, from the safetensors headers.

    The index file decides if there is one, else model.safetensors, else every *.safetensors file in the folder counts.
    Raises ValueError for missing, truncated or malformed files and for a folder with pickle weights only.
    """
    listing = folder / INDEX
    if listing.is_file():
        weight_map = read_json(listing).get("weight_map")
        # a bare file name, so that a hostile index cannot point outside the folder
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) and file == Path(file).name for file in weight_map.values()
        ):
            raise ValueError(f"{listing} has no weight_map of tensor name to file in this folder; download the model again")
        files = [folder / file for file in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} of {len(files)} shards named in {INDEX}: {', '.join(missing[:4])}")
    elif (folder / "model.safetensors").is_file():
        weight_map, files = None, [folder / "model.safetensors"]
    else:
        weight_map, files = None, sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(_no_weights(folder))
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise ValueError(f"tensor {name} is in {entries[name].file.name} and in {file.name} of {folder}; keep one")
            entries[name] = entry
    absent = sorted(set(weight_map or ()) - entries.keys())
    if absent:
        raise ValueError(f"{listing} names tensor {absent[0]}, which no shard holds; download the model again")
    return entries


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not pickles:
        return f"{folder} has no weights; *.safetensors files are needed beside config.json"
    architectures = read_json(folder / "config.json").get("architectures") or ["AutoModel"]
    return (
        f"{folder} has only pickle weights ({pickles[0]}), and loading a pickle can run code; where you trust it, run "
        f'python -c "from transformers import {architectures[0]} as M; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('SAFE')\", add the tokenizer files, give SAFE"
    )


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file. Raises ValueError when it is cut short or its header does not add up."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError(f"{file} is not a safetensors file (header length {length}); download it again")
        if 8 + length > size:
            raise ValueError(f"{file} is cut short: {size} bytes, its header alone has {8 + length}; download it again")
        raw = stream.read(length)
    entries, end = {}, 8 + length
    try:
        for name, info in json.loads(raw).items():
            if name == "__metadata__":
                continue
            if info["dtype"] not in DTYPES:
                raise ValueError(f"{name} has dtype {info['dtype']}, known are {', '.join(DTYPES)}")
            start, stop = (8 + length + int(offset) for offset in info["data_offsets"])
            entry = Entry(file, DTYPES[info["dtype"]], tuple(info["shape"]), start, stop)
            if min(entry.shape, default=0) < 0 or start < 8 + length or stop - start != entry_bytes(entry):
                raise ValueError(f"{name} has byte range {info['data_offsets']} for {info['dtype']} {info['shape']}")
            entries[name] = entry
            end = max(end, stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} has a header that cannot be used ({error}); download it again") from error
    if end > size:
        raise ValueError(f"{file} is cut short: {size} bytes, its header describes {end}; download it again")
    return entries


def entry_bytes(entry: Entry) -> int:
    """Bytes that the shape and dtype of `entry` ask for."""
    total = entry.dtype.itemsize
    for dim in entry.shape:
        total *= dim
    return total


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ValueError, naming the file, when it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object; download it again")
    return values


def require_finite(name: str, value: Tensor) -> None:
    """Raise ValueError, naming the tensor, for a NaN or an infinity."""
    if not value.isfinite().all():
        raise ValueError(f"{name} holds a NaN or an infinity; repair the checkpoint before quantizing it")


class Weights:
    """The tensors of a model folder by name; nothing is read or mapped before `read`.

    A read is one `pread` into fresh memory, so a tensor lives no longer than its user keeps it and the page cache, not this
    process, holds the file.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Entry] | None = None) -> None:
        """entries: what to read under which name; None: the folder's tensors."""
        self.folder = folder
        self._entries = index(folder) if entries is None else entries

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """All tensor names, in file order."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`; nothing is read."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored; nothing is read."""
        return self._entry(name).dtype

    def bytes_of(self, name: str) -> int:
        """Stored bytes of tensor `name`; nothing is read."""
        return entry_bytes(self._entry(name))

    def read(self, name: str) -> Tensor:
        """Tensor `name` as stored, in memory of its own."""
        entry = self._entry(name)
        buffer = bytearray(entry.stop - entry.start)
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            got = stream.readinto(buffer)
        if got != len(buffer):
            raise ValueError(f"{entry.file} ended while {name} was read; the file changed since it was opened")
        if not buffer:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(buffer, dtype=entry.dtype).reshape(entry.shape)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise ValueError(
                f"{self.folder} has no tensor {name}; it has {len(self._entries)}, such as {next(iter(self._entries))}"
            )
        return self._entries[name]
