"""Audio: clips are read, resampled and labelled; decoder targets reproduce what the float model itself would be fed."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from quant.audio import SAMPLE_RATE, clips, features, prefix, targets
from quant.plan import make_plan
from quant.recipe import load_recipe
from quant.samples import make_samples

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
END, START, ENGLISH, GERMAN, TRANSCRIBE, TRANSLATE, NO_TIMES = range(len(LETTERS), len(LETTERS) + 7)


def tone(hz: float, seconds: float, rate: int = SAMPLE_RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def refusal(source: Path | None) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        clips(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def processor() -> SimpleNamespace:
    """Whisper's feature extractor and a tokenizer with one token per byte."""
    bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return SimpleNamespace(feature_extractor=WhisperFeatureExtractor(), tokenizer=PreTrainedTokenizerFast(tokenizer_object=bpe))


@pytest.fixture
def model() -> WhisperForConditionalGeneration:
    """A random multilingual Whisper with 64 channels."""
    torch.manual_seed(0)
    special = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "decoder_start_token_id": START}
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
    config = WhisperConfig(
        vocab_size=NO_TIMES + 1,
        d_model=64,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_target_positions=40,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **sizes,
        **special,
    )
    made = WhisperForConditionalGeneration(config).eval()
    made.generation_config = GenerationConfig(
        max_length=40,
        no_timestamps_token_id=NO_TIMES,
        return_timestamps=False,
        is_multilingual=True,
        lang_to_id={"<|en|>": ENGLISH, "<|de|>": GERMAN},
        task_to_id={"transcribe": TRANSCRIBE, "translate": TRANSLATE},
        language="en",
        task="transcribe",
        **special,
    )
    return made


def test_resampling_keeps_the_band_and_removes_what_would_alias(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "low.wav", tone(1000, 1.0, 48_000), 48_000)
    soundfile.write(tmp_path / "high.wav", tone(11_000, 1.0, 48_000), 48_000)
    high, low = clips(tmp_path)
    assert low.samples.dtype == np.float32
    assert len(low.samples) == SAMPLE_RATE
    inner = slice(1000, -1000)
    assert np.abs(low.samples[inner] - tone(1000, 1.0)[inner]).max() < 1e-3
    assert np.abs(high.samples[inner]).max() < 1e-3


def test_stereo_is_averaged_and_flac_is_exact(tmp_path: Path) -> None:
    stereo = np.stack([tone(300, 0.2), np.zeros(3200, np.float32)], axis=1)
    soundfile.write(tmp_path / "a.flac", stereo, SAMPLE_RATE)
    (clip,) = clips(tmp_path)
    assert np.abs(clip.samples - stereo.mean(axis=1)).max() < 2**-15
    assert clip.seconds == pytest.approx(0.2)


def test_transcripts_come_from_manifest_or_beside(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.wav", "b.wav", "sub/c.wav"):
        soundfile.write(tmp_path / name, tone(200, 0.1), SAMPLE_RATE)
    (tmp_path / "b.txt").write_text(" beside \n")
    rows = [{"file": "sub/c.wav", "text": "manifest"}, {"file": "a.wav", "text": None}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [(c.path.name, c.text) for c in clips(tmp_path)] == [("a.wav", None), ("b.wav", "beside"), ("c.wav", "manifest")]
    assert [c.path.name for c in clips(tmp_path / "list.jsonl")] == ["c.wav", "a.wav"]


def test_limit_is_spread_over_the_folder(tmp_path: Path) -> None:
    for i in range(10):
        soundfile.write(tmp_path / f"{i}.wav", tone(200, 0.05), SAMPLE_RATE)
    assert [clip.path.stem for clip in clips(tmp_path, limit=5)] == ["0", "2", "4", "6", "8"]
    assert len(clips(tmp_path, limit=99)) == 10


def test_a_long_clip_is_cut_and_loses_its_text(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(200, 2.0), SAMPLE_RATE)
    (tmp_path / "a.txt").write_text("text of all of it")
    (cut,), (whole,) = clips(tmp_path, seconds=1.5), clips(tmp_path, seconds=None)
    assert (cut.seconds, cut.text) == (1.5, None)
    assert (whole.seconds, whole.text) == (2.0, "text of all of it")


def test_errors_name_the_file(tmp_path: Path) -> None:
    assert "--calib" in refusal(None)
    assert "no audio" in refusal(tmp_path)
    assert "neither" in refusal(tmp_path / "absent")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"file": "gone.wav"}')
    assert "gone.wav" in refusal(manifest)
    manifest.write_text('{"audio": "gone.wav"}')
    assert "line 1" in refusal(manifest)
    manifest.unlink()
    (tmp_path / "bad.wav").write_bytes(b"RIFF1234WAVEjunk")
    assert "bad.wav" in refusal(tmp_path)
    soundfile.write(tmp_path / "bad.wav", np.zeros(0, np.float32), SAMPLE_RATE)
    assert "bad.wav is empty" in refusal(tmp_path)
    soundfile.write(tmp_path / "bad.wav", np.array([0.0, np.nan], np.float32), SAMPLE_RATE, subtype="FLOAT")
    assert "NaN" in refusal(tmp_path)


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (320, 1), (321, 2), (16_000, 50), (480_000, 1500)])
def test_valid_frames_cover_the_samples(tmp_path: Path, processor: SimpleNamespace, samples: int, frames: int) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(samples, 0.1, np.float32), SAMPLE_RATE)
    (made,) = features(processor, clips(tmp_path))
    assert made.input_features.shape == (1, 80, 3000)
    assert made.frames == frames


def test_padded_frames_weigh_what_the_recipe_says(tiny: ModuleType, tmp_path: Path) -> None:
    source, speech = tiny.whisper_folder(tmp_path / "float"), tiny.clips_folder(tmp_path / "clips")
    for weight in (0.0, 0.25):
        sets = [f"calibration.source={speech}", f"calibration.padding_weight={weight}", "head=null"]
        samples, _ = make_samples(make_plan(str(source), load_recipe("dgq", sets)), torch.device("cpu"))
        for sample, clip in zip(samples, clips(speech), strict=True):
            (mask,) = sample.masks.values()
            spoken = -(-len(clip.samples) // 320)
            assert 0 < spoken < mask.shape[1]
            assert torch.equal(mask[0, :spoken], torch.ones(spoken))
            assert torch.equal(mask[0, spoken:], torch.full((mask.shape[1] - spoken,), weight))


def test_targets_of_a_transcript(tmp_path: Path, processor: SimpleNamespace, model: WhisperForConditionalGeneration) -> None:
    soundfile.write(tmp_path / "a.wav", tone(200, 0.3), SAMPLE_RATE)
    (tmp_path / "a.txt").write_text("go on")
    model.generation_config.language = "German"
    (ids,) = targets(model, processor, clips(tmp_path))
    assert ids.dtype == torch.int64
    assert ids[0, :4].tolist() == [START, GERMAN, TRANSCRIBE, NO_TIMES]
    assert processor.tokenizer.decode(ids[0, 4:]) == " go on"
    (tmp_path / "a.txt").write_text("x" * 100)
    (ids,) = targets(model, processor, clips(tmp_path))
    assert ids.shape == (1, model.config.max_target_positions)


@pytest.mark.parametrize("multilingual", [True, False])
def test_targets_without_text_are_what_the_model_says(
    tmp_path: Path, processor: SimpleNamespace, model: WhisperForConditionalGeneration, multilingual: bool
) -> None:
    soundfile.write(tmp_path / "a.wav", tone(200, 0.3), SAMPLE_RATE)
    rules = model.generation_config
    rules.is_multilingual = multilingual
    if not multilingual:
        del rules.language, rules.task, rules.lang_to_id, rules.task_to_id
    # text tokens only, so that every step is the argmax over bytes and can be repeated below
    rules.suppress_tokens = [START, ENGLISH, GERMAN, TRANSCRIBE, TRANSLATE, NO_TIMES]
    given = clips(tmp_path)
    (ids,) = targets(model, processor, given)
    start = prefix(model, features(processor, given)[0].input_features)
    assert len(start) == (4 if multilingual else 2)
    assert ids[0, : len(start)].tolist() == start
    assert ids.shape[1] > len(start)
    with torch.no_grad():
        logits = model(features(processor, given)[0].input_features, decoder_input_ids=ids).logits[0, len(start) - 1 : -1]
    logits[:, rules.suppress_tokens] = -torch.inf
    assert logits.argmax(-1).tolist() == ids[0, len(start) :].tolist()
