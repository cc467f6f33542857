import math

import pytest
import torch
from torch import nn

from lightning_rlhf.functional import (
    apply_missing_eos_penalty,
    approx_kl,
    clip_fraction,
    kl_k1,
    kl_k3,
    masked_mean,
    ppo_policy_loss,
    ppo_value_loss,
    ratio,
    token_kl,
    token_logprobs,
    token_rewards,
    truncated_importance_weights,
    value_clip_fraction,
)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def log(*values):
    return numbers(*values).log()


def test_token_rewards_by_hand():
    kl = torch.tensor([[1.0, -2.0, 3.0], [4.0, math.nan, math.inf]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = token_rewards(kl, torch.tensor([10.0, -1.0]), mask, kl_coef=0.5)
    assert found.tolist() == [[-0.5, 1.0, 8.5], [-3.0, 0.0, 0.0]]


def test_token_rewards_sum_to_the_reward_of_the_sequence():
    kl, scores = torch.rand(5, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 6, 2])[:, None]
    found = token_rewards(kl, scores, mask, kl_coef=0.2)
    torch.testing.assert_close(found.sum(1), scores - 0.2 * (kl * mask).sum(1))
    torch.testing.assert_close(token_rewards(kl, scores, mask, kl_coef=0.0).sum(1), scores)


def test_missing_eos():
    scores, truncated = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    assert apply_missing_eos_penalty(scores, truncated, penalty=0.5).tolist() == [0.5, 2.0]
    assert apply_missing_eos_penalty(scores, truncated, replacement=-3.0).tolist() == [-3.0, 2.0]
    assert apply_missing_eos_penalty(scores, truncated).tolist() == [1.0, 2.0]
    bad = torch.tensor([math.nan, 2.0])
    assert apply_missing_eos_penalty(bad, truncated, replacement=0.0).tolist() == [0.0, 2.0]


RATIOS = [1.0, 1.5, 1.5, 0.5, 0.5, 1.1, 0.9]
ADVANTAGES = [2.0, 2.0, -2.0, 2.0, -2.0, 3.0, -3.0]


def test_policy_loss_by_hand():
    found = ppo_policy_loss(log(*RATIOS), numbers(*[0.0] * 7), numbers(*ADVANTAGES), clip_range=0.2)
    assert found.tolist() == pytest.approx([-2.0, -2.4, 3.0, -1.0, 1.6, -3.3, 2.7])
    assert ratio(log(1.5), numbers(0.0)).item() == pytest.approx(1.5)


def test_clipping_stops_the_gradient_where_it_would_lead_further_and_only_there():
    logprobs = log(*RATIOS).requires_grad_()
    ppo_policy_loss(logprobs, numbers(*[0.0] * 7), numbers(*ADVANTAGES)).sum().backward()
    kept = [True, False, True, True, False, True, True]
    expected = [-a * r if keep else 0.0 for a, r, keep in zip(ADVANTAGES, RATIOS, kept, strict=True)]
    assert logprobs.grad.tolist() == pytest.approx(expected)
    clipped = clip_fraction(logprobs.detach(), numbers(*[0.0] * 7), numbers(*ADVANTAGES))
    assert clipped.tolist() == [float(not keep) for keep in kept]


def test_at_ratio_1_the_gradient_is_the_policy_gradient():
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    tokens, advantages = torch.tensor([0, 4, 2, 1, 1, 3]), torch.randn(6, dtype=torch.float64)
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    (mine,) = torch.autograd.grad(
        ppo_policy_loss(logprobs, logprobs.detach(), advantages).sum(), logits, retain_graph=True
    )
    (plain,) = torch.autograd.grad(-(advantages * logprobs).sum(), logits)
    torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf])
def test_losses_do_not_depend_on_padding(padding):
    torch.manual_seed(0)
    mask = torch.arange(4) < torch.tensor([4, 2])[:, None]
    rows = [torch.randn(2, 4, dtype=torch.float64) for _ in range(3)]
    for loss in (ppo_policy_loss, ppo_value_loss):
        expected, gradient = _mean_and_gradient(loss, [row[mask] for row in rows], torch.ones(6).bool())
        dirty = [torch.where(mask, row, padding) for row in rows]
        found, found_gradient = _mean_and_gradient(loss, dirty, mask)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found_gradient[mask], gradient)


def _mean_and_gradient(loss, inputs, mask):
    first = inputs[0].clone().requires_grad_()
    mean = masked_mean(loss(first, *inputs[1:]), mask)
    (gradient,) = torch.autograd.grad(mean, first)
    return mean.detach(), gradient


def test_value_loss_by_hand():
    """V, V_old, R: (1, 0, 2) is clipped to 0.2; (1, 0, −2) errs more unclipped; (0.1, 0, 1) is within."""
    values = numbers(1.0, 1.0, 0.1).requires_grad_()
    old, returns = numbers(0.0, 0.0, 0.0), numbers(2.0, -2.0, 1.0)
    loss = ppo_value_loss(values, old, returns)
    assert loss.tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 9.0, 0.5 * 0.81])
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([0.0, 3.0, -0.9])
    assert value_clip_fraction(values.detach(), old, returns).tolist() == [1.0, 0.0, 0.0]
    unclipped = ppo_value_loss(values, old, returns, value_clip_range=math.inf)
    assert unclipped.tolist() == pytest.approx([0.5, 4.5, 0.405])


def test_gradcheck():
    torch.manual_seed(1)
    a, b, c = (torch.randn(8, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda x, y: ppo_policy_loss(x, b, y), (a.requires_grad_(), c.requires_grad_())
    )
    assert torch.autograd.gradcheck(lambda x, y: ppo_value_loss(x, b, y), (a, c))
    kl, mask = (
        torch.rand(2, 3, dtype=torch.float64, requires_grad=True),
        torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(),
    )
    scores = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: token_rewards(x, y, mask, kl_coef=0.3), (kl, scores))


def test_policy_loss_equals_trl():
    trl = pytest.importorskip("trl")
    inputs = log(*RATIOS), numbers(*[0.0] * 7), numbers(*ADVANTAGES)
    losses, clipped = _loss_of_trl(trl.GRPOTrainer, *inputs)
    torch.testing.assert_close(ppo_policy_loss(*inputs), losses)
    assert clip_fraction(*inputs).tolist() == clipped


def _loss_of_trl(trainer, logprobs, old_logprobs, advantages):
    """Each token as a sequence of one, through the loss method of TRL's trainer."""
    losses, clipped = [], []
    for logprob, old, advantage in zip(logprobs, old_logprobs, advantages, strict=True):
        stub = _TrlLoss(logprob.reshape(1, 1))
        inputs = {
            "prompt_ids": torch.zeros(1, 1).long(),
            "prompt_mask": torch.ones(1, 1).long(),
            "completion_ids": torch.zeros(1, 1).long(),
            "completion_mask": torch.ones(1, 1).long(),
            "advantages": advantage.reshape(1),
            "old_per_token_logps": old.reshape(1, 1),
        }
        losses.append(trainer._compute_loss(stub, None, inputs))
        clipped += stub._metrics["train"]["clip_ratio/region_mean"]
    return torch.stack(losses), clipped


class _TrlLoss:
    """What TRL's loss method reads of its trainer, with log-probabilities that are given."""

    top_entropy_quantile = 1.0
    off_policy_mask_threshold = None
    importance_sampling_level = "token"
    beta = 0.0
    loss_type = "grpo"
    epsilon_low = epsilon_high = 0.2
    use_vllm = False
    aux_loss_enabled = _entropy_bonus_enabled = False
    current_gradient_accumulation_steps = 1

    def __init__(self, logprobs):
        from collections import defaultdict
        from types import SimpleNamespace

        self.logprobs = logprobs
        self.model = SimpleNamespace(training=True)
        self.args = SimpleNamespace(delta=None, use_bias_correction_kl=False)
        self.accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
        self._metrics = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.logprobs, torch.zeros_like(self.logprobs), None


def test_approx_kl_by_hand_and_0_where_nothing_moved():
    assert approx_kl(numbers(-1.0, -2.0), numbers(-3.0, -2.0)).tolist() == [2.0, 0.0]


def test_importance_weights_are_cut_above_only_and_carry_no_gradient():
    logprobs = log(0.9, 0.1, 0.5).requires_grad_()
    weights = truncated_importance_weights(logprobs, log(0.3, 0.4, 0.5), cap=2.0)
    assert weights.tolist() == pytest.approx([2.0, 0.25, 1.0])
    assert not weights.requires_grad


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: ppo_policy_loss(x, x, x, clip_range=0.0), r"clip_range must lie in \(0, 1\)"),
        (lambda x: clip_fraction(x, x, x, clip_range=1.0), r"clip_range must lie in \(0, 1\)"),
        (lambda x: ppo_policy_loss(x, x, x[:1]), "logprobs has shape"),
        (lambda x: ppo_value_loss(x, x, x, value_clip_range=-1.0), "value_clip_range must be positive"),
        (lambda x: ppo_value_loss(x, x, x[:, None]), "values has shape"),
        (lambda x: truncated_importance_weights(x, x, cap=0.0), "cap must be positive"),
        (lambda x: apply_missing_eos_penalty(x, x > 0, penalty=1.0, replacement=1.0), "not both"),
        (lambda x: apply_missing_eos_penalty(x, x > 0, penalty=-1.0), "must not be negative"),
        (
            lambda x: token_rewards(x[:, None], x, x[:, None] > 0, kl_coef=-1.0),
            "kl_coef must not be negative",
        ),
        (lambda x: token_rewards(x[:, None], x[:2], x[:, None] > 0, kl_coef=1.0), "scores has shape"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.zeros(3))


@pytest.fixture
def two_models():
    torch.manual_seed(0)
    return torch.randn(11, 6), nn.Linear(6, 17), torch.randn(11, 4), nn.Linear(4, 17)


def test_token_kl_by_hand():
    """1/2, 1/2 against 3/4, 1/4: ln 2 + (ln 4/3 + ln 4)/2 − 2 ln 2 … = ½ ln(2/3) + ½ ln 2."""
    identity = lambda hidden: hidden  # noqa: E731
    policy, reference = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    assert token_kl(policy, identity, reference, identity).item() == pytest.approx(
        0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    )
    reverse = token_kl(reference, identity, policy, identity).item()
    assert reverse == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_kl_equals_the_plain_formula(two_models, chunk_size, temperature):
    hidden, head, ref_hidden, ref_head = two_models
    p = (head(hidden).double() / temperature).log_softmax(-1)
    q = (ref_head(ref_hidden).double() / temperature).log_softmax(-1)
    found = token_kl(*two_models, temperature=temperature, chunk_size=chunk_size)
    torch.testing.assert_close(found.double(), (p.exp() * (p - q)).sum(-1), atol=1e-6, rtol=1e-5)
    assert not found.requires_grad


def test_token_kl_is_what_the_estimators_estimate(two_models):
    """Each estimator, averaged over the whole vocabulary with the policy's probabilities."""
    hidden, head, ref_hidden, ref_head = two_models
    exact = token_kl(*two_models)
    for estimator in (kl_k1, kl_k3):
        total = torch.zeros(11)
        for token in range(17):
            targets = torch.full((11,), token)
            logprobs = token_logprobs(hidden, head, targets).logprobs
            ref_logprobs = token_logprobs(ref_hidden, ref_head, targets).logprobs
            total += logprobs.exp() * estimator(logprobs, ref_logprobs)
        torch.testing.assert_close(exact, total, atol=1e-5, rtol=1e-5)


def test_token_kl_is_0_for_the_same_model_never_negative_and_chunked(two_models):
    hidden, head, _, _ = two_models
    assert (token_kl(hidden, head, hidden, head) == 0).all()
    almost = token_kl(hidden, head, hidden + 1e-7, head)
    assert (almost >= 0).all()
    sizes = []
    head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    assert token_kl(hidden, head, hidden, head, chunk_size=4).shape == (11,)
    assert sizes == [4, 4, 4, 4, 3, 3]
    assert token_kl(hidden[:0], head, hidden[:0], head).shape == (0,)
    with pytest.raises(ValueError, match="same M"):
        token_kl(hidden, head, hidden[:3], head)
    with pytest.raises(ValueError, match="temperature must be positive"):
        token_kl(hidden, head, hidden, head, temperature=0.0)
