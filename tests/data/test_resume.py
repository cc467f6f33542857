import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_rlhf.data import GroupBatchSampler, SFTDataModule
from tests.data.test_datamodules import Recorder, data, trainer

STEPS = 7  # batches of 8 of 52 rows
BY_TOKENS = {"max_tokens": 35, "length_grouped": True}


def fit(tmp_path, tokenizer, callbacks=(), ckpt_path=None, limit_train_batches=1.0, **how):
    module = Recorder(tokenizer)
    saves = {"callbacks": list(callbacks), "enable_checkpointing": bool(callbacks)}
    run = trainer(tmp_path, max_epochs=4, limit_train_batches=limit_train_batches, **saves)
    run.fit(module, datamodule=SFTDataModule(data(), data(), **how), ckpt_path=ckpt_path, weights_only=True)
    return module.seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", [{}, BY_TOKENS], ids=["groups", "tokens"])
@pytest.mark.parametrize("step", [STEPS + 3, STEPS], ids=["middle", "end"])
def test_a_resumed_run_sees_what_the_other_would_have_seen(tmp_path, tokenizer, workers, how, step):
    how = {"num_workers": workers, "seed": 5, **how}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    whole = fit(tmp_path, tokenizer, [saver], **how)
    assert step == STEPS or [epoch for epoch, _ in whole[step - 1 : step + 1]] == [1, 1]
    resumed = fit(tmp_path, tokenizer, ckpt_path=tmp_path / f"step={step}.ckpt", **how)
    assert resumed == whole[step:]
    assert len({rows for _, rows in whole}) > len(whole) * 0.9  # epochs differ


@pytest.mark.parametrize("workers", [0, 2])
def test_after_an_epoch_cut_short(tmp_path, tokenizer, workers):
    how = {"limit_train_batches": 3, "num_workers": workers}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole = fit(tmp_path, tokenizer, [saver], **how)
    assert fit(tmp_path, tokenizer, ckpt_path=tmp_path / "step=6.ckpt", **how) == whole[6:]


@pytest.mark.parametrize("workers", [0, 2])
def test_checkpoints_at_the_end_of_an_epoch(tmp_path, tokenizer, workers):
    whole = fit(
        tmp_path,
        tokenizer,
        [ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)],
        num_workers=workers,
    )
    for epoch in (0, 1, 2):
        resumed = fit(tmp_path, tokenizer, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", num_workers=workers)
        assert resumed == [step for step in whole if step[0] > epoch]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_without_lightning_resumes_in_the_right_epoch(workers):
    def loader():
        sampler = GroupBatchSampler([1] * 40, batch_size=4)
        return StatefulDataLoader(
            Rows(), batch_size=None, sampler=sampler, num_workers=workers, collate_fn=list
        )

    first = loader()
    first.sampler.set_epoch(3)
    batches = iter(first)
    seen = [next(batches) for _ in range(4)]
    state = first.state_dict()
    rest = list(batches)
    second = loader()
    second.load_state_dict(state)
    assert list(second) == rest
    assert len(seen + rest) == 10
    second.sampler.set_epoch(4)
    first.sampler.set_epoch(4)
    assert list(first) == list(second)


class Rows:
    def __len__(self):
        return 40

    def __getitem__(self, rows):
        return rows


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_draws_nothing_from_the_global_random_state(tokenizer, workers):
    """Else a run resumed where an iterator had yet to be made would draw other dropout masks."""
    datamodule = SFTDataModule(
        data(), data(), test=data(), predict=data(), tokenizer=tokenizer, num_workers=workers
    )
    for stage in ("fit", "test", "predict"):
        datamodule.setup(stage)
    before = torch.get_rng_state()
    for loader in (
        datamodule.train_dataloader(),
        datamodule.val_dataloader(),
        datamodule.test_dataloader(),
        datamodule.predict_dataloader(),
        datamodule.evaluation_loader("train"),
    ):
        next(iter(loader))
        assert torch.equal(torch.get_rng_state(), before)
