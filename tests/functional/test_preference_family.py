"""The losses of the family: by hand, by identities and limits, by gradients."""

import math

import pytest
import torch

from lightning_rlhf import functional as RF

LN2 = math.log(2)
LENGTHS = torch.tensor([2, 3, 4])


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_logps(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [-3 * torch.rand(3, dtype=torch.float64, generator=generator) - 0.1 for _ in range(count)]


def with_lengths(loss):
    return lambda *logps, **settings: loss(
        *logps, LENGTHS[: len(logps[0])], LENGTHS[: len(logps[0])], **settings
    )


def bco(*logps, delta=0.3, **settings):
    return RF.bco_loss(*logps, torch.tensor(delta, dtype=torch.float64), **settings)


# name: loss of four log-probabilities, hyperparameters, value where policy and reference agree, at β = 0.5
LOSSES = {
    "dpo": (RF.dpo_loss, {"label_smoothing": 0.1}, LN2),
    "ipo": (with_lengths(RF.ipo_loss), {}, 1.0),
    "sigmoid_norm": (with_lengths(RF.length_normalized_dpo_loss), {}, LN2),
    "hinge": (RF.hinge_loss, {}, 1.0),
    "robust": (RF.robust_dpo_loss, {"label_smoothing": 0.2}, LN2),
    "exo": (RF.exo_loss, {"label_smoothing": 0.1}, -math.log(2 * math.sqrt(0.9 * 0.1))),
    "discopop": (RF.discopop_loss, {"tau": 0.5}, (LN2 + 1) / 2),
    "nca": (RF.nca_loss, {}, 2 * LN2),
    "bco": (bco, {}, math.log(1 + math.exp(0.3)) + math.log(1 + math.exp(-0.3))),
    "sppo": (RF.sppo_loss, {}, 2.0),
    "apo_zero": (RF.apo_zero_loss, {}, 1.0),
    "apo_down": (RF.apo_down_loss, {}, 1.0),
    "aot": (RF.aot_loss, {}, LN2),
    "aot_unpaired": (RF.aot_unpaired_loss, {}, LN2),
}
# What each loss pushes, where policy and reference agree: chosen and rejected completions.
PUSHES = dict.fromkeys(LOSSES, (1, -1)) | {"apo_down": (0, -1)}


@pytest.mark.parametrize("name", LOSSES)
def test_value_where_policy_and_reference_agree(name):
    loss, settings, expected = LOSSES[name]
    chosen, rejected = random_logps(2)
    assert loss(chosen, rejected, chosen, rejected, beta=0.5, **settings).tolist() == pytest.approx(
        [expected] * 3
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_raises_chosen_and_lowers_rejected(name):
    loss, settings, _ = LOSSES[name]
    chosen, rejected, *_ = (x.requires_grad_() for x in random_logps(2))
    ref = (chosen.detach().clone(), rejected.detach().clone())
    loss(chosen, rejected, *ref, beta=0.5, **settings).sum().backward()
    assert [torch.sign(-x.grad.round(decimals=9)).tolist() for x in (chosen, rejected)] == [
        [side] * 3 for side in PUSHES[name]
    ]


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    loss, settings, _ = LOSSES[name]
    inputs = [x.requires_grad_() for x in random_logps(4)]
    assert torch.autograd.gradcheck(lambda *x: loss(*x, beta=0.7, **settings), inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_beta_must_be_positive(name):
    loss, settings, _ = LOSSES[name]
    with pytest.raises(ValueError, match=r"beta must be positive, got 0.0"):
        loss(*random_logps(4), beta=0.0, **settings)


@pytest.mark.parametrize("name", [n for n in LOSSES if not n.startswith("aot")])
def test_pairs_do_not_see_each_other(name):
    loss, settings, _ = LOSSES[name]
    logps = random_logps(4)
    whole = loss(*logps, beta=0.5, **settings)
    assert loss(*(x[:1] for x in logps), beta=0.5, **settings).item() == pytest.approx(
        whole[0].item(), rel=1e-12
    )


def test_by_hand():
    # h_w = 2, h_l = −1, β = 0.5: rewards 1 and −0.5, margin 1.5
    logps = numbers(-8), numbers(-21), numbers(-10), numbers(-20)
    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = {
        RF.hinge_loss: 0.0,
        RF.nca_loss: -math.log(sigma(1)) - 0.5 * math.log(sigma(-1)) - 0.5 * math.log(sigma(0.5)),
        RF.sppo_loss: (2 - 1) ** 2 + (-1 + 1) ** 2,
        RF.apo_zero_loss: 1 - sigma(1) + sigma(-0.5),
        RF.apo_down_loss: sigma(1) + 1 - sigma(1.5),
    }
    for loss, value in expected.items():
        assert loss(*logps, beta=0.5).item() == pytest.approx(value, abs=1e-12), loss
    assert RF.ipo_loss(*logps, numbers(4), numbers(2), beta=0.5).item() == pytest.approx((0.5 + 0.5 - 1) ** 2)
    assert RF.ipo_loss(*logps, numbers(1), numbers(1), beta=0.5).item() == pytest.approx((2 + 1 - 1) ** 2)
    assert bco(*logps, delta=0.25, beta=0.5).item() == pytest.approx(
        -math.log(sigma(0.75)) - math.log(sigma(0.75))
    )
    q, smoothing = sigma(1.5), 0.1
    assert RF.exo_loss(*logps, beta=0.5, label_smoothing=smoothing).item() == pytest.approx(
        q * math.log(q / 0.9) + (1 - q) * math.log((1 - q) / 0.1)
    )
    blend = sigma(1.5 / 0.5)
    assert RF.discopop_loss(*logps, beta=0.5, tau=0.5).item() == pytest.approx(
        -(1 - blend) * math.log(q) + blend * math.exp(-1.5)
    )


def test_robust_is_dpo_on_average_over_the_flips():
    """Flip each label with probability ε: the mean of the robust loss is DPO's loss of the true labels."""
    chosen, rejected, ref_chosen, ref_rejected = random_logps(4)
    settings = {"beta": 0.5, "label_smoothing": 0.2}
    kept = RF.robust_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **settings)
    flipped = RF.robust_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, **settings)
    clean = RF.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.5)
    torch.testing.assert_close(0.8 * kept + 0.2 * flipped, clean)


def test_exo_has_its_minimum_0_at_the_labels_log_odds():
    margins = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    zero = torch.zeros_like(margins)
    losses = RF.exo_loss(margins, zero, zero, zero, beta=1.0, label_smoothing=0.2)
    assert margins[losses.argmin()].item() == pytest.approx(math.log(4), abs=0.01)
    assert losses.min().item() == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match=r"label_smoothing must be positive, got 0.0"):
        RF.exo_loss(margins, zero, zero, zero, beta=1.0, label_smoothing=0.0)


def test_length_normalised_equals_dpo_at_length_one():
    logps, one = random_logps(4), torch.ones(3)
    torch.testing.assert_close(
        RF.length_normalized_dpo_loss(*logps, one, one, beta=0.5), RF.dpo_loss(*logps, beta=0.5)
    )


@pytest.mark.parametrize("loss", [RF.nca_loss, bco, RF.sppo_loss, RF.apo_zero_loss])
def test_displacement_costs_where_dpo_does_not_see_it(loss):
    """Both log-ratios fall by 5 nats: DPO's loss stays, these rise."""
    chosen, rejected, zero = numbers(0.5), numbers(-0.5), numbers(0.0)
    shifted = (chosen - 5, rejected - 5, zero, zero)
    assert RF.dpo_loss(*shifted, beta=0.5).item() == pytest.approx(
        RF.dpo_loss(chosen, rejected, zero, zero, beta=0.5).item()
    )
    before = loss(chosen, rejected, zero, zero, beta=0.5, **({"delta": 0.0} if loss is bco else {}))
    after = loss(*shifted, beta=0.5, **({"delta": 0.0} if loss is bco else {}))
    assert after.item() > before.item() + 0.05


def test_aot_compares_quantiles():
    policy, zero = numbers(3, 1, 2), numbers(0, 0, 0)
    losses = RF.aot_loss(policy, zero, numbers(0, 2, 1), zero, beta=1.0)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1))] * 3)
    logps = random_logps(4)
    one = [x[:1] for x in logps]
    for loss in (RF.aot_loss, RF.aot_unpaired_loss):
        torch.testing.assert_close(loss(*one, beta=0.3), RF.dpo_loss(*one, beta=0.3))  # a batch of one is DPO
    order = torch.tensor([2, 0, 1])
    mixed = [logps[0][order], logps[1], logps[2][order], logps[3]]
    torch.testing.assert_close(RF.aot_unpaired_loss(*mixed, beta=0.3), RF.aot_unpaired_loss(*logps, beta=0.3))
    assert not torch.allclose(RF.aot_loss(*mixed, beta=0.3), RF.aot_loss(*logps, beta=0.3))


# --- without a reference --------------------------------------------------------------------------------------------


def test_orpo_by_hand():
    # p_w = 0.5 over two tokens, p_l = 0.2 over one: odds 1 and 1/4
    chosen, rejected = 2 * numbers(0.5).log(), numbers(0.2).log()
    lengths = torch.tensor([2]), torch.tensor([1])
    assert RF.log_odds_ratio(chosen, rejected, *lengths).item() == pytest.approx(math.log(4))
    loss = RF.orpo_loss(chosen, rejected, *lengths, beta=0.5)
    assert loss.item() == pytest.approx(LN2 - 0.5 * math.log(4 / 5))


def test_odds_keep_their_digits_and_gradients_at_both_ends():
    logps = numbers(-1e-9, -1e-3, -0.69, -0.7, -50.0).requires_grad_()
    one = torch.ones(5)
    odds = RF.log_odds_ratio(logps, torch.full_like(logps, -LN2), one, one)
    exact = [math.log(math.exp(x) / -math.expm1(x)) for x in logps.tolist()]
    assert odds.tolist() == pytest.approx(exact, rel=1e-9, abs=1e-9)
    odds.sum().backward()
    assert logps.grad.tolist() == pytest.approx([-1 / math.expm1(x) for x in logps.tolist()], rel=1e-6)
    certain = RF.log_odds_ratio(torch.zeros(1), torch.full((1,), -1.0), one[:1], one[:1])
    assert certain.isfinite().all()


def test_simpo_and_cpo_by_hand():
    chosen, rejected = numbers(-2.0), numbers(-12.0)
    lengths = torch.tensor([2]), torch.tensor([4])
    margin = 2.0 * (-1 + 3) - 0.5
    assert RF.simpo_loss(chosen, rejected, *lengths, beta=2.0, gamma=0.5).item() == pytest.approx(
        math.log(1 + math.exp(-margin))
    )
    loss = RF.cpo_loss(chosen, rejected, lengths[0], beta=0.1, cpo_alpha=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.0)) + 0.5 * 1.0)


def test_the_tokens_mean_of_a_batch_is_over_its_tokens():
    logps, lengths = numbers(-4, -6, -1), torch.tensor([1, 3, 4])
    assert RF.sft_term(logps, lengths).mean().item() == pytest.approx(11 / 8)
    assert RF.sft_term(logps, lengths, average="sequences").tolist() == [4, 2, 0.25]


@pytest.mark.parametrize("average", ["tokens", "sequences"])
def test_gradcheck_without_a_reference(average):
    inputs = [x.requires_grad_() for x in random_logps(2)]
    for loss in (
        lambda c, r: RF.orpo_loss(c, r, LENGTHS, LENGTHS, beta=0.5, average=average),
        lambda c, r: RF.simpo_loss(c, r, LENGTHS, LENGTHS, beta=2.0, gamma=0.5, label_smoothing=0.1),
        lambda c, r: RF.cpo_loss(c, r, LENGTHS, beta=0.5, average=average),
    ):
        assert torch.autograd.gradcheck(loss, inputs)
        chosen, rejected = torch.autograd.grad(loss(*inputs).sum(), inputs)
        assert (chosen < 0).all()
        assert (rejected > 0).all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: RF.orpo_loss(x, x, LENGTHS, LENGTHS, beta=0.0), "beta"),
        (lambda x: RF.simpo_loss(x, x, LENGTHS, LENGTHS, beta=-1.0, gamma=0.5), "beta"),
        (lambda x: RF.cpo_loss(x, x, LENGTHS, beta=0.1, cpo_alpha=-1.0), "cpo_alpha must not be negative"),
        (lambda x: RF.cpo_loss(x, x, LENGTHS, beta=0.1, label_smoothing=0.5), "label_smoothing"),
        (lambda x: RF.sft_term(x, LENGTHS, average="words"), "average must be 'tokens' or 'sequences'"),
        (lambda x: RF.discopop_loss(x, x, x, x, beta=0.1, tau=0.0), "tau must be positive"),
        (lambda x: RF.divergence_scores(x, divergence="kl"), "divergence must be one of reverse_kl, "),
    ],
)
def test_out_of_range(call, match):
    with pytest.raises(ValueError, match=match):
        call(random_logps(1)[0])


# --- divergences and weights ----------------------------------------------------------------------------------------


def test_divergences_by_hand_and_in_their_limits():
    u = numbers(0.0, math.log(3))
    scores = lambda name, alpha=0.5: RF.divergence_scores(u, divergence=name, alpha=alpha).tolist()  # noqa: E731
    assert scores("reverse_kl") == u.tolist()
    assert scores("forward_kl") == pytest.approx([0, 2 / 3])
    assert scores("js") == pytest.approx([0, math.log(2 * 3 / 4)])
    assert scores("alpha", 0.0) == pytest.approx(scores("forward_kl"))
    assert scores("alpha", 1.0) == scores("alpha", 1 + 1e-9) == scores("reverse_kl")
    assert scores("alpha", 1.001) == pytest.approx(scores("reverse_kl"), rel=1e-3)
    assert scores("alpha", 3.0) == pytest.approx([0, (9 - 1) / 2])


@pytest.mark.parametrize("name", ["forward_kl", "js", "alpha"])
def test_divergences_are_finite_and_rise(name):
    u = torch.linspace(-200, 200, 401)
    scores = RF.divergence_scores(u, divergence=name, alpha=0.5)
    assert scores.isfinite().all()
    assert (scores.diff() >= 0).all()
    near = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(RF.divergence_scores(near, divergence=name, alpha=0.5).sum(), near)[0]
    assert slope.item() == pytest.approx({"forward_kl": 1.0, "js": 0.5, "alpha": 1.0}[name])


def test_length_desensitised_sums_by_hand():
    logprobs, lengths = numbers(-1, -2, -3, -4, -5, -6), torch.tensor([1, 3, 2, 0])
    assert RF.length_desensitized_sum(logprobs, lengths, ld_alpha=0.5).tolist() == [-1, -2 - 3.5, -5.5, 0]
    assert RF.length_desensitized_sum(logprobs, lengths, ld_alpha=0.0).tolist() == [-1, -2, 0, 0]
    torch.testing.assert_close(
        RF.length_desensitized_sum(logprobs, lengths, ld_alpha=1.0), RF.sum_by_sequence(logprobs, lengths)
    )
    with pytest.raises(ValueError, match=r"ld_alpha must lie in \[0, 1\], got 1.5"):
        RF.length_desensitized_sum(logprobs, lengths, ld_alpha=1.5)
    with pytest.raises(ValueError, match="lengths must be those of pairs, got 3 sequences"):
        RF.length_desensitized_sum(logprobs, lengths[:3], ld_alpha=0.5)


def test_wpo_weights_by_hand_and_from_a_head():
    probabilities = numbers(0.5, 0.3, 0.2)
    logits = probabilities.log().float().expand(3, 3)
    tokens = RF.token_logprobs(
        logits, lambda x: x, torch.tensor([0, 1, 2]), with_collision=True, chunk_size=2
    )
    assert tokens.log_collision.tolist() == pytest.approx([math.log(0.38)] * 3, rel=1e-6)
    weights = RF.wpo_weights(tokens.logprobs, tokens.log_collision, torch.tensor([2, 1]))
    assert weights.tolist() == pytest.approx([math.sqrt(0.5 * 0.3) / 0.38, 0.2 / 0.38], rel=1e-5)
    assert not weights.requires_grad
    assert RF.token_logprobs(logits, lambda x: x, torch.tensor([0, 1, 2])).log_collision is None
