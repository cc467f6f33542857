"""PPO in a stock Trainer: the first step, how a rollout is cut, and what it does with bad input."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_rlhf.algorithms import GAE, GRPO, PPO, RLOO, KLControl, Optimization, Update
from lightning_rlhf.algorithms.base import NonFiniteLossError
from lightning_rlhf.data import PreferenceDataModule, PromptCollator, PromptDataModule
from lightning_rlhf.generation import Completion, Generator, Sampling
from lightning_rlhf.models import LoRA, Policy
from lightning_rlhf.rewards import EndpointReward, Reward, RewardError
from tests.algorithms.conftest import Gradients
from tests.algorithms.rollouts import SAMPLING, SGD, Waves, Written, ppo, prompts
from tests.models.families import tiny


def trained(module):
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


# --- the first step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_at_the_first_step_every_ratio_is_1_and_the_kl_0(lora, trainer, llama_dir):
    """Exactly, where the old log-probabilities come from the same packing: one prompt, one minibatch."""
    run = trainer()
    module = ppo(Policy(llama_dir, lora=lora), sampling=replace(SAMPLING, num_samples=1))
    run.fit(module, prompts(1, 1))
    assert run.callback_metrics["train/policy/ratio"] == 1.0
    assert run.callback_metrics["train/policy/approxkl_avg"] == 0.0
    for name in ("kl", "kl_k1", "kl_k3"):
        assert run.callback_metrics[f"train/objective/{name}"] == 0.0


def test_in_another_packing_they_are_up_to_rounding(trainer, llama_dir):
    run = trainer()
    run.fit(ppo(llama_dir, update=Update(num_epochs=1, minibatch_size=64, micro_batch_size=3)), prompts())
    assert run.callback_metrics["train/policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert run.callback_metrics["train/policy/approxkl_avg"] < 1e-10


def test_another_sampler_than_the_policy_stops_the_run(trainer, llama_dir):
    class Moved(PPO):
        def estimate(self, *arguments):
            self.policy.causal_lm.lm_head.weight.data.mul_(1.1)
            return super().estimate(*arguments)

    module = Moved(llama_dir, Waves(), sampling=SAMPLING, optimization=SGD)
    with pytest.raises(
        RuntimeError, match="should be 1: the policy that is trained is not the one that sampled"
    ):
        trainer().fit(module, prompts())


def test_another_model_as_reference_is_compared_by_its_own_head(trainer, llama_dir, tmp_path):
    """A GPT-2 with dropout in its configuration: it is switched off, so the KL is the same both times."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.tokenizers import letters

    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    assert config.resid_pdrop > 0
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "other")
    letters().save_pretrained(tmp_path / "other")
    found = []
    for _ in range(2):
        run = trainer()
        run.fit(ppo(llama_dir, reference=str(tmp_path / "other")), prompts())
        assert run.callback_metrics["train/policy/ratio"] == pytest.approx(1.0, abs=1e-5)
        found.append(run.callback_metrics["train/objective/kl"].item())
    assert found[0] == found[1] > 0.1


# --- how a rollout is cut ---------------------------------------------------------------------------------------------


def gradients(trainer, path, layout="shared_prefix", **update):
    seen = Gradients()
    seen.on_train_epoch_end = lambda *_: None
    module = ppo(
        Policy(path, layout=layout),
        sampling=replace(SAMPLING, num_samples=3),
        update=Update(**{"num_epochs": 2, "minibatch_size": 6, "entropy_coef": 0.01, **update}),
        generator=Written(),
    )
    run = trainer(callbacks=[seen])
    run.fit(module, prompts(8, 4))
    return seen.steps, run.callback_metrics


def test_results_do_not_depend_on_micro_batches_or_layout(trainer, llama_dir):
    expected, metrics = gradients(trainer, llama_dir)
    assert len(expected) == 8
    cuts = [
        {"micro_batch_size": 1},
        {"micro_batch_size": 4},
        {"micro_batch_tokens": 12},
        {"layout": "padded"},
        {"layout": "padded", "micro_batch_size": 4, "average": "tokens"},
    ]
    for cut in cuts:
        found, measured = gradients(trainer, llama_dir, **cut)
        for a, b in zip(expected, found, strict=True):
            assert (a - b).norm() < 1e-5 * a.norm(), cut
        for name, value in metrics.items():
            if "time" not in name:
                assert measured[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


def test_by_sequences_every_completion_weighs_the_same(trainer, llama_dir):
    by_tokens, _ = gradients(trainer, llama_dir)
    by_sequences, _ = gradients(trainer, llama_dir, average="sequences")
    again, _ = gradients(trainer, llama_dir, average="sequences", micro_batch_size=1)
    assert (by_tokens[0] - by_sequences[0]).norm() > 1e-2 * by_tokens[0].norm()
    assert (again[-1] - by_sequences[-1]).norm() < 1e-5 * again[-1].norm()


def test_no_forward_is_larger_than_asked(trainer, llama_dir, monkeypatch):
    module = ppo(
        llama_dir,
        update=Update(num_epochs=1, minibatch_size=8, micro_batch_size=4, micro_batch_tokens=20),
        generator=Written(),
    )
    module.configure_model()
    sizes = []
    whole = module.policy.hidden_states
    monkeypatch.setattr(
        module.policy,
        "hidden_states",
        lambda batch, **k: (
            sizes.append((batch.num_completions, batch.input_ids.numel())) or whole(batch, **k)
        ),
    )
    trainer().fit(module, prompts(8, 8))
    assert max(count for count, _ in sizes) <= 4
    assert max(tokens for _, tokens in sizes) <= 20


def test_a_temperature_is_a_division_of_the_head_everywhere(trainer, tokenizer):
    """Sampled and trained at 2, a model does what it does at 1 with half its head: samples, KL, and weights."""
    found = []
    for temperature in (2.0, 1.0):
        model = tiny("LlamaConfig")
        with torch.no_grad():
            model.lm_head.weight.mul_(temperature)
        sampling = Sampling(max_new_tokens=6, num_samples=4, temperature=temperature)
        module = ppo(model, tokenizer, sampling=sampling, estimator=RLOO(), kl=KLControl(coef=0.5))
        module.update = Update(num_epochs=2, minibatch_size=64, clip_range=0.01, max_grad_norm=None)
        model.lm_head.requires_grad_(False)
        run = trainer()
        run.fit(module, prompts(8, 4))
        weights = torch.cat([p.detach().flatten() for n, p in trained(module).items()])
        found.append((run.callback_metrics, weights))
    (metrics, weights), (expected, others) = found
    assert metrics["train/objective/kl"] > 1e-6
    assert metrics["train/completions/mean_length"] == expected["train/completions/mean_length"]
    for name, value in expected.items():
        if "time" not in name:
            assert metrics[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-7), name
    torch.testing.assert_close(weights, others, rtol=1e-5, atol=1e-7)


def test_an_early_stop_leaves_epochs_out(trainer, llama_dir):
    update = Update(num_epochs=4, minibatch_size=64)
    steps = []
    for limit in (None, 1e-12, 1e6):
        run = trainer()
        fast = replace(SGD, lr=1.0)
        module = ppo(llama_dir, update=replace(update, max_approx_kl=limit), optimization=fast)
        run.fit(module, prompts())
        steps.append(run.global_step)
    assert steps == [4, 2, 4]  # in the first epoch it has not moved yet


# --- inside a Trainer -------------------------------------------------------------------------------------------------


def test_a_checkpoint_makes_the_module_again_and_validates(trainer, llama_dir, tmp_path):
    module = ppo(llama_dir, estimator=GRPO(scale=False), value_lr=None, optimization=replace(SGD, lr=0.1))
    run = trainer()
    run.fit(module, prompts())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = PPO.load_from_checkpoint(tmp_path / "a.ckpt", reward=Waves())
    assert again.estimator == GRPO(scale=False)
    assert (again.sampling, again.update, again.kl.control) == (
        module.sampling,
        module.update,
        module.kl.control,
    )
    assert all(torch.equal(p, trained(again)[n]) for n, p in trained(module).items())
    run = trainer()
    run.validate(ppo(llama_dir, estimator=GRPO(scale=False)), prompts(), ckpt_path=tmp_path / "a.ckpt")
    assert run.callback_metrics["val/objective/kl"] > 0


def test_validation_samples_and_changes_nothing(trainer, llama_dir):
    found = []
    for val in (None, prompts(3, 2, seed=9)):
        module = ppo(llama_dir)
        run = trainer(max_epochs=2, num_sanity_val_steps=1)
        run.fit(module, prompts(), val)
        found.append(trained(module))
    assert all(torch.equal(p, found[1][n]) for n, p in found[0].items())
    rows = module.last_validation
    assert [row["row"] for row in rows] == [0, 1, 2]
    mean = sum(row["score"] for row in rows) / 3
    assert run.callback_metrics["val/objective/scores"] == pytest.approx(mean, abs=1e-6)
    assert {
        "val/objective/scores_greedy",
        "val/objective/kl",
        "val/completions/mean_length",
    } <= run.callback_metrics.keys()


def test_a_reward_is_given_the_columns_of_the_data(trainer, llama_dir, tmp_path):
    class Seen(Waves):
        columns = ()

        def forward(self, samples):
            self.columns = samples.columns
            return super().forward(samples)

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "ab"[: 1 + i % 2], "answer": i}) + "\n" for i in range(4)))
    reward = Seen()
    datamodule = PromptDataModule(str(data), batch_size=4)
    trainer().fit(ppo(llama_dir, reward=reward), datamodule=datamodule)
    assert sorted(reward.columns["answer"]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_schedule_ends_with_the_run(trainer, llama_dir):
    update = Update(num_epochs=2, minibatch_size=4)
    optimization = Optimization(name="sgd", lr=1.0, schedule="linear", warmup_ratio=0.0)
    for settings in ({"max_epochs": 2}, {"max_epochs": 50, "max_steps": 16}):
        run = trainer(**settings)
        module = ppo(llama_dir, update=update, optimization=optimization, value_lr=0.5)
        run.fit(module, prompts(8, 4))
        assert run.global_step == 2 * 2 * 2 * 2
        assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.0] * 2
        assert {group["initial_lr"] for group in run.optimizers[0].param_groups} == {1.0, 0.5}


# --- bad input --------------------------------------------------------------------------------------------------------


class Failing(Waves):
    """Breaks from the second rollout on."""

    def __init__(self, how):
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, samples):
        self.calls += 1
        scores = super().forward(samples)
        return scores if self.calls == 1 else self.how(scores)


def _raise(scores):
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda scores: scores * float("nan"), "reward 'failing' is nan for sample 0 .8 of 8"),
        (_raise, "reward 'failing' failed: OSError: the disk is gone"),
        (lambda scores: scores[:-1], r"returned values of shape \(7,\) for 8 samples"),
    ],
)
def test_a_bad_reward_stops_the_run_and_the_last_checkpoint_stays(how, message, trainer, llama_dir, tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    module = ppo(llama_dir, reward=Failing(how), update=Update(num_epochs=2, minibatch_size=64))
    with pytest.raises(RewardError, match=message):
        trainer(max_epochs=3, callbacks=[saver], enable_checkpointing=True).fit(module, prompts())
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=2.ckpt"]
    run = trainer(max_epochs=3)
    run.fit(
        ppo(llama_dir, update=Update(num_epochs=2, minibatch_size=64), reward=Failing(lambda scores: scores)),
        prompts(),
        ckpt_path=tmp_path / "step=2.ckpt",
    )
    assert run.global_step == 6


def test_an_endpoint_that_dies_midway(trainer, llama_dir, tmp_path):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        answered = 0

        def do_POST(self):
            rows = len(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["completions"])
            Handler.answered += 1
            self.send_response(200 if Handler.answered == 1 else 503)
            self.end_headers()
            self.wfile.write(json.dumps({"scores": [0.5] * rows}).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        module = ppo(llama_dir, reward=EndpointReward(url, max_attempts=2, backoff=0.01))
        saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1)
        with pytest.raises(RewardError, match="503"):
            trainer(max_epochs=3, callbacks=[saver], enable_checkpointing=True).fit(module, prompts())
        assert len(list(tmp_path.glob("*.ckpt"))) == 1
    finally:
        server.shutdown()
        server.server_close()


def test_a_loss_that_is_not_finite_names_its_rows_and_changes_no_weight(trainer, llama_dir):
    class Broken(PPO):
        def estimate(self, *arguments):
            found = super().estimate(*arguments)
            return found._replace(advantages=found.advantages * torch.inf)

    module = Broken(llama_dir, Waves(), sampling=SAMPLING, optimization=SGD, update=Update(minibatch_size=64))
    module.configure_model()
    before = trained(module)
    with pytest.raises(NonFiniteLossError, match="at step 0, on rows .*lower update.max_grad_norm"):
        trainer().fit(module, prompts())
    assert all(torch.equal(p, before[n]) for n, p in trained(module).items())


class Silent(Generator):
    """Its completions never end, or are empty."""

    def __init__(self, tokens):
        self.tokens = tokens

    def generate(self, model, tokenizer, prompts, sampling, *, seeds=None):
        for prompt in prompts:
            yield [Completion(list(prompt), self.tokens, "", True)] * sampling.num_samples


@pytest.mark.parametrize("bootstrap", [False, True])
def test_an_eos_that_never_comes_still_trains(bootstrap, trainer, llama_dir):
    run = trainer()
    module = ppo(llama_dir, estimator=GAE(bootstrap_truncated=bootstrap), generator=Silent([7, 8]))
    run.fit(module, prompts())
    assert run.callback_metrics["train/completions/clipped_ratio"] == 1.0
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_an_empty_completion_names_its_row(trainer, llama_dir):
    with pytest.raises(ValueError, match="row 0: the sampler returned an empty completion"):
        trainer().fit(ppo(llama_dir, generator=Silent([])), prompts())


def test_an_empty_prompt_and_one_that_leaves_no_room_name_their_rows(trainer, llama_dir):
    rows = [{"prompt_ids": ids, "text": "", "messages": None, "row_id": 5} for ids in ([], [7] * 124)]
    for row, message in zip(
        rows, ("row 5: the prompt has no token", "row 5: the prompt has 124 tokens.*128"), strict=True
    ):
        with pytest.raises(ValueError, match=message):
            trainer().fit(ppo(llama_dir), DataLoader([row], collate_fn=PromptCollator()))


def test_data_of_another_kind(trainer, llama_dir, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(TypeError, match="gave a PackedBatch: use PromptDataModule"):
        trainer().fit(ppo(llama_dir), datamodule=PreferenceDataModule(str(data)))
    with pytest.raises(TypeError, match="gave a PackedBatch: use PromptDataModule"):
        trainer().validate(ppo(llama_dir), PreferenceDataModule(str(data), val=str(data)))


@pytest.mark.parametrize("name", ["gradient_clip_val", "accumulate_grad_batches"])
def test_what_the_trainer_refuses(name, trainer, llama_dir):
    with pytest.raises(MisconfigurationException, match=f"manual optimization. Remove `Trainer.{name}=2"):
        trainer(**{name: 2}).fit(ppo(llama_dir), prompts())


def test_the_trainer_counts_optimizer_steps(trainer, llama_dir):
    """8 completions in minibatches of 4, two epochs: 4 steps a rollout."""
    update = Update(num_epochs=2, minibatch_size=4)

    def fit(every=0, update=update, **settings):
        saver = ModelCheckpoint(every_n_train_steps=every) if every else ModelCheckpoint()
        run = trainer(callbacks=[saver], enable_checkpointing=True, **settings)
        run.fit(ppo(llama_dir, update=update), prompts())
        return run.global_step

    with pytest.warns(
        UserWarning, match="max_steps 5 is no multiple of the 4 optimizer steps.*after 8 steps"
    ):
        assert fit(max_steps=5, max_epochs=9) == 8
    with pytest.raises(ValueError, match="every_n_train_steps 6: .* takes 4 of them.*multiple of 4, or 1"):
        fit(every=6)
    with pytest.raises(ValueError, match="every_n_train_steps 4: .* takes a number that varies.*Give 1"):
        fit(every=4, update=replace(update, max_approx_kl=1.0))
    for every in (1, 2, 4, 8):
        assert fit(every=every) == 4


class Endless(IterableDataset):
    def __iter__(self):
        yield from prompts().dataset


def test_a_schedule_needs_an_end(trainer, llama_dir):
    cosine = Optimization(lr=1e-3)
    with pytest.raises(ValueError, match="schedule 'cosine' needs the number of steps"):
        trainer(max_epochs=-1).fit(ppo(llama_dir, optimization=cosine), prompts())
    unsized = DataLoader(Endless(), batch_size=4, collate_fn=PromptCollator())
    with pytest.raises(ValueError, match="schedule 'cosine' .* its data no length"):
        trainer().fit(ppo(llama_dir, optimization=cosine), unsized)
    run = trainer(max_steps=1)
    run.fit(ppo(llama_dir, optimization=cosine), unsized)
    assert run.global_step == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": RLOO(), "sampling": Sampling(num_samples=1)}, "num_samples must be at least 2, got 1"),
        ({"estimator": RLOO(), "critic": "head", "sampling": SAMPLING}, "RLOO has no critic"),
        ({"sampling": Sampling(temperature=0.0)}, "temperature must be positive"),
        ({"value_lr": 0.0}, "value_lr must be positive"),
    ],
)
def test_settings_that_do_not_fit(settings, message, llama_dir):
    with pytest.raises(ValueError, match=message):
        PPO(llama_dir, Waves(), **settings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Update(num_epochs=0),
        lambda: Update(minibatch_size=0),
        lambda: Update(micro_batch_tokens=0),
        lambda: Update(clip_range=1.0),
        lambda: Update(value_clip_range=0.0),
        lambda: Update(max_grad_norm=0.0),
        lambda: Update(max_approx_kl=-1.0),
        lambda: Update(entropy_coef=-0.1),
        lambda: Update(average="token"),
        lambda: KLControl(coef=-1.0),
        lambda: KLControl(coef=0.0, target=6.0),
        lambda: KLControl(target=0.0),
        lambda: KLControl(horizon=0.0),
        lambda: KLControl(estimator="k3"),
        lambda: GAE(gamma=1.1),
        lambda: GAE(lam=-0.1),
    ],
)
def test_settings_out_of_range(make):
    with pytest.raises(ValueError, match="must"):
        make()


def test_a_function_is_no_reward(llama_dir):
    with pytest.raises(TypeError, match="got function: put a function into rewards.FunctionReward"):
        PPO(llama_dir, lambda samples: 0.0)
    assert issubclass(Waves, Reward)
