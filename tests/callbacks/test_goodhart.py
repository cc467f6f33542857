"""GoodhartMonitor on a tiny model, with a proxy and a gold reward that are planted."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import DPO, PPO, RLOO, KLControl, Optimization, Update
from lightning_rlhf.callbacks import GoodhartMonitor
from lightning_rlhf.callbacks import goodhart as module_under_test
from lightning_rlhf.callbacks.held_out_kl import sampled_kl
from lightning_rlhf.data import PromptBatch
from lightning_rlhf.data.packing import pack
from lightning_rlhf.generation import Sampling
from lightning_rlhf.models import LoRA, Policy
from lightning_rlhf.objectives import SimPO
from lightning_rlhf.rewards import FunctionReward, LengthPenalty, LengthResidual, Normalized, ShapedReward
from tests.algorithms.conftest import random_groups


def capitals(completions):
    return [sum(c.isupper() for c in text) + 0.01 * len(text) for text in completions]


def no_capitals(completions):
    return [-value for value in capitals(completions)]


def monitor(**settings):
    defaults = {
        "gold": FunctionReward(no_capitals),
        "proxy": FunctionReward(capitals),
        "every_n_steps": 2,
        "num_prompts": 6,
        "max_new_tokens": 5,
    }
    return GoodhartMonitor(**{**defaults, **settings})


def loader(batch_size=4):
    return DataLoader(random_groups(8, 2), batch_size=batch_size, collate_fn=pack)


def ppo(llama, tokenizer, reward=None):
    return PPO(
        llama,
        reward or FunctionReward(capitals),
        tokenizer,
        sampling=Sampling(max_new_tokens=5, num_samples=2),
        estimator=RLOO(),
        kl=KLControl(coef=0.1),
        update=Update(num_epochs=1, minibatch_size=8),
    )


def prompts(batches=4):
    rows = [g.prompt for g in random_groups(4 * batches, 1)]
    return DataLoader(
        range(4 * batches),
        batch_size=4,
        collate_fn=lambda places: PromptBatch(
            tuple(rows[i] for i in places),
            tuple("x" for _ in places),
            tuple("x" for _ in places),
            {},
            tuple(places),
        ),
    )


def test_writes_logs_and_measures(trainer, tokenizer, llama, tmp_path):
    watch = monitor()
    run = trainer(callbacks=[watch], max_epochs=2)
    run.fit(DPO(llama, tokenizer, optimization=Optimization(lr=1e-2)), loader(), loader())
    content = json.loads((tmp_path / "goodhart" / "goodhart.json").read_text())
    assert content["curve"]["steps"] == [0, 2, 4]
    assert content["curve"]["kl"][0] == 0
    assert content["curve"]["proxy"][0] == pytest.approx(0, abs=1e-12)
    assert content["curve"]["kl"][2] > content["curve"]["kl"][1] > 0
    # The gold is minus the proxy, so on whatever samples the curves are mirrored.
    assert content["curve"]["gold"] == pytest.approx([-z for z in content["curve"]["proxy"]])
    assert content["latest"]["goodhart/correlation"] == pytest.approx(-1)
    assert content["latest"]["goodhart/excess_gap"] == pytest.approx(0, abs=1e-9)
    assert 0 < content["latest"]["goodhart/time_share"] < 1
    assert content["latest"]["goodhart/alpha"] is None  # three evaluations are too few to fit
    assert (tmp_path / "goodhart" / "goodhart.png").stat().st_size > 5000
    assert run.callback_metrics["goodhart/gold"].item() == pytest.approx(content["curve"]["gold"][2])
    assert len(watch.history[0]["rows"]) == 6


def test_kl_is_that_of_the_samples(trainer, tokenizer, llama):
    """Against the log-ratio of the policy's own samples: the k1 estimate has the same mean."""
    module = DPO(llama, tokenizer)
    with torch.no_grad():
        llama.lm_head.weight.mul_(1.5)
    watch = monitor(num_prompts=400, max_new_tokens=3, batch_size=100)
    groups = random_groups(400, 2)
    data = DataLoader(groups, batch_size=100, collate_fn=pack)
    run = trainer(callbacks=[watch], limit_train_batches=1, max_epochs=1)
    module.configure_optimizers = lambda: torch.optim.SGD(llama.parameters(), lr=0.0)
    module._assert_equal_at_start = lambda *_: None
    run.fit(module, data, data)
    measured = torch.tensor(watch.history[-1]["kl"])
    assert (measured >= -1e-6).all()
    module.eval()
    estimate = sampled_kl(module, [g.prompt for g in groups], Sampling(max_new_tokens=3))
    noise = (measured.var() / 400 + estimate.var() / 400).sqrt().item()
    assert measured.mean().item() == pytest.approx(estimate.mean().item(), abs=4 * noise)
    assert measured.mean() > 10 * noise


def test_running_statistics_of_a_reward_are_those_of_training(trainer, llama, tokenizer):
    """The monitor's proxy is part of the module's reward, and what it samples is not counted into that one's scale."""
    counts = []
    watch = monitor(proxy="capitals")
    for callbacks in ([], [watch]):
        shaper = Normalized()
        module = ppo(llama, tokenizer, ShapedReward(FunctionReward(capitals, name="capitals"), [shaper]))
        trainer(callbacks=callbacks, max_steps=2, num_sanity_val_steps=0).fit(module, prompts(), prompts())
        counts.append(shaper.get_extra_state()["moments"][0])
    assert counts[0] == counts[1] == 16.0  # two rollouts of 4 prompts, 2 samples each
    for one in watch.history:  # the part before it is normalised
        assert one["proxy"] == pytest.approx([-value for value in one["gold"]], abs=1e-5)


def test_training_is_not_changed(trainer, llama_dir):
    losses = []
    for callbacks in ([], [monitor()]):
        torch.manual_seed(0)
        module = DPO(Policy(llama_dir, lora=LoRA(r=2)), optimization=Optimization(lr=1e-2))
        run = trainer(max_epochs=2, callbacks=callbacks)
        shuffled = DataLoader(random_groups(8, 2), batch_size=4, collate_fn=pack, shuffle=True)
        run.fit(module, shuffled, loader())
        losses.append(run.callback_metrics["train/loss"].item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("on_alarm", ["warn", "stop", "raise_kl"])
def test_an_alarm_acts(on_alarm, trainer, tokenizer, llama, monkeypatch):
    """The test itself is measured in tests/functional: here it says so at the third evaluation."""
    monkeypatch.setattr(
        module_under_test,
        "decline_test",
        lambda gold, proxy, threshold: module_under_test.DeclineTest(len(gold) == 3, 4.0, 5.0),
    )
    watch = monitor(on_alarm=on_alarm, proxy=None, every_n_steps=1)
    module = ppo(llama, tokenizer)
    run = trainer(callbacks=[watch], max_epochs=1)
    with pytest.warns(UserWarning, match=r"over-optimisation at step 2: gold fell by 4.0 standard errors"):
        run.fit(module, prompts(4), prompts(2))
    # The test begins anew at step 2, so that step 4 is its third evaluation again.
    assert watch.alarms == ([2] if on_alarm == "stop" else [2, 4])
    assert run.global_step == (2 if on_alarm == "stop" else 4)
    assert module.kl.coef == pytest.approx(0.4 if on_alarm == "raise_kl" else 0.1)


def test_a_planted_decline_is_found_and_the_best_by_gold_is_kept(trainer, tokenizer, llama, tmp_path):
    """Letters that are no capitals lose their logits step by step: the proxy rises, and gold, its negative, falls."""
    ids = [tokenizer.convert_tokens_to_ids(c) for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]

    class Shift(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            sign = -1.0 if trainer.global_step < 4 else 1.0
            module.shift[ids] += sign * (0.5 if trainer.global_step < 4 else 0.8)

    module = DPO(llama, tokenizer)
    module.shift = torch.zeros(len(llama.lm_head.weight))
    logits = llama.lm_head.forward
    llama.lm_head.forward = lambda hidden: logits(hidden) + module.shift
    module._assert_equal_at_start = lambda *_: None
    watch = monitor(every_n_steps=1, num_prompts=32, max_evaluations=16, on_alarm="stop", max_new_tokens=8)
    run = trainer(callbacks=[Shift(), watch], max_epochs=1)
    train = DataLoader(random_groups(64, 2), batch_size=4, collate_fn=pack)
    with pytest.warns(UserWarning, match="training stops"):
        run.fit(module, train, DataLoader(random_groups(32, 2), batch_size=8, collate_fn=pack))
    assert 5 <= watch.alarms[0] <= 9
    assert watch.best["step"] in (3, 4, 5)
    saved = torch.load(tmp_path / "goodhart" / "best_gold.ckpt", weights_only=True)
    assert saved["global_step"] == watch.best["step"]
    means = [sum(one["gold"]) / 32 for one in watch.history]
    assert watch.best["gold"] == pytest.approx(max(means))


def test_resumes_with_its_evaluations(trainer, tokenizer, llama_dir, tmp_path):
    def run(watch, epochs, checkpoint=None):
        torch.manual_seed(0)
        trainer_ = trainer(callbacks=[watch], max_epochs=epochs)
        trainer_.fit(
            DPO(llama_dir, optimization=Optimization(lr=1e-3, schedule="constant")),
            loader(),
            loader(),
            ckpt_path=checkpoint,
        )
        trainer_.save_checkpoint(tmp_path / "last.ckpt")
        return watch

    whole = run(monitor(), 4).history
    run(monitor(), 2)
    resumed = run(monitor(), 4, tmp_path / "last.ckpt").history
    assert [one["step"] for one in resumed] == [one["step"] for one in whole] == [0, 2, 4, 6, 8]
    assert resumed == whole  # texts included
    assert all(len(one["completions"]) == 4 for one in resumed)
    with pytest.raises(ValueError, match="held-out prompts are not those of the checkpoint"):
        run(monitor(num_prompts=3), 6, tmp_path / "last.ckpt")


@pytest.mark.parametrize("part", [None, "capitals"])
def test_rollouts_of_training_are_judged_and_nothing_else_is_sampled(part, trainer, tokenizer, llama):
    """4 prompts, 2 samples each and one step a rollout; an evaluation has the two rollouts before it."""
    seen = []

    class Remember(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(module.last_rollout)

    watch = monitor(rollouts=True, proxy=part)
    reward = FunctionReward(capitals, name="capitals")
    module = ppo(llama, tokenizer, reward if part is None else ShapedReward(reward, [LengthPenalty(3.0)]))
    drawn = []
    generate = module.generator.generate
    module.generator.generate = lambda *a, **k: drawn.append(len(a[2])) or generate(*a, **k)
    trainer(callbacks=[Remember(), watch], max_epochs=1).fit(module, prompts(), prompts(2))
    assert [one["step"] for one in watch.history] == [0, 2, 4]
    assert drawn[-4:] == [4] * 4
    for evaluation, rollouts in zip(watch.history[1:], (seen[:2], seen[2:]), strict=True):
        assert evaluation["completions"] == []
        expected = {"row": [], "kl": [], "proxy": [], "gold": []}
        for one in rollouts:
            texts = one.rollout.samples.completions
            for place, group in enumerate(one.rollout.groups):
                pair = slice(2 * place, 2 * place + 2)
                expected["row"].append(group.row_id)
                expected["kl"].append(one.kl[pair].mean().item())
                expected["proxy"].append(sum(capitals(texts[pair])) / 2)
                expected["gold"].append(sum(no_capitals(texts[pair])) / 2)
        assert evaluation["rows"] == expected["row"]
        for name in ("kl", "proxy", "gold"):
            assert evaluation[name] == pytest.approx(expected[name], abs=1e-5)


@pytest.mark.parametrize("rollouts", [True, False])
def test_a_part_is_known_before_what_shapes_it(rollouts, trainer, tokenizer, llama):
    """The line of LengthResidual is fitted on the first rollout, and the start is judged before that."""
    watch = monitor(rollouts=rollouts, proxy="capitals")
    reward = ShapedReward(FunctionReward(capitals, name="capitals"), [LengthResidual()])
    run = trainer(callbacks=[watch], max_epochs=1, num_sanity_val_steps=0)
    run.fit(ppo(llama, tokenizer, reward), prompts(), prompts(2))
    assert [one["step"] for one in watch.history] == [0, 2, 4]
    for one in watch.history:
        assert one["proxy"] == pytest.approx([-value for value in one["gold"]], abs=1e-5)


def test_the_few_prompts_that_are_left_at_the_end_are_not_kept_as_the_best(tmp_path):
    watch = monitor(rollouts=True)
    watch.history = [
        {"step": step, "gold": gold} for step, gold in ((0, [0.0] * 6), (8, [1.0] * 8), (9, [9.0] * 2))
    ]
    watch.best = {"step": 8, "gold": 1.0, "path": "best"}
    watch._keep_best(None, tmp_path, at_start=False)
    assert watch.best["step"] == 8


def test_rollouts_between_evaluations_are_part_of_checkpoints(trainer, tokenizer, llama_dir, tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.global_step == 1:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    def run(checkpoint=None):
        watch = monitor(rollouts=True, proxy=None, every_n_steps=3)
        torch.manual_seed(0)
        fit = trainer(callbacks=[watch, Save()], max_epochs=4, limit_train_batches=1)
        fit.fit(ppo(llama_dir, None), prompts(), prompts(2), ckpt_path=checkpoint)
        return watch.history

    whole = run()
    assert [len(one["rows"]) for one in whole] == [6, 12, 4]
    assert run(tmp_path / "first.ckpt") == whole


def test_a_single_prompt_is_judged_with_the_next_rollout(trainer, tokenizer, llama):
    """One prompt has no spread. Where the last rollout has no more, it is left out."""
    watch = monitor(rollouts=True, proxy=None, every_n_steps=1)
    several = prompts()
    one_each = DataLoader(range(5), batch_size=1, collate_fn=several.collate_fn)
    trainer(callbacks=[watch], max_epochs=1).fit(ppo(llama, tokenizer), one_each, prompts(2))
    assert [one["step"] for one in watch.history] == [0, 2, 4]
    assert [len(one["rows"]) for one in watch.history[1:]] == [2, 2]


@pytest.mark.parametrize("kept", [True, False])
def test_checkpoints_of_another_kind_are_refused(kept):
    with pytest.raises(
        ValueError, match=rf"made with rollouts: {kept}, and now it is {not kept}: resume with"
    ):
        monitor(rollouts=not kept).load_state_dict(monitor(rollouts=kept).state_dict())
    state = monitor(proxy="capitals").state_dict()
    for settings, message in (
        ({"proxy": None}, "proxy: capitals"),
        ({"proxy": "capitals", "temperature": 0.5}, "temperature: 1.0"),
    ):
        with pytest.raises(ValueError, match=f"made with {message}, and now it is"):
            monitor(**settings).load_state_dict(state)


def test_other_held_out_prompts_than_the_checkpoints_are_refused():
    row = {"kl": 0.0, "proxy": 1.0, "gold": 1.0, "prompt": "x", "completion": "y"}
    watch = monitor()
    watch._remember(0, [{"row": number, **row} for number in (1, 2)])
    with pytest.raises(ValueError, match="resume with the same validation data and num_prompts"):
        watch._remember(1, [{"row": number, **row} for number in (1, 3)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"num_prompts": 1}, "num_prompts"),
        ({"num_texts": -1}, r"num_texts \(-1\) not negative"),
        ({"on_alarm": "panic"}, "on_alarm must be warn, stop or raise_kl, got 'panic'"),
        ({"kl_factor": 1.0}, "kl_factor"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        monitor(**settings)


def test_what_it_cannot_watch_is_refused(trainer, tokenizer, llama):
    def fit(watch, module, *data):
        trainer(callbacks=[watch]).fit(module, *data)

    with pytest.raises(ValueError, match="there is none: use an objective with a reference"):
        fit(monitor(), DPO(llama, tokenizer, objective=SimPO()), loader(), loader())
    with pytest.raises(
        ValueError, match="DPO has no reward of its own: give GoodhartMonitor a reward as proxy"
    ):
        fit(monitor(proxy=None), DPO(llama, tokenizer), loader(), loader())
    with pytest.raises(
        ValueError, match="held-out prompts are those of the validation data, and there is none"
    ):
        fit(monitor(), DPO(llama, tokenizer), loader())
    with pytest.raises(ValueError, match="rollouts: true judges what a module samples for training, and DPO"):
        fit(monitor(rollouts=True), DPO(llama, tokenizer), loader(), loader())
    normalised = PPO(
        llama,
        ShapedReward(FunctionReward(capitals), [Normalized()]),
        tokenizer,
        estimator=RLOO(),
        sampling=Sampling(num_samples=2),
    )
    for part in (None, "shaped_reward"):
        with pytest.raises(
            ValueError, match="shaped_reward is Normalized.* another part as its proxy, one of capitals$"
        ):
            fit(monitor(proxy=part), normalised, prompts(), prompts(2))
    with pytest.raises(ValueError, match="the proxy is Normalized, which changes with what it has seen"):
        fit(monitor(proxy=normalised.reward), normalised, prompts(), prompts(2))
    with pytest.raises(
        ValueError, match="proxy 'gold' is no part of the module's reward: give a reward, or one of"
    ):
        fit(monitor(proxy="gold"), normalised, prompts(), prompts(2))
    with pytest.raises(ValueError, match="multiplies PPO's kl.coef, and DPO has none"):
        fit(monitor(on_alarm="raise_kl"), DPO(llama, tokenizer), loader(), loader())
    steered = PPO(
        llama,
        FunctionReward(capitals),
        tokenizer,
        estimator=RLOO(),
        kl=KLControl(0.1, target=6.0),
        sampling=Sampling(num_samples=2),
    )
    with pytest.raises(ValueError, match="not steered, got coef 0.1 and target 6.0"):
        fit(monitor(on_alarm="raise_kl"), steered, prompts(), prompts())
