"""Calibration samples for a plan: text windows, or speech with the token ids its decoder is taught with."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from quant import audio, text
from quant.calibrate import Sample
from quant.masked import bidirectional, masked_samples
from quant.plan import Plan
from quant.resources import compute_dtype

IDENTITIES: dict[Any, str] = {}  # of data that were read in this process


def make_samples(plan: Plan, device: torch.device) -> tuple[list[Sample], str]:
    """The recipe's calibration data as model inputs, and a line that says what it is.

    Raises ValueError (one line) for data that is missing, too short, or not what the model hears or reads.
    """
    samples, line = speech_samples(plan, device) if plan.speech else text_samples(plan, device)
    digest = hashlib.sha256()
    for sample in samples:
        for key in sorted(sample.inputs):
            digest.update(sample.inputs[key].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return samples, f"{line}, sha256 {digest.hexdigest()[:16]}"


def data_identity(plan: Plan) -> str:
    """A digest of the calibration data of `plan`, without running a model on it. Raises ValueError as `make_samples`."""
    wanted = plan.recipe.calibration
    key = (str(plan.source), wanted, plan.recipe.seed)
    if key not in IDENTITIES:
        digest = hashlib.sha256()
        if plan.speech:
            for clip in audio.clips(wanted.source, wanted.clips):
                digest.update(clip.samples.tobytes() + repr(clip.text).encode())
        else:
            for sample in text_samples(plan, torch.device("cpu"))[0]:
                digest.update(sample.inputs["input_ids"].numpy().tobytes())
        IDENTITIES[key] = digest.hexdigest()
    return IDENTITIES[key]


def text_samples(plan: Plan, device: torch.device) -> tuple[list[Sample], str]:
    """Windows of tokens [1, length]."""
    wanted = plan.recipe.calibration
    room = getattr(plan.model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and wanted.length > room:
        raise ValueError(
            f"calibration.length is {wanted.length}, the model has {room} positions; --set calibration.length={room}"
        )
    corpus = text.documents(wanted.source, "calibration")
    tokenizer = preprocessor(plan, "AutoTokenizer")
    count = max(1, wanted.tokens // wanted.length)
    found = text.windows(tokenizer, corpus, wanted.length, count, plan.recipe.seed)
    rows = plan.model.get_input_embeddings().num_embeddings
    if int(found.tokens.max()) >= rows:
        raise ValueError(
            f"the tokenizer in {plan.source} makes token {int(found.tokens.max())}, the model has {rows}; "
            "put the model's own tokenizer there"
        )
    line = f"{corpus.name}: {len(found.tokens)} windows of {wanted.length} tokens"
    if len(found.tokens) < count:
        line += f" ({count} asked, {found.available} tokens available)"
    if plan.masking is None:
        line += ", none masked" if bidirectional(plan.model.config.to_dict()) else ""
        return [Sample({"input_ids": row.unsqueeze(0).to(device)}) for row in found.tokens], line
    samples, masked = masked_samples(found.tokens, plan.masking, wanted, plan.recipe.seed, device)
    return samples, f"{line}, {masked}"


def preprocessor(plan: Plan, auto: str) -> Any:
    """The source's tokenizer or processor, by its transformers auto class. Raises ValueError when it cannot be opened."""
    import transformers

    try:
        return getattr(transformers, auto).from_pretrained(plan.source)
    except Exception as error:  # each tokenizer class has its own complaints, some of them over many lines
        reason = " ".join(str(error).split("\n")[0].split())
        raise ValueError(
            f"{plan.source} has no usable {auto.removeprefix('Auto').lower()} ({reason}); put the model's own files there"
        ) from error


def speech_samples(plan: Plan, device: torch.device) -> tuple[list[Sample], str]:
    """Clips with their transcripts; where there is none, the float model's own greedy text."""
    import transformers

    wanted = plan.recipe.calibration
    clips = audio.clips(wanted.source, wanted.clips)
    processor = preprocessor(plan, "AutoProcessor")
    model: Any = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(plan.source, dtype=torch.float32).to(device).eval()
    ids = audio.targets(model, processor, clips)
    del model
    samples = []
    for features, target in zip(audio.features(processor, clips), ids, strict=True):
        mel = features.input_features.to(device, compute_dtype(device))
        frames = mel.shape[-1] // audio.ENCODER_STRIDE
        speech: Tensor = (torch.arange(frames, device=device) < features.frames).unsqueeze(0)
        mask = torch.where(speech, 1.0, wanted.padding_weight)
        samples.append(Sample({"input_features": mel, "decoder_input_ids": target.view(1, -1).to(device)}, {frames: mask}))
    seconds = sum(clip.seconds for clip in clips)
    taught = sum(clip.text is not None for clip in clips)
    return samples, f"{wanted.source}: {len(clips)} clips, {seconds:.0f} s, {taught} with transcript"
