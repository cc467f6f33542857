"""Whole updates of PPO equal an independent implementation in float64: plain loops, one sequence at a time."""

import copy
import itertools
import math
import random
from dataclasses import dataclass, replace

import pytest
import torch

from lightning_rlhf.algorithms import GAE, GRPO, RLOO, KLControl, Optimization, Reinforce, Update
from lightning_rlhf.generation import Sampling
from tests.algorithms.rollouts import Written, ppo, prompts, wave
from tests.models.families import tiny


@dataclass
class Plain:
    """PPO on given samples: settings by the names of the library, parameters of its own."""

    model: object
    estimator: object
    kl: KLControl
    update: Update
    optimization: Optimization
    value_lr: float
    temperature: float

    def __post_init__(self):
        self.policy, self.reference, self.critic = (copy.deepcopy(self.model).double() for _ in range(3))
        width = self.policy.config.hidden_size
        self.head = [torch.zeros(1, width, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
        self.parameters = [(p, self.optimization.lr) for p in self.policy.parameters()]
        if isinstance(self.estimator, GAE):
            own = [*self.critic.model.parameters(), *self.head]
            self.parameters += [(p.requires_grad_(), self.value_lr) for p in own]
        self.moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p, _ in self.parameters]
        self.coef, self.num_steps = self.kl.coef, 0

    def distributions(self, model, prompt, tokens):
        """Log-probabilities of the whole vocabulary where each token was chosen."""
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0]
        return (logits[len(prompt) - 1 : -1] / self.temperature).log_softmax(-1)

    def values(self, prompt, tokens):
        """Before every token, and after the last."""
        hidden = self.critic.model(input_ids=torch.tensor([prompt + tokens])).last_hidden_state[0]
        return (hidden[len(prompt) - 1 :] * self.head[0]).sum(1) + self.head[1]

    def rollout(self, number, drawn):
        samples = [one for group in drawn for one in group]
        with torch.no_grad():
            logps = [self.distributions(self.policy, s.prompt, s.tokens) for s in samples]
            refs = [self.distributions(self.reference, s.prompt, s.tokens) for s in samples]
            values = [self.values(s.prompt, s.tokens).tolist() for s in samples]
        old = [[row[t].item() for row, t in zip(l, s.tokens, strict=True)] for l, s in zip(logps, samples)]  # noqa: B905, E741
        ref = [[row[t].item() for row, t in zip(l, s.tokens, strict=True)] for l, s in zip(refs, samples)]  # noqa: B905, E741
        exact = [(p.exp() * (p - q)).sum(1).tolist() for p, q in zip(logps, refs, strict=True)]
        k1 = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(old, ref, strict=True)]
        kl = exact if self.kl.estimator == "exact" else k1
        scores = [wave(s.tokens) for s in samples]
        if isinstance(self.estimator, GAE):
            advantages, returns = self.gae(samples, scores, kl, values)
        else:
            whole = [s - self.coef * sum(x) for s, x in zip(scores, kl, strict=True)]
            by_sequence = self.by_sequence(whole, len(drawn[0]))
            advantages, returns = [[a] * len(x) for a, x in zip(by_sequence, kl, strict=True)], None
        if self.update.whiten_advantages:
            flat = list(itertools.chain(*advantages))
            mean = sum(flat) / len(flat)
            variance = sum((a - mean) ** 2 for a in flat) / len(flat)
            advantages = [[(a - mean) / math.sqrt(variance + 1e-8) for a in row] for row in advantages]
        for epoch in range(self.update.num_epochs):
            order = list(range(len(samples)))
            random.Random(f"0:{number}:{epoch}:0").shuffle(order)
            for start in range(0, len(order), self.update.minibatch_size):
                chosen = order[start : start + self.update.minibatch_size]
                self.step(
                    [(samples[i], old[i], values[i], advantages[i], returns and returns[i]) for i in chosen]
                )
        if self.kl.target is not None:
            mean = sum(map(sum, exact)) / len(samples)
            error = min(max(mean / self.kl.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * len(samples) / self.kl.horizon

    def gae(self, samples, scores, kl, values):
        rewards = [[-self.coef * x for x in row] for row in kl]
        for row, score in zip(rewards, scores, strict=True):
            row[-1] += score
        if self.estimator.whiten_rewards:
            flat = list(itertools.chain(*rewards))
            mean = sum(flat) / len(flat)
            std = math.sqrt(sum((r - mean) ** 2 for r in flat) / len(flat) + 1e-8)
            rewards = [[r / std for r in row] for row in rewards]
        advantages, returns = [], []
        for sample, row, v in zip(samples, rewards, values, strict=True):
            found, after = [], 0.0
            following = v[-1] if sample.truncated and self.estimator.bootstrap_truncated else 0.0
            for reward, value in zip(row[::-1], v[-2::-1], strict=True):
                after = reward + self.estimator.gamma * (following + self.estimator.lam * after) - value
                found.insert(0, after)
                following = value
            advantages.append(found)
            returns.append([a + value for a, value in zip(found, v[:-1], strict=True)])
        return advantages, returns

    def by_sequence(self, rewards, size):
        found = []
        for i, reward in enumerate(rewards):
            group = rewards[i // size * size : i // size * size + size]
            mean = sum(group) / size
            if isinstance(self.estimator, RLOO):
                found.append(reward - (sum(group) - reward) / (size - 1))
            elif isinstance(self.estimator, GRPO):
                std = math.sqrt(sum((r - mean) ** 2 for r in group) / (size - 1))
                found.append((reward - mean) / (std + 1e-4))
            else:
                found.append(reward - sum(rewards) / len(rewards))
        return found

    def step(self, minibatch):
        for parameter, _ in self.parameters:
            parameter.grad = None
        losses = []
        for sample, old, old_values, advantages, returns in minibatch:
            logp = self.distributions(self.policy, sample.prompt, sample.tokens)
            values = self.values(sample.prompt, sample.tokens) if returns else None
            own = []
            for t, token in enumerate(sample.tokens):
                ratio = (logp[t, token] - old[t]).exp()
                clipped = ratio.clamp(1 - self.update.clip_range, 1 + self.update.clip_range)
                loss = -torch.minimum(ratio * advantages[t], clipped * advantages[t])
                loss = loss + self.update.entropy_coef * (logp[t].exp() * logp[t]).sum()
                if returns:
                    bound = self.update.value_clip_range
                    near = values[t].clamp(old_values[t] - bound, old_values[t] + bound)
                    worse = torch.maximum((values[t] - returns[t]) ** 2, (near - returns[t]) ** 2)
                    loss = loss + self.update.value_coef * 0.5 * worse
                own.append(loss)
            losses += [sum(own) / len(own)] if self.update.average == "sequences" else own
        (sum(losses) / len(losses)).backward()
        self.descend()

    @torch.no_grad()
    def descend(self):
        self.num_steps += 1
        trained = [
            (p, lr, m) for (p, lr), m in zip(self.parameters, self.moments, strict=True) if p.grad is not None
        ]
        norm = math.sqrt(sum(p.grad.square().sum().item() for p, _, _ in trained))
        scale = 1.0 if self.update.max_grad_norm is None else min(1.0, self.update.max_grad_norm / norm)
        settings = self.optimization
        for p, lr, moments in trained:
            gradient = p.grad * scale
            if settings.name == "sgd":
                p -= lr * gradient
                continue
            for moment, beta, value in zip(moments, settings.betas, (gradient, gradient**2), strict=True):
                moment.mul_(beta).add_((1 - beta) * value)
            first, second = (
                m / (1 - b**self.num_steps) for m, b in zip(moments, settings.betas, strict=True)
            )
            if p.ndim >= 2:
                p -= lr * settings.weight_decay * p
            p -= lr * first / (second.sqrt() + settings.eps)

    def state(self):
        """What was trained, by the library's names."""
        found = {f"policy.model.{n}": p for n, p in self.policy.named_parameters()}
        if isinstance(self.estimator, GAE):
            found |= {f"critic.model.model.model.{n}": p for n, p in self.critic.model.named_parameters()}
            found |= {"critic.head.weight": self.head[0], "critic.head.bias": self.head[1]}
        return found


# An ε at which the sign of a gradient that is almost 0 does not matter.
ADAM = Optimization(lr=2e-3, eps=1e-3, weight_decay=0.1, schedule="constant")
SGD = Optimization(name="sgd", lr=3e-2, schedule="constant")
UPDATE = Update(
    num_epochs=2,
    whiten_advantages=True,
    minibatch_size=3,
    micro_batch_size=2,
    clip_range=0.03,
    value_clip_range=0.1,
    value_coef=0.3,
    entropy_coef=0.02,
)
CASES = {
    "gae": (GAE(gamma=0.98, lam=0.9), KLControl(coef=0.2), UPDATE, ADAM),
    "gae, rewards whitened, cut completions bootstrapped": (
        GAE(whiten_rewards=True, bootstrap_truncated=True),
        KLControl(coef=0.2, target=0.01, horizon=20, estimator="exact"),
        replace(UPDATE, average="sequences", max_grad_norm=0.5),
        SGD,
    ),
    "rloo": (RLOO(), KLControl(coef=0.2, target=5.0, horizon=20), UPDATE, ADAM),
    "rloo by sequences": (
        RLOO(),
        KLControl(coef=0.2),
        replace(UPDATE, average="sequences", whiten_advantages=False, max_grad_norm=None),
        SGD,
    ),
    "grpo": (GRPO(), KLControl(estimator="exact"), replace(UPDATE, whiten_advantages=False), ADAM),
    "reinforce": (Reinforce(), KLControl(coef=0.0), replace(UPDATE, whiten_advantages=False), SGD),
}


@pytest.mark.parametrize("case", CASES)
def test_three_rollouts_equal_plain_loops_in_float64(case, trainer, tokenizer):
    estimator, kl, update, optimization = CASES[case]
    model = tiny("LlamaConfig")
    value_lr = 5e-3 if optimization.name == "adamw" else 0.3
    plain = Plain(model, estimator, kl, update, optimization, value_lr, temperature=0.7)
    start = {name: p.detach().clone() for name, p in plain.state().items()}
    sampler = Written()
    module = ppo(
        model,
        tokenizer,
        estimator=estimator,
        kl=kl,
        update=update,
        optimization=optimization,
        value_lr=value_lr,
        sampling=Sampling(max_new_tokens=8, num_samples=3, temperature=0.7),
        generator=sampler,
    )
    run = trainer()
    run.fit(module, prompts(count=8, batch_size=3))
    for number, drawn in enumerate(sampler.calls):
        plain.rollout(number, drawn)
    assert run.global_step == plain.num_steps == 2 * (3 + 3 + 2)
    assert module.kl.coef == pytest.approx(plain.coef, rel=1e-5)
    assert (plain.coef != kl.coef) == (kl.target is not None)
    assert 0 < run.callback_metrics["train/policy/clipfrac_avg"] < 1
    found = {name: p for name, p in module.named_parameters() if p.requires_grad}
    expected = plain.state()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        gap = (found[name].double() - weight).abs().max()
        # The bias of the critic starts at 0 and sums what cancels: float32 has 1e-7 of its terms there.
        assert gap < max(1e-5 * weight.abs().max(), 1e-7), name
        assert gap < 1e-3 * (weight - start[name]).abs().max(), name
