"""PPO-ptx: the gradient of a step is that of PPO plus pretrain_coef times that of the text's mean cross-entropy."""

import pytest
import torch
from datasets import Dataset

from lightning_rlhf.algorithms import PPO, Optimization, Reinforce, Update
from lightning_rlhf.data import PretrainingMix, PromptDataModule, SFTDataModule
from lightning_rlhf.data.packing import pack
from lightning_rlhf.generation import Sampling
from lightning_rlhf.rewards import Reward
from tests.algorithms.conftest import Gradients
from tests.models.families import tiny

PROMPTS = Dataset.from_list([{"prompt": f"say {n}"} for n in range(4)])
TEXT = Dataset.from_list([{"prompt": "a b", "completion": f" c {n}"} for n in range(4)])


class Length(Reward):
    def forward(self, samples):
        return torch.tensor([float(sum(ids)) for ids in samples.completion_ids])


def gradient(coef, tokenizer, trainer, average="tokens"):
    torch.manual_seed(0)
    module = PPO(
        tiny("LlamaConfig"),
        Length(),
        tokenizer,
        sampling=Sampling(max_new_tokens=5),
        estimator=Reinforce(),
        update=Update(
            num_epochs=1, minibatch_size=4, max_grad_norm=None, pretrain_coef=coef, average=average
        ),
        optimization=Optimization(schedule="constant"),
    )
    seen = Gradients()
    data = PretrainingMix(PromptDataModule(PROMPTS, batch_size=4), SFTDataModule(TEXT, batch_size=4))
    run = trainer(max_steps=1, max_epochs=1, callbacks=[seen])
    run.fit(module, datamodule=data)
    return seen.steps[0], run, data


@pytest.mark.parametrize("average", ["tokens", "sequences"])
def test_the_gradient_is_the_sum_of_both(average, tokenizer, trainer):
    without, *_ = gradient(0.0, tokenizer, trainer, average)
    found, run, data = gradient(3.0, tokenizer, trainer, average)
    model = tiny("LlamaConfig")
    from lightning_rlhf.models import LanguageModel

    (batch,) = data.pretrain.evaluation_loader("train", batch_size=4)
    loss = -LanguageModel(model)(pack(batch.groups())).logprobs.mean()
    loss.backward()
    text = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (found - without - 3.0 * text).norm() <= 1e-4 * text.norm()
    assert text.norm() > 0
    assert run.callback_metrics["train/loss/pretrain_avg"].item() == pytest.approx(loss.item(), rel=1e-5)


def test_text_that_is_not_there_is_asked_for(tokenizer, trainer):
    module = PPO(
        tiny("LlamaConfig"), Length(), tokenizer, update=Update(pretrain_coef=1.0), estimator=Reinforce()
    )
    with pytest.raises(ValueError, match="the data has no text beside its prompts: use PretrainingMix"):
        trainer(max_steps=1).fit(module, datamodule=PromptDataModule(PROMPTS))
