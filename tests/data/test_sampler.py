import numpy as np
import pytest

from lightning_rlhf.data import GroupBatchSampler

LENGTHS = np.random.default_rng(0).integers(5, 200, 503).tolist()
HOWS = [{"batch_size": 8}, {"max_tokens": 900}, {"batch_size": 8, "length_grouped": True}]
HOWS += [{"max_tokens": 900, "length_grouped": True}]


def batches(epoch=0, lengths=LENGTHS, **how):
    sampler = GroupBatchSampler(lengths, **how)
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_once_an_epoch_on_some_rank_and_equally_many_batches(how, ranks):
    for epoch in range(4):
        by_rank = [batches(epoch, num_replicas=ranks, rank=rank, **how) for rank in range(ranks)]
        assert len({len(found) for found in by_rank}) == 1
        assert sorted(row for found in by_rank for batch in found for row in batch) == list(
            range(len(LENGTHS))
        )


@pytest.mark.parametrize("how", HOWS)
def test_the_order_is_a_function_of_seed_and_epoch(how):
    assert batches(1, seed=3, **how) == batches(1, seed=3, **how)
    assert batches(1, seed=3, **how) != batches(2, seed=3, **how)
    assert batches(1, seed=3, **how) != batches(1, seed=4, **how)
    unshuffled = [row for batch in batches(1, shuffle=False, max_tokens=900) for row in batch]
    assert unshuffled == list(range(len(LENGTHS)))


def test_budget():
    for found in (batches(max_tokens=900), batches(max_tokens=900, length_grouped=True)):
        sums = [sum(LENGTHS[i] for i in batch) for batch in found]
        assert max(sums) <= 900
        assert np.mean(sums) > 700
    assert batches(lengths=[5, 50, 5], max_tokens=10, shuffle=False) == [
        [0],
        [1],
        [2],
    ]  # a long row has its own


def test_every_epoch_has_as_many_batches_as_the_first():
    sampler = GroupBatchSampler(LENGTHS, max_tokens=900)
    assert {len(sampler.batches(epoch)) for epoch in range(30)} == {len(sampler)}


def test_length_grouping_puts_like_to_like():
    def spread(found):
        return np.mean([np.ptp([LENGTHS[i] for i in batch]) for batch in found])

    assert spread(batches(batch_size=8, length_grouped=True)) < spread(batches(batch_size=8)) / 4


def test_drop_last():
    found = batches(batch_size=8, drop_last=True)
    assert {len(batch) for batch in found} == {8}
    assert len(found) == 62
    assert len(batches(batch_size=8, drop_last=True, num_replicas=4)) == 15
    with pytest.raises(ValueError, match="5 rows make 0 batches, too few for 1 ranks with drop_last"):
        batches(lengths=[1] * 5, batch_size=8, drop_last=True)


def test_more_ranks_than_rows_repeats_rows():
    assert [batches(lengths=[1], num_replicas=2, rank=rank) for rank in (0, 1)] == [[[0]], [[0]]]


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match=r"batch_size \(0\)"):
        GroupBatchSampler([1], batch_size=0)
