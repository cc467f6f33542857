"""RewardModel: its loss against TRL and by hand, ranked groups, ensembles, normalisation, resume."""

import copy
import itertools
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_rlhf.algorithms import Optimization, RewardModel
from lightning_rlhf.algorithms.reward_model import in_share
from lightning_rlhf.callbacks import ExactResume
from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.models import LanguageModel, LoRA, Policy, load_language_model
from tests.algorithms.conftest import Gradients, random_groups
from tests.models.families import tiny
from tests.tokenizers import letters

TOLERANCE = 1e-5


def reward_model(**settings):
    torch.manual_seed(0)
    return RewardModel(tiny("LlamaConfig"), letters(), **settings)


def one_step(module, groups, trainer, **settings):
    gradients = Gradients()
    run = trainer(max_steps=1, callbacks=[gradients], **settings)
    run.fit(module, DataLoader(groups, batch_size=len(groups), collate_fn=pack))
    return gradients.losses[0], gradients.steps[0], run.callback_metrics


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
@pytest.mark.parametrize("center", [0.0, 0.3])
@pytest.mark.parametrize("with_margin", [False, True])
def test_equals_trl(layout, center, with_margin, trainer, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    groups = random_groups(6, 2)
    if with_margin:
        groups = [
            PromptGroup(g.prompt, g.completions, extras={"margin": 0.3 * i}) for i, g in enumerate(groups)
        ]
    model = tiny("LlamaConfig")
    torch.manual_seed(0)
    module = RewardModel(LanguageModel(model, layout=layout), letters(), center_rewards_coef=center)
    model.save_pretrained(tmp_path / "model")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    theirs.score.weight.data.copy_(module.ensemble.heads[0].weight)
    args = trl.RewardConfig(
        output_dir=str(tmp_path),
        center_rewards_coefficient=center or None,
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        save_strategy="no",
    )
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    oracle = trl.RewardTrainer(theirs, args=args, train_dataset=rows, processing_class=letters())
    batch = [
        {
            "chosen_ids": [*g.prompt, *g.completions[0]],
            "rejected_ids": [*g.prompt, *g.completions[1]],
            **({"margin": g.extras["margin"]} if with_margin else {}),
        }
        for g in groups
    ]
    oracle.model.train()
    loss = oracle.compute_loss(oracle.model, oracle.data_collator(batch))
    loss.backward()
    found, gradient, metrics = one_step(module, groups, trainer)
    assert found == pytest.approx(loss.item(), rel=TOLERANCE)
    named = dict(oracle.model.named_parameters())
    expected = torch.cat(
        [
            named[
                n.removeprefix("policy.model.").replace("ensemble.scorers.0.head.weight", "score.weight")
            ].grad.flatten()
            for n, p in module.named_parameters()
            if p.requires_grad
        ]
    )
    assert (gradient - expected).norm() <= TOLERANCE * expected.norm()
    for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert metrics[f"train/{name}"].item() == pytest.approx(
            oracle._metrics["train"][name][-1], rel=1e-4, abs=1e-5
        )


def test_the_first_loss_by_hand(trainer):
    module, groups = reward_model(), random_groups(1, 2)
    with torch.no_grad():
        chosen, rejected = module.ensemble.raw(pack(groups))[0].tolist()
    assert one_step(module, groups, trainer)[0] == pytest.approx(
        math.log1p(math.exp(rejected - chosen)), rel=1e-5
    )


def ranked(count, size, seed=0):
    return [
        PromptGroup(g.prompt, g.completions, ranks=[float(r) for r in range(size)], row_id=g.row_id)
        for g in random_groups(count, size, seed)
    ]


def test_a_ranked_group_is_the_mean_of_its_comparisons():
    module, (group,) = reward_model(), ranked(1, 4)
    together = module.losses(pack([group]), "test")
    apart = [
        module.losses(pack([PromptGroup(group.prompt, [group.completions[i], group.completions[j]])]), "test")
        for i, j in itertools.combinations(range(4), 2)
    ]
    torch.testing.assert_close(together, torch.stack(apart).mean(0))


def test_prompts_weigh_the_same_whatever_their_number_of_completions():
    module = reward_model()
    two, four = ranked(1, 2)[0], ranked(1, 4, seed=1)[0]
    together = module.losses(pack([two, four]), "test")
    assert together.shape == (1, 2)
    torch.testing.assert_close(together[:, 0], module.losses(pack([two]), "test")[0])
    torch.testing.assert_close(together[:, 1], module.losses(pack([four]), "test")[0])


def test_ties_and_the_order_of_completions():
    module = reward_model()
    group = random_groups(1, 3)[0]
    tied = PromptGroup(group.prompt, group.completions, ranks=[1.0, 0.0, 1.0])
    first, second, third = group.completions
    pairs = [PromptGroup(group.prompt, [second, other]) for other in (first, third)]
    expected = torch.cat([module.losses(pack([pair]), "test") for pair in pairs]).mean()
    torch.testing.assert_close(module.losses(pack([tied]), "test").squeeze(), expected)


def test_accumulated_equals_one_batch(trainer):
    groups = ranked(5, 3)
    whole = one_step(reward_model(), groups, trainer)
    gradients = Gradients()
    run = trainer(max_steps=1, callbacks=[gradients], accumulate_grad_batches=8)
    run.fit(reward_model(), DataLoader(groups, batch_size=1, collate_fn=pack))
    assert (gradients.steps[0] - whole[1]).norm() <= TOLERANCE * whole[1].norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_members_on_one_base_train_as_they_would_alone(checkpointing, llama_dir, trainer):
    """One automatic backward through several adapters, recomputed activations included."""
    groups = random_groups(12, 2)
    policy = Policy(llama_dir, lora=LoRA(r=2), gradient_checkpointing=checkpointing)
    torch.manual_seed(0)
    module = RewardModel(policy, num_members=3, member_share=0.6)
    module.configure_model()
    with torch.no_grad():  # so that every adapter computes something else
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    found = {}
    module.on_after_backward = lambda: found.update(
        {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    )
    run = trainer(max_steps=1)
    run.fit(module, DataLoader(groups, batch_size=12, collate_fn=pack))
    trainable = {n for n, p in module.named_parameters() if p.requires_grad}
    assert set(found) == trainable
    for member in range(3):
        name = "default" if member == 0 else f"member_{member}"
        alone = RewardModel(policy)
        alone.configure_model()
        with torch.no_grad():
            for n, p in alone.named_parameters():
                source = n.replace(".default.", f".{name}.").replace("scorers.0", f"scorers.{member}")
                p.copy_(start[source])
        own = [g for g in groups if in_share(g.row_id, member, 0.6, 0)]
        alone.losses(pack(own), "test").sum().backward()
        for n, p in alone.named_parameters():
            if p.requires_grad:
                source = n.replace(".default.", f".{name}.").replace("scorers.0", f"scorers.{member}")
                # The Trainer's gradient is still the sum here, times the number of members.
                assert (found[source] / 3 - p.grad).norm() <= TOLERANCE * p.grad.norm()
                assert p.grad.norm() > 0


def test_members_share_one_base_in_memory(llama_dir):
    one = load_language_model(Policy(llama_dir, lora=LoRA(r=2)))
    module = RewardModel(Policy(llama_dir, lora=LoRA(r=2)), num_members=4)
    module.configure_model()
    adapters = sum(p.numel() for n, p in one.named_parameters() if "lora_" in n)
    heads = sum(head.weight.numel() for head in module.ensemble.heads)
    base = sum(p.numel() for n, p in one.named_parameters() if "lora_" not in n)
    assert sum(p.numel() for p in module.parameters()) == base + 4 * adapters + heads


def test_every_member_draws_its_own_share():
    shares = [{row for row in range(2000) if in_share(row, member, 0.5, 0)} for member in range(3)]
    assert all(abs(len(share) - 1000) < 100 for share in shares)
    assert abs(len(shares[0] & shares[1]) - 500) < 75  # independent draws
    assert shares[0] != {row for row in range(2000) if in_share(row, 0, 0.5, 1)}


def test_heads_start_the_same_where_asked(llama_dir):
    for shared in (False, True):
        module = RewardModel(Policy(llama_dir, lora=LoRA(r=2)), num_members=2, shared_head_init=shared)
        module.configure_model()
        one, other = (head.weight for head in module.ensemble.heads)
        assert torch.equal(one, other) == shared
        assert one is not other


def test_validation_sets_the_scale(trainer):
    module, groups = reward_model(), random_groups(9, 2)
    loader = DataLoader(groups, batch_size=4, collate_fn=pack)
    run = trainer(max_epochs=2)
    run.fit(module, loader, loader)
    with torch.no_grad():
        scores = torch.cat([module.predict_step(batch, 0) for batch in loader])
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1.0, abs=1e-5)
    head = module.ensemble.heads[0]
    before = (head.mean, head.std)
    trainer().validate(module, DataLoader(groups[:3], batch_size=3, collate_fn=pack))
    assert (head.mean, head.std) == before  # only a fit sets it


def test_the_scale_survives_a_checkpoint_and_bfloat16(trainer, tmp_path, llama_dir):
    loader = DataLoader(random_groups(6, 2), batch_size=3, collate_fn=pack)
    module = RewardModel(Policy(llama_dir, lora=LoRA(r=2)))
    run = trainer(precision="bf16-true")
    run.fit(module, loader, loader)
    assert module.ensemble.heads[0].weight.dtype == torch.float32
    run.save_checkpoint(tmp_path / "rm.ckpt")
    again = RewardModel.load_from_checkpoint(tmp_path / "rm.ckpt", weights_only=True)
    head, kept = module.ensemble.heads[0], again.ensemble.heads[0]
    assert (kept.mean, kept.std) == (head.mean, head.std)
    assert torch.equal(kept.weight, head.weight)


def test_without_validation_it_says_that_scores_are_not_normalised(trainer):
    with pytest.warns(UserWarning, match="not normalised: there was no validation epoch"):
        one_step(reward_model(), random_groups(2, 2), trainer)


def test_evaluation_measures_calibration_and_length(trainer):
    groups = random_groups(20, 2)
    module = reward_model()
    found = trainer().test(module, DataLoader(groups, batch_size=7, collate_fn=pack), verbose=False)[0]
    lengths = torch.tensor([[len(c) for c in g.completions] for g in groups])
    wins = (lengths[:, 0] > lengths[:, 1]).float() + 0.5 * (lengths[:, 0] == lengths[:, 1]).float()
    assert found["test/longer_wins"] == pytest.approx(wins.mean().item())
    with torch.no_grad():
        scores = module.ensemble.raw(pack(groups))[0]
    expected = torch.corrcoef(torch.stack([scores, lengths.flatten().float()]))[0, 1].item()
    assert found["test/length_correlation"] == pytest.approx(expected, abs=1e-5)
    assert 0.0 <= found["test/calibration_error"] <= 0.5


def test_resume_is_exact(trainer, tmp_path, llama_dir):
    groups = random_groups(12, 2)

    def run(ckpt_path=None):
        torch.manual_seed(0)
        module = RewardModel(Policy(llama_dir, lora=LoRA(r=2)), num_members=2, member_share=0.7)
        every_epoch = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        loop = trainer(max_epochs=2, enable_checkpointing=True, callbacks=[ExactResume(), every_epoch])
        loader = DataLoader(groups, batch_size=4, collate_fn=pack)
        loop.fit(module, loader, loader, ckpt_path=ckpt_path, weights_only=True)
        return module.state_dict()

    whole = run()
    resumed = run(tmp_path / "epoch=0.ckpt")
    assert set(whole) == set(resumed)
    for name, one in whole.items():
        other = resumed[name]
        assert one == other if isinstance(one, dict) else torch.equal(one, other), name


def test_a_learnable_preference_is_learned(trainer):
    """Completions that hold a certain token are preferred: accuracy on new pairs becomes near 1."""

    def groups(count, seed):
        found = []
        for group in random_groups(count, 1, seed):
            plain = [token for token in group.completions[0] if token != 5] or [6]
            found.append(PromptGroup(group.prompt, [[*plain, 5], [*plain, 6]], row_id=group.row_id))
        return found

    module = RewardModel(
        tiny("LlamaConfig"), letters(), optimization=Optimization(lr=3e-3, schedule="constant")
    )
    run = trainer(max_epochs=6)
    run.fit(module, DataLoader(groups(64, 0), batch_size=8, collate_fn=pack))
    found = trainer().test(module, DataLoader(groups(64, 1), batch_size=16, collate_fn=pack), verbose=False)[
        0
    ]
    assert found["test/accuracy"] > 0.95


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_members": 0}, "num_members must be at least 1, got 0"),
        ({"member_share": 0.5}, "member_share 0.5 with one member would leave data out"),
        ({"member_share": 1.5, "num_members": 2}, r"member_share must lie in \(0, 1\], got 1.5"),
        ({"center_rewards_coef": -1.0}, "center_rewards_coef must be at least 0"),
        ({"num_members": 2}, "with a built model that has no adapter"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        reward_model(**settings)


def test_a_single_completion_is_refused():
    with pytest.raises(ValueError, match="row 7: a reward model compares completions of one prompt"):
        reward_model().losses(pack([PromptGroup([5], [[6]], row_id=7)]), "train")


def test_labelled_answers_are_refused():
    labelled = PromptGroup([5], [[6], [7]], extras={"label": 1.0})
    with pytest.raises(ValueError, match="these are labelled one by one: use PreferenceDataModule"):
        reward_model().losses(pack([labelled]), "train")


def test_dropout_is_off_and_the_vocabulary_head_is_not_trained(llama_dir):
    model = tiny("LlamaConfig")
    model.config.attention_dropout = 0.5
    module = RewardModel(copy.deepcopy(model), letters())
    assert not any(p.requires_grad for n, p in module.named_parameters() if "lm_head" in n)
    assert all(layer.self_attn.attention_dropout == 0.0 for layer in module.policy.causal_lm.model.layers)
