import itertools

import pytest
import torch

from lightning_rlhf import functional as RF


def test_bradley_terry_by_hand():
    loss = RF.bradley_terry_loss(torch.tensor([2.0]), torch.tensor([0.5]))
    assert loss.item() == pytest.approx(0.2014132779827524)  # ln(1 + e^-1.5)


def test_both_directions_are_one_probability():
    a, b = torch.randn(2, 20, dtype=torch.float64)
    total = torch.exp(-RF.bradley_terry_loss(a, b)) + torch.exp(-RF.bradley_terry_loss(b, a))
    torch.testing.assert_close(total, torch.ones_like(a))


def test_the_gradient_raises_the_chosen_score():
    a, b = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    RF.bradley_terry_loss(a, b).sum().backward()
    assert (a.grad == -0.5).all()
    assert (b.grad == 0.5).all()


def test_a_margin_is_an_offset_of_the_chosen_score():
    a, b, margin = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(RF.bradley_terry_loss(a, b, margin), RF.bradley_terry_loss(a - margin, b))


def test_comparisons_are_all_pairs_of_a_group_by_rank():
    ranks = torch.tensor([2.0, 0.0, 1.0, 0.0, 1.0])
    found = RF.comparisons([3, 2], ranks)
    expected = set()
    for start, end in ((0, 3), (3, 5)):
        for i, j in itertools.combinations(range(start, end), 2):
            expected.add((i, j) if ranks[i] < ranks[j] else (j, i))
    assert set(zip(found.better.tolist(), found.worse.tolist(), strict=True)) == expected
    assert found.sizes.tolist() == [3, 1]
    assert found.counts.tolist() == [1.0] * 4


def test_the_mean_of_a_group_leaves_ties_out():
    found = RF.comparisons([3, 2], torch.tensor([0.0, 0.0, 1.0, 5.0, 5.0]))
    values = torch.tensor([100.0, 1.0, 3.0, 7.0])  # (0, 1) and the second group are ties
    assert found.mean(values).tolist() == [2.0, 0.0]


def test_group_sizes_must_fit():
    with pytest.raises(ValueError, match="groups of 3 completions, but 2 ranks"):
        RF.comparisons([3], torch.zeros(2))


def test_ensembles_by_hand():
    scores = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 3.0]])
    assert RF.ensemble_mean(scores).tolist() == [3.0, 1.0]
    assert RF.ensemble_worst_case(scores).tolist() == [1.0, 0.0]
    weighted = RF.ensemble_uncertainty_weighted(scores, coef=0.75)
    torch.testing.assert_close(weighted, torch.tensor([3.0 - 0.75 * 8 / 3, 1.0 - 0.75 * 2.0]))
    torch.testing.assert_close(RF.ensemble_uncertainty_weighted(scores, coef=0.0), RF.ensemble_mean(scores))
    with pytest.raises(ValueError, match="coef must be at least 0, got -1"):
        RF.ensemble_uncertainty_weighted(scores, coef=-1.0)
