"""Perplexity and divergence against their definitions, summed directly in float64 from a tiny random model's logits."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from scipy.stats import ttest_rel
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from quant.eval import divergence, perplexity
from quant.eval.divergence import Divergence
from quant.eval.journal import Journal

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 400,
    "initializer_range": 0.3,  # logits far from flat
}
WINDOWS = torch.randint(0, 97, (3, 301), generator=torch.Generator().manual_seed(1))  # more than one slice of the head


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def perturbed(model, size):
    """A copy with Gaussian noise of relative `size` on every weight; the same noise at every size."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in other.parameters():
            weight += size * weight.std() * torch.randn(weight.shape, generator=generator) if weight.ndim == 2 else 0
    return other


@torch.no_grad()
def log_probs(model):
    """ln p [W, L-1, V] in float64."""
    return torch.log_softmax(copy.deepcopy(model).double()(input_ids=WINDOWS).logits[:, :-1], dim=-1)


def by_definition(model):
    """exp of the mean over windows of each window's mean cross-entropy."""
    picked = log_probs(model).gather(-1, WINDOWS[:, 1:, None]).squeeze(-1)
    return math.exp(-picked.mean(dim=1).mean())


@pytest.mark.parametrize("batch", [1, 2])
def test_perplexity_is_the_definition(model, batch):
    result = perplexity.evaluate(model, WINDOWS, batch=batch)
    assert result.perplexity == pytest.approx(by_definition(model), rel=1e-5)
    assert (result.windows, result.length, result.tokens) == (3, 301, 900)
    assert result.fidelity is None


def test_a_model_agrees_with_itself(model):
    result = perplexity.evaluate(model, WINDOWS, model)
    assert result.ratio == 1
    assert result.ratio_error == 0
    assert result.p_value == 1
    assert result.fidelity.kl_max == 0
    assert result.fidelity.top1 == 1
    assert result.fidelity.rms_delta_p == 0
    assert result.fidelity.tokens == 900


def test_comparison_is_the_definition(model):
    other = perturbed(model, 0.1)
    result = perplexity.evaluate(other, WINDOWS, model, batch=2)
    p, q = log_probs(model), log_probs(other)
    kl = (p.exp() * (p - q)).sum(-1)
    fidelity = result.fidelity
    assert fidelity.kl_mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert fidelity.kl_max == pytest.approx(kl.max().item(), rel=1e-4)
    assert fidelity.kl_median == pytest.approx(kl.quantile(0.5).item(), rel=1e-3)
    for found, at in ((fidelity.kl_p90, 0.9), (fidelity.kl_p95, 0.95), (fidelity.kl_p99, 0.99), (fidelity.kl_p999, 0.999)):
        assert found == pytest.approx(kl.quantile(at).item(), rel=1e-3)
    counted = [int(((kl >= low) & (kl < high)).sum()) for low, high in pairwise(divergence.KL_EDGES)]
    assert sum(abs(a - b) for a, b in zip(fidelity.kl_counts, counted, strict=True)) <= 4  # a token at an edge counts twice
    assert sum(fidelity.kl_counts) == 900
    assert fidelity.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=1 / 900)
    target = WINDOWS[:, 1:, None]
    right, wanted = (x.argmax(-1, keepdim=True) == target for x in (q, p))
    assert fidelity.flips_lost == pytest.approx((wanted & ~right).double().mean().item(), abs=1 / 900)
    assert fidelity.flips_gained == pytest.approx((right & ~wanted).double().mean().item(), abs=1 / 900)
    assert 0 < fidelity.flips_lost + fidelity.flips_gained <= 1 - fidelity.top1
    delta = q.gather(-1, target).exp() - p.gather(-1, target).exp()
    assert fidelity.rms_delta_p == pytest.approx(delta.square().mean().sqrt().item(), rel=1e-4)
    losses = [-x.gather(-1, target).squeeze(-1).mean(dim=1) for x in (p, q)]
    assert result.reference_perplexity == pytest.approx(by_definition(model), rel=1e-5)
    assert result.ratio == pytest.approx(by_definition(other) / by_definition(model), rel=1e-5)
    paired = (losses[1] - losses[0]).std() / math.sqrt(3)
    assert result.ratio_error == pytest.approx(result.ratio * paired.item(), rel=1e-3)
    assert result.p_value == pytest.approx(ttest_rel(*losses).pvalue, rel=1e-2)


def test_more_noise_more_divergence(model):
    small, large = (perplexity.evaluate(perturbed(model, size), WINDOWS, model).fidelity for size in (0.02, 0.1))
    assert 0 < small.kl_mean < large.kl_mean / 4
    assert small.top1 > large.top1
    assert small.rms_delta_p < large.rms_delta_p
    for found in (small, large):
        assert found.kl_median <= found.kl_p99 <= found.kl_p999 <= found.kl_max


def test_a_head_with_a_softcap_is_not_taken_apart():
    torch.manual_seed(0)
    shape = SHAPE | {"head_dim": 8, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8}
    capped = Gemma2ForCausalLM(Gemma2Config(**shape)).eval()
    plain = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    assert not perplexity.Scorer(capped, WINDOWS[:1, :16]).split
    assert perplexity.Scorer(plain, WINDOWS[:1, :16]).split
    assert perplexity.evaluate(capped, WINDOWS).perplexity == pytest.approx(by_definition(capped), rel=1e-5)


def test_no_more_logits_at_once_than_a_slice(model):
    with torch.inference_mode():
        sizes = [tuple(x.shape) for x in perplexity.Scorer(model, WINDOWS[:1, :16]).slices(WINDOWS[:2])]
    assert sizes == [(2, 256, 97), (2, 44, 97)]


def test_excluded_tokens_and_broken_weights():
    reference = torch.tensor([[0.0, 0.0, -torch.inf]])
    agree = Divergence()
    agree.add(reference, reference.clone(), torch.tensor([0]), group=0)
    assert agree.fidelity().kl_max == 0
    with pytest.raises(ValueError, match="NaN among the logits of the model"):
        agree.add(reference, torch.full((1, 3), torch.nan), torch.tensor([0]), group=0)


def test_ties_go_to_the_lowest_id_on_both_sides():
    tied = torch.zeros(1, 5, dtype=torch.bfloat16)
    found = Divergence()
    found.add(tied, tied.clone(), torch.tensor([2]), group=0)
    almost = tied.clone()
    almost[0, 4] = 0.01
    found.add(tied, almost, torch.tensor([2]), group=1)
    assert found.fidelity().top1 == 0.5


def test_errors_are_over_groups():
    """Twenty copies of each window's tokens carry no new information: the error of the mean must not shrink."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(1, 8, generator=generator) for _ in range(6)]
    once, often = Divergence(), Divergence()
    for group, row in enumerate(rows):
        once.add(torch.zeros(1, 8), row, torch.tensor([0]), group=group)
        often.add(torch.zeros(20, 8), row.expand(20, 8), torch.zeros(20, dtype=torch.int64), group=group)
    assert often.fidelity().kl_error == pytest.approx(once.fidelity().kl_error, rel=1e-6)
    kl = [float(-row.log_softmax(-1).mean() - math.log(8)) for row in rows]
    assert once.fidelity().kl_error == pytest.approx(divergence.standard_error(kl), rel=1e-5)


def test_a_killed_evaluation_goes_on_with_the_same_numbers(model, tmp_path, monkeypatch):
    other = perturbed(model, 0.1)
    whole = perplexity.evaluate(other, WINDOWS, model)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    path = tmp_path / "journal"
    with pytest.raises(KeyboardInterrupt):
        perplexity.evaluate(other, WINDOWS, model, progress=stop, journal=Journal(path))
    with path.open("a") as file:
        file.write('["window 2", {"losses": [1.')  # killed while it wrote
    journal = Journal(path)
    assert journal.resumed == 2
    ran = []
    score = perplexity.score
    monkeypatch.setattr(perplexity, "score", lambda *given: ran.append(given[-1]) or score(*given))
    assert perplexity.evaluate(other, WINDOWS, model, journal=journal) == whole
    assert ran == [2]
    assert Journal(path).resumed == 3
    assert Journal(path, fresh=True).resumed == 0
    journal.finish()
    assert not path.exists()


def test_refusals(model):
    with pytest.raises(ValueError, match="windows has shape"):
        perplexity.evaluate(model, WINDOWS[:0])
    other = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 98}))
    with pytest.raises(ValueError, match="one vocabulary"):
        perplexity.evaluate(model, WINDOWS, other)
