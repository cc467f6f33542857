from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from lightning_rlhf.algorithms import SFT
from lightning_rlhf.algorithms.footprint import forecast
from lightning_rlhf.cli import memory
from lightning_rlhf.cli.memory import GIB, RESERVE, Device, DoesNotFitError, MemoryCLI, device_of
from lightning_rlhf.cli.memory_config import training_of
from lightning_rlhf.cli.memory_switches import suggestions
from lightning_rlhf.cli.training import fit

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
# Algorithm, completions that are not sampled, those learnt from, whether there is a reference, and a critic, members.
EXPECTED = {
    "sft": ("SFT", 1, None, False, False, 1),
    "dpo": ("DPO", 2, None, True, False, 1),
    "ipo": ("DPO", 2, None, True, False, 1),
    "orpo": ("DPO", 2, None, False, False, 1),
    "simpo": ("DPO", 2, None, False, False, 1),
    "kto": ("KTO", 2, 1, True, False, 1),
    "reward_model": ("RewardModel", 2, None, False, False, 1),
    "reward_ensemble": ("RewardModel", 2, None, False, False, 4),
    "ppo": ("PPO", 1, None, True, True, 1),
    "ppo_qlora": ("PPO", 1, None, True, True, 1),
    "rloo": ("PPO", 1, None, True, False, 1),
    "grpo": ("PPO", 1, None, True, False, 1),
    "online_dpo": ("OnlineDPO", 1, None, True, False, 1),
}
SHORT = ["--data.max_length", "48", "--data.max_prompt_length", "24", "--trainer.accelerator", "cpu"]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A configuration of a model, without weights and without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(vocab_size=1000, **shape).save_pretrained(folder)
    return str(folder)


def words(recipe, *more):
    return ["--config", str(RECIPES / f"{recipe}.yaml"), *map(str, more)]


def parsed(recipe, *more):
    cli = MemoryCLI(words(recipe, *more))
    return cli, training_of(cli.plain, cli.sizes)


@pytest.mark.parametrize("recipe", EXPECTED)
def test_every_recipe_is_understood(recipe):
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(EXPECTED)
    _, training = parsed(recipe)
    found = (training.algorithm, training.completions, training.learned, training.has_reference)
    assert (*found, training.has_critic, training.members) == EXPECTED[recipe]


def test_settings_are_where_they_belong():
    flags = ["--model.policy.lora.r", 4, "--model.optimization.name", "sgd", "--trainer.precision", 32]
    flags += ["--data.max_length", 700, "--data.max_prompt_length", 300, "--data.batch_size", 3]
    _, training = parsed("dpo", *flags)
    assert (training.policy.lora.r, training.optimizer, training.precision) == (4, "sgd", "32-true")
    assert (training.groups, training.prompt, training.completion) == (3, 300, 400)
    _, training = parsed(
        "dpo", "--data.max_tokens", 4000, "--data.max_length", 1000, "--completion_tokens", 200
    )
    assert (training.groups, training.prompt, training.completion) == (4000 // (512 + 2 * 200), 512, 200)
    _, training = parsed(
        "dpo", "--model.precompute_reference", "true", "--trainer.accumulate_grad_batches", 4
    )
    assert not training.has_reference
    assert training.accumulates
    _, training = parsed("sft", "--prompt_tokens", 10, "--completion_tokens", 20)
    assert (training.prompt, training.completion) == (10, 20)


def test_settings_of_a_rollout_are_where_they_belong():
    flags = ["--model.update.micro_batch_tokens", 4000, "--model.generator", "VLLMGenerator"]
    _, training = parsed("ppo_qlora", *flags)
    assert (training.groups, training.prompt, training.completion) == (64, 512, 256)
    assert (training.minibatch, training.micro_batch, training.micro_tokens) == (16, 4, 4000)
    assert not training.generates
    (reward,) = training.rewards
    assert (reward.policy.path, reward.batch_size, reward.share_base) == ("./reward-adapter", 32, True)
    _, training = parsed("grpo")
    assert (training.rewards, training.sampling.num_samples) == ((), 8)


def test_a_small_model_fits_and_needs_no_weights(program, bare):
    code, printed, error = program("memory", *words("dpo", *SHORT, "--model.policy.path", bare))
    assert code == 0, error
    assert "4 prompts × 2 completions, 24 + 24 tokens" in printed
    assert "all at a time" in printed
    assert "fits into the" in printed
    assert "switch" not in printed


@pytest.mark.parametrize(
    ("recipe", "more", "share"),
    [
        ("dpo", [], 0.7),
        ("ppo", ["--model.sampling.max_new_tokens", 24, "--data.batch_size", 4], 0.75),
    ],
)
def test_a_suggestion_is_what_a_prediction_with_it_finds(bare, recipe, more, share):
    if recipe == "ppo":
        more = [*more, "--model.reward.model", bare]
    start = [*SHORT, "--model.policy.path", bare, *more]
    cli, training = parsed(recipe, *start)
    found = forecast(training)
    limit = int(share * found.total)
    several = list(suggestions(cli.plain, cli.sizes, limit, found))
    totals = [found.total, *(one.found.total for one in several)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] <= limit < totals[-2]
    flags = [word for one in several for word in str(one.switch).split()]
    assert forecast(parsed(recipe, *start, *flags)[1]).total == totals[-1]


def test_what_can_not_fit_tries_every_switch_and_says_so(program, bare):
    code, printed, error = program(
        "memory", *words("dpo", *SHORT, "--model.policy.path", bare, "--gib", RESERVE / GIB)
    )
    assert code == 0, error
    assert "does not fit into" in printed
    assert "it is not enough" in printed
    order = ["--model.precompute_reference true", "--data.batch_size 2", "--model.policy.lora.r 16"]
    places = [printed.find(flag.split()[0]) for flag in order]
    assert -1 < places[0] < places[1] < places[2]


def test_activations_are_held_on_the_host_of_a_gpu(program, bare):
    """Long rows: not on a CPU, which is the host."""
    flags = ["--data.max_length", 4000, "--data.max_prompt_length", 2000, "--trainer.precision", 32]
    flags += ["--model.policy.gradient_checkpointing", "true", "--model.policy.offload_activations", "true"]
    arguments = words("sft", *flags, "--model.policy.path", bare, "--gpu", "RTX 4090")
    _, printed, _ = program("memory", *arguments)
    assert "GiB of activations are held there" in printed
    _, printed, _ = program("memory", *arguments, "--trainer.accelerator", "cpu")
    assert "held there" not in printed


def test_devices_go_by_name_or_size():
    assert device_of("h100", None, "auto") == Device("H100", 80 * GIB)
    assert device_of(None, 1.5, "auto") == Device("1.5 GiB", 3 * GIB // 2)
    assert device_of(None, None, "cpu").memory > GIB
    with pytest.raises(ValueError, match=r"no GPU 'RTX 4091' is known \(near it: RTX 4090"):
        device_of("RTX 4091", None, "auto")


def test_a_missing_model_is_named(program):
    code, _, error = program("memory", *words("dpo", "--model.policy.path", "no/such"))
    assert code == 1
    assert "lightning-rlhf: error: " in error
    assert "no configuration of a model at 'no/such'" in error


@pytest.fixture
def out_of_memory(monkeypatch, llama_dir, tmp_path):
    """Arguments of a training whose first step runs out of memory."""

    def step(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr(SFT, "training_step", step)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab", "completion": "cd"}\n' * 8)
    flags = ["--model.policy.path", llama_dir, "--data.train", "rows.jsonl", "--trainer.precision", "32-true"]
    flags += ["--trainer.val_check_interval", "1.0", "--data.num_workers", "0"]
    (tmp_path / "no_val.yaml").write_text("data:\n  init_args:\n    val: null\n")
    return [*words("sft", "--config", "no_val.yaml", *SHORT, *flags)]


def test_running_out_of_memory_shows_what_it_takes_and_what_would_help(program, out_of_memory, monkeypatch):
    monkeypatch.setattr(memory, "device_of", lambda *_: Device("a small GPU", RESERVE + 2**20))
    code, _, error = program("fit", *out_of_memory)
    assert code == 1
    assert "CUDA out of memory. Tried to allocate 9.00 GiB." in error
    assert "all at a time" in error
    assert "does not fit into the 1.0 GiB of a small GPU" in error
    assert "--data.batch_size" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("recipe", ["ppo", "online_dpo"])
def test_running_out_of_memory_shows_the_phases_of_what_samples(recipe, bare, monkeypatch):
    monkeypatch.setattr(memory, "device_of", lambda *_: Device("a small GPU", RESERVE + 2**20))
    flags = ["--model.reward.model", bare, "--model.sampling.max_new_tokens", 24, "--data.batch_size", 4]
    arguments = words(recipe, *SHORT, "--model.policy.path", bare, *flags)
    text = str(memory.does_not_fit(torch.OutOfMemoryError("CUDA out of memory."), arguments))
    assert text.startswith("CUDA out of memory.")
    for phase in ("generation", "scoring", "policy and", "forward and", "KV cache", "reward model 0"):
        assert phase in text
    assert "does not fit into the 1.0 GiB of a small GPU" in text
    assert "--model.policy.lora.r 16" in text


def test_running_out_of_memory_keeps_the_original(out_of_memory):
    with pytest.raises(DoesNotFitError, match="should fit: look for other processes") as caught:
        fit(out_of_memory)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert "--data.batch_size" in str(caught.value)  # something smaller, all the same


def test_one_rank_speaks_for_all(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert memory.does_not_fit(error, []) is error
