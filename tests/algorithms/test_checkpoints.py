import resource
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import DPO, SFT, Optimization
from lightning_rlhf.data.packing import pack
from lightning_rlhf.models import LoRA, Policy, Quantization
from lightning_rlhf.objectives import Sigmoid
from tests.algorithms.conftest import random_groups


def loader(k=2, count=8):
    return DataLoader(random_groups(count, k), batch_size=4, collate_fn=pack)


def fit_and_save(module, trainer, tmp_path, k=2):
    saver = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
    run = trainer(enable_checkpointing=True, callbacks=[saver])
    run.fit(module, loader(k))
    return saver.last_model_path


@pytest.mark.parametrize(
    ("policy", "only_adapters"),
    [
        ({}, False),
        ({"lora": LoRA(r=2)}, True),
        ({"lora": LoRA(r=2), "quantization": Quantization(compute_dtype="float32")}, True),
    ],
    ids=["full", "lora", "nf4"],
)
def test_a_checkpoint_holds_what_was_trained_and_gives_it_back(
    policy, only_adapters, trainer, llama_dir, tmp_path
):
    module = DPO(Policy(llama_dir, **policy), objective=Sigmoid(beta=0.3), optimization=Optimization(lr=1e-2))
    path = fit_and_save(module, trainer, tmp_path)
    saved = torch.load(path, weights_only=True)
    weights = [name for name in saved["state_dict"] if name.startswith("policy.")]
    assert weights
    assert all("lora_" in name for name in weights) == only_adapters
    assert not any(name.startswith("reference.") for name in saved["state_dict"])
    assert saved["algorithm"] == "DPO"

    again = DPO.load_from_checkpoint(path)
    assert again.objective == Sigmoid(beta=0.3)
    assert again.policy_settings == module.policy_settings
    predictions = trainer().predict(module, loader())
    torch.testing.assert_close(trainer().predict(again, loader()), predictions, atol=1e-6, rtol=1e-5)
    assert torch.cat(predictions).abs().max() > 1e-3


def test_the_checkpoint_of_another_algorithm_is_refused(trainer, llama_dir, tmp_path):
    path = fit_and_save(SFT(Policy(llama_dir)), trainer, tmp_path, k=1)
    with pytest.raises(ValueError, match="this is a checkpoint of SFT, not of DPO.*lightning-rlhf export"):
        DPO.load_from_checkpoint(path)
    with pytest.raises(ValueError, match="this is a checkpoint of SFT, not of DPO"):
        trainer().fit(DPO(Policy(llama_dir)), loader(), ckpt_path=path)


def test_missing_adapters_are_named(trainer, llama_dir, tmp_path):
    path = fit_and_save(DPO(Policy(llama_dir, lora=LoRA(r=2, target_modules=["q_proj"]))), trainer, tmp_path)
    other = DPO(Policy(llama_dir, lora=LoRA(r=2, target_modules=["v_proj"])))
    with pytest.raises(RuntimeError, match=r"missing \['policy.*v_proj.*unknown \['policy.*q_proj"):
        trainer().fit(other, loader(), ckpt_path=path)


def test_an_adapter_of_another_rank_is_named(trainer, llama_dir, tmp_path):
    path = fit_and_save(DPO(Policy(llama_dir, lora=LoRA(r=2))), trainer, tmp_path)
    with pytest.raises(
        RuntimeError, match=r"lora_A.default.weight has the shape \(2, \d+\) in it, \(3, \d+\) here"
    ):
        trainer().fit(DPO(Policy(llama_dir, lora=LoRA(r=3))), loader(), ckpt_path=path)


def test_goes_on_from_an_adapter_with_a_copy_as_reference(trainer, llama_dir, tmp_path):
    """SFT with LoRA, its adapter exported, then DPO from it: the reference is the adapter as it was."""
    sft = SFT(Policy(llama_dir, lora=LoRA(r=2)), optimization=Optimization(lr=1e-1))
    trainer().fit(sft, loader(k=1))
    sft.policy.model.save_pretrained(tmp_path / "adapter")
    dpo = DPO(Policy(str(tmp_path / "adapter")), tokenizer=sft.tokenizer, optimization=Optimization(lr=1e-2))
    batch = pack(random_groups(3, 2))
    dpo.configure_model()
    before = dpo.reference(batch)
    path = fit_and_save(dpo, trainer, tmp_path)
    assert dpo.reference.kind == "adapter"
    assert torch.equal(dpo.reference(batch), before)
    again = DPO.load_from_checkpoint(path, tokenizer=sft.tokenizer)
    assert torch.equal(again.reference(batch), before)


def test_an_adapter_directory_trains_in_half_precision(trainer, llama_dir, tmp_path):
    """Its settings name no LoRA: that it is an adapter is seen from the loaded model."""
    sft = SFT(Policy(llama_dir, lora=LoRA(r=2)))
    trainer(max_steps=1).fit(sft, loader(k=1))
    sft.policy.model.save_pretrained(tmp_path / "adapter")
    again = SFT(Policy(str(tmp_path / "adapter")), tokenizer=sft.tokenizer)
    run = trainer(precision="bf16-true")
    run.fit(again, loader(k=1))
    assert run.callback_metrics["train/loss"].isfinite()
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}


def test_a_disk_that_fills_while_saving_leaves_no_broken_checkpoint(trainer, llama_dir, tmp_path):
    """A limit on the size of a file makes the write itself fail half-way, as a full disk does."""
    first = fit_and_save(SFT(Policy(llama_dir)), trainer, tmp_path, k=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path(first).stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            fit_and_save(SFT(Policy(llama_dir)), trainer, tmp_path, k=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = list((tmp_path / "checkpoints").glob("*.ckpt"))
    assert first in map(str, found)
    assert all(torch.load(path, weights_only=True)["algorithm"] == "SFT" for path in found)
