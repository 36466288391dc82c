"""From vLLM's names of layers to the names on disk that config.json speaks of, and what the plugin refuses to serve.

vLLM fuses q, k, v and gate, up, and not every model of it says where a layer is as the checkpoint does. An architecture is
served when it is listed here, which means that it was run and compared: a model whose loader rearranges weights would take
packed ones without complaint and compute something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant.checkpoint import scheme_of, softmax_bits, token_thresholds
from quant.kernels.activation import Activation
from quant.kernels.format import Format

Scheme = tuple[Format, Activation]


@dataclass(frozen=True)
class Architecture:
    """One model class of vLLM.

    table: the input embedding's name on disk. floats: prefixes of parts that vLLM computes in float only.
    renames: regular expression -> replacement, from vLLM's prefix of a layer to its name on disk.
    """

    table: str
    floats: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()

    def on_disk(self, prefix: str) -> str:
        """The disk name of the layer that vLLM calls `prefix`."""
        for pattern, replacement in self.renames:
            prefix = re.sub(pattern, replacement, prefix)
        return prefix


DECODER = Architecture("model.embed_tokens")
ARCHITECTURES = {
    "LlamaForCausalLM": DECODER,
    "WhisperForConditionalGeneration": Architecture(
        "model.decoder.embed_tokens",
        # ".decoder.layers.0.layers.mlp.fc1" is "model.decoder.layers.0.fc1" on disk
        renames=((r"^(?:model)?\.(encoder|decoder)\.layers\.(\d+)\.(?:layers\.)?(?:mlp\.)?", r"model.\1.layers.\2."),),
    ),
    "Qwen2AudioForConditionalGeneration": Architecture(
        "language_model.model.embed_tokens", floats=("audio_tower.", "multi_modal_projector.")
    ),
}


def architecture_of(section: Mapping[str, Any], names: Sequence[str]) -> Architecture:
    """What is known of the architecture that config.json names. Raises ValueError where this checkpoint cannot be served.

    section: config.json's quantization_config.
    """
    name = next((name for name in names if name in ARCHITECTURES), None)
    if name is None:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"lowbit's vLLM plugin does not serve {', '.join(names) or 'a model without architecture'}; it serves {known}; "
            "use quant.load, or export it: quantize export OUT --to compressed-tensors"
        )
    if bits := softmax_bits(section):
        raise ValueError(f"attention probabilities of {bits} bits are not served by vLLM; quantize with --set softmax=null")
    if token_thresholds(section) is not None:
        raise ValueError("bits that attention chooses by token are not served by vLLM; quantize with activation int8_token")
    found = ARCHITECTURES[name]
    for rule in section["rules"]:
        if rule["match"].startswith(found.floats):
            part = rule["match"].partition(".")[0]
            raise ValueError(
                f"{rule['match']} is packed, but vLLM computes {part} of {name} in float only; "
                f"quantize again with the rule {{match: '*{part}.*', skip: true}}"
            )
    return found


def fused_names(name: str, packed_modules: Mapping[str, Sequence[str]]) -> list[str]:
    """Disk names of the matrices in the layer `name`, in vLLM's order: "a.qkv_proj" is "a.q_proj", "a.k_proj", "a.v_proj"."""
    for fused, parts in packed_modules.items():
        if name == fused or name.endswith(f".{fused}"):
            return [name.removesuffix(fused) + part for part in parts]
    return [name]


def one_scheme(section: Mapping[str, Any], names: Sequence[str]) -> Scheme | None:
    """The scheme of all matrices of a layer; None: it stays in float. Raises ValueError where they differ."""
    schemes = [scheme_of(section, name) for name in names]
    for name, scheme in zip(names[1:], schemes[1:], strict=True):
        if scheme != schemes[0]:
            raise ValueError(
                f"{names[0]} is {text(schemes[0])} and {name} is {text(scheme)}, but vLLM fuses them; "
                "quantize again with one rule for both"
            )
    return schemes[0]


def text(scheme: Scheme | None) -> str:
    """A scheme in words."""
    return "float" if scheme is None else f"{scheme[0]} with activation {scheme[1]}"
