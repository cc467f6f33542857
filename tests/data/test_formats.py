import json

import pytest

from lightning_rlhf.data.formats import BadRow, read_example, recognise
from lightning_rlhf.data.prompts import split_prompt

USER = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
PAIR = ("prompt", "chosen", "rejected")


@pytest.mark.parametrize(
    ("columns", "task", "expected"),
    [
        (["text", "id"], "sft", ("text",)),
        (["messages"], "sft", ("messages",)),
        (["conversations"], "sft", ("conversations",)),
        (["completion", "prompt", "text"], "sft", ("prompt", "completion")),
        (["rejected", "chosen", "prompt", "score"], "preference", PAIR),
        (["rejected", "chosen"], "preference", ("chosen", "rejected")),
    ],
)
def test_formats_are_recognised(columns, task, expected):
    assert recognise(columns, task) == expected


def test_misspelt_and_missing_columns():
    with pytest.raises(
        ValueError, match=r"f\.jsonl has the columns promt, completion\..*'promt' a misspelling of 'prompt'"
    ):
        recognise(["promt", "completion"], "sft", "f.jsonl")
    with pytest.raises(
        ValueError, match="needs prompt . completion, or messages.*Rename your columns: a datamodule's"
    ):
        recognise(["question", "answer"], "sft")
    with pytest.raises(
        ValueError, match="These are the columns of preference data: use PreferenceDataModule"
    ):
        recognise(["prompt", "chosen", "rejected"], "sft")
    with pytest.raises(
        ValueError, match="These are the columns of supervised fine-tuning: use SFTDataModule"
    ):
        recognise(["prompt", "completion"], "preference")


@pytest.mark.parametrize(
    ("column", "task"), [("promt", "preference"), ("Prompt", "preference"), ("propmt", "sft")]
)
def test_a_misspelt_column_is_not_ignored_where_a_simpler_format_fits(column, task):
    simpler = ["chosen", "rejected"] if task == "preference" else ["completion", "text"]
    with pytest.raises(ValueError, match=f"Is '{column}' a misspelling of 'prompt'. Rename it"):
        recognise([column, *simpler], task)
    assert recognise(["prompt_id", *simpler], task) == tuple(simpler[-2 if task == "preference" else -1 :])


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": None}, "missing value", "column 'rejected' has no value"),
        (
            {"prompt": "a", "chosen": 3, "rejected": "b"},
            "wrong type",
            "column 'chosen' is of type int; it must be text",
        ),
        ({"prompt": "a", "chosen": ["x"], "rejected": "b"}, "wrong type", "column 'chosen' is of type list"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "empty completion", "column 'chosen' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "empty completion", "column 'rejected' is empty"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            "identical pair",
            "are identical; a pair must differ",
        ),
        (
            {"prompt": [USER], "chosen": [{"role": "assistant", "content": " "}], "rejected": [NO]},
            "empty completion",
            "column 'chosen' is empty",
        ),
        (
            {"prompt": [{"content": "x"}], "chosen": [YES], "rejected": [NO]},
            "wrong type",
            "column 'prompt' has a message with content; it needs 'role' and 'content'",
        ),
        (
            {"prompt": [{"role": "user", "content": 3}], "chosen": [YES], "rejected": [NO]},
            "wrong type",
            "'content' is of type int",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"},
            "wrong type",
            "column 'margin' is of type str",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "tools": "{"},
            "wrong type",
            "column 'tools' is text but not",
        ),
    ],
)
def test_bad_rows(row, reason, message):
    with pytest.raises(BadRow, match=message) as error:
        read_example(row, PAIR)
    assert error.value.reason == reason


def test_extras_and_template_arguments_travel_along():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"prompt": [USER], "chosen": [YES], "rejected": [NO], "margin": 2, "tools": json.dumps(tools)}
    row["chat_template_kwargs"] = {"enable_thinking": False, "other": None}
    example = read_example(row, PAIR)
    assert example.extras == {"margin": 2.0}
    assert example.tools == tools
    assert example.template_kwargs == {"enable_thinking": False}


def test_nulls_that_arrow_fills_in_are_no_part_of_a_message():
    row = {"messages": [{**USER, "tool_calls": None}, {**YES, "name": None}]}
    assert read_example(row, ("messages",)).completions == ([USER, YES],)


def test_conversations_are_converted():
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}
    example = read_example(row, ("conversations",))
    assert example.whole
    assert example.completions == ([USER, YES],)


def test_system_goes_first_unless_there_is_one():
    system = {"role": "system", "content": "be kind"}
    row = {"prompt": [USER], "completion": [YES], "system": "be kind"}
    assert read_example(row, ("prompt", "completion")).prompt == [system, USER]
    row["prompt"] = [{"role": "system", "content": "mine"}, USER]
    assert read_example(row, ("prompt", "completion")).prompt == row["prompt"]
    assert (
        read_example({"messages": [USER, YES], "system": "be kind"}, ("messages",)).completions[0][0]
        == system
    )


def test_text_beside_messages_becomes_a_message():
    example = read_example({"prompt": [USER], "chosen": "yes", "rejected": "no"}, PAIR)
    assert example.completions == ([YES], [NO])
    example = read_example({"prompt": "hi", "chosen": [YES], "rejected": [NO]}, PAIR)
    assert example.prompt == [USER]
    # HuggingFaceH4/ultrafeedback_binarized: the prompt as text, and again as the first turn of both
    example = read_example({"prompt": "hi", "chosen": [USER, YES], "rejected": [USER, NO]}, PAIR)
    assert (example.prompt, example.completions) == ([USER], ([YES], [NO]))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: sky? A: blue", "Q: sky? A: green", "Q: sky? A:"),
        ("The sky is blue", "The sky is black", "The sky is"),  # not inside a word
        (
            "\n\nHuman: a\n\nAssistant: It is",
            "\n\nHuman: a\n\nAssistant: It was",
            "\n\nHuman: a\n\nAssistant:",
        ),
        ("one", "two", ""),
        ("one two", "one two three", "one"),  # something is left of both
        ([USER, YES], [USER, NO], [USER]),
        ([USER, YES], [USER, YES, USER], [USER]),
        ([YES], [NO], []),
    ],
)
def test_the_implicit_prompt(chosen, rejected, prompt):
    found, rest = split_prompt(chosen, rejected)
    assert found == prompt
    assert [found + r for r in rest] == [chosen, rejected]
    assert all(rest)
