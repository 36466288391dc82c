"""`model.generate` on compiled graphs: transformers prepares and checks the call, this runs the tokens.

Greedy search and sampling with any logits processors, stopping criteria, streamers and batches are run here. The rest
(beams, assisted decoding, a cache brought along) goes to transformers' own loop, with a warning that says why.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor

MODES = ("greedy_search", "sample")


class Runtime(Protocol):
    """A model ready to run."""

    def refuses(self, ids: Tensor, given: dict[str, Any]) -> str | None:
        """Why this call must run eagerly, or None. ids [B, T]; given: what `generate` would pass to the model."""

    def begin(self, ids: Tensor, given: dict[str, Any], room: int) -> Tensor:
        """Start anew with prompts ids [B, T] -> logits [B, V] of the next token. room: tokens expected to follow."""

    def step(self, tokens: Tensor) -> Tensor:
        """One more token per row, [B] -> logits [B, V]."""


class Loop:
    """transformers' `custom_generate` for one runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def refuses(self, ids: Tensor, config: Any, given: dict[str, Any]) -> str | None:
        mode = config.get_generation_mode(given.get("assistant_model"))
        if mode not in MODES:
            return f"its mode is {mode.value}; compiled are {', '.join(MODES)}"
        if config.output_attentions or config.output_hidden_states:
            return "attention weights or hidden states are asked for"
        if not config.use_cache:
            return "use_cache is False"
        if (past := given.get("past_key_values")) is not None and past.get_seq_length() > 0:
            return "a filled cache is given"
        return self.runtime.refuses(ids, given)

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **given: Any,
    ) -> Any:
        """As transformers' `_sample`: ids [B, T + new], or its output class when `return_dict_in_generate` is set."""
        config = generation_config
        if (reason := self.refuses(input_ids, config, given)) is not None:
            warnings.warn(f"generate runs eagerly, not compiled: {reason}", stacklevel=2)
            return eager(model, input_ids, logits_processor, stopping_criteria, config, synced_gpus, streamer, given)
        rows, length = input_ids.shape
        room = max(config.max_length - length, 1)
        ids = torch.cat([input_ids, input_ids.new_zeros(rows, room)], 1)
        going = torch.ones(rows, dtype=torch.bool)
        pad = config._pad_token_tensor if any(hasattr(rule, "eos_token_id") for rule in stopping_criteria) else None
        scores: list[Tensor] | None = [] if config.return_dict_in_generate and config.output_scores else None
        raw: list[Tensor] | None = [] if config.return_dict_in_generate and config.output_logits else None
        logits = self.runtime.begin(input_ids, given, room)
        while True:
            values = logits.float()
            score = logits_processor(ids[:, :length], values) if logits_processor else values
            if scores is not None:
                scores.append(score)
            if raw is not None:
                raw.append(logits.float())
            tokens = torch.multinomial(score.softmax(-1), 1)[:, 0] if config.do_sample else score.argmax(-1)
            if pad is not None:
                tokens = torch.where(going, tokens, pad)
            ids[:, length] = tokens
            length += 1
            if streamer is not None:
                streamer.put(tokens)
            going &= ~stopping_criteria(ids[:, :length], None if scores is None else tuple(scores))
            if not going.any():
                break
            logits = self.runtime.step(tokens)
        if streamer is not None:
            streamer.end()
        return outputs(model, ids[:, :length], scores, raw, config)


def eager(
    model: Any, ids: Tensor, processors: Any, criteria: Any, config: Any, synced: bool, streamer: Any, given: dict[str, Any]
) -> Any:
    """transformers' own loop for the mode that `config` asks for."""
    from transformers.generation.utils import GENERATION_MODES_MAPPING

    mode = config.get_generation_mode(given.get("assistant_model"))
    loop = getattr(type(model), GENERATION_MODES_MAPPING[mode])
    options = given | ({} if streamer is None else {"streamer": streamer})
    return loop(
        model,
        ids,
        logits_processor=processors,
        stopping_criteria=criteria,
        generation_config=config,
        synced_gpus=synced,
        **options,
    )


def outputs(model: Any, ids: Tensor, scores: list[Tensor] | None, raw: list[Tensor] | None, config: Any) -> Any:
    """What `generate` returns; without the KV cache, which stays with the runtime."""
    from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

    if not config.return_dict_in_generate:
        return ids
    kind = GenerateEncoderDecoderOutput if model.config.is_encoder_decoder else GenerateDecoderOnlyOutput
    return kind(sequences=ids, scores=None if scores is None else tuple(scores), logits=None if raw is None else tuple(raw))


def attach(model: Any, runtime: Runtime) -> None:
    """Make `model.generate` use `runtime`, which becomes `model.runtime`."""
    model.runtime = runtime
    model.generate = functools.partial(model.generate, custom_generate=Loop(runtime))
