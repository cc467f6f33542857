"""Policy, reference, critic and rewards on one base: the traps of adapters, each a test."""

import json

import lightning as L
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_rlhf.algorithms import GAE, PPO, RLOO, KLControl, Optimization, RewardModel, Update
from lightning_rlhf.data.packing import pack
from lightning_rlhf.models import LoRA, Policy, Quantization, load_language_model
from lightning_rlhf.models.critic import VALUE_ADAPTER, is_critic
from lightning_rlhf.models.export import export_checkpoint
from lightning_rlhf.models.reference import REFERENCE_ADAPTER
from lightning_rlhf.models.reward_export import export_reward_model
from lightning_rlhf.rewards import RewardEnsemble, RewardModelReward
from tests.algorithms.conftest import random_groups
from tests.algorithms.rollouts import SAMPLING, Waves, Written, ppo, prompts

NF4 = Quantization(compute_dtype="bfloat16")
IDS = torch.tensor([[1, 5, 6, 7, 8, 9]])
ADAM = Optimization(lr=1e-2, schedule="constant")


class Seen(L.Callback):
    """Gradients by name at every step, and what requires one."""

    def __init__(self):
        self.steps, self.required = [], []

    def on_train_start(self, trainer, module):
        def keep(*_):
            named = list(module.named_parameters())
            self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})
            self.required.append({n for n, p in named if p.requires_grad})

        trainer.optimizers[0].register_step_post_hook(keep)


def learn(trainer, policy, rollouts=3, callbacks=(), **settings):
    seen = Seen()
    module = ppo(policy, **{"optimization": ADAM, **settings})
    run = trainer(max_epochs=rollouts, callbacks=[seen, *callbacks])
    run.fit(module, prompts(6, 6))
    return module, run, seen


def of_role(named, role):
    return {n: v for n, v in named.items() if f".{role}." in n}


@pytest.fixture(scope="module")
def sft_dir(llama_dir, tmp_path_factory):
    """An adapter that was trained, with dropout in its settings."""
    path = tmp_path_factory.mktemp("sft") / "adapter"
    model = load_language_model(Policy(llama_dir, lora=LoRA(r=2, dropout=0.5)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def reward_dirs(llama_dir, tmp_path_factory):
    """Two reward models, adapters on the policy's base, after some real steps."""
    folder = tmp_path_factory.mktemp("rewards")
    for seed in range(2):
        torch.manual_seed(seed)
        module = RewardModel(Policy(llama_dir, lora=LoRA(r=2, dropout=0.5)), optimization=ADAM)
        loader = DataLoader(random_groups(6, 2, seed=seed), batch_size=3, collate_fn=pack)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        run = L.Trainer(
            accelerator="cpu", max_steps=4, enable_checkpointing=False, default_root_dir=folder, **quiet
        )
        run.fit(module, loader, loader)
        run.save_checkpoint(folder / "a.ckpt")
        export_reward_model(folder / "a.ckpt", folder / str(seed))
    return [str(folder / "0"), str(folder / "1")]


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_policy_and_critic_adapters_both_learn(checkpointing, trainer, llama_dir):
    policy = Policy(llama_dir, lora=LoRA(r=2, dropout=0.5), gradient_checkpointing=checkpointing)
    module, _, seen = learn(trainer, policy, generator=Written(), kl=KLControl(coef=0.5))
    assert all(required == seen.required[0] for required in seen.required)
    assert {
        role
        for n in seen.required[0]
        if ".lora_" in n
        for role in n.split(".")
        if role in ("default", "value")
    } == {
        "default",
        "value",
    }
    # The head starts at 0, and so does B: the critic's head learns first, then B, then A.
    last = seen.steps[-1]
    for role in ("default", VALUE_ADAPTER):
        assert of_role(last, role)
        assert all(g.abs().max() > 0 for g in of_role(last, role).values()), role
    assert last["critic.head.weight"].abs().max() > 0


def test_checkpointing_and_the_other_role_change_no_gradient(trainer, llama_dir):
    def gradients(checkpointing=False, **update):
        policy = Policy(llama_dir, lora=LoRA(r=2), gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        settings = {"num_epochs": 2, "minibatch_size": 8, "micro_batch_size": 3, "max_grad_norm": None}
        _, _, seen = learn(trainer, policy, 2, generator=Written(), update=Update(**{**settings, **update}))
        return seen.steps

    plain, again, other = gradients(), gradients(checkpointing=True), gradients(value_coef=0.7)
    for step, (a, b) in enumerate(zip(plain, again, strict=True)):
        assert a.keys() == b.keys()
        for name, gradient in a.items():
            assert (gradient - b[name]).norm() <= 1e-5 * gradient.norm(), (step, name)
    # Beside each other, they are those of each alone: Adam does not see the weight of a loss.
    for a, b in zip(plain[:4], other[:4], strict=True):
        for name, gradient in of_role(a, "default").items():
            assert (gradient - b[name]).norm() <= 1e-5 * gradient.norm(), name
    for name, gradient in plain[0].items():
        if is_critic(name):
            torch.testing.assert_close(other[0][name], 7 * gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("lora", [LoRA(r=2), None])
def test_a_backward_of_its_own_for_the_critic_changes_no_gradient(lora, trainer, llama_dir, monkeypatch):
    """The policy's activations are gone before the critic's are there; the gradients are those of one backward."""
    order = []
    backward, values = PPO.manual_backward, PPO.value_losses
    monkeypatch.setattr(PPO, "manual_backward", lambda self, *a: order.append("b") or backward(self, *a))
    monkeypatch.setattr(PPO, "value_losses", lambda self, *a: order.append("v") or values(self, *a))

    def gradients():
        order.clear()
        update = Update(num_epochs=2, minibatch_size=8, micro_batch_size=4, average="sequences")
        torch.manual_seed(0)
        _, _, seen = learn(trainer, Policy(llama_dir, lora=lora), 1, generator=Written(), update=update)
        return seen.steps, "".join(order)

    apart, order_apart = gradients()
    monkeypatch.setattr(PPO, "critic_apart", False)
    together, order_together = gradients()
    assert set(order_apart[i : i + 3] for i in range(0, len(order_apart), 3)) == {"bvb"}
    assert set(order_together[i : i + 2] for i in range(0, len(order_together), 2)) == {"vb"}
    for a, b in zip(apart, together, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("kind", "lora"), [("adapter", True), ("head", True), ("head", False), ("model", True), ("model", False)]
)
def test_every_kind_of_critic_learns_the_returns(kind, lora, trainer, llama_dir):
    losses = []

    class Loss(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(trainer.callback_metrics["train/loss/value_avg"].item())

    class Constant(Waves):
        def forward(self, samples):
            return torch.ones(len(samples))

    module, _, seen = learn(
        trainer,
        Policy(llama_dir, lora=LoRA(r=2) if lora else None),
        8,
        [Loss()],
        critic=kind,
        reward=Constant(),
        value_lr=3e-2,
        update=Update(num_epochs=2, minibatch_size=64, value_clip_range=10.0),
        optimization=Optimization(lr=1e-4, schedule="constant"),
    )
    assert losses[-1] < 0.3 * losses[0]
    own = {n for n in seen.required[0] if is_critic(n)}
    policy = seen.required[0] - own
    assert policy
    assert {"critic.head.weight", "critic.head.bias"} <= own
    assert (len(own) == 2) == (kind == "head")
    assert all(
        n.startswith("policy.") == (kind == "adapter")
        for n in own - {"critic.head.weight", "critic.head.bias"}
    )
    if kind == "head":  # the critic's loss reaches the trunk, through a head that is 0 at the first step
        assert all(g.abs().max() > 0 for n, g in seen.steps[-1].items() if "layers.1" in n)


def test_an_adapter_beside_no_adapter_is_refused(trainer, llama_dir):
    with pytest.raises(ValueError, match="critic 'adapter' shares the base.*this policy has none"):
        trainer().fit(ppo(llama_dir, critic="adapter"), prompts())


# --- reference, rewards -----------------------------------------------------------------------------------------------


def test_a_policy_that_starts_from_an_adapter_has_a_copy_as_reference(sft_dir, trainer):
    """The copy and the critic's adapter bring the dropout of the settings, which has to be off."""
    module, run, seen = learn(trainer, sft_dir, 1, optimization=ADAM)
    assert run.callback_metrics["train/objective/kl"] == 0.0
    assert run.callback_metrics["train/policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert all(m.p == 0.0 for m in module.modules() if isinstance(m, torch.nn.Dropout))
    assert not of_role(dict.fromkeys(seen.required[0]), REFERENCE_ADAPTER)
    frozen = of_role(dict(module.named_parameters()), REFERENCE_ADAPTER)
    start = load_file(f"{sft_dir}/adapter_model.safetensors")
    for name, p in frozen.items():
        key = name.removeprefix("policy.model.").replace(f".{REFERENCE_ADAPTER}.", ".")
        assert torch.equal(p, start[key])


@pytest.mark.parametrize("how", ["one", "ensemble"])
def test_rewards_on_the_policys_base_equal_those_on_their_own(how, trainer, llama_dir, reward_dirs):
    def reward(share):
        members = [RewardModelReward(d, share_base=share, name=f"r{i}") for i, d in enumerate(reward_dirs)]
        return members[0] if how == "one" else RewardEnsemble(members)

    scores = []
    for share in (True, False):
        torch.manual_seed(0)
        module, run, seen = learn(
            trainer, Policy(llama_dir, lora=LoRA(r=2)), reward=reward(share), generator=Written()
        )
        names = [n for n in dict(module.named_parameters()) if "reward" in n]
        assert bool(names) == share
        assert not set(names) & seen.required[0]
        scores.append(
            {n: v.item() for n, v in run.callback_metrics.items() if "rewards/" in n or "scores" in n}
        )
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert abs(scores[0]["train/objective/scores"]) > 1e-3
    if how == "ensemble":
        assert scores[0]["train/rewards/disagreement"] > 1e-3


# --- all on four bits, checkpoints, export ----------------------------------------------------------------------------


def base_bits(module):
    """As bytes: what four bits are stored in may read as nan."""
    named = module.policy.named_parameters()
    return {n: p.detach().view(torch.uint8).clone() for n, p in named if ".lora_" not in n}


def test_four_roles_on_one_base_in_four_bits(trainer, llama_dir, reward_dirs, tmp_path):
    def build():
        torch.manual_seed(0)
        members = [RewardModelReward(d, share_base=True, name=f"r{i}") for i, d in enumerate(reward_dirs)]
        policy = Policy(llama_dir, lora=LoRA(r=4, dropout=0.1), quantization=NF4)
        return ppo(
            policy,
            reward=RewardEnsemble(members),
            kl=KLControl(coef=0.01, target=1.0, horizon=100),
            optimization=Optimization(lr=2e-2, schedule="constant"),
            update=Update(num_epochs=2, minibatch_size=8),
        )

    module = build()
    module.configure_model()
    before = base_bits(module)
    adapters = {n: p.detach().clone() for n, p in module.named_parameters() if ".lora_B." in n}
    run = trainer(max_epochs=3, precision="bf16-mixed")
    run.fit(module, prompts(8, 8))
    assert run.callback_metrics["train/objective/kl"] > 1e-3
    for name, parameter in module.named_parameters():
        if name in adapters:  # policy and critic have moved, the rewards have not
            assert torch.equal(parameter, adapters[name]) == ("reward" in name), name
    assert base_bits(module).keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in base_bits(module).items())
    assert sum(type(p).__name__ == "Params4bit" for p in module.parameters()) == 2 * 7

    run.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    roles = ("default", VALUE_ADAPTER, "reward_r0", "reward_r1")
    for name in state:
        adapter = ".lora_" in name and any(f".{role}." in name for role in roles)
        assert (
            adapter
            or name.startswith("critic.head.")
            or "extra_state" in name
            or name.startswith("num_tokens")
        ), name
    again = build()
    again.configure_model()
    again.load_state_dict(state)
    assert all(torch.equal(v, module.state_dict()[n]) for n, v in again.state_dict().items() if ".lora_" in n)

    export_checkpoint(tmp_path / "a.ckpt", tmp_path / "adapter")
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    own = of_role(dict(module.policy.model.named_parameters()), "default")
    assert {n.replace(".default.", "."): 0 for n in own}.keys() == exported.keys()
    assert all(torch.equal(p, exported[n.replace(".default.", ".")]) for n, p in own.items())


@pytest.mark.parametrize("kind", ["full", "fresh adapter", "adapter"])
@pytest.mark.parametrize("critic", ["model", "adapter"])
def test_an_export_is_the_policy_alone(kind, critic, trainer, llama_dir, sft_dir, tmp_path):
    policy = {"full": llama_dir, "fresh adapter": Policy(llama_dir, lora=LoRA(r=2)), "adapter": sft_dir}[kind]
    critic = "model" if kind == "full" else critic
    module, run, _ = learn(trainer, policy, 2, critic=critic)
    run.save_checkpoint(tmp_path / "a.ckpt")
    export_checkpoint(tmp_path / "a.ckpt", tmp_path / "out")
    export_checkpoint(tmp_path / "a.ckpt", tmp_path / "merged", merge=kind != "full")
    with torch.no_grad():
        expected = module.policy.model.eval()(input_ids=IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        if kind != "full":
            settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
            assert settings["task_type"] == "CAUSAL_LM"
            base = AutoModelForCausalLM.from_pretrained(llama_dir)
            found = PeftModel.from_pretrained(base, tmp_path / "out").eval()
            torch.testing.assert_close(found(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
        start = AutoModelForCausalLM.from_pretrained(llama_dir).eval()(input_ids=IDS).logits
        assert (start - expected).abs().max() > 1e-2


def test_no_frozen_base_is_in_a_checkpoint(llama_dir):
    """A critic of its own under LoRA has a base of its own, frozen as well."""
    module = ppo(Policy(llama_dir, lora=LoRA(r=2)), critic="model")
    module.configure_model()
    weights = [n for n in module.state_dict() if n.endswith("weight") and ".lora_" not in n]
    assert weights == ["critic.head.weight"]
    again = ppo(Policy(llama_dir, lora=LoRA(r=2)), critic="model")
    again.configure_model()
    again.load_state_dict(module.state_dict())


def test_the_kl_coefficient_is_float64_under_bf16_true(trainer, llama_dir, tmp_path):
    """0.05 · (1 − 0.2 · 12/1e5), 3 times: in bfloat16 it would not move at all, in float32 be rounded."""
    kl = KLControl(coef=0.05, target=1e9, horizon=1e5)
    module = PPO(
        Policy(llama_dir, lora=LoRA(r=2), dtype="bfloat16"),
        Waves(),
        sampling=SAMPLING,
        estimator=RLOO(),
        kl=kl,
        optimization=ADAM,
    )
    run = trainer(max_epochs=3, precision="bf16-true")
    run.fit(module, prompts(6, 6))
    run.save_checkpoint(tmp_path / "a.ckpt")
    expected = 0.05 * (1 - 0.2 * 12 / 1e5) ** 3
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert state["kl._extra_state"] == pytest.approx(expected, rel=1e-14)
    again = PPO.load_from_checkpoint(tmp_path / "a.ckpt", reward=Waves())
    assert again.kl.coef == state["kl._extra_state"]
    assert again.num_rollouts == 3
    assert {p.dtype for n, p in module.named_parameters() if p.requires_grad} == {torch.float32}


def test_the_critic_has_a_learning_rate_of_its_own(trainer, llama_dir):
    settings = Optimization(name="sgd", lr=1e-3, schedule="constant")
    module, run, _ = learn(trainer, Policy(llama_dir, lora=LoRA(r=2)), 1, optimization=settings, value_lr=0.5)
    names = {id(p): n for n, p in module.named_parameters()}
    for group in run.optimizers[0].param_groups:
        assert {is_critic(names[id(p)]) for p in group["params"]} == {group["lr"] == 0.5}
    assert GAE.needs_values
