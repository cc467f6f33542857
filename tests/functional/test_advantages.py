import math
from types import SimpleNamespace

import pytest
import torch

from lightning_rlhf.functional import (
    adaptive_kl_coef,
    best_of_n_expectation,
    best_of_n_kl,
    gae,
    grpo_advantages,
    pad_by_sequence,
    reinforce_advantages,
    rloo_advantages,
    unpad,
)

LENGTHS = (4, 1, 3)


def mask_of(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


@pytest.fixture
def rollout():
    draw = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(3, 4, dtype=torch.float64, generator=draw) for _ in range(2))
    return rewards, values, mask_of(LENGTHS, 4)


def by_loop(rewards, values, gamma, lam, after=0.0):
    """The definition: a sum over all later errors of one step."""
    steps = len(rewards)
    values = [*values, after]
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(steps)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, steps)) for t in range(steps)]


def test_gae_by_hand():
    """δ = (0 + 0.9 · 0.5 − 1, 2 − 0.5) = (−0.55, 1.5); A_0 = −0.55 + 0.9 · 0.5 · 1.5."""
    rewards, values = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.5]])
    advantages, returns = gae(rewards, values, mask_of([2], 2), gamma=0.9, lam=0.5)
    assert advantages[0].tolist() == pytest.approx([0.125, 1.5])
    assert returns[0].tolist() == pytest.approx([1.125, 2.0])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.7, 1.0), (0.8, 0.0)])
def test_gae_is_the_sum_of_its_definition(rollout, gamma, lam):
    rewards, values, mask = rollout
    bootstrap = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    for after in (torch.zeros(3), bootstrap):
        advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=after)
        for row, n in enumerate(LENGTHS):
            r, v = rewards[row, :n].tolist(), values[row, :n].tolist()
            assert advantages[row, :n].tolist() == pytest.approx(by_loop(r, v, gamma, lam, after[row].item()))
            assert (advantages[row, n:] == 0).all()


def test_with_lambda_1_the_advantage_is_the_return_minus_the_value(rollout):
    rewards, values, mask = rollout
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    kept = torch.where(mask, rewards, 0.0)
    to_go = torch.where(mask, kept.flip(1).cumsum(1).flip(1), 0.0)
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, torch.where(mask, to_go - values, 0.0))


def test_with_lambda_0_it_is_the_error_of_one_step_and_with_gamma_0_that_of_the_reward(rollout):
    rewards, values, mask = rollout
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    assert advantages[0, 1].item() == pytest.approx(
        (rewards[0, 1] + 0.9 * values[0, 2] - values[0, 1]).item()
    )
    advantages, returns = gae(rewards, values, mask, gamma=0.0, lam=0.9)
    torch.testing.assert_close(returns, torch.where(mask, rewards, 0.0))
    torch.testing.assert_close(advantages, torch.where(mask, rewards - values, 0.0))


@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf, 1e30])
def test_gae_never_reads_the_padding(rollout, padding):
    rewards, values, mask = rollout
    expected = gae(rewards, values, mask)
    dirty = [torch.where(mask, x, padding) for x in (rewards, values)]
    wider = [torch.cat([x, torch.full((3, 5), padding, dtype=x.dtype)], 1) for x in dirty]
    found = gae(*wider, mask_of(LENGTHS, 9))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[:, :4], b)
        assert (a[:, 4:] == 0).all()


def test_gae_each_row_on_its_own_and_rows_without_tokens(rollout):
    rewards, values, mask = rollout
    whole = gae(rewards, values, mask)[0]
    parts = [gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1])[0] for i in range(3)]
    assert torch.equal(whole, torch.cat(parts))
    assert (gae(rewards, values, torch.zeros_like(mask), bootstrap=torch.ones(3))[0] == 0).all()
    assert gae(rewards[:, :0], values[:, :0], mask[:, :0])[0].shape == (3, 0)


def test_gae_gradcheck(rollout):
    rewards, values, mask = rollout
    inputs = (rewards.requires_grad_(), values.requires_grad_())
    assert torch.autograd.gradcheck(lambda r, v: gae(r, v, mask, gamma=0.9, lam=0.7), inputs)


def test_gae_refusals(rollout):
    rewards, values, mask = rollout
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 1.5"):
        gae(rewards, values, mask, gamma=1.5)
    with pytest.raises(ValueError, match=r"lam must lie in \[0, 1\], got -0.1"):
        gae(rewards, values, mask, lam=-0.1)
    with pytest.raises(ValueError, match="rewards has shape"):
        gae(rewards, values[:, :3], mask)


REWARDS = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 0.0, -1.0, 4.0, 0.5], dtype=torch.float64)


def test_rloo_leaves_one_out():
    expected = []
    for start in (0, 3, 6):
        group = REWARDS[start : start + 3].tolist()
        expected += [r - (sum(group) - r) / 2 for r in group]
    assert rloo_advantages(REWARDS, 3).tolist() == pytest.approx(expected)
    assert rloo_advantages(torch.tensor([1.0, 5.0]), 2).tolist() == [-4.0, 4.0]


def test_grpo_by_hand():
    """1, 2, 6: mean 3, sample variance (4 + 1 + 9)/2 = 7."""
    found = grpo_advantages(REWARDS, 3)
    assert found[:3].tolist() == pytest.approx([x / (math.sqrt(7) + 1e-4) for x in (-2, -1, 3)])
    assert found[3:6].tolist() == [0.0, 0.0, 0.0]
    assert grpo_advantages(REWARDS, 3, scale=False)[:3].tolist() == pytest.approx([-2, -1, 3])


@pytest.mark.parametrize(
    "estimate",
    [
        lambda r: rloo_advantages(r, 3),
        lambda r: grpo_advantages(r, 3),
        lambda r: grpo_advantages(r, 3, scale=False),
    ],
)
def test_groups_do_not_see_each_other_and_constants_of_a_prompt_cancel(estimate):
    whole = estimate(REWARDS)
    assert torch.equal(whole, torch.cat([estimate(REWARDS[i : i + 3]) for i in (0, 3, 6)]))
    shifted = REWARDS + torch.tensor([10.0, -5.0, 3.0]).repeat_interleave(3)
    torch.testing.assert_close(estimate(shifted), whole)
    torch.testing.assert_close(whole.reshape(3, 3).sum(1), torch.zeros(3, dtype=torch.float64))


def test_rloo_is_grpo_without_scale_times_k_over_k_minus_1():
    torch.testing.assert_close(rloo_advantages(REWARDS, 3), 1.5 * grpo_advantages(REWARDS, 3, scale=False))


@pytest.mark.parametrize(
    ("name", "settings", "mine"),
    [
        ("grpo", {"scale_rewards": "group"}, lambda r: grpo_advantages(r, 3)),
        ("grpo", {"scale_rewards": "none"}, lambda r: grpo_advantages(r, 3, scale=False)),
        ("rloo", {}, lambda r: rloo_advantages(r, 3)),
    ],
)
def test_equal_to_trl(name, settings, mine):
    """The lines of TRL's trainers, run as they stand: they are in the middle of a method of several hundred."""
    trl = pytest.importorskip("trl")
    rewards = REWARDS.float()
    found = _advantages_of_trl(getattr(trl, f"{name.upper()}Trainer"), rewards, 3, settings)
    torch.testing.assert_close(mine(rewards), found, rtol=1e-5, atol=1e-6)


def _advantages_of_trl(trainer, rewards, group_size, settings):
    import inspect
    import textwrap

    module = inspect.getmodule(trainer)
    lines = inspect.getsource(trainer._generate_and_score_completions).splitlines()
    if trainer.__name__ == "GRPOTrainer":
        first, last = "mean_grouped_rewards = torch.nanmean", "advantages = advantages / (std_rewards + 1e-4)"
    else:
        first, last = "scorable_counts =", "advantages = rewards - baselines"
    start = next(i for i, line in enumerate(lines) if first in line)
    stop = next(i for i, line in enumerate(lines) if i > start and last in line)
    names = {
        "self": SimpleNamespace(**settings),
        "rewards": rewards,
        "grouped_rewards": rewards.view(-1, group_size),
        "num_generations": group_size,
        "torch": torch,
        "nanstd": module.nanstd,
    }
    exec(textwrap.dedent("\n".join(lines[start : stop + 1])), names)
    return names["advantages"]


def test_reinforce_by_hand():
    scores, kl = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    assert reinforce_advantages(scores, kl, kl_coef=0.5).tolist() == [-0.5, -4.5]
    rewards = reinforce_advantages(scores, kl, kl_coef=0.5)
    assert reinforce_advantages(scores, kl, kl_coef=0.5, baseline=rewards.mean()).tolist() == [2.0, -2.0]
    with pytest.raises(ValueError, match="kl_coef must not be negative"):
        reinforce_advantages(scores, kl, kl_coef=-0.5)


@pytest.mark.parametrize("estimate", [rloo_advantages, grpo_advantages])
def test_groups_must_be_whole(estimate):
    with pytest.raises(ValueError, match="draw at least 2"):
        estimate(REWARDS, 1)
    with pytest.raises(ValueError, match="not whole groups of 4"):
        estimate(REWARDS, 4)
    with pytest.raises(ValueError, match="not whole groups of 3"):
        estimate(REWARDS.reshape(3, 3), 3)


def test_the_coefficient_follows_the_error_within_a_fifth():
    settings = {"target": 6.0, "horizon": 1000.0, "num_episodes": 100}
    assert adaptive_kl_coef(0.2, 6.0, **settings) == 0.2
    assert adaptive_kl_coef(0.2, 6.6, **settings) == pytest.approx(0.2 * 1.01)
    assert adaptive_kl_coef(0.2, 5.4, **settings) == pytest.approx(0.2 * 0.99)
    assert adaptive_kl_coef(0.2, 600.0, **settings) == pytest.approx(0.2 * 1.02)
    assert adaptive_kl_coef(0.2, 0.0, **settings) == pytest.approx(0.2 * 0.98)


def test_the_coefficient_brings_a_system_to_its_target():
    """A policy whose KL is 1/β settles where β is 1/target, from ten times too large and too small."""
    for coefficient in (10 / 6, 0.1 / 6):
        for _ in range(400):
            coefficient = adaptive_kl_coef(
                coefficient, 1 / coefficient, target=6.0, horizon=1000.0, num_episodes=100
            )
        assert 1 / coefficient == pytest.approx(6.0, rel=1e-3)


def test_a_factor_of_2_takes_three_and_a_half_horizons():
    coefficient, episodes = 0.1, 0
    while coefficient < 0.2:
        coefficient = adaptive_kl_coef(coefficient, 100.0, target=6.0, horizon=10_000.0, num_episodes=50)
        episodes += 50
    assert episodes == pytest.approx(35_000, rel=0.02)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"kl_coef": 0.0}, "kl_coef must be positive"),
        ({"target": -1.0}, "target must be positive"),
        ({"horizon": 0.0}, "horizon must be positive"),
        ({"num_episodes": 0}, "num_episodes is 0"),
        ({"num_episodes": 500}, "raise the horizon"),
        ({"kl": math.nan}, "kl is nan"),
    ],
)
def test_the_coefficient_refuses(changed, match):
    settings = {"kl_coef": 0.1, "kl": 6.0, "target": 6.0, "horizon": 100.0, "num_episodes": 10} | changed
    with pytest.raises(ValueError, match=match):
        adaptive_kl_coef(settings.pop("kl_coef"), settings.pop("kl"), **settings)


def test_kl_of_best_of_n():
    """The density of the best of n is n F^{n−1}: ∫ n u^{n−1} ln(n u^{n−1}) du over quantiles u."""
    assert best_of_n_kl(1) == 0.0
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for n in (2, 5, 64):
        density = n * u ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx(torch.xlogy(density, density).mean().item(), abs=1e-4)
    with pytest.raises(ValueError, match="n must be at least 1"):
        best_of_n_kl(0)


def by_enumeration(proxy, gold, n):
    from itertools import combinations

    def best(chosen):
        top = max(proxy[i] for i in chosen)
        tied = [gold[i] for i in chosen if proxy[i] == top]
        return sum(tied) / len(tied)

    values = [best(chosen) for chosen in combinations(range(len(proxy)), n)]
    return sum(values) / len(values)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("proxy", [[3.0, 1.0, 2.0, 6.0, 5.0, 4.0], [2.0, 1.0, 2.0, 2.0, 1.0, 3.0], [1.0] * 6])
def test_best_of_n_is_the_mean_over_all_subsets(proxy, n):
    gold = [0.3, -1.0, 2.0, 0.5, 7.0, -2.0]
    found = best_of_n_expectation(torch.tensor(proxy), torch.tensor(gold), n)
    assert found.item() == pytest.approx(by_enumeration(proxy, gold, n), rel=1e-6)


def test_best_of_n_of_many_samples_and_prompts():
    draw = torch.Generator().manual_seed(0)
    proxy = torch.rand(2, 4000, generator=draw)
    found = best_of_n_expectation(proxy, proxy, 100)
    assert found.tolist() == pytest.approx([100 / 101] * 2, abs=0.002)
    assert torch.equal(found[1], best_of_n_expectation(proxy[1], proxy[1], 100))
    order = torch.randperm(4000, generator=draw)
    assert best_of_n_expectation(proxy[0][order], proxy[0][order], 7) == best_of_n_expectation(
        proxy[0], proxy[0], 7
    )


def test_best_of_n_refusals():
    with pytest.raises(ValueError, match=r"between 1 and the number of samples \(3\), got 4"):
        best_of_n_expectation(torch.zeros(3), torch.zeros(3), 4)
    with pytest.raises(ValueError, match="gold is nan in row 1"):
        best_of_n_expectation(torch.zeros(2), torch.tensor([0.0, math.nan]), 1)


def test_padding_and_back_with_gradients():
    flat = torch.arange(1.0, 7.0, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 0, 3, 1])
    padded, mask = pad_by_sequence(flat, lengths)
    assert padded.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5], [6, 0, 0]]
    assert mask.sum(1).tolist() == lengths.tolist()
    assert torch.equal(unpad(padded, mask), flat)
    assert torch.equal(pad_by_sequence(flat, lengths, width=5)[0][:, :3], padded)
    assert torch.autograd.gradcheck(lambda x: unpad(pad_by_sequence(x, lengths)[0], mask), flat)
    assert pad_by_sequence(flat[:0], lengths[:0])[0].shape == (0, 0)
    with pytest.raises(ValueError, match=r"flat must be \(M,\)"):
        pad_by_sequence(padded, lengths)
