"""Tiny models in Hugging Face layout, with tokenizers, for tests of the pipeline. Nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

SENTENCE = "The quick brown fox jumps over the lazy dog, and the dog sleeps on while the fox jumps again. "
# recipe overrides that make a run take a second and need no network
SMALL = ["calibration.tokens=512", "calibration.length=64", "calibration.source=manual", "head=null"]
# of recipes that train: fewer steps, too
SHORT = {
    "db-llm": ["blockwise.steps=8", "distill.steps=8"],
    "distill-nvfp4-w4a4": ["distill.steps=8"],
    "distill-w4a16": ["distill.steps=8"],
    "edgeqat-w4a4": ["edgeqat.steps=4", "token_bits.length=64"],
    "edgeqat-w4a8": ["edgeqat.steps=4"],
    "pv-tuning": ["pv_tuning.steps=6"],
}
WORDS = 320
RATE = 16_000


def small(recipe: str) -> list[str]:
    """Overrides that make a run of a shipped recipe short."""
    return [*SMALL, *SHORT.get(recipe, [])]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens; </s> is 0."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=["</s>"], initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    bpe.train_from_iterator([SENTENCE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


def llama(*, tied: bool = False, layers: int = 3, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama: 64 channels, 96 in the MLP (which group 64 does not divide), two query heads per key head, bfloat16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def llama_folder(folder: Path, **how: Any) -> Path:
    """`llama` saved with its tokenizer."""
    llama(**how).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


MASK = WORDS - 1  # no token of `tokenizer`


def diffusion(*, tied: bool = False, seed: int = 0, layers: int = 3, **config: Any) -> LlamaForCausalLM:
    """`llama` as a masked-diffusion model: attention to both sides, token MASK stands where a token is to be filled in."""
    model = llama(tied=tied, seed=seed, layers=layers)
    model.config.update({"is_causal": False, "mask_token_id": MASK, **config})
    return model


def diffusion_folder(folder: Path, *, steps: int = 0, **how: Any) -> Path:
    """`diffusion` saved with its tokenizer, after `steps` steps of training to fill in masks on the Python manual."""
    model = diffusion(**how)
    if steps:
        train_to_fill_in(model.float(), steps, how.get("seed", 0))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def train_to_fill_in(model: Any, steps: int, seed: int, length: int = 64, batch: int = 16) -> None:
    """Minimize the cross-entropy at masked positions, a share of them drawn uniformly for each window."""
    from quant.text import documents, windows

    rows = windows(tokenizer(), documents("manual", "calibration"), length, None, seed).tokens
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        ids = rows[torch.randint(len(rows), (batch,), generator=draw)]
        masked = torch.rand(batch, length, generator=draw) < torch.rand(batch, 1, generator=draw).clamp_min(0.02)
        logits = model(input_ids=ids.masked_fill(masked, MASK), use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[masked], ids[masked]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


MIXTURES = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GraniteMoe")


def mixture_folder(folder: Path, kind: str = "Mixtral", *, experts: int = 4) -> Path:
    """A random mixture of experts, saved with its tokenizer: 2 blocks of 64 channels, two experts of 96 for a token, bfloat16.

    kind: one of MIXTURES. Mixtral has names of its own on disk, Qwen2Moe an expert for all tokens, GraniteMoe stores the
    experts of a layer as one tensor.
    """
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        num_experts=experts,
        num_local_experts=experts,
        num_experts_per_tok=2,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="bfloat16",
    )
    getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def whisper_folder(folder: Path) -> Path:
    """A random Whisper (2 + 2 blocks of 64 channels, 2 s of audio) with its processor."""
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 1}
    config = WhisperConfig(
        vocab_size=WORDS,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=100,
        max_target_positions=40,
        init_std=0.1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **special,
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(max_length=40, no_timestamps_token_id=2, return_timestamps=False, **special)
    model.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(chunk_length=2)
    WhisperProcessor(feature_extractor=extractor, tokenizer=tokenizer()).save_pretrained(folder)
    return folder


def clips_folder(folder: Path, count: int = 3) -> Path:
    """Noisy tones of different lengths, with transcripts, as .wav."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(count):
        time = np.arange(int((0.6 + 0.4 * i) * RATE)) / RATE
        wave = 0.4 * np.sin(2 * np.pi * (200 + 90 * i) * time) + 0.1 * draw.standard_normal(len(time))
        soundfile.write(folder / f"{i}.wav", wave.astype(np.float32), RATE)
        (folder / f"{i}.txt").write_text("the dog jumps")
    return folder


def rewrite(folder: Path, change: Any, file: str = "model.safetensors") -> None:
    """Load a weight file's tensors, let `change` edit the dict, write them back."""
    tensors = {name: value.clone() for name, value in load_file(folder / file).items()}
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_json(path: Path, change: Any) -> None:
    """Let `change` edit a JSON file's object."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def block_diffusion_folder(folder: Path) -> Path:
    """A random DiffusionGemma of two blocks, whose encoder and decoder are one set of weights. It has no tokenizer."""
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16}
    text = shape | ids | {"vocab_size": 120, "num_hidden_layers": 2, "num_key_value_heads": 1, "sliding_window": 16}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    text |= {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    vision = shape | {"model_type": "gemma4_vision", "num_hidden_layers": 1, "num_key_value_heads": 2}
    config = transformers.DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision | {"position_embedding_size": 16},
        canvas_length=8,
        image_token_id=116,
        boi_token_id=117,
        eoi_token_id=118,
    )
    transformers.DiffusionGemmaForBlockDiffusion(config).save_pretrained(folder)
    return folder
