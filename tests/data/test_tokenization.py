import pytest
from datasets import Dataset

from lightning_rlhf.data import PackCollator, tokenize_preference, tokenize_sft
from tests.data.conftest import CHATML, FORGETFUL, MARKED, make_tokenizer

CONVERSATION = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what is this?"},
    {"role": "assistant", "content": "it is a cat"},
    {"role": "user", "content": "and the sky"},
    {"role": "assistant", "content": "blue"},
]
TEXTS = [
    ("the sky is", " blue"),
    ("the sky is ", "blue"),
    ("Human: what is", " this? </s>"),
    ("", "it is"),
    ("a", "é🙂"),
]


def sft(tokenizer, *rows, **how):
    return tokenize_sft(Dataset.from_list(list(rows)), tokenizer, **how)[0].to_list()


def pairs(tokenizer, *rows, **how):
    return tokenize_preference(Dataset.from_list(list(rows)), tokenizer, **how)[0].to_list()


def counted(row, tokenizer):
    """The runs of tokens that count, as text."""
    masks = row["completion_masks"] or [[True] * len(c) for c in row["completion_ids"]]
    runs, current = [], []
    for token, counts in [*zip(row["completion_ids"][0], masks[0], strict=True), (0, False)]:
        if counts:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("prompt", "completion"), TEXTS)
def test_ids_of_prompt_and_completion_are_those_of_the_whole(prompt, completion, bos):
    tokenizer = make_tokenizer(add_bos=bos)
    (row,) = sft(tokenizer, {"prompt": prompt, "completion": completion})
    whole = tokenizer(prompt + completion)["input_ids"]
    start = [] if bos or prompt else [tokenizer.bos_token_id]
    end = [] if whole[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
    assert row["prompt_ids"] + row["completion_ids"][0] == start + whole + end
    assert row["prompt_ids"]
    assert row["completion_ids"][0].count(tokenizer.eos_token_id) == 1


def test_a_prompt_of_which_no_token_stands_is_tokenised_apart():
    tokenizer = make_tokenizer()
    assert len(tokenizer("the")["input_ids"]) < len(
        tokenizer("t")["input_ids"] + tokenizer("he")["input_ids"]
    )
    (row,) = sft(tokenizer, {"prompt": "t", "completion": "he"})
    assert row["prompt_ids"] == tokenizer("t")["input_ids"]
    assert row["completion_ids"][0] == [*tokenizer("he")["input_ids"], tokenizer.eos_token_id]


def test_text_starts_with_bos_and_all_of_it_counts(tokenizer):
    (row,) = sft(tokenizer, {"text": "the sky"})
    assert row["prompt_ids"] == [tokenizer.bos_token_id]
    assert row["completion_ids"] == [[*tokenizer("the sky")["input_ids"], tokenizer.eos_token_id]]
    assert row["completion_masks"] is None
    nameless = make_tokenizer(bos_token=None)
    (row,) = sft(nameless, {"text": "the sky"})
    assert row["prompt_ids"] + row["completion_ids"][0] == [
        *nameless("the sky")["input_ids"],
        nameless.eos_token_id,
    ]
    assert len(row["prompt_ids"]) == 1


@pytest.mark.parametrize(
    "special",
    [
        {"pad_token": None},
        {"pad_token": "</s>"},
        {"bos_token": "</s>"},
        {"bos_token": "</s>", "pad_token": "</s>"},
    ],
)
def test_special_tokens_may_be_missing_or_coincide(special):
    tokenizer = make_tokenizer(**special)
    (row,) = pairs(tokenizer, {"prompt": "the sky", "chosen": " is blue", "rejected": " is"})
    batch = PackCollator()([row])
    assert [c[-1] for c in row["completion_ids"]] == [tokenizer.eos_token_id] * 2
    assert batch.targets.tolist() == row["completion_ids"][0] + row["completion_ids"][1]


def test_without_eos_completions_are_not_closed_and_the_report_says_so():
    tokenizer = make_tokenizer(eos_token=None)
    rows = Dataset.from_list([{"prompt": "the", "completion": " sky"}])
    tokenised, report = tokenize_sft(rows, tokenizer)
    assert tokenizer.decode(tokenised[0]["completion_ids"][0]) == " sky"
    assert "no EOS token" in str(report)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_turn_of_the_assistant_counts_and_no_other(template):
    tokenizer = make_tokenizer(chat_template=template)
    (row,) = sft(tokenizer, {"messages": CONVERSATION})
    # Without markers what follows the opening belongs to the turn, its line break included.
    expected = ["it is a cat<|im_end|>", "blue<|im_end|>"]
    assert [run.removesuffix("\n") for run in counted(row, tokenizer)] == expected
    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    whole = row["prompt_ids"] + row["completion_ids"][0]
    assert whole == ids[: len(whole)]
    assert tokenizer.decode(ids[len(whole) :]).strip() == ""


def test_all_tokens_count_on_request(chat):
    (row,) = sft(chat, {"messages": CONVERSATION}, loss_on="all")
    text = chat.apply_chat_template(CONVERSATION, tokenize=False)
    assert len(row["prompt_ids"]) == 1
    assert chat.decode(row["prompt_ids"] + row["completion_ids"][0]) == text
    (row,) = sft(chat, {"prompt": "the sky", "completion": " is"}, loss_on="all")
    assert row["prompt_ids"] == [chat.bos_token_id]


def test_completion_or_only_the_assistants_turns_of_it(chat):
    row = {"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:]}
    (whole,) = sft(chat, row)
    assert whole["completion_masks"] is None
    assert chat.decode(whole["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert chat.eos_token_id not in whole["completion_ids"][0]  # the template closes its own
    (turns,) = sft(chat, row, loss_on="assistant")
    assert [run.strip() for run in counted(turns, chat)] == ["it is a cat<|im_end|>", "blue<|im_end|>"]
    assert turns["prompt_ids"] == whole["prompt_ids"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = make_tokenizer(chat_template=FORGETFUL)
    thought = [dict(turn) for turn in CONVERSATION]
    thought[2]["content"] = "<think>hm</think>a cat"
    with pytest.raises(
        ValueError, match="row 1: the chat template writes earlier turns differently.*generation"
    ):
        sft(tokenizer, {"messages": thought})
    assert sft(tokenizer, {"messages": thought}, loss_on="all")
    assert sft(tokenizer, {"messages": CONVERSATION})  # nothing to take out, nothing rewritten


def test_what_a_template_refuses_names_the_row():
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        ValueError, match="row 1: the chat template refuses the conversation: roles must alternate"
    ):
        sft(tokenizer, {"messages": CONVERSATION})


def test_conversations_need_a_template(tokenizer):
    with pytest.raises(
        ValueError, match="has no chat template. Use the tokenizer of an instruction-tuned model"
    ):
        sft(tokenizer, {"messages": CONVERSATION}, on_bad_row="drop")


def test_a_conversation_without_the_assistant(chat):
    with pytest.raises(ValueError, match="row 1: no token is written by the assistant"):
        sft(chat, {"messages": CONVERSATION[:2]})


def test_assistant_turns_of_plain_text_do_not_exist(tokenizer):
    with pytest.raises(ValueError, match="loss_on='assistant' needs conversational data"):
        sft(tokenizer, {"text": "the"}, loss_on="assistant")


def test_template_arguments_are_used():
    tokenizer = make_tokenizer(
        chat_template="{% if tools %}TOOLS{% endif %}{% if loud %}LOUD{% endif %}" + CHATML
    )
    row = {
        "prompt": CONVERSATION[:2],
        "completion": CONVERSATION[2:3],
        "chat_template_kwargs": {"loud": True},
    }
    row["tools"] = [{"type": "function", "function": {"name": "f"}}]
    (found,) = sft(tokenizer, row)
    assert tokenizer.decode(found["prompt_ids"]).startswith("TOOLSLOUD")


def test_pairs_share_the_prompt(chat):
    implicit = {
        "chosen": CONVERSATION[1:3],
        "rejected": [CONVERSATION[1], {"role": "assistant", "content": "a dog"}],
    }
    explicit = {"prompt": CONVERSATION[1:2], **{name: turns[1:] for name, turns in implicit.items()}}
    (one,), (other,) = pairs(chat, implicit), pairs(chat, explicit)
    assert one == other
    assert [chat.decode(c) for c in one["completion_ids"]] == ["it is a cat<|im_end|>\n", "a dog<|im_end|>\n"]


def test_truncation_and_its_counts(tokenizer):
    long = {"prompt": "the sky is blue and the sea is green", "chosen": " blue and green", "rejected": " it"}
    rows = Dataset.from_list([long, {"prompt": "a", "chosen": "b", "rejected": "c"}])
    whole = tokenize_preference(rows, tokenizer)[0][0]
    cut, report = tokenize_preference(rows, tokenizer, max_length=7, max_prompt_length=5)
    assert cut[0]["prompt_ids"] == whole["prompt_ids"][-5:]
    assert cut[0]["completion_ids"] == [c[:2] for c in whole["completion_ids"]]
    assert (report.prompts_truncated, report.completions_truncated, report.tokens) == (1, 1, 9 + 5)
    assert "2 rows read from the Dataset, 0 dropped; 1 prompts and 1 completions truncated; 14 tokens" in str(
        report
    )


def test_bos_survives_truncation():
    tokenizer = make_tokenizer(add_bos=True)
    (row,) = sft(tokenizer, {"prompt": "the sky is blue and", "completion": " green"}, max_prompt_length=3)
    assert row["prompt_ids"][0] == tokenizer.bos_token_id
    assert len(row["prompt_ids"]) == 3


def test_a_prompt_longer_than_the_limit(tokenizer):
    long = {"prompt": "the sky is blue", "completion": " it"}
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}, long])
    with pytest.raises(
        ValueError, match=r"f, row 2: column 'prompt' has \d+ tokens.*raise max_length, or set max_prompt"
    ):
        tokenize_sft(rows, tokenizer, max_length=4, name="f")
    kept, report = tokenize_sft(rows, tokenizer, max_length=4, on_bad_row="drop")
    assert len(kept) == 1
    assert report.dropped == {"prompt too long": 1}
    with pytest.raises(ValueError, match=r"max_prompt_length \(8\) must be less than max_length \(4\)"):
        tokenize_sft(rows, tokenizer, max_length=4, max_prompt_length=8)


def test_truncation_that_leaves_nothing_to_learn(chat):
    messages = [*CONVERSATION[1:3], {"role": "user", "content": "x " * 20}, CONVERSATION[4]]
    (row,) = sft(chat, {"messages": messages}, max_length=30)
    assert len(row["prompt_ids"]) + len(row["completion_ids"][0]) <= 30
    with pytest.raises(ValueError, match="leaves no room for a completion"):
        sft(chat, {"messages": messages}, max_length=10)


def test_drop_counts_by_reason_and_renumbers(tokenizer):
    good, same = (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
    )
    empty = {"prompt": "a", "chosen": "", "rejected": "b"}
    rows, report = tokenize_preference(
        Dataset.from_list([same, good, empty, same, good]), tokenizer, on_bad_row="drop"
    )
    assert report.dropped == {"identical pair": 2, "empty completion": 1}
    assert "3 dropped (2 identical pair, 1 empty completion)" in str(report)
    assert (rows["row_id"][:], rows["source_row"][:]) == ([0, 1], [1, 4])
    with pytest.raises(ValueError, match="every row was dropped: 1 rows read"):
        tokenize_preference(Dataset.from_list([same]), tokenizer, on_bad_row="drop")


def test_errors_name_data_row_column_and_remedy(tokenizer):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}])
    with pytest.raises(
        ValueError, match=r"f\.jsonl, row 2: column 'completion' is empty.*Correct .* on_bad_row='drop'"
    ):
        tokenize_sft(rows, tokenizer, name="f.jsonl")


def test_an_empty_prompt_needs_bos_or_a_common_first_token():
    tokenizer = make_tokenizer(bos_token=None)
    with pytest.raises(ValueError, match="row 1: the prompt is empty, and the tokenizer has no BOS"):
        pairs(tokenizer, {"chosen": "abc", "rejected": "xyz"})
    (row,) = pairs(make_tokenizer(), {"chosen": "abc", "rejected": "xyz"})
    assert len(row["prompt_ids"]) == 1


def test_margins_reach_the_batch(tokenizer):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5}
    assert PackCollator()(pairs(tokenizer, row)).extras["margin"].tolist() == [0.5]
