"""Where PPO ends: at the closed form on a language of eight completions, and at the KL it is steered to."""

import itertools
import random

import lightning as L
import pytest
import torch

from lightning_rlhf.algorithms import PPO, RLOO, KLControl, Optimization, Reinforce, Update
from lightning_rlhf.data.packing import PromptGroup, pack
from lightning_rlhf.functional import sum_by_sequence
from lightning_rlhf.generation import Completion, Generator, Sampling
from lightning_rlhf.rewards import Reward
from tests.algorithms.rollouts import prompts
from tests.models.families import VOCABULARY, tiny

COEF = 0.5
PROMPT = [5, 6]
COMPLETIONS = [[10 + a, 20 + b, 30 + c] for a, b, c in itertools.product(range(2), repeat=3)]


def log_distribution(policy):
    """Log-probabilities of the eight completions, of all there are."""
    batch = pack([PromptGroup(PROMPT, COMPLETIONS)])
    return sum_by_sequence(policy(batch).logprobs, batch.target_lengths).detach()


class Eight(Generator):
    """Draws among the eight completions in proportion to the policy, with as little noise as a sample can have.

    Stratified: completion i comes up ⌊n·p⌋ or ⌈n·p⌉ times of n.
    """

    def generate(self, model, tokenizer, prompts, sampling, *, seeds=None):
        cumulative = log_distribution(model).softmax(0).cumsum(0).tolist()
        for prompt, seed in zip(prompts, seeds, strict=True):
            offset = random.Random(seed).random()
            at = [(i + offset) / sampling.num_samples for i in range(sampling.num_samples)]
            chosen = [min(sum(c < u for c in cumulative), 7) for u in at]
            yield [Completion(list(prompt), COMPLETIONS[i], "", False) for i in chosen]


class Of(Reward):
    def __init__(self, values):
        super().__init__()
        self.table = {tuple(ids): v for ids, v in zip(COMPLETIONS, values.tolist(), strict=True)}

    def forward(self, samples):
        return torch.tensor([self.table[tuple(ids)] for ids in samples.completion_ids])


def only_eight(model):
    """The model on a vocabulary where the eight completions are all there is: other tokens cannot be chosen."""
    allowed = sorted({token for completion in COMPLETIONS for token in completion})
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.fill_(-30.0)
        head.bias[allowed] = 0.0
    head.bias.requires_grad_(False)
    model.lm_head = head
    return model


def learn(trainer, tokenizer, rewards, rollouts, *callbacks, **settings):
    module = PPO(
        only_eight(tiny("LlamaConfig")),
        Of(rewards),
        tokenizer,
        generator=Eight(),
        **{
            "estimator": RLOO(),
            "sampling": Sampling(max_new_tokens=3, num_samples=64),
            "update": Update(num_epochs=1, minibatch_size=256, whiten_advantages=False, max_grad_norm=None),
            **settings,
        },
    )
    start = log_distribution(module.policy)
    data = prompts(1, 1)
    data.dataset[0]["prompt_ids"] = PROMPT
    trainer(max_epochs=rollouts, callbacks=list(callbacks)).fit(module, data)
    return module, start


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [RLOO(), Reinforce()])
def test_it_ends_at_the_tilted_reference(estimator, trainer, tokenizer):
    """π_ref · exp(r/β) / Z, renormalised over the eight: there every advantage is 0, so the noise of samples ends.

    Completions of probability 1e-3 are seldom among 64, and those are what is left after 200 rollouts (1.2e-3). After
    400 the largest difference is below 1e-6.
    """
    torch.manual_seed(1)
    rewards = torch.randn(8)
    optimization = Optimization(lr=1e-2, schedule="linear", warmup_ratio=0.0)
    settings = {"estimator": estimator, "kl": KLControl(coef=COEF), "optimization": optimization}
    module, start = learn(trainer, tokenizer, rewards, 400, **settings)
    target = (start + rewards / COEF).softmax(0)
    found = log_distribution(module.policy).softmax(0)
    assert (found - target).abs().max() < 1e-4
    assert (target - start.softmax(0)).abs().max() > 0.1


class KL(L.Callback):
    def __init__(self):
        self.found, self.coefs = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.found.append(trainer.callback_metrics["train/objective/kl"].item())
        self.coefs.append(module.kl.coef)


class ByToken(Reward):
    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, samples):
        return self.values[[ids[0] for ids in samples.completion_ids]]


@pytest.mark.slow
@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_adaptive_kl_reaches_its_target_from_ten_times_off(factor, trainer, tokenizer):
    """A horizon of 1,000 episodes: the mean KL of 20 rollouts comes within 20% of the target, and stays.

    Completions of one token, so that the KL that a coefficient leads to is known.
    """
    rewards = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1))
    model = tiny("LlamaConfig")
    with torch.no_grad():
        start = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    tilted = (start + rewards / COEF).log_softmax(-1)
    target = (tilted.exp() * (tilted - start)).sum().item()  # what the coefficient COEF leads to
    seen = KL()
    module = PPO(
        model,
        ByToken(rewards),
        tokenizer,
        sampling=Sampling(max_new_tokens=1, num_samples=200),
        estimator=RLOO(),
        kl=KLControl(coef=factor * COEF, target=target, horizon=1000),
        optimization=Optimization(lr=3e-3, schedule="constant"),
        update=Update(num_epochs=1, minibatch_size=256, whiten_advantages=False),
    )
    data = prompts(1, 1)
    data.dataset[0]["prompt_ids"] = PROMPT
    trainer(max_epochs=160, callbacks=[seen]).fit(module, data)
    means = [sum(seen.found[i : i + 20]) / 20 for i in range(0, 160, 20)]
    assert abs(means[1] / target - 1) > 0.2, means
    assert all(abs(mean / target - 1) < 0.2 for mean in means[-3:]), (means, target, seen.coefs[::20])
