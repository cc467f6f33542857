"""What must hold of an optimizer step, whatever the algorithm."""

import math

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import DPO, PPO, SFT, Optimization, Update
from lightning_rlhf.algorithms.base import NonFiniteLossError
from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.models import LoRA, Policy
from tests.algorithms.conftest import Gradients, random_groups
from tests.algorithms.rollouts import ppo, prompts
from tests.models.families import tiny

PLAIN_SGD = Optimization(name="sgd", lr=1e-2, schedule="constant")
ALGORITHMS = [pytest.param(SFT, 1, id="SFT"), pytest.param(DPO, 2, id="DPO")]


def loader(groups, batch_size):
    return DataLoader(groups, batch_size=batch_size, collate_fn=pack)


def gradients_of(algorithm, groups, batch_size, accumulate, trainer, tokenizer, **settings):
    module = algorithm(tiny("LlamaConfig"), tokenizer, optimization=PLAIN_SGD)
    seen = Gradients()
    fit = trainer(accumulate_grad_batches=accumulate, callbacks=[seen], **settings)
    fit.fit(module, loader(groups, batch_size))
    return seen, torch.cat([p.detach().flatten() for p in module.policy.parameters()])


@pytest.mark.parametrize(("algorithm", "k"), ALGORITHMS)
def test_eight_accumulated_equal_a_batch_of_eight(algorithm, k, trainer, tokenizer):
    """Twelve rows: the second window is shorter. Rows have different lengths, so token means differ."""
    groups = random_groups(12, k)
    whole, weights = gradients_of(algorithm, groups, 8, 1, trainer, tokenizer)
    cut, cut_weights = gradients_of(algorithm, groups, 1, 8, trainer, tokenizer)
    assert len(whole.steps) == len(cut.steps) == 2
    for a, b in zip(whole.steps, cut.steps, strict=True):
        assert (a - b).norm() / a.norm() < 1e-5
    assert cut.losses[-1] == pytest.approx(whole.losses[-1], rel=1e-5)
    torch.testing.assert_close(weights, cut_weights)


@pytest.mark.parametrize(("algorithm", "k"), ALGORITHMS)
def test_the_gradient_is_that_of_the_mean(algorithm, k, trainer, tokenizer):
    groups = random_groups(5, k)
    seen, _ = gradients_of(algorithm, groups, 5, 1, trainer, tokenizer)
    module = algorithm(tiny("LlamaConfig"), tokenizer)
    batch = pack(groups)
    if algorithm is SFT:
        loss = -module.policy(batch).logprobs.mean()
    else:
        logps = module.policy(batch).logprobs.split(batch.num_targets)
        logps = torch.stack([part.sum() for part in logps])
        ratios = logps - module.reference(batch)
        loss = -torch.nn.functional.logsigmoid(0.1 * (ratios[0::2] - ratios[1::2])).mean()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in module.policy.parameters()])
    assert (seen.steps[0] - expected).norm() / expected.norm() < 1e-5
    assert seen.losses[0] == pytest.approx(loss.item(), rel=1e-5)


def test_clipping_sees_the_mean(trainer, tokenizer):
    seen, _ = gradients_of(SFT, random_groups(4, 1), 1, 4, trainer, tokenizer, gradient_clip_val=0.5)
    assert seen.steps[0].norm().item() == pytest.approx(0.5, rel=1e-3)


def test_first_dpo_loss_is_ln_2(trainer, tokenizer):
    seen, _ = gradients_of(DPO, random_groups(4, 2), 4, 1, trainer, tokenizer)
    assert seen.losses[0] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(("algorithm", "k"), ALGORITHMS)
def test_a_nan_stops_the_run_and_names_the_rows(algorithm, k, trainer, tokenizer, llama):
    module = algorithm(llama, tokenizer, optimization=PLAIN_SGD)
    before = torch.cat([p.detach().flatten() for p in module.policy.parameters()])
    module._checked = True  # the step-0 check has a test of its own

    def poison(batch, batch_idx, step=module.training_step):
        return step(batch, batch_idx) if batch_idx == 0 else step(batch, batch_idx) * 1 + poisoned(module)

    def poisoned(module):
        module._loss_sum = module._loss_sum + math.nan
        return math.nan

    module.training_step = poison
    with pytest.raises(
        NonFiniteLossError, match=r"nan at step 1, on rows \[4, 5, 6, 7\].*no checkpoint was saved"
    ):
        trainer().fit(module, loader(random_groups(8, k), 4))
    after = torch.cat([p.detach().flatten() for p in module.policy.parameters()])
    assert after.isfinite().all()
    assert not torch.equal(before, after)


def test_a_nan_weight_is_found(trainer, tokenizer, llama):
    with torch.no_grad():
        llama.model.norm.weight[0] = math.nan
    with pytest.raises(NonFiniteLossError, match="step 0"):
        trainer().fit(SFT(llama, tokenizer), loader(random_groups(4, 1), 4))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_full_fine_tuning_of_half_precision_weights_is_refused(precision, trainer, tokenizer, llama):
    with pytest.raises(ValueError, match="use bf16-mixed, or LoRA"):
        trainer(precision=precision).fit(SFT(llama, tokenizer), loader(random_groups(4, 1), 4))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_lora_trains_in_half_precision_with_float32_adapters(precision, trainer, llama_dir):
    module = DPO(Policy(llama_dir, lora=LoRA(r=2)), optimization=Optimization(lr=1e-2))
    groups = random_groups(8, 2)
    run = trainer(precision=precision, max_epochs=8)
    run.fit(module, loader(groups, 8))
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert run.callback_metrics["train/rewards/accuracies"] > 0.8
    assert run.callback_metrics["train/num_tokens"] == 8 * len(pack(groups).input_ids)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_by_name_lower_the_loss(name, trainer, tokenizer, llama):
    seen = Gradients()
    module = SFT(llama, tokenizer, optimization=Optimization(name=name, lr=1e-2))
    trainer(max_epochs=5, callbacks=[seen]).fit(module, loader(random_groups(4, 1), 4))
    assert seen.losses[-1] < 0.9 * seen.losses[0]


def test_warmup_and_cosine(trainer, tokenizer, llama):
    rates = []
    module = SFT(llama, tokenizer, optimization=Optimization(lr=1e-3, name="sgd", warmup_ratio=0.25))
    step = module.training_step

    def watched(batch, batch_idx):
        rates.append(module.optimizers().param_groups[0]["lr"])
        return step(batch, batch_idx)

    module.training_step = watched
    trainer().fit(module, loader(random_groups(8, 1), 1))
    cosine = [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert rates == pytest.approx([1e-3 * rate for rate in (0.0, 0.5, *cosine)])


def test_a_schedule_without_an_end_is_refused(trainer, tokenizer, llama):
    with pytest.raises(ValueError, match="set max_steps or max_epochs"):
        trainer(max_epochs=-1, max_steps=-1).fit(SFT(llama, tokenizer), loader(random_groups(4, 1), 4))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"name": "adam"}, ValueError, "optimization.name is 'adam'; it must be one of adamw"),
        ({"schedule": "cosin"}, ValueError, "optimization.schedule is 'cosin'; it must be one of cosine"),
        ({"lr": "1e-5"}, TypeError, "optimization.lr must be a number, got '1e-5'"),
    ],
)
def test_slips_in_the_optimization_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        Optimization(**settings)


def test_arguments_of_the_wrong_type_are_named(tokenizer, llama):
    with pytest.raises(TypeError, match=r"objective must be one of .*, got 'sigmoid': write"):
        DPO(llama, tokenizer, objective="sigmoid")
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer, got the text 'a/model': load it"):
        SFT(llama, "a/model")


def test_sft_refuses_pairs(trainer, tokenizer, llama):
    """It would learn the rejected completions as well."""
    with pytest.raises(
        ValueError, match=r"row 0: SFT needs one completion a prompt.*got 2: use SFTDataModule"
    ):
        trainer().fit(SFT(llama, tokenizer), DataLoader(random_groups(2, 2), batch_size=2, collate_fn=pack))


@pytest.mark.parametrize("algorithm", [SFT, PPO])
def test_gradients_are_clipped_under_mixed_precision(algorithm, trainer, llama_dir):
    """Lightning refuses to clip for an optimizer that unscales in its step, as a fused AdamW does."""
    norms = []

    class Norms(L.Callback):
        def on_train_start(self, run, module):
            run.optimizers[0].register_step_post_hook(
                lambda *_: norms.append(
                    torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm()
                )
            )

    clip = {"gradient_clip_val": 1e-3} if algorithm is SFT else {}
    update = Update(num_epochs=1, minibatch_size=2, max_grad_norm=1e-3)
    module = (
        SFT(llama_dir) if algorithm is SFT else ppo(llama_dir, optimization=Optimization(), update=update)
    )
    data = loader(random_groups(4, 1), 2) if algorithm is SFT else prompts()
    trainer(precision="bf16-mixed", callbacks=[Norms()], **clip).fit(module, data)
    assert norms
    assert all(norm == pytest.approx(1e-3, rel=1e-2) for norm in norms)


def test_tokens_of_another_model_are_refused(trainer, tokenizer, llama):
    groups = [PromptGroup([5], [[6, 10_000]], row_id=3)]
    with pytest.raises(
        ValueError, match=r"token id 10000 in the batch of rows \[3\], and the model's embedding has"
    ):
        trainer().fit(SFT(llama, tokenizer), DataLoader(groups, batch_size=1, collate_fn=pack))


def test_rows_past_the_context_are_warned_of(trainer, tokenizer, llama):
    room = llama.config.max_position_embeddings
    groups = [PromptGroup([5], [[6] * room])]
    with pytest.warns(UserWarning, match=f"a row has {room + 1} tokens, and the model's context is {room}"):
        trainer().fit(SFT(llama, tokenizer), DataLoader(groups, batch_size=1, collate_fn=pack))
