import ast
import json
import re
import resource
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import RewardModel
from lightning_rlhf.cli.plan import RECIPES as QUICKSTART_RECIPES
from lightning_rlhf.data.packing import pack
from lightning_rlhf.models import LoRA, Policy
from lightning_rlhf.models.reward_export import export_reward_model
from tests.algorithms.conftest import random_groups

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
DATA = {"sft": "sft_train.jsonl"}
PREFERENCES = "preferences_train.jsonl"
ALGORITHMS = {
    "sft": "SFT",
    "kto": "KTO",
    "reward_model": "RewardModel",
    "reward_ensemble": "RewardModel",
    "online_dpo": "OnlineDPO",
    **dict.fromkeys(("ppo", "ppo_qlora", "rloo", "grpo"), "PPO"),
}
# What samples needs a reward, and short answers on two cores: 8 prompts, and so some optimizer steps a rollout.
ONLINE = {
    "ppo": ("--model.reward.model", "sandbox/reward-model"),
    "ppo_qlora": ("--model.reward.model", "sandbox/reward-adapter"),
    "rloo": ("--model.reward.model", "sandbox/reward-model"),
    "grpo": ("--model.reward.function", "sandbox/my_rewards.py:accuracy"),
    "online_dpo": ("--model.reward.model", "sandbox/reward-model"),
}
# With an overlay these are what dpo, reward_model and ppo are with it: the same class, with adapters of the same kind.
AS_ANOTHER = {"ipo", "orpo", "simpo", "rloo", "grpo", "ppo_qlora"}
STEPS_OF_TWO_ROLLOUTS = {"ppo": 8, "ppo_qlora": 8, "rloo": 4, "grpo": 8}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory, llama_dir):
    """What the tiny overlay reads, smaller than `lightning-rlhf sandbox` makes it."""
    folder = tmp_path_factory.mktemp("world") / "sandbox"
    folder.mkdir()
    (folder / "model").symlink_to(llama_dir)
    rows = [
        {"prompt": f"tell me {n}:", "completion": f" ok {n}", "chosen": f" yes {n}.", "rejected": " no"}
        for n in range(40)
    ]
    columns = {DATA["sft"]: ("prompt", "completion"), PREFERENCES: ("prompt", "chosen", "rejected")}
    for name, wanted in columns.items():
        picked = [{column: row[column] for column in wanted} for row in rows]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in picked))
    save_reward(RewardModel(llama_dir), folder / "reward-model")
    save_reward(RewardModel(Policy(llama_dir, lora=LoRA(r=2))), folder / "reward-adapter")
    (folder / "my_rewards.py").write_text(
        "def accuracy(completions, chosen):\n"
        "    return [float(c[:1] == right[:1]) for c, right in zip(completions, chosen)]\n"
    )
    return folder


def save_reward(module, folder):
    """A reward model as `export` writes it, after one step."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder.parent,
    )
    trainer.fit(module, DataLoader(random_groups(4, 2), batch_size=4, collate_fn=pack))
    trainer.save_checkpoint(folder.parent / "reward.ckpt")
    export_reward_model(folder.parent / "reward.ckpt", folder)


@pytest.fixture
def arguments(sandbox, tmp_path):
    """Arguments of a recipe with the tiny overlay and others."""

    def make(recipe, *overlays, steps=None):
        (tmp_path / "sandbox").exists() or (tmp_path / "sandbox").symlink_to(sandbox)
        paths = [
            RECIPES / f"{recipe}.yaml",
            *(RECIPES / "overlays" / f"{o}.yaml" for o in ("tiny", *overlays)),
        ]
        words = [word for path in paths for word in ("--config", path)]
        return [
            *words,
            "--data.train",
            f"sandbox/{DATA.get(recipe, PREFERENCES)}",
            "--trainer.max_steps",
            steps or STEPS_OF_TWO_ROLLOUTS.get(recipe, 2),
            *short_answers(recipe),
        ]

    return make


def short_answers(recipe):
    if recipe not in ONLINE:
        return ()
    return (*ONLINE[recipe], "--model.sampling.max_new_tokens", 6, "--data.batch_size", 8)


def checkpoint(folder):
    (path,) = folder.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    return path


@pytest.mark.parametrize(
    ("overlay", "recipe"),
    [
        pytest.param(
            overlay,
            recipe,
            marks=pytest.mark.slow if overlay and recipe in AS_ANOTHER else (),
            id=f"{overlay or 'plain'}-{recipe}",
        )
        for overlay in ("", "lora", "qlora")
        for recipe in sorted(path.stem for path in RECIPES.glob("*.yaml"))
    ],
)
def test_every_recipe_trains_and_is_exported(program, arguments, tmp_path, recipe, overlay):
    code, _, error = program("fit", *arguments(recipe, *filter(None, [overlay])))
    assert code == 0, error[-2000:]
    saved = torch.load(checkpoint(tmp_path), weights_only=True)
    steps = STEPS_OF_TWO_ROLLOUTS.get(recipe, 2)
    assert saved["global_step"] == steps
    algorithm = ALGORITHMS.get(recipe, "DPO")
    assert saved["algorithm"] == algorithm
    assert "random_states" in saved
    assert (
        yaml.safe_load((tmp_path / "lightning_logs/version_0/config.yaml").read_text())["trainer"][
            "max_steps"
        ]
        == steps
    )
    if recipe in ONLINE:
        assert saved["state_dict"]["_extra_state"]["num_rollouts"] == 2
    code, printed, error = program("export", checkpoint(tmp_path), "--output", "out", "--merge")
    assert code == 0, error
    assert algorithm in printed
    folder = tmp_path / "out" / "member_3" if recipe == "reward_ensemble" else tmp_path / "out"
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("recipe", ["sft", "reward_model", "dpo", "kto", "ppo"])
def test_every_recipe_of_the_quickstart_trains(program, sandbox, tmp_path, recipe):
    """The files that are part of the package, as they are, on other data."""
    (tmp_path / "sandbox").symlink_to(sandbox)
    paths = (
        "--model.policy.path",
        "sandbox/model",
        "--data.train",
        f"sandbox/{DATA.get(recipe, PREFERENCES)}",
    )
    other = {"ppo": short_answers("ppo"), "reward_model": ("--data.val", f"sandbox/{PREFERENCES}")}
    steps = STEPS_OF_TWO_ROLLOUTS.get(recipe, 2)
    config = QUICKSTART_RECIPES / f"{recipe}.yaml"
    code, _, error = program(
        "fit", "--config", config, *paths, *other.get(recipe, ()), "--trainer.max_steps", steps
    )
    assert code == 0, error[-2000:]
    saved = torch.load(checkpoint(tmp_path), weights_only=True)
    assert (saved["algorithm"], saved["global_step"]) == (ALGORITHMS.get(recipe, "DPO"), steps)


def test_what_is_no_module_is_in_a_wheel_all_the_same():
    (kept,) = re.findall(
        r"^lightning_rlhf = (\[.*\])$", (RECIPES.parent / "pyproject.toml").read_text(), re.M
    )
    package = RECIPES.parent / "lightning_rlhf"
    found = {path for pattern in ast.literal_eval(kept) for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert found == files
    assert len(files) > 5


@pytest.mark.parametrize("recipe", ["sft", "dpo", "kto", "reward_model"])
def test_doctor_shows_what_will_happen_and_saves_nothing(program, arguments, tmp_path, recipe):
    words = arguments(recipe, "lora")
    code, printed, error = program("doctor", *words)
    assert code == 0, error[-2000:]
    for text in (
        "prompt",
        "learned from",
        "policy adapter",
        "layout",
        "loss",
        "tokens computed",
        "one optimizer step",
    ):
        assert text in printed
    assert ("base without its adapter" in printed) == (recipe in ("dpo", "kto"))
    assert [path.name for path in tmp_path.iterdir()] == ["sandbox"]


@pytest.mark.parametrize(("recipe", "steps"), [("ppo_qlora", 4), ("ppo", 4), ("grpo", 4), ("rloo", 2)])
def test_doctor_shows_a_rollout(program, arguments, tmp_path, recipe, steps):
    code, printed, error = program("doctor", *arguments(recipe))
    assert code == 0, error[-2000:]
    for text in ("as the model sees it", "one rollout (thrown away)", "KL at step 0", "seconds a rollout"):
        assert text in printed
    assert f"{steps}: max_steps" in printed
    roles = {
        "ppo": ("policy ", "critic ", "reference ", "reward reward_model "),
        "ppo_qlora": ("policy adapter", "value adapter", "critic ", "reward_reward_model adapter"),
        "grpo": ("policy ", "reference ", "accuracy"),
        "rloo": ("policy ", "reference ", "reward reward_model "),
    }[recipe]
    assert all(role in printed for role in roles)
    assert [path.name for path in tmp_path.iterdir()] == ["sandbox"]


def test_validation_and_prediction_of_what_samples(program, arguments, tmp_path):
    words = [
        *arguments("rloo"),
        "--data.val",
        "sandbox/preferences_train.jsonl",
        "--trainer.limit_val_batches",
        1,
    ]
    code, printed, error = program(
        "validate", *words, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "."
    )
    assert code == 0, error[-2000:]
    assert "val/objective/scores_greedy" in printed
    (path,) = tmp_path.rglob("samples/step-0.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(8))
    assert rows[0]["prompt"] == "tell me 0:"
    assert all(row["kl"] == pytest.approx(0.0, abs=1e-5) for row in rows)
    words = [*arguments("rloo"), "--data.predict", "sandbox/preferences_train.jsonl"]
    code, _, error = program("predict", *words)
    assert code == 0, error[-2000:]
    (path,) = tmp_path.rglob("predictions.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(40))
    assert all(len(line["completions"]) == 4 for line in lines)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.update.clip_rang", "unknown key 'clip_rang' in model.update (did you mean 'clip_range'?)"),
        ("--model.kl.targett", "unknown key 'targett' in model.kl (did you mean 'target'?)"),
        ("--model.sampling.max_tokens", "unknown key 'max_tokens' in model.sampling"),
        ("--model.reward.modell", "unknown key 'modell' in model.reward"),
        ("--model.estimator.lamb", "unknown key 'lamb' in model.estimator (did you mean 'lam'?)"),
    ],
)
def test_a_typo_in_the_settings_of_a_rollout_is_named(program, flag, message):
    code, _, error = program("fit", "--config", RECIPES / "ppo.yaml", flag, "0.5")
    assert code == 2
    assert message in error.splitlines()[0]


def test_the_parts_of_ppo_are_chosen_by_flags(program):
    flags = [
        "--model.estimator",
        "Reinforce",
        "--model.estimator.baseline",
        "false",
        "--model.kl.target",
        "6.0",
    ]
    flags += [
        "--model.reward",
        "FunctionReward",
        "--model.reward.function",
        "math:sqrt",
        "--model.update.num_epochs",
        "2",
    ]
    flags += ["--model.generator", "VLLMServerGenerator", "--model.generator.url", "http://localhost:1"]
    code, printed, error = program("fit", "--config", RECIPES / "rloo.yaml", *flags, "--print_config")
    assert code == 0, error
    found = yaml.safe_load(printed)["model"]["init_args"]
    assert found["estimator"]["class_path"].endswith(".Reinforce")
    assert found["estimator"]["init_args"] == {"baseline": False}
    assert found["reward"]["class_path"].endswith(".FunctionReward")
    assert found["reward"]["init_args"]["function"] == "math:sqrt"
    assert (found["kl"]["target"], found["update"]["num_epochs"]) == (6.0, 2)
    assert found["generator"]["init_args"]["url"] == "http://localhost:1"


def test_what_the_trainer_refuses_of_ppo_is_said(program, arguments):
    code, _, error = program("fit", *arguments("rloo"), "--trainer.gradient_clip_val", 1.0)
    assert code == 1
    assert "gradient_clip_val" in error
    assert "clips by model.update.max_grad_norm" in error
    assert "Traceback" not in error


def test_a_checkpoint_of_another_algorithm_is_refused(program, arguments, tmp_path):
    program("fit", *arguments("sft"))
    code, _, error = program("fit", *arguments("dpo"), "--ckpt_path", checkpoint(tmp_path))
    assert code == 1
    assert "this is a checkpoint of SFT, not of DPO" in error


def test_a_missing_model_is_named(program, arguments):
    """The tests run without network: this is what is said where a model is not cached either."""
    code, _, error = program("fit", *arguments("dpo"), "--model.policy.path", "no/such")
    assert code == 1
    assert "lightning-rlhf: error: no tokenizer at 'no/such': it is not a directory with one" in error
    assert "no network, not cached" in error
    assert "`hf download no/such`" in error
    assert "Union" not in error


def test_missing_data_are_named(program, arguments):
    code, _, error = program("fit", *arguments("dpo"), "--data.train", "no/such")
    assert code == 1
    assert "lightning-rlhf: error: no/such: no such file or directory, and as a data set of the Hub" in error
    assert "Without network, give a file or a directory" in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"promt": "a", "chosen": "b", "rejected": "c"}', "'promt' a misspelling of 'prompt'"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": 3}',
            "row 1: column 'rejected' is of type int; it must be text",
        ),
        ('{"prompt": "a", "chosen": "b"', "row 1: invalid JSON"),
        ('{"prompt": "a", "chosen": "", "rejected": "c"}', "row 1: column 'chosen' is empty"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "row 1: 'chosen' and 'rejected' are identical"),
        ("", "is empty; it must hold at least one row"),
    ],
)
def test_bad_data_are_one_message_that_names_the_file(program, arguments, tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text(line and line + "\n")
    code, _, error = program("fit", *arguments("dpo"), "--data.train", "bad.jsonl")
    assert code == 1, "it was trained on"
    assert "lightning-rlhf: error: bad.jsonl" in error
    assert message in error
    assert "Traceback" not in error


def test_a_disk_that_fills_while_saving_is_one_message(program, arguments, tmp_path):
    """A limit on the size of a file makes the write of the checkpoint fail half-way, as a full disk does."""
    program("fit", *arguments("sft"))
    size = checkpoint(tmp_path).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        code, _, error = program("fit", *arguments("sft"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "lightning-rlhf: error: [Errno 27] File too large" in error
    assert not [path for path in tmp_path.glob("lightning_logs/version_1/checkpoints/*")]


def test_predict_with_kto_writes_one_value_a_labelled_answer(program, arguments, tmp_path):
    code, _, error = program(
        "predict", *arguments("kto"), "--data.predict", "sandbox/preferences_train.jsonl"
    )
    assert code == 0, error[-2000:]
    (path,) = tmp_path.rglob("predictions.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(80))  # each pair is two answers
    assert all(len(line["values"]) == 1 for line in lines)


def test_predict_writes_one_line_a_row(program, arguments, tmp_path):
    code, _, error = program(
        "predict", *arguments("dpo"), "--data.predict", "sandbox/preferences_train.jsonl"
    )
    assert code == 0, error[-2000:]
    (path,) = tmp_path.rglob("predictions.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(40))
    assert all(len(line["values"]) == 2 for line in lines)


def test_a_weighted_sum_trains_and_says_what_it_needs(program, arguments, tmp_path):
    parts = [{"class_path": "SimPO"}, {"class_path": "SFTTerm", "init_args": {"average": "sequences"}}]
    objective = {"class_path": "Weighted", "init_args": {"objectives": parts, "weights": [1.0, 0.3]}}
    path = tmp_path / "sum.yaml"
    path.write_text(yaml.safe_dump({"model": {"init_args": {"objective": objective}}}))
    code, _, error = program("fit", *arguments("simpo"), "--config", path)
    assert code == 0, error[-2000:]
    saved = torch.load(checkpoint(tmp_path), weights_only=True)["hyper_parameters"]["objective"]
    assert [part["class_path"].rsplit(".", 1)[1] for part in saved["init_args"]["objectives"]] == [
        "SimPO",
        "SFTTerm",
    ]
    code, printed, error = program("doctor", *arguments("simpo"))
    assert code == 0, error[-2000:]
    assert "none: SimPO needs none" in printed
