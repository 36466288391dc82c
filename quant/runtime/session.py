"""A decoder ready to run: its graphs, its KV caches, and how far the text has come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from quant.runtime import artifact, attend

STEP = 256  # capacities are multiples of it, or all positions of the model


class Session:
    """Prefill and decode of a Llama-like model with its compiled graph, one batch of texts at a time.

    One graph serves prompts and single tokens: a graph of fixed shape for the latter was not faster (SmolLM2-135M).
    """

    def __init__(self, decoder: Any, kind: str, dtype: torch.dtype, graph: artifact.Graph) -> None:
        self.decoder, self.kind, self.dtype, self.graph = decoder, kind, dtype, graph
        self.caches: list[attend.Cache] = []
        self.context: list[Tensor] = []  # what the graph takes besides: of text, rotations; of speech, the clip
        self.start = torch.zeros((), dtype=torch.int64)  # places filled in every row of the caches
        self.first = torch.zeros(0, dtype=torch.int64)  # [B] of them, padding at the beginning

    def refuses(self, ids: Tensor, given: dict[str, Any]) -> str | None:
        """As generate.Runtime: prompts are token ids, padded on the left if at all."""
        if given.get("inputs_embeds") is not None:
            return "embeddings are given in place of token ids"
        mask = given.get("attention_mask")
        if mask is not None and (mask.shape != ids.shape or bool((mask[:, :-1] > mask[:, 1:]).any())):
            return "the attention mask is more than padding on the left"
        return None

    def begin(self, ids: Tensor, given: dict[str, Any], room: int) -> Tensor:
        """As generate.Runtime."""
        mask = given.get("attention_mask")
        return self.prefill(ids, None if mask is None else (mask == 0).sum(1), room)

    def prefill(self, ids: Tensor, padding: Tensor | None = None, room: int = 0) -> Tensor:
        """Start anew with prompts ids [B, T] int64 -> logits [B, V] of the next token.

        padding [B]: how many ids at the beginning of each row are none. room: tokens expected to follow, for which memory is
        taken at once. Raises ValueError for an empty prompt and for one longer than the model's positions.
        """
        rows, tokens = ids.shape
        if rows * tokens == 0:
            raise ValueError(f"the prompt is {rows} x {tokens} tokens; give at least one")
        if self.caches and self.caches[0][0].shape[0] != rows:
            self.caches = []
        self.start = torch.zeros((), dtype=torch.int64)
        self.first = torch.zeros(rows, dtype=torch.int64) if padding is None else padding.to(torch.int64)
        self.reserve(max(tokens, min(tokens + room, self.decoder.longest)))
        return self._run(ids)

    def step(self, tokens: Tensor) -> Tensor:
        """One more token per row, [B] int64 -> logits [B, V]. Raises ValueError when the model has no position for it."""
        self.reserve(int(self.start) + 1)
        return self._run(tokens[:, None])

    def _run(self, ids: Tensor) -> Tensor:
        caches = (part for cache in self.caches for part in cache)
        logits = self.graph([ids.contiguous(), self.start, self.first, *caches, *self.context])[0]
        self.start += ids.shape[1]
        return logits

    def reserve(self, tokens: int) -> None:
        """Make the caches hold `tokens` per row, keeping what they hold. Raises ValueError beyond the model's positions."""
        if self.caches and tokens <= self.caches[0][0].shape[2]:
            return
        if tokens > self.decoder.longest:
            raise ValueError(f"the text reaches {tokens} tokens; the model has {self.decoder.longest} positions: shorten it")
        capacity = min(-(-tokens // STEP) * STEP, self.decoder.longest)
        if self.caches:
            self.caches = [attend.grown(cache, capacity) for cache in self.caches]
        else:
            self.caches = memory(self.decoder, self.kind, len(self.first), capacity, self.dtype)
        self.place(capacity)

    def place(self, capacity: int) -> None:
        """Make the graph's other inputs fit caches of `capacity` tokens."""
        self.context = self.decoder.rotations(capacity, self.dtype)


class SpeechSession(Session):
    """The same for Whisper, with a second graph: from the encoder's output to the keys and values of the clip."""

    def __init__(self, decoder: Any, kind: str, dtype: torch.dtype, graph: artifact.Graph, audio: artifact.Graph) -> None:
        super().__init__(decoder, kind, dtype, graph)
        self.audio = audio

    def place(self, capacity: int) -> None:
        """Nothing: a clip's keys and values are as they are."""

    def refuses(self, ids: Tensor, given: dict[str, Any]) -> str | None:
        """As generate.Runtime: the encoder has run, prompts are token ids without padding."""
        if given.get("encoder_outputs") is None:
            return "the encoder's output is not given"
        if given.get("decoder_inputs_embeds") is not None:
            return "embeddings are given in place of token ids"
        mask = given.get("decoder_attention_mask")
        if mask is not None and not bool(mask.all()):
            return "prompts of unequal lengths are given"
        return None

    def begin(self, ids: Tensor, given: dict[str, Any], room: int) -> Tensor:
        """As generate.Runtime."""
        self.context = self.audio([given["encoder_outputs"][0].contiguous()])
        return self.prefill(ids, None, room)


def memory(decoder: Any, kind: str, rows: int, capacity: int, dtype: torch.dtype) -> list[attend.Cache]:
    """Caches for all blocks, with nothing in them."""
    return [attend.empty(kind, rows, capacity, dtype, channel) for channel in decoder.channels]


def graph(
    decoder: nn.Module, about: dict[str, Any], kind: str, dtype: torch.dtype, audio: torch.Size | None, say: artifact.Say | None
) -> artifact.Graph | None:
    """The graph of a decoder for any B, T and S, from the disk, else compiled if `say` is given, else None.

    audio: [H, S, D] of the keys of a clip, where the decoder attends to one.
    """
    longest: int = decoder.longest  # type: ignore[assignment]
    b, t, s = (Dim(name, min=1, max=top) for name, top in (("b", 4096), ("t", longest), ("s", 2**31)))
    rows, tokens = 2, 3  # any but 1, which tracing would take for a constant
    caches = memory(decoder, kind, rows, min(STEP, longest), dtype)
    shapes = [tuple({} if part.dim() == 2 else {0: b, 2: s} for part in cache) for cache in caches]
    dynamic: list[Any] = [{0: b, 1: t}, None, {0: b}, shapes]
    numbers = torch.zeros((), dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    inputs: list[Any] = [torch.zeros(rows, tokens, dtype=torch.int64), *numbers, caches]
    if audio is None:
        inputs.append(decoder.rotations(min(STEP, longest), dtype))  # type: ignore[operator]
        dynamic.append([{0: s}, {0: s}])
    else:
        inputs.append([tuple(torch.zeros(rows, *audio, dtype=dtype) for _ in range(2)) for _ in caches])
        dynamic.append([({0: b}, {0: b}) for _ in caches])
    return artifact.get("decoder", decoder, about, inputs, tuple(dynamic), say)
