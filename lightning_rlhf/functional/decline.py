"""A sequential test: whether the gold reward falls, looked at after every evaluation of a run."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_finite, require_same_shape

__all__ = [
    "DeclineTest",
    "decline_statistic",
    "decline_statistic_unpaired",
    "decline_test",
    "decline_threshold",
]


class DeclineTest(NamedTuple):
    """What the evaluations so far say.

    Attributes:
        alarm: Gold fell while the proxy rose, both by more than chance.
        statistic: How far gold fell, in standard errors: the largest over the pairs of blocks.
        proxy_rise: How far the proxy rose between the same two blocks, in standard errors.
    """

    alarm: bool
    statistic: float
    proxy_rise: float


def decline_statistic(values: Tensor) -> tuple[Tensor, tuple[int, int]]:
    r"""The largest fall between two neighbouring blocks of evaluations that end with the latest one.

    For blocks of a = 1, 2, 4, … evaluations before and b = 1, 2, 4, … up to now, the difference of each prompt's
    means is taken, and their mean over prompts is divided by its standard error: a paired t statistic, so that neither
    what a prompt is worth nor how noise varies along the run matters. It is mapped to a normal deviate by Wallace's
    (1959) $z = \frac{8\nu + 1}{8\nu + 3} \sqrt{\nu \ln (1 + t^2 / \nu)}$ with $\nu = N - 1$.

    Args:
        values: One row per evaluation in order, one column per prompt, ``(T, N)``.

    Returns:
        The largest z, a scalar, float64, −∞ below two evaluations; and the lengths a and b of its blocks.

    Raises:
        ValueError: If there are fewer than two prompts or a value is not finite.

    Example:
        >>> z, blocks = decline_statistic(torch.tensor([[1.0, 3.0, 5.0], [0.9, 2.0, 4.1]]))
        >>> print(f"{z:.2f} {blocks}")
        1.45 (1, 1)
    """
    if values.dim() != 2 or values.shape[1] < 2:
        raise ValueError(
            f"values has shape {tuple(values.shape)}: give (T, N), N ≥ 2 prompts in each of T evaluations"
        )
    require_finite("values", values)
    blocks = _blocks(len(values))
    if not blocks:
        return torch.tensor(-math.inf, dtype=torch.float64), (0, 0)
    z, place = _deviate(_falls(values, blocks)).max(0)
    return z, blocks[int(place)]


def decline_statistic_unpaired(values: Sequence[Tensor]) -> tuple[Tensor, tuple[int, int]]:
    r"""As :func:`decline_statistic` where every evaluation is of other prompts, such as the rollouts of a training.

    With the mean $m_t$ of evaluation t and its standard error $s_t$, blocks of a evaluations before and b up to now
    have

    $t = \frac{\bar m_{before} - \bar m_{now}}{\sqrt{\sum_{before} s_t^2 / a^2 + \sum_{now} s_t^2 / b^2}}$

    with the degrees of freedom of Welch (1947), mapped to a normal deviate as there.

    Args:
        values: One row per evaluation in order, each of one value per prompt, ``(N_t,)``.

    Returns:
        The largest z, a scalar, float64, −∞ below two evaluations; and the lengths a and b of its blocks.

    Raises:
        ValueError: If an evaluation has fewer than two prompts or a value is not finite.

    Example:
        >>> z, blocks = decline_statistic_unpaired([torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1.0, 2.0])])
        >>> print(f"{z:.2f} {blocks}")
        0.98 (1, 1)
    """
    means, squares, counts = _means(values)
    blocks = _blocks(len(values))
    if not blocks:
        return torch.tensor(-math.inf, dtype=torch.float64), (0, 0)
    z, place = _deviate_unpaired(means, squares, counts, blocks).max(0)
    return z, blocks[int(place)]


def decline_test(
    gold: Tensor | Sequence[Tensor], proxy: Tensor | Sequence[Tensor], *, threshold: float
) -> DeclineTest:
    """Whether gold falls while the proxy rises, by more than chance, at the latest of several looks.

    Gold falls where :func:`decline_statistic` exceeds the threshold; the proxy rises where its z between the
    same two blocks exceeds 1.645, the normal's 95% point. Where gold never declines, each difference of a later and
    an earlier block has a mean of at least 0, so constant gold is the worst case, and
    :func:`decline_threshold` bounds the probability of any alarm in a run.

    Measured with 32 evaluations: of 1,000 runs whose gold followed the proxy with a correlation of 0.3 to 1, and of
    1,000 runs of constant gold, less than the stated 5% gave an alarm. Where gold rose by one standard deviation of a
    sample over 16 evaluations and fell by it over 16 more, all of 100 runs gave one, half of them before 40% of the
    gain was lost with 128 prompts, and before 65% with 32.

    Args:
        gold: Gold rewards, ``(T, N)``: T evaluations in order, the same N prompts in each; or a row for each
            evaluation, ``(N_t,)``, where the prompts differ, which asks for more samples:
            :func:`decline_statistic_unpaired`.
        proxy: Proxy rewards of the same samples, in the same shape.
        threshold: From :func:`decline_threshold`.

    Returns:
        Whether to raise an alarm, and both statistics.

    Raises:
        ValueError: If shapes or the numbers of evaluations differ, there are fewer than two prompts or a value is not
            finite.

    Example:
        >>> noise = torch.tensor([0.0, 0.1, -0.1, 0.2])
        >>> steps = torch.stack([noise, noise.flip(0), noise.roll(1), noise.roll(2)])
        >>> level = torch.tensor([[0.0], [0.0], [5.0], [5.0]])
        >>> decline_test(steps - level, steps + level, threshold=3.0).alarm
        True
        >>> decline_test(steps + level, steps + level, threshold=3.0).alarm
        False
    """
    if isinstance(gold, Tensor) and isinstance(proxy, Tensor):
        require_same_shape("gold", gold, "proxy", proxy)
        require_finite("proxy", proxy)
        statistic, blocks = decline_statistic(gold)
        rise = -_deviate(_falls(proxy, [blocks])).item() if all(blocks) else -math.inf
    else:
        if len(gold) != len(proxy):
            raise ValueError(
                f"gold has {len(gold)} evaluations and proxy {len(proxy)}: give both of each evaluation"
            )
        for one, other in zip(gold, proxy, strict=True):
            require_same_shape("gold", one, "proxy", other)
        statistic, blocks = decline_statistic_unpaired(list(gold))
        found = _means(list(proxy))
        rise = -_deviate_unpaired(*found, [blocks]).item() if all(blocks) else -math.inf
    alarm = statistic.item() > threshold and rise > NormalDist().inv_cdf(0.95)
    return DeclineTest(alarm, statistic.item(), rise)


def decline_threshold(
    max_evaluations: int, *, false_alarm_rate: float = 0.05, num_simulations: int = 4000, seed: int = 0
) -> float:
    """The threshold that gold's statistic exceeds at any of so many evaluations with a given probability.

    By simulation of constant gold with Gaussian noise, the worst case of a reward that does not decline. It covers
    all looks of a run together.

    Args:
        max_evaluations: Looks in a run, at most; with more of them false alarms become more likely.
        false_alarm_rate: Probability of at least one false alarm in a run, in (0, 1).
        num_simulations: Runs simulated.
        seed: Of the simulation.

    Returns:
        The threshold, in standard errors.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> abs(decline_threshold(2) - 1.645) < 0.1  # one look that compares: the normal's 95% point
        True
    """
    if max_evaluations < 2:
        raise ValueError(f"max_evaluations must be at least 2, got {max_evaluations}")
    if not 0.0 < false_alarm_rate < 1.0:
        raise ValueError(f"false_alarm_rate must lie in (0, 1), got {false_alarm_rate}")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(max_evaluations, num_simulations, generator=generator, dtype=torch.float64)
    highest = torch.full((num_simulations,), -math.inf, dtype=torch.float64)
    for end in range(2, max_evaluations + 1):
        blocks = _blocks(end)
        errors = torch.tensor([math.sqrt(1 / a + 1 / b) for a, b in blocks], dtype=torch.float64)
        z = _falls(noise[:end], blocks) / errors[:, None]
        highest = torch.maximum(highest, z.amax(0))
    return highest.quantile(1 - false_alarm_rate).item()


def _blocks(count: int) -> list[tuple[int, int]]:
    """Lengths of neighbouring blocks that fit into so many evaluations."""
    lengths = [2**k for k in range(count.bit_length())]
    return [(a, b) for a in lengths for b in lengths if a + b <= count]


def _falls(values: Tensor, blocks: list[tuple[int, int]]) -> Tensor:
    """Each column's mean over the earlier block less that over the later one, which ends with the last row."""
    sums = torch.nn.functional.pad(values.double(), (0, 0, 1, 0)).cumsum(0)
    before, after = torch.tensor(blocks, device=values.device).T
    middle = len(values) - after
    earlier = (sums[middle] - sums[middle - before]) / before[:, None]
    return earlier - (sums[-1] - sums[middle]) / after[:, None]


def _deviate(falls: Tensor) -> Tensor:
    """The normal deviate of the paired t statistic of differences over the last dimension."""
    count = falls.shape[-1]
    degrees = torch.tensor(count - 1.0, dtype=torch.float64)
    return _wallace(falls.mean(-1), falls.std(-1) / math.sqrt(count), degrees)


def _means(values: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each evaluation its mean, the square of the mean's standard error, and the number of values."""
    for row in values:
        if row.dim() != 1 or len(row) < 2:
            raise ValueError(f"an evaluation has shape {tuple(row.shape)}: give (N,), N ≥ 2 prompts in each")
        require_finite("values", row)
    columns = [[row.double().mean(), row.double().var() / len(row), len(row)] for row in values]
    means, squares, counts = torch.tensor(columns, dtype=torch.float64).reshape(-1, 3).T
    return means, squares, counts


def _deviate_unpaired(
    means: Tensor, squares: Tensor, counts: Tensor, blocks: list[tuple[int, int]]
) -> Tensor:
    """The normal deviate of Welch's t statistic of the later block's mean below the earlier one's."""
    found = []
    for before, after in blocks:
        middle = len(means) - after
        parts = [(slice(middle - before, middle), before), (slice(middle, None), after)]
        fall = means[parts[0][0]].mean() - means[parts[1][0]].mean()
        shares = torch.cat([squares[place] / size**2 for place, size in parts])
        degrees = torch.cat([counts[place] - 1 for place, _ in parts])
        total = shares.sum()
        found.append(
            _wallace(fall, total.sqrt(), total.square() / (shares.square() / degrees).sum().clamp(min=1e-300))
        )
    return torch.stack(found)


def _wallace(mean: Tensor, error: Tensor, degrees: Tensor) -> Tensor:
    """The normal deviate of a t statistic."""
    t = mean / error.clamp(
        min=1e-12 * mean.abs().max().item() + 1e-300
    )  # no noise at all: a very large number
    degrees = degrees.clamp(min=1.0)
    size = (degrees * torch.log1p(t.square() / degrees)).sqrt() * (8 * degrees + 1) / (8 * degrees + 3)
    return torch.sign(t) * size
