"""Overlays of strategies: that they are read, and a run that torchrun starts, as on several machines."""

import json

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch.distributed.fsdp import ShardingStrategy

from tests.processes import ROOT, run_module

OVERLAYS = {
    "ddp": "DDPStrategy",
    "fsdp2": "ModelParallelStrategy",
    "fsdp1": "FSDPStrategy",
    "deepspeed": "DeepSpeedStrategy",
}


def config(name):
    return ROOT / "recipes" / f"{name}.yaml"


@pytest.mark.parametrize("overlay", sorted(OVERLAYS))
@pytest.mark.parametrize("recipe", ["dpo", "ppo_qlora"])
def test_an_overlay_is_read_with_a_recipe(program, overlay, recipe):
    code, printed, error = program(
        "fit", "--config", config(recipe), "--config", config(f"overlays/{overlay}"), "--print_config"
    )
    assert code == 0, error
    trainer = yaml.safe_load(printed)["trainer"]
    assert trainer["strategy"]["class_path"] == f"lightning.pytorch.strategies.{OVERLAYS[overlay]}"
    assert trainer["devices"] == 2


def test_the_older_fsdp_is_read():
    settings = yaml.safe_load(config("overlays/fsdp1").read_text())["trainer"]["strategy"]
    parser = ArgumentParser()
    parser.add_subclass_arguments(Strategy, "strategy")
    strategy = parser.instantiate(parser.parse_object({"strategy": settings})).strategy
    assert isinstance(strategy, FSDPStrategy)
    assert strategy.sharding_strategy is ShardingStrategy.FULL_SHARD


def test_torchrun_starts_a_sharded_run_whose_checkpoint_is_exported(program, llama_dir, tmp_path):
    """Full fine-tuning with a reference model, whose log-probabilities are computed in advance, each rank its share."""
    rows = [{"prompt": f"tell me {n}:", "chosen": f" yes {n}.", "rejected": " no"} for n in range(14)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("dpo", "overlays/tiny", "overlays/fsdp2")
    words = [word for name in names for word in ("--config", str(config(name)))]
    words += ["--model.policy.path", llama_dir, "--model.precompute_reference", "true"]
    words += ["--data.train", "data.jsonl", "--data.batch_size", "3", "--trainer.max_steps", "2"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_module(*torchrun, "-m", "lightning_rlhf", "fit", *words, seconds=300, cwd=tmp_path)
    (path,) = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert (saved["algorithm"], saved["global_step"], len(saved["random_states"])) == ("DPO", 2, 2)
    code, printed, error = program("export", path, "--output", tmp_path / "out")
    assert code == 0, error
    assert "DPO model" in printed
    assert (tmp_path / "out" / "model.safetensors").is_file()
