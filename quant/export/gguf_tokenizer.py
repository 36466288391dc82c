"""The tokenizer of a folder as GGUF metadata: byte-level BPE with a splitting rule that llama.cpp knows by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quant.gguf_llama import CONTROL_TOKEN, SPECIAL, pre_tokenizers

NORMAL_TOKEN, USER_TOKEN, UNUSED_TOKEN = 1, 4, 5  # values in tokenizer.ggml.token_type
PLAIN = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)


def splitter(part: Any) -> list[Any]:
    """A pre-tokenizer in tokenizer.json as a flat list, without what does not change the split."""
    if part and part["type"] == "Sequence":
        return [step for inner in part["pretokenizers"] for step in splitter(inner)]
    return [{key: value for key, value in (part or {}).items() if key != "trim_offsets"}]


def rule_of(tokenizer: dict[str, Any]) -> str:
    """GGUF's name for how a tokenizer.json splits text. Raises ValueError where it has none that is known here."""
    from tokenizers import Tokenizer, models

    model = tokenizer["model"]
    odd = next((key for key in PLAIN if model.get(key)), None)
    if model.get("type") != "BPE" or odd or tokenizer.get("normalizer"):
        what = f"{model.get('type')} with {odd or 'a normalizer'}" if model.get("type") == "BPE" else model.get("type")
        raise ValueError(f"the tokenizer is {what}; GGUF files are written for byte-level BPE only")
    known = pre_tokenizers()
    for rule, part in known.items():
        bare = Tokenizer(models.BPE())
        bare.pre_tokenizer = part
        if splitter(json.loads(bare.to_str())["pre_tokenizer"]) == splitter(tokenizer.get("pre_tokenizer")):
            return rule
    raise ValueError(f"the tokenizer splits text by a rule that is not known here; known to GGUF and here: {', '.join(known)}")


def read(folder: Path) -> Any:
    """The tokenizer of a folder. Raises ValueError where GGUF cannot hold it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no tokenizer that can be read; copy the tokenizer files into it") from error
    if not getattr(tokenizer, "backend_tokenizer", None):
        raise ValueError(f"{folder} has a tokenizer without tokenizer.json; GGUF files are written for byte-level BPE only")
    rule_of(json.loads(tokenizer.backend_tokenizer.to_str()))
    return tokenizer


def add(writer: Any, tokenizer: Any, rows: int) -> None:
    """Add what `read` gave to a GGUFWriter. rows: of the embedding, at least the tokens; the rest get unused names."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {i: f"[PAD{i}]" for i in range(rows)}
    kinds = dict.fromkeys(range(rows), UNUSED_TOKEN)
    for text, i in described["model"]["vocab"].items():
        names[i], kinds[i] = text, NORMAL_TOKEN
    for token in described["added_tokens"]:
        names[token["id"]], kinds[token["id"]] = token["content"], CONTROL_TOKEN if token["special"] else USER_TOKEN
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule_of(described))
    writer.add_token_list([names[i] for i in range(rows)])
    writer.add_token_types([kinds[i] for i in range(rows)])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    if merges:
        writer.add_token_merges(merges)
    for kind, key in SPECIAL.items():
        found = getattr(tokenizer, f"{kind}_token_id", None)
        if found is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", found)
    bos = tokenizer.bos_token_id
    writer.add_bool("tokenizer.ggml.add_bos_token", bos is not None and tokenizer("x").input_ids[:1] == [bos])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
