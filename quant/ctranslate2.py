"""Whisper from a CTranslate2 container: tensors, configuration, generation rules, tokenizer, feature extractor.

The container (version 6), little endian, no padding; a string is a uint16 length, that many bytes, the last of them NUL:
    uint32 version, string model class, uint32 revision,
    uint32 count, then per tensor: string name, uint8 rank, rank x uint32 shape, uint8 dtype, uint32 bytes, data,
    uint32 count, then per alias: string name, string target.
Self-attention q, k, v are stacked along rows in `linear_0`; cross-attention k, v in `linear_1`. Whisper's k has no bias.
Head size is 64 in every Whisper model, so all sizes follow from the shapes.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

Arrays = dict[str, NDArray[Any]]
DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
HEAD_DIM = 64
MULTILINGUAL_VOCAB = 51865  # English-only models have one token less


def read_tensors(blob: bytes) -> Arrays:
    """Every tensor of a `model.bin` by name, as read-only views of `blob`; aliases share the view.

    Raises ValueError when the blob ends early or has another version.
    """
    at = 0

    def take(fmt: str) -> tuple[int, ...]:
        nonlocal at
        try:
            values = struct.unpack_from("<" + fmt, blob, at)
        except struct.error as error:
            raise ValueError(f"the CTranslate2 container ends at byte {len(blob)}, inside a header at byte {at}") from error
        at += struct.calcsize("<" + fmt)
        return values

    def text() -> str:
        nonlocal at
        (size,) = take("H")
        at += size
        return blob[at - size : at - 1].decode()

    (version,) = take("I")
    if version != 6:
        raise ValueError(f"CTranslate2 container version is {version}; only version 6 is read here")
    text()
    take("I")
    tensors: Arrays = {}
    for _ in range(take("I")[0]):
        name = text()
        shape = take(f"{take('B')[0]}I")
        kind, size = take("BI")
        if at + size > len(blob):
            raise ValueError(f"the CTranslate2 container ends at byte {len(blob)}, inside tensor {name}")
        dtype = np.dtype(DTYPES[kind])
        tensors[name] = np.frombuffer(blob, dtype, size // dtype.itemsize, at).reshape(shape)
        at += size
    for _ in range(take("I")[0]):
        alias, target = text(), text()
        tensors[alias] = tensors[target]
    return tensors


def whisper_state(tensors: Arrays) -> dict[str, Tensor]:
    """State dict of WhisperForConditionalGeneration, float16, without the tied `proj_out`."""
    state: dict[str, Tensor] = {}
    width = tensors["decoder/embeddings/weight"].shape[1]

    def put(name: str, source: str, part: int | None = None) -> None:
        array = tensors[source]
        rows = array if part is None else array[part * width : (part + 1) * width]
        state[name] = torch.from_numpy(rows.astype(np.float16))

    def norm(source: str, target: str) -> None:
        put(f"{target}.weight", f"{source}/gamma")
        put(f"{target}.bias", f"{source}/beta")

    def linear(source: str, target: str, part: int | None = None, bias: bool = True) -> None:
        put(f"{target}.weight", f"{source}/weight", part)
        if bias:
            put(f"{target}.bias", f"{source}/bias", part)

    for side in ("encoder", "decoder"):
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        put(f"model.{side}.embed_positions.weight", f"{side}/position_encodings/encodings")
        for i in range(layer_count(tensors, side)):
            source, target = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
            for part, letter in enumerate("qkv"):
                linear(f"{source}/self_attention/linear_0", f"{target}.self_attn.{letter}_proj", part, bias=letter != "k")
            linear(f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
                linear(f"{source}/attention/linear_0", f"{target}.encoder_attn.q_proj")
                linear(f"{source}/attention/linear_1", f"{target}.encoder_attn.k_proj", 0, bias=False)
                linear(f"{source}/attention/linear_1", f"{target}.encoder_attn.v_proj", 1)
                linear(f"{source}/attention/linear_2", f"{target}.encoder_attn.out_proj")
            norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
            linear(f"{source}/ffn/linear_0", f"{target}.fc1")
            linear(f"{source}/ffn/linear_1", f"{target}.fc2")
    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"model.encoder.{conv}")
    put("model.decoder.embed_tokens.weight", "decoder/embeddings/weight")
    return state


def layer_count(tensors: Arrays, side: str) -> int:
    """Number of blocks of the encoder or the decoder."""
    return len({name.split("/")[1] for name in tensors if re.match(rf"{side}/layer_\d+/", name)})


def convert(blob: bytes, config: bytes, tokenizer: bytes, out: Path) -> None:
    """Write a complete Hugging Face Whisper folder into `out` from a `model.bin`, its `config.json` and `tokenizer.json`.

    Generation defaults to English transcription without timestamps; a multilingual model takes `language=` and `task=`.
    """
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizerFast

    tensors = read_tensors(blob)
    source = json.loads(config)
    vocab, width = tensors["decoder/embeddings/weight"].shape
    ids = {token["content"]: token["id"] for token in json.loads(tokenizer)["added_tokens"]}
    end = ids["<|endoftext|>"]
    special = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"],
    }
    heads, ffn = width // HEAD_DIM, tensors["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    mels, targets = tensors["encoder/conv1/weight"].shape[1], tensors["decoder/position_encodings/encodings"].shape[0]
    WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        vocab_size=vocab,
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=layer_count(tensors, "encoder"),
        decoder_layers=layer_count(tensors, "decoder"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        max_source_positions=tensors["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=targets,
        suppress_tokens=None,  # these two live in the generation config
        begin_suppress_tokens=None,
        dtype="float16",
        **special,
    ).save_pretrained(out)
    generation = GenerationConfig(
        max_length=targets,
        suppress_tokens=source["suppress_ids"],
        begin_suppress_tokens=source["suppress_ids_begin"],
        alignment_heads=source["alignment_heads"],
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        max_initial_timestamp_index=50,
        return_timestamps=False,
        is_multilingual=vocab >= MULTILINGUAL_VOCAB,
        **special,
    )
    if generation.is_multilingual:
        generation.lang_to_id = {token: i for token, i in ids.items() if i in set(source["lang_ids"])}
        generation.task_to_id = {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]}
        generation.language, generation.task = "en", "transcribe"
    generation.save_pretrained(out)
    save_file(whisper_state(tensors), out / "model.safetensors", metadata={"format": "pt"})
    (out / "tokenizer.json").write_bytes(tokenizer)
    fast = WhisperTokenizerFast(tokenizer_file=str(out / "tokenizer.json"), model_max_length=targets)
    extractor = WhisperFeatureExtractor(feature_size=mels)
    extractor.save_pretrained(out)  # preprocessor_config.json, where transformers 4 and serving stacks look
    WhisperProcessor(extractor, fast).save_pretrained(out)
