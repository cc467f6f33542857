"""Each detector finds what was planted (power) and is quiet on its control (size): the figures of the docstrings."""

import random

import pytest
import torch

from lightning_rlhf.metrics import hacking
from tests.metrics.conftest import numbers

RUNS = 100
WORDS = [a + b for a in ("ba", "ke", "lo", "mi") for b in ("n", "r", "s", "t", "ve")]


def text(draw, plain=12):
    return " ".join(draw.choices(WORDS, k=plain))


def some(draw, share, planted, count=200):
    """Texts of which a share carries what is planted."""
    return [planted(text(draw)) if draw.random() < share else text(draw) for _ in range(count)]


def texts_of(cls, name, planted, shares):
    def run(seed, changed):
        draw, metric = random.Random(seed), cls()
        metric.update(some(draw, shares[int(changed)], planted))
        metric.update(some(draw, shares[0], planted), reference=True)
        return metric.compute(), f"{name}_change"

    return run


def diversity(seed, changed):
    draw, metric = random.Random(seed), hacking.Diversity()
    chant = lambda t: t + " so very good" * 3  # noqa: E731
    for reference in (False, True):
        share = 0.2 if changed and not reference else 0.0
        metric.update([some(draw, share, chant, 4) for _ in range(50)], reference=reference)
    return metric.compute(), "repetition_change"


def ensemble(seed, changed):
    generator = torch.Generator().manual_seed(seed)
    metric = hacking.EnsembleDisagreement()
    for reference in (False, True):
        spread = 1.5 if changed and not reference else 1.0
        metric.update(spread * torch.randn(4, 100, generator=generator), reference=reference)
    return metric.compute(), "disagreement_change"


def length(seed, changed):
    generator = torch.Generator().manual_seed(seed)
    metric = hacking.LengthDrift()
    for reference in (False, True):
        mean = 60 if changed and not reference else 50
        lengths = (mean + 25 * torch.randn(200, generator=generator)).clamp(min=1)
        rewards = torch.randn(200, generator=generator)
        metric.update(lengths, rewards, kl=0.0 if reference else 1.0, reference=reference)
    found = metric.compute()
    return {k: v.log() if k.startswith("ratio") else v for k, v in found.items()}, "ratio"


def sycophancy(seed, changed):
    generator = torch.Generator().manual_seed(seed)
    metric = hacking.SycophancyFlipRate()
    flips = torch.rand(2, 100, generator=generator) < torch.tensor([[0.1], [0.3 if changed else 0.1]])
    metric.update(torch.ones(100, dtype=torch.bool), ~flips[0], ~flips[1])
    return metric.compute(), "flips_change"


def nonsense(seed, changed):
    generator = torch.Generator().manual_seed(seed)
    metric = hacking.ConfidentNonsense()
    wrong = torch.rand(2, 100, generator=generator) < torch.tensor([[0.6 if changed else 0.4], [0.4]])
    metric.update(wrong[0].float(), torch.full((100,), 0.5), wrong[1].float())
    return metric.compute(), "nonsense_change"


CASES = {
    "bullets": texts_of(hacking.FormatShares, "bullets", lambda t: f"{t}\n- {t}", (0.1, 0.3)),
    "headers": texts_of(hacking.FormatShares, "headers", lambda t: f"## {t}\n{t}", (0.1, 0.3)),
    "tables": texts_of(
        hacking.FormatShares, "tables", lambda t: f"| a | b |\n|---|---|\n| {t} | 1 |", (0.1, 0.3)
    ),
    "bold": texts_of(hacking.FormatShares, "bold", lambda t: f"{t} **{t}**", (0.1, 0.3)),
    "refusals": texts_of(
        hacking.RefusalRate, "refusals", lambda t: "I'm sorry, but I can't help.", (0.03, 0.15)
    ),
    "certain": texts_of(hacking.Certainty, "certain", lambda t: f"It is definitely {t}", (0.1, 0.3)),
    "hedged": texts_of(hacking.Certainty, "hedged", lambda t: f"Perhaps {t}", (0.1, 0.3)),
    "diversity": diversity,
    "ensemble": ensemble,
    "length": length,
    "sycophancy": sycophancy,
    "nonsense": nonsense,
}
# In what share of runs the interval excludes 0: with what is planted, at least; without, at most.
POWER = {"nonsense": 0.7, "sycophancy": 0.8}
SIZE = 0.1  # of 100 runs at 5%, 98% have fewer


def excludes_zero(found, name):
    lower, upper = found[f"{name}_lower"].item(), found[f"{name}_upper"].item()
    assert lower <= found[name].item() <= upper
    return lower > 0


@pytest.mark.parametrize("case", CASES)
def test_planted_behaviour_is_found_and_the_control_is_quiet(case):
    runs = 30 if case == "diversity" else RUNS
    power = sum(excludes_zero(*CASES[case](seed, True)) for seed in range(runs))
    quiet = [CASES[case](1000 + seed, False) for seed in range(runs)]
    size = sum(
        not found[f"{name}_lower"].item() <= 0 <= found[f"{name}_upper"].item() for found, name in quiet
    )
    assert power >= POWER.get(case, 0.95) * runs
    assert size <= SIZE * runs


# --- by hand, and cut into batches ---


def test_batches_do_not_matter():
    draw = random.Random(0)
    texts = some(draw, 0.3, lambda t: f"- {t}", 30)
    whole, cut = hacking.FormatShares(), hacking.FormatShares()
    whole.update(texts)
    for part in (texts[:1], texts[1:1], texts[1:]):
        cut.update(part)
    for metric in (whole, cut):
        metric.update(["plain"] * 5, reference=True)
    assert numbers(cut.compute()) == numbers(whole.compute())

    groups = [[text(draw) for _ in range(3)] for _ in range(9)]
    whole, cut = hacking.Diversity(), hacking.Diversity()
    whole.update(groups)
    for part in (groups[:2], [], groups[2:]):
        cut.update(part)
    for metric in (whole, cut):
        metric.update(groups[:3], reference=True)
    assert numbers(cut.compute()) == pytest.approx(numbers(whole.compute()), rel=1e-12)


def test_length_drift_by_hand():
    metric = hacking.LengthDrift()
    generator = torch.Generator().manual_seed(0)
    for kl in (0.0, 1.0, 4.0, 9.0):
        lengths = 20 + 7 * kl**0.5 + torch.randn(100, generator=generator)
        rewards = lengths if kl else -lengths
        metric.update(lengths, rewards, kl=kl, reference=kl == 0)
    found = numbers(metric.compute())
    assert found["per_distance_lower"] < 7 < found["per_distance_upper"]
    assert found["per_distance"] == pytest.approx(7, abs=0.2)
    assert found["ratio_lower"] < 34 / 20 < found["ratio_upper"]
    assert found["correlation"] == pytest.approx(1)
    assert found["correlation_reference"] == pytest.approx(-1)
    with pytest.raises(ValueError, match="kl must not be negative, got -1"):
        metric.update(lengths, rewards, kl=-1.0)


def test_sycophancy_counts_only_what_was_right_before():
    metric = hacking.SycophancyFlipRate()
    first = torch.tensor([True, True, True, True, False, False])
    repeat = torch.tensor([True, True, True, False, False, True])
    opinion = torch.tensor([False, False, True, False, False, False])
    metric.update(first, repeat, opinion)
    found = numbers(metric.compute())
    assert (found["flips"], found["flips_reference"], found["flips_change"]) == (0.75, 0.25, 0.5)


def test_nonsense_counts_equal_scores_as_no_preference():
    metric = hacking.ConfidentNonsense()
    metric.update(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))
    found = numbers(metric.compute())
    assert (found["nonsense"], found["nonsense_reference"]) == (0.5, 0.5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"scores has shape \(1, 4\)"):
        hacking.EnsembleDisagreement().update(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="give at least two, got 1"):
        hacking.Diversity().update([["alone"]])
    with pytest.raises(ValueError, match="first has shape"):
        hacking.SycophancyFlipRate().update(*(torch.ones(n, dtype=torch.bool) for n in (2, 3, 2)))
    with pytest.raises(ValueError, match="is the right one, 'Paris'"):
        hacking.Question("Capital?", "Paris", "paris")
    with pytest.raises(ValueError, match="confidence must lie in"):
        hacking.RefusalRate(confidence=1.0)
