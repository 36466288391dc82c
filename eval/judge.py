"""What the models of a comparison are measured on: the same windows or clips for all, and a float reference that runs once."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from quant.eval import kept, loading, perplexity, speech
from quant.eval.perplexity import Progress
from quant.eval.report import identity_of


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model on the judge's data; KL in nats, shares in [0, 1], errors as in TextResult, Fidelity and SpeechResult."""

    kl_mean: float
    kl_error: float | None
    kl_p99: float
    top1: float
    top1_error: float | None
    perplexity: float | None = None
    perplexity_error: float | None = None
    reference_perplexity: float | None = None
    ratio: float | None = None
    ratio_error: float | None = None
    wer: float | None = None
    reference_wer: float | None = None
    wer_change: float | None = None
    wer_change_error: float | None = None


class Judge(Protocol):
    """about: the data in words. identity: a digest of all that decides `measure`, but for the model."""

    about: str
    identity: str

    def measure(self, folder: Path, progress: Progress) -> Measured:
        """The model in `folder` against the reference."""
        ...


def shown(source: str) -> str:
    """A data source without the folders of its absolute path."""
    return Path(source).name if Path(source).is_absolute() else source


class TextJudge:
    """Perplexity and divergence on windows [W, L] of a text."""

    def __init__(self, source: Path, corpus: str, windows: Tensor, dtype: str, device: str) -> None:
        self.source, self.windows, self.dtype, self.device = source, windows, dtype, device
        self.about = f"text: {shown(corpus)}, {len(windows)} windows of {windows.shape[1]} tokens, {dtype}"
        digest = hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
        self.identity = identity_of([digest, list(windows.shape), dtype, device, loading.versions()])

    @cached_property
    def reference(self) -> perplexity.Logits:
        """The float model's logits."""
        return kept.keep(loading.load(self.source, loading.DTYPES[self.dtype], self.device), self.windows)

    def measure(self, folder: Path, progress: Progress) -> Measured:
        """As `Judge.measure`."""
        reference = self.reference  # before the model is loaded: one of the two is in memory, not both
        model = loading.load(folder, loading.DTYPES[self.dtype], self.device)
        result = perplexity.evaluate(model, self.windows, reference, progress=progress)
        assert result.fidelity is not None
        return Measured(
            **fidelity_part(result.fidelity),
            perplexity=result.perplexity,
            perplexity_error=result.perplexity_error,
            reference_perplexity=result.reference_perplexity,
            ratio=result.ratio,
            ratio_error=result.ratio_error,
        )


class SpeechJudge:
    """Word error rate on clips, and divergence teacher-forced on the reference's own transcripts."""

    def __init__(self, source: Path, audio: str, limit: int | None, language: str, dtype: str, device: str) -> None:
        from transformers import AutoProcessor

        from quant.audio import clips

        self.source, self.language, self.dtype, self.device = source, language, dtype, device
        self.processor = AutoProcessor.from_pretrained(source)
        self.clips = clips(audio, limit, seconds=None)
        self.about = f"speech: {shown(audio)}, {len(self.clips)} clips, {dtype}"
        digest = hashlib.sha256()
        for clip in self.clips:
            digest.update(clip.samples.tobytes() + repr(clip.text).encode())
        self.identity = identity_of([digest.hexdigest(), language, dtype, device, loading.versions()])

    @cached_property
    def reference(self) -> list[speech.Heard]:
        """What the float model makes of each clip."""
        model = loading.load(self.source, loading.DTYPES[self.dtype], self.device)
        return list(speech.listen(model, self.processor, self.clips, self.language))

    def measure(self, folder: Path, progress: Progress) -> Measured:
        """As `Judge.measure`."""
        reference = self.reference
        model = loading.load(folder, loading.DTYPES[self.dtype], self.device)
        result = speech.evaluate(
            model, reference, self.processor, self.clips, language=self.language, folder=self.source, progress=progress
        )
        if result.fidelity is None:
            raise ValueError("all clips are longer than the model's window: no token can be compared; add shorter ones")
        assert result.reference is not None
        return Measured(
            **fidelity_part(result.fidelity),
            wer=result.model.wer,
            reference_wer=result.reference.wer,
            wer_change=result.wer_change,
            wer_change_error=result.wer_change_error,
        )


def fidelity_part(fidelity: Any) -> dict[str, Any]:
    """The fields that a Fidelity and a Measured share."""
    return {key: value for key, value in asdict(fidelity).items() if key in Measured.__dataclass_fields__}
