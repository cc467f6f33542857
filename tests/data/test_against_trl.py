"""TRL's trainers tokenise the same rows to the same ids."""

import pytest
from datasets import Dataset

from lightning_rlhf.data import load_rows, tokenize_preference, tokenize_sft, tokenize_unpaired
from tests.data.conftest import MARKED, make_tokenizer

trl = pytest.importorskip("trl")

CONVERSATION = [
    {"role": "user", "content": "what is this?"},
    {"role": "assistant", "content": "it is a cat"},
    {"role": "user", "content": "and the sky"},
    {"role": "assistant", "content": "blue"},
]
OTHER = [{"role": "assistant", "content": "a dog"}]
PLAIN = [
    {"prompt": "the sky is", "chosen": " blue", "rejected": " green"},
    {"prompt": "Human: what is ", "chosen": "this", "rejected": "it</s>"},
]
CHAT = [{"prompt": CONVERSATION[:1], "chosen": CONVERSATION[1:2], "rejected": OTHER}]

CONFIGS = {
    trl.SFTTrainer: trl.SFTConfig,
    trl.RewardTrainer: trl.RewardConfig,
    trl.DPOTrainer: trl.DPOConfig,
    trl.KTOTrainer: trl.KTOConfig,
}


def by_trl(trainer, rows, tokenizer, **settings):
    """What a trainer's own preparation makes of rows, without building its model."""
    bare = trainer.__new__(trainer)
    bare._tokenizer = tokenizer
    bare._is_vision_dataset = False
    bare.chat_template = None
    bare.completion_only_loss = False
    bare.assistant_only_loss = settings.get("assistant_only_loss", False)
    bare.calculate_KL = False
    bare.desirable_weight = bare.undesirable_weight = 1.0
    config = CONFIGS[trainer]
    args = config(output_dir="unused", report_to=[], use_cpu=True, bf16=False, max_length=None, **settings)
    if trainer is not trl.SFTTrainer:
        return bare._prepare_dataset(rows, tokenizer, args, "train")
    return bare._prepare_dataset(rows, tokenizer, args, False, None, "train")


@pytest.mark.parametrize("rows", [PLAIN, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("bos", [False, True])
def test_preference(rows, bos):
    tokenizer = make_tokenizer(add_bos=bos, chat_template=MARKED)
    ours = tokenize_preference(Dataset.from_list(rows), tokenizer)[0]
    for one, other in zip(ours, by_trl(trl.DPOTrainer, Dataset.from_list(rows), tokenizer), strict=True):
        assert one["prompt_ids"] == other["prompt_ids"]
        assert one["completion_ids"] == [other["chosen_ids"], other["rejected_ids"]]


@pytest.mark.assets
def test_preference_of_real_dialogue(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "gpt2-tokenizer")
    rows = load_rows(assets / "preferences" / "hh_helpful_test.jsonl.gz").select(range(100))
    rows = rows.filter(lambda row: row["chosen"] != row["rejected"])
    ours = tokenize_preference(rows, tokenizer, max_length=None)[0]
    for one, other in zip(ours, by_trl(trl.DPOTrainer, rows, tokenizer), strict=True):
        assert [one["prompt_ids"], *one["completion_ids"]] == [
            other["prompt_ids"],
            other["chosen_ids"],
            other["rejected_ids"],
        ]


@pytest.mark.parametrize("rows", [PLAIN, CHAT * 2], ids=["plain", "chat"])
@pytest.mark.parametrize("form", ["labelled", "pairs", "implicit"])
def test_unpaired(rows, form):
    tokenizer = make_tokenizer(chat_template=MARKED)
    if form == "labelled":
        rows = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in rows
            for name in ("chosen", "rejected")
        ]
    if form == "implicit":
        rows = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    data = Dataset.from_list(rows)
    if form == "implicit" and rows[0]["chosen"][0] == "t":
        data = data.select(
            [0]
        )  # where the common prefix ends inside a word, ours is cut back to its beginning
    ours = tokenize_unpaired(data, tokenizer, mismatched=False)[0]
    theirs = by_trl(trl.KTOTrainer, data, tokenizer)
    # TRL puts all chosen answers of a batch before all rejected ones.
    key = lambda row: (row["prompt_ids"], row["completion_ids"], row["label"])  # noqa: E731
    found = [{**row, "completion_ids": row["completion_ids"][0], "label": row["label"] == 1} for row in ours]
    assert sorted(map(key, found)) == sorted(map(key, theirs))


def test_prompt_completion():
    tokenizer = make_tokenizer(chat_template=MARKED)
    for row in (
        {"prompt": "the sky is", "completion": " blue"},
        {"prompt": CONVERSATION[:1], "completion": OTHER},
    ):
        rows = Dataset.from_list([row])
        one, other = tokenize_sft(rows, tokenizer)[0][0], by_trl(trl.SFTTrainer, rows, tokenizer)[0]
        assert one["prompt_ids"] + one["completion_ids"][0] == other["input_ids"]
        assert len(one["prompt_ids"]) == other["completion_mask"].index(1)


def test_assistant_only():
    tokenizer = make_tokenizer(chat_template=MARKED)
    rows = Dataset.from_list([{"messages": CONVERSATION}])
    one = tokenize_sft(rows, tokenizer)[0][0]
    other = by_trl(trl.SFTTrainer, rows, tokenizer, assistant_only_loss=True)[0]
    ids = one["prompt_ids"] + one["completion_ids"][0]
    labels = [-100] * len(one["prompt_ids"])
    labels += [
        i if m else -100 for i, m in zip(one["completion_ids"][0], one["completion_masks"][0], strict=True)
    ]
    assert ids == other["input_ids"][: len(ids)]
    assert labels + [-100] * (len(other["input_ids"]) - len(ids)) == other["labels"]
