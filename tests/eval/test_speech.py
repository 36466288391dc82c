"""Word errors on known strings, the loop detector, and the whole comparison on a tiny random Whisper."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from quant.eval import speech, wer
from quant.eval.journal import Journal
from quant.eval.speech import Line

START, EOS, QUIET, VOCAB = 257, 256, 258, 260


@dataclass(frozen=True)
class Clip:
    path: str
    samples: np.ndarray
    text: str | None


class Processor:
    """Features of Whisper, one byte a token: stands for WhisperProcessor without a trained tokenizer."""

    def __init__(self):
        self.feature_extractor = WhisperFeatureExtractor(feature_size=8)
        self.tokenizer = SimpleNamespace(all_special_ids=[EOS, START, QUIET], decode=self.decode)

    def __call__(self, samples, sampling_rate, return_tensors, **options):
        return self.feature_extractor(samples, sampling_rate=sampling_rate, return_tensors=return_tensors, **options)

    def decode(self, ids, skip_special_tokens):
        return " ".join(f"w{i}" for i in ids.tolist() if i < EOS)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_target_positions=24,
        init_std=0.3,
        decoder_start_token_id=START,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    made = WhisperForConditionalGeneration(config).eval()
    made.generation_config.update(
        no_timestamps_token_id=QUIET,
        is_multilingual=False,
        return_timestamps=False,
        max_length=24,
        decoder_start_token_id=START,
    )
    return made


@pytest.fixture(scope="module")
def clips():
    noise = np.random.default_rng(0)
    return [
        Clip(f"{n}.wav", noise.normal(0, 0.1, 16_000 * (n + 1)).astype(np.float32), "hello world" if n else None)
        for n in range(3)
    ]


def test_edits_of_known_strings():
    assert wer.edits("a b c d", "a x c") == wer.Edits(words=4, substitutions=1, deletions=1, insertions=0)
    assert wer.edits("", "a b") == wer.Edits(words=0, substitutions=0, deletions=0, insertions=2)
    assert wer.edits("a", "").errors == 1


def heard(text, finished, seconds):
    return speech.Heard(text, torch.tensor([0]), 1, finished, seconds, None)


def test_wer_is_pooled_not_averaged():
    tally = speech._Tally(lambda text: text)
    tally.add("a", heard("b", True, 1.0))  # 100 % of one word
    tally.add("a b c d e f g h i", heard("a b c d e f g h i", True, 1.0))  # 0 % of nine
    tally.add(None, heard("never scored", True, 2.0))
    summary = tally.summary(audio_seconds=8.0)
    assert summary.wer == pytest.approx(0.1)  # the mean of clips would be 0.5
    assert summary.words == 10
    assert summary.rtf == 0.5
    # two clips, errors 1 and 0 around 0.1 per word: residuals 0.9 and -0.9
    assert summary.wer_error == pytest.approx((2 * 0.81 * 2) ** 0.5 / 10)


@pytest.mark.parametrize(
    "text",
    ["no no no no", "so I said thank you thank you thank you thank you", "a b c d e f g h " * 4, "x " + "to be or not " * 5],
)
def test_loops_are_found(text):
    assert wer.loops(text)


@pytest.mark.parametrize(
    "text", ["", "no no no", "thank you thank you thank you thank", "one two three four five six", "a b a c " * 3]
)
def test_speech_is_no_loop(text):
    assert not wer.loops(text)


def test_a_loop_in_the_transcript_is_no_fault():
    tally = speech._Tally(lambda text: text)
    tally.add("row row row row your boat", heard("row row row row your boat", True, 1.0))
    assert tally.loops == 0
    tally.add("row your boat", heard("row row row row your boat", True, 1.0))
    tally.add("row your boat", heard("row your boat", False, 1.0))  # ran into the length limit
    assert tally.loops == 2


def test_changed_counts_every_letter():
    heard = [("a b", "a b"), ("a b", "a b."), ("", "a")]
    lines = [Line(file="", text=None, transcript=a, reference_transcript=b) for a, b in heard]
    assert speech.changed(lines) == 2


def test_normalizer_names_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(wer, "find_spec", lambda name: None)
    bare = SimpleNamespace(tokenizer=SimpleNamespace())
    normalize, name = wer.normalizer(bare, "en", tmp_path)
    assert name == "whisper-english without spelling map"
    plain = normalize("Mr. Smith's colour won't cost $20,000!")
    assert plain.split() == ["mister", "smith", "is", "colour", "will", "not", "cost", "$20000"]
    (tmp_path / "normalizer.json").write_text('{"colour": "color"}')
    normalize, name = wer.normalizer(bare, "en", tmp_path)
    assert name == "whisper-english"
    assert normalize("Colour") == "color"
    assert wer.normalizer(bare, "de", tmp_path)[1] == "whisper-basic"


def test_a_model_agrees_with_itself(model, clips):
    result = speech.evaluate(model, model, Processor(), clips)
    assert result.changed == 0
    assert result.wer_change == 0
    assert result.fidelity.kl_max == 0
    assert result.fidelity.top1 == 1
    assert result.model.words == 4  # the clip without a transcript is heard, not scored
    assert len(result.lines) == 3


def test_more_noise_more_divergence(model, clips):
    found = []
    for size in (0.02, 0.3):
        other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in other.model.decoder.parameters():
                weight += size * 0.3 * torch.randn(weight.shape, generator=generator)
        found.append(speech.evaluate(other, model, Processor(), clips))
    small, large = (result.fidelity for result in found)
    assert 0 < small.kl_mean < large.kl_mean
    assert small.top1 >= large.top1
    assert small.tokens == large.tokens  # the positions are the reference's
    assert found[1].changed == 3


def test_a_killed_evaluation_goes_on_with_the_same_numbers(model, clips, tmp_path):
    """Neither model hears again what was heard before it was killed."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.decoder.embed_tokens.weight += 0.1 * torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(1))
    whole = speech.evaluate(other, model, Processor(), clips)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        speech.evaluate(other, model, Processor(), clips, progress=stop, journal=Journal(tmp_path / "journal"))
    heard = []
    for side in (other, model):
        side.generate = lambda *given, generate=side.generate, **options: heard.append(options) or generate(*given, **options)
    try:
        resumed = speech.evaluate(other, model, Processor(), clips, journal=Journal(tmp_path / "journal"))
    finally:
        del model.generate
    assert len(heard) == 2 * 2  # a second to warm up and the last clip, of each
    for part in ("lines", "fidelity", "wer_change", "wer_change_interval", "changed"):
        assert getattr(resumed, part) == getattr(whole, part)
    assert whole.wer_change_interval[0] <= whole.wer_change <= whole.wer_change_interval[1]


def test_teacher_forcing_scores_what_greedy_decoding_chose(model, clips):
    """At every position after the prompt the model's own argmax is the id it generated, so positions are aligned."""
    recognizer = speech.Recognizer(model, Processor(), "en")
    features = recognizer.features(clips[0].samples)
    with torch.inference_mode():
        ids = recognizer.greedy(features)
        chosen = recognizer.logits(features, ids).argmax(-1)
    prompt = recognizer.prompt_length(ids)
    assert ids[:prompt].tolist() == [START]
    assert torch.equal(chosen[prompt - 1 :], ids[prompt:])


def test_without_clips_or_reference(model, clips):
    with pytest.raises(ValueError, match="no clips"):
        speech.evaluate(model, None, Processor(), [])
    alone = speech.evaluate(model, None, Processor(), clips[:1])
    assert alone.fidelity is None
    assert alone.model.wer is None
    assert alone.changed is None
