import pytest
import torch

from lightning_rlhf.data.packing import PromptGroup, pack

GROUPS = [
    PromptGroup([1, 2, 3], [[4, 5], [6]], masks=[[True, False], [True]], row_id=7, extras={"margin": 0.5}),
    PromptGroup([8], [[9]], row_id=9, extras={"margin": -1.0}),
]


def test_the_row_by_hand():
    batch = pack(GROUPS)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert batch.predictors.tolist() == [2, 2, 6]
    assert batch.targets.tolist() == [4, 6, 9]
    assert batch.target_lengths.tolist() == list(batch.num_targets) == [1, 1, 1]
    assert batch.row_ids == (7, 9)
    assert batch.extras["margin"].tolist() == [0.5, -1.0]
    assert (batch.num_groups, batch.num_completions, batch.max_positions) == (2, 3, 5)


def test_segments_cover_the_row_once():
    batch = pack(GROUPS)
    assert [tuple(s) for s in batch.segments] == [(0, 5, 0, 0), (5, 6, 0, 3), (6, 8, 6, 6)]


def test_parts_by_hand():
    batch = pack([PromptGroup([1, 2], [[3], [4, 5], [6]]), PromptGroup([7], [[8, 9], [10]])])
    first, others = batch.parts(1)
    assert batch.input_ids[first.tokens].tolist() == [1, 2, 3, 7, 8, 9]
    assert [tuple(s) for s in first.segments] == [(0, 3, 0, 0), (3, 6, 3, 3)]
    assert batch.input_ids[others.tokens].tolist() == [4, 5, 6, 10]
    assert [tuple(s) for s in others.segments] == [(6, 8, 0, 2), (8, 9, 0, 2), (9, 10, 3, 4)]
    assert batch.are_first(1) == [True, False, False, True, False]
    whole, nothing = batch.parts(3)
    assert whole.segments == batch.segments
    assert not nothing.segments
    assert not len(nothing.tokens)


def test_padded_is_the_same_text():
    batch = pack(GROUPS)
    padded = batch.padded()
    rows = [ids[mask].tolist() for ids, mask in zip(padded.input_ids, padded.attention_mask, strict=True)]
    assert rows == [[1, 2, 3, 4, 5], [1, 2, 3, 6], [8, 9]]
    flat = padded.input_ids.flatten()
    assert flat[padded.predictors].tolist() == batch.input_ids[batch.predictors].tolist()
    assert flat[padded.predictors + 1].tolist() == batch.targets.tolist()


def test_moves_tensors_and_keeps_lengths():
    moved = pack(GROUPS).to("meta")
    assert moved.input_ids.device.type == moved.extras["margin"].device.type == "meta"
    assert moved.prompt_lengths == (3, 1)


@pytest.mark.parametrize(
    ("group", "match"),
    [
        (PromptGroup([], [[1]], row_id=3), "row 3: the prompt has no token"),
        (PromptGroup([1], [[]], row_id=3), "row 3: every group needs completions"),
        (PromptGroup([1], [], row_id=3), "row 3: every group needs completions"),
        (PromptGroup([1], [[2]], masks=[[True, True]], row_id=3), "row 3: a mask has another length"),
    ],
)
def test_refuses_what_cannot_be_scored(group, match):
    with pytest.raises(ValueError, match=match):
        pack([group])


def test_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="at least one prompt group"):
        pack([])


def test_nothing_of_a_batch_lies_on_the_device_by_accident():
    assert all(t.dtype == torch.long for t in (pack(GROUPS).input_ids, pack(GROUPS).targets))


def test_groups_are_those_that_were_packed():
    groups = [
        PromptGroup([5, 6], [[7, 8], [9]], [[False, True], [True]], row_id=3, extras={"margin": 0.5}),
        PromptGroup([5], [[6, 6, 6]], [[True, False, True]], row_id=4, extras={"margin": 1.5}),
    ]
    assert pack(groups).groups() == groups
