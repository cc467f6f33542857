"""A closed form: on a language of one prompt and eight completions DPO must reach π_ref·exp(r/β)/Z."""

import itertools

import pytest
import torch

from lightning_rlhf.algorithms import DPO
from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.functional import sum_by_sequence
from lightning_rlhf.objectives import Completions, Pairs, Sigmoid
from tests.models.families import tiny

BETA = 0.5
PROMPT = [5, 6]
COMPLETIONS = [[10 + a, 20 + b, 30 + c] for a, b, c in itertools.product(range(2), repeat=3)]


def log_distribution(model):
    """Log-probabilities of the eight completions, renormalised over them."""
    batch = pack([PromptGroup(PROMPT, COMPLETIONS)])
    return sum_by_sequence(model(batch).logprobs, batch.target_lengths).log_softmax(0)


@pytest.mark.parametrize("seed", [0, 1])
def test_dpo_on_the_full_preference_distribution_reaches_the_tilted_reference(seed, tokenizer):
    torch.manual_seed(seed)
    rewards = torch.randn(8)
    module = DPO(tiny("LlamaConfig", seed=seed), tokenizer, objective=Sigmoid(beta=BETA))
    with torch.no_grad():
        target = (log_distribution(module.policy) + rewards / BETA).log_softmax(0)

    # Every ordered pair, weighted by how often Bradley–Terry annotators prefer its first completion.
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j]
    winner, loser = (torch.tensor(side) for side in zip(*pairs, strict=True))
    weights = torch.sigmoid(rewards[winner] - rewards[loser])
    batch = pack([PromptGroup(PROMPT, COMPLETIONS)])
    reference = module.reference(batch)

    optimizer = torch.optim.LBFGS(module.policy.parameters(), max_iter=400, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logps = sum_by_sequence(module.policy(batch).logprobs, batch.target_lengths)
        sides = (Completions(logps[i], batch.target_lengths[i], reference[i]) for i in (winner, loser))
        losses = module.objective(Pairs(*sides))
        loss = (weights * losses).mean()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    with torch.no_grad():
        found = log_distribution(module.policy)
    assert (found.exp() - target.exp()).abs().max() < 1e-3
    assert (
        target.exp() - torch.full((8,), 1 / 8)
    ).abs().max() > 0.05  # the target is no uniform distribution
