"""Rankings: a prompt and its completions, the best first, or by their ranks."""

import math

import pytest
import torch
from datasets import Dataset

from lightning_rlhf.data import PackCollator, PreferenceDataModule, PromptGroup, pack, tokenize_preference
from lightning_rlhf.data.formats import BadRow, read_example

RANKED = ("prompt", "completions")
USER = {"role": "user", "content": "hi"}


def says(text):
    return [{"role": "assistant", "content": text}]


def row(completions=("a", "b", "c"), **more):
    return {"prompt": "p", "completions": list(completions), **more}


def test_without_ranks_the_first_is_the_best():
    example = read_example(row(), RANKED)
    assert (example.completions, example.ranks) == (("a", "b", "c"), (0.0, 1.0, 2.0))


@pytest.mark.parametrize("ranks", [[3, 1, 3], [2, 0, 2], [0.5, -1.0, 0.5]])
def test_completions_are_put_best_first_and_ties_keep_their_order(ranks):
    example = read_example(row(ranks=ranks), RANKED)
    assert example.completions == ("b", "a", "c")
    assert example.ranks == (float(ranks[1]), float(ranks[0]), float(ranks[0]))


def test_conversations():
    example = read_example({"prompt": [USER], "completions": [says("x"), says("y")], "ranks": [2, 1]}, RANKED)
    assert (example.prompt, example.completions) == ([USER], (says("y"), says("x")))


@pytest.mark.parametrize(
    ("bad", "reason", "message"),
    [
        (row(ranks=[1, 2]), "contradictory ranks", "column 'ranks' has 2 values for 3 completions"),
        (row(ranks=[1, "2", 3]), "wrong type", "holds a value of type str; ranks are numbers"),
        (row(ranks=[1, True, 3]), "wrong type", "holds a value of type bool"),
        (row(ranks=[1, None, 3]), "wrong type", "holds a value of type NoneType"),
        (row(ranks=[1, math.nan, 3]), "not finite", "column 'ranks' is nan; it must be finite"),
        (row(ranks=[1, math.inf, 3]), "not finite", "column 'ranks' is inf"),
        (row(ranks="1,2,3"), "wrong type", "column 'ranks' is of type str; it must be a list of numbers"),
        (row(ranks=None), "missing value", "column 'ranks' has no value"),
        (row(ranks=[2, 2, 2]), "equal ranks", "all ranks are 2; there is nothing to learn"),
        (row("aba", ranks=[1, 2, 3]), "contradictory ranks", "completions 1 and 3 .* ranks are 1 and 3"),
        (row("abb"), "contradictory ranks", "completions 2 and 3 are identical"),
        (row("a"), "too few completions", "column 'completions' has 1; a ranking needs two or more"),
        (row(()), "wrong type", "a list of two or more completions"),
        (
            {"prompt": "p", "completions": "ab"},
            "wrong type",
            "column 'completions' is 'ab'; it must be a list",
        ),
        ({"prompt": "p", "completions": None}, "missing value", "column 'completions' has no value"),
        (row(["a", " "]), "empty completion", r"column 'completions\[1\]' is empty"),
        (row(["a", 3]), "wrong type", r"column 'completions\[1\]' is of type int"),
    ],
)
def test_bad_rankings(bad, reason, message):
    with pytest.raises(BadRow, match=message) as error:
        read_example(bad, RANKED)
    assert error.value.reason == reason


@pytest.mark.parametrize("margin", [math.nan, math.inf, -math.inf])
def test_a_margin_is_finite(margin):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": margin}
    with pytest.raises(BadRow, match=f"column 'margin' is {margin}; it must be finite"):
        read_example(pair, ("prompt", "chosen", "rejected"))


def test_the_same_completion_twice_in_a_tie_is_no_contradiction():
    assert read_example(row("aab", ranks=[1, 1, 2]), RANKED).ranks == (1.0, 1.0, 2.0)


def test_from_rows_to_a_batch(tokenizer):
    rows = Dataset.from_list([row("abc", ranks=[2, 1, 1]), row("xy", ranks=[1, 2])])
    tokenised, report = tokenize_preference(rows, tokenizer)
    batch = PackCollator()(tokenised[:])
    assert report.rows == 2
    assert batch.ranks.dtype == torch.float32
    assert batch.ranks.tolist() == [1, 1, 2, 1, 2]
    first = [tokenizer.decode(ids[0]) for ids in tokenised[0]["completion_ids"]]
    assert first == ["b", "c", "a"]
    assert batch.to("cpu").ranks.tolist() == batch.ranks.tolist()
    assert batch.to("meta").ranks.device.type == "meta"


def test_pairs_have_no_ranks(tokenizer):
    rows = Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2}])
    batch = PackCollator()(tokenize_preference(rows, tokenizer)[0][:])
    assert batch.ranks is None
    assert batch.extras["margin"].tolist() == [2.0]


def test_bad_rankings_follow_on_bad_row(tokenizer):
    rows = Dataset.from_list([row(ranks=[1, 2, 3]), row(ranks=[1, 1, 1]), row("abb", ranks=[1, 2, 3])])
    with pytest.raises(ValueError, match="the Dataset, row 2: all ranks are 1.*on_bad_row='drop'"):
        tokenize_preference(rows, tokenizer)
    data = PreferenceDataModule(rows, tokenizer=tokenizer, on_bad_row="drop")
    data.setup("fit")
    assert data.report["train"].dropped == {"equal ranks": 1, "contradictory ranks": 1}
    (batch,) = data.train_dataloader()
    assert batch.ranks.tolist() == [1, 2, 3]


def test_packing_refuses_ranks_that_do_not_fit():
    with pytest.raises(ValueError, match="row 4: 1 ranks for 2 completions"):
        pack([PromptGroup([1], [[2], [3]], row_id=4, ranks=[0])])
    with pytest.raises(ValueError, match="rank all or none"):
        pack([PromptGroup([1], [[2], [3]], ranks=[0, 1]), PromptGroup([1], [[2], [3]])])
