"""EdgeQAT: end-to-end distillation that also keeps queries and keys varied and attention maps like the teacher's.

    loss = KL per token + entropy * L_E + distribution * L_D        quant/train/attention_losses.py

As in the pass `distill`, steps and norms move and codes stay; it starts from what the passes before have quantized, and tokens
are rounded as they will be served. The published training starts from round-to-nearest, moves all weights straight through
with learned step sizes, adds the cross-entropy of the text and the logits of two larger teachers.
(EdgeQAT, later Squat, Shen et al., 2024. Its scripts use either these losses or bits by token, never both.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from quant.passes import distill
from quant.train.attention_losses import Form

if TYPE_CHECKING:
    from quant.train.distill import Objective
    from quant.train.folder import Student


class Pass(distill.Pass):
    """entropy, distribution: weights of the two losses, 0.5 and 1 in the paper. form: of the distribution loss."""

    steps: int = Field(40, ge=0)
    entropy: float = Field(0.5, ge=0)
    distribution: float = Field(1.0, ge=0)
    form: Form = "cosine"

    @property
    def maps(self) -> int:
        return 7 if self.entropy or self.distribution else 0  # measured: SmolLM2-135M, windows of 512, 6.7 GB instead of 4.8

    def objective(self, teacher: Any, student: Student) -> Objective | None:
        from quant.train.attention import Guided

        if not self.entropy and not self.distribution:
            return None
        return Guided(teacher, student.model, self.entropy, self.distribution, self.form)
