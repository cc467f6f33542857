import gzip
import json

import pytest
import torch

from lightning_rlhf import SFT
from lightning_rlhf.cli.generate import prompt_ids
from tests.tokenizers import letters

SHORT = ("--sampling.max_new_tokens", "5")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "abc"}\n\n{"prompt": "de", "other": 1}\n')
    return path


def test_writes_one_row_a_completion_in_order(program, llama_dir, prompts, tmp_path):
    words = ("--model", llama_dir, "--prompts", prompts, "--output", "out.jsonl", *SHORT)
    code, printed, _ = program("generate", *words, "--sampling.num_samples", "2")
    found = rows(tmp_path / "out.jsonl")
    assert (code, [row["prompt"] for row in found]) == (0, ["abc", "abc", "de", "de"])
    assert set(found[0]) == {"prompt", "completion", "truncated"}
    assert "wrote 4 completions to out.jsonl" in printed
    code, _, error = program("generate", *words)
    assert code == 1
    assert "out.jsonl exists already" in error


def test_a_seed_repeats(program, llama_dir, prompts, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ("--model", llama_dir, "--prompts", prompts, "--output", name, "--seed", seed)
        program("generate", *words, "--sampling.max_new_tokens", 20)
    first, again, other = (rows(tmp_path / name) for name in "abc")
    assert first == again != other


def test_text_files_hold_one_prompt_a_line(program, llama_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("abc\nd e\n")
    program("generate", "--model", llama_dir, "--prompts", "prompts.txt", "--output", "out.jsonl", *SHORT)
    assert [row["prompt"] for row in rows(tmp_path / "out.jsonl")] == ["abc", "d e"]


def test_reads_a_checkpoint(program, llama_dir, tmp_path):
    from tests.models.test_export import checkpoint

    checkpoint(SFT(llama_dir), tmp_path / "a.ckpt")
    code, printed, _ = program("generate", "--model", "a.ckpt", "--prompt", "abc", *SHORT)
    assert code == 0
    assert printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give either --prompts FILE or --prompt TEXT"),
        (("--prompts", "nothing.jsonl"), "no file of prompts at nothing.jsonl"),
        (("--prompts", "broken.jsonl"), "broken.jsonl, line 2: not valid JSON"),
        (("--prompts", "column.jsonl.gz"), 'column.jsonl.gz, line 1: no column "prompt"'),
        (("--prompts", "empty.txt"), "empty.txt holds no prompt"),
        (("--prompt", "a", "--sampling.temperature", "-1"), "temperature must not be negative"),
    ],
)
def test_bad_input_is_named(program, llama_dir, tmp_path, words, message):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "empty.txt").write_text("\n")
    with gzip.open(tmp_path / "column.jsonl.gz", "wt") as file:
        file.write('{"text": "a"}\n')
    code, _, error = program("generate", "--model", llama_dir, *words)
    assert code in (1, 2)
    assert message in error


def test_a_missing_model_says_what_to_do(program):
    code, _, error = program("generate", "--model", "no/such", "--prompt", "a")
    assert code == 1
    assert "no model at 'no/such'" in error
    assert "hf download" in error


def test_prompt_ids():
    tokenizer = letters()
    assert prompt_ids(tokenizer, "ab") == tokenizer("ab").input_ids
    assert prompt_ids(tokenizer, "") == [tokenizer.bos_token_id]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}:"
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.decode(prompt_ids(tokenizer, messages)) == "hi:"


def test_a_failure_leaves_no_output(llama_dir, tmp_path):
    from lightning_rlhf.cli.generate import write_rows

    def broken():
        yield {"prompt": "a"}
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_rows(broken(), tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.assets
def test_greedy_story(program, assets):
    words = (
        "--model",
        assets / "stories260K-hf",
        "--prompt",
        "Once upon a time",
        "--sampling.temperature",
        "0",
    )
    _, printed, _ = program("generate", *words)
    assert printed.startswith(", there was a little girl named Lily. She loved to play outside in the park.")
    assert torch.is_grad_enabled()
