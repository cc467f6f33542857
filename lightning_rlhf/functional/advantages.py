"""Advantages: how much better an action was than expected, by token (GAE) or by sequence.

The estimators by sequence take samples of the same prompt one after the other: rewards ``(G · group_size,)``.
"""

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_same_shape

GRPO_EPSILON = 1e-4
"""Added to the standard deviation of a group, as in TRL."""


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimation over the tokens of a completion.

    $A_t = \delta_t + \gamma \lambda A_{t+1}$ with $\delta_t = r_t + \gamma V_{t+1} - V_t$: equations 11 to 16 of
    Schulman et al. (2016), "High-Dimensional Continuous Control Using Generalized Advantage Estimation". $V_t$ is the
    value before token t is chosen; after the last token it is 0, and so is $A$.

    Args:
        rewards: Reward of each token, ``(N, T)``.
        values: Value of the state in which each token was chosen, ``(N, T)``.
        mask: True where a token stands, ``(N, T)``, boolean; rows are padded on the right. What stands where it is
            False is never read, nan and infinities included.
        gamma: γ, the discount per token, in [0, 1].
        lam: λ, in [0, 1]: 0 trusts the values after one step, 1 the rewards alone.
        bootstrap: Value after the last token, ``(N,)``, instead of 0: of completions that were cut off.

    Returns:
        Advantages and returns ($A_t + V_t$), each ``(N, T)``, 0 where the mask is False. Gradients are not stopped.

    Raises:
        ValueError: If γ or λ is out of range or the shapes differ.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.25, 9.0]])
        >>> gae(rewards, values, torch.tensor([[True, True, False]]), lam=0.5)
        (tensor([[0.1250, 0.7500, 0.0000]]), tensor([[0.6250, 1.0000, 0.0000]]))
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    require_same_shape("rewards", rewards, "values", values)
    require_same_shape("rewards", rewards, "mask", mask)
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    if bootstrap is not None:
        is_last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
        after = torch.where(is_last, bootstrap[:, None].to(values), after)
    deltas = torch.where(mask, rewards + gamma * after - values, 0.0)
    advantage = deltas.new_zeros(len(deltas))
    found: list[Tensor] = []
    for delta in reversed(deltas.unbind(1)):
        advantage = delta + gamma * lam * advantage
        found.append(advantage)
    advantages = torch.stack(found[::-1], dim=1) if found else deltas
    return advantages, advantages + values


def rloo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    r"""Reward minus the mean of the other samples of its prompt, $r_i - \frac{1}{k-1} \sum_{j \neq i} r_j$.

    Kool et al. (2019); RLOO of Ahmadian et al. (2024), "Back to Basics: Revisiting REINFORCE Style Optimization for
    Learning from Human Feedback in LLMs".

    Args:
        rewards: One per completion, those of a prompt one after the other, ``(N,)``.
        group_size: k, samples a prompt, at least 2.

    Returns:
        ``(N,)``; each group sums to 0.

    Raises:
        ValueError: If the rewards are not whole groups of at least 2.

    Example:
        >>> rloo_advantages(torch.tensor([1.0, 2.0, 6.0]), 3)
        tensor([-3.0000, -1.5000,  4.5000])
    """
    grouped = _grouped(rewards, group_size)
    return ((grouped - grouped.mean(1, keepdim=True)) * (group_size / (group_size - 1))).reshape(-1)


def grpo_advantages(rewards: Tensor, group_size: int, *, scale: bool = True) -> Tensor:
    r"""Reward relative to the samples of its prompt, $(r_i - \bar r) / (s + 10^{-4})$.

    Section 4.1.2 of Shao et al. (2024), "DeepSeekMath" (GRPO). s is the sample standard deviation, with k − 1 in its
    denominator, as in TRL. Without the division it is Dr. GRPO (Liu et al., 2025, "Understanding R1-Zero-Like
    Training"), whose gradient is not larger for prompts on which rewards differ little.

    Args:
        rewards: One per completion, those of a prompt one after the other, ``(N,)``.
        group_size: k, samples a prompt, at least 2.
        scale: Divide by the standard deviation.

    Returns:
        ``(N,)``; each group sums to 0, and is 0 where all its rewards are the same.

    Raises:
        ValueError: If the rewards are not whole groups of at least 2.

    Example:
        >>> grpo_advantages(torch.tensor([0.0, 2.0]), 2)
        tensor([-0.7071,  0.7071])
        >>> grpo_advantages(torch.tensor([0.0, 2.0]), 2, scale=False)
        tensor([-1.,  1.])
    """
    grouped = _grouped(rewards, group_size)
    centred = grouped - grouped.mean(1, keepdim=True)
    if scale:
        centred = centred / (grouped.std(1, keepdim=True) + GRPO_EPSILON)
    return centred.reshape(-1)


def reinforce_advantages(
    scores: Tensor, kl: Tensor, *, kl_coef: float, baseline: Tensor | float = 0.0
) -> Tensor:
    r"""The reward of a whole completion with its KL penalty, $r - \beta \, \mathrm{KL} - b$.

    Williams (1992), with the reward of equation 2 of Ziegler et al. (2019). Without a baseline it is also the reward
    that :func:`rloo_advantages` and :func:`grpo_advantages` compare within a prompt.

    Args:
        scores: One per completion, ``(N,)``.
        kl: Estimate of KL(π‖π_ref) of each completion, summed over its tokens, ``(N,)``, in nats.
        kl_coef: β, in reward per nat, at least 0.
        baseline: What does not depend on the completion, such as the mean of the batch over all ranks.

    Returns:
        ``(N,)``.

    Raises:
        ValueError: If ``kl_coef`` is negative or the shapes differ.

    Example:
        >>> reinforce_advantages(torch.tensor([1.0]), torch.tensor([4.0]), kl_coef=0.1, baseline=0.5)
        tensor([0.1000])
    """
    if kl_coef < 0:
        raise ValueError(f"kl_coef must not be negative, got {kl_coef}")
    require_same_shape("scores", scores, "kl", kl)
    return scores - kl_coef * kl - baseline


def _grouped(rewards: Tensor, group_size: int) -> Tensor:
    if group_size < 2:
        raise ValueError(
            f"group_size is {group_size}: the other samples of a prompt are the baseline, so draw at least 2"
        )
    if rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards of shape {tuple(rewards.shape)} are not whole groups of {group_size}: give one reward per "
            "completion, those of a prompt one after the other"
        )
    return rewards.reshape(-1, group_size)
