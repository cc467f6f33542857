"""PPO in a Trainer, PPO of the last TRL that has it, and sampling alone: each in a process of its own."""

import sys
import tempfile
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_rlhf.data.packing import PromptGroup
from lightning_rlhf.data.prompt_batch import PromptBatch
from tests.benchmarks.worker import Served, Spec
from tests.benchmarks.workload import LEARNING_RATE, VOCABULARY, llama, score_weights
from tests.tokenizers import letters

NEW_TOKENS = 64
MINIBATCH_SIZE = 8
ROLLOUT_FORWARD = 8
"""Prompts that a side samples at a time, and that TRL's scores: its default of 64 would fill the memory with logits."""
CHECKPOINTED = "activation checkpointing"
PPO_SETTINGS = ["sdpa", CHECKPOINTED]


def run_side(spec: Spec, served: Served) -> None:
    """Be the competitor that a process was started as."""
    if spec.task == "generation":
        ours_samples(served) if spec.name == "ours" else bare_samples(served)
    elif spec.name == "ours":
        ours(spec, served)
    else:
        trl(spec, served)


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(spec: Spec, served: Served) -> None:
    """A stock Trainer; an iteration ends where it asks for the next batch."""
    import lightning as L

    from lightning_rlhf.algorithms import PPO, Optimization, Update
    from lightning_rlhf.generation import Sampling
    from lightning_rlhf.models import LoRA, Policy

    adapters = spec.task == "ppo_adapter"
    served.imported()
    module = PPO(
        Policy(f"{spec.folder}/base", lora=LoRA()) if adapters else llama(),
        _reward(f"{spec.folder}/reward" if adapters else None),
        letters(),
        sampling=Sampling(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, batch_size=ROLLOUT_FORWARD),
        update=Update(num_epochs=spec.num_epochs, minibatch_size=MINIBATCH_SIZE),
        critic="adapter" if adapters else "model",
        optimization=Optimization(lr=LEARNING_RATE, schedule="constant"),
    )

    class Prompts(Dataset[PromptBatch]):
        """A batch as soon as it is asked for from outside; with a length, so that the Trainer never reads ahead."""

        waiting = 0

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> PromptBatch:
            if self.waiting:
                logged = module.trainer.callback_metrics
                served.done(
                    (logged["train/objective/scores"].item(), self.waiting * NEW_TOKENS),
                    logged["train/time/generation_share"].item(),
                )
            batch = served.batch(_prompt_batch)
            self.waiting = len(batch)
            return batch

    L.Trainer(
        accelerator="cpu",
        max_steps=16_000_000,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    ).fit(module, DataLoader(Prompts(), batch_size=None, collate_fn=_same))


def _reward(adapter: str | None) -> Any:
    """A random reward model: an adapter on the policy's base, or as large as the policy."""
    from lightning_rlhf.models import LanguageModel, Scorer
    from lightning_rlhf.models.scorer import ScoreHead
    from lightning_rlhf.rewards import RewardModelReward

    if adapter is not None:
        return RewardModelReward(adapter, letters(), share_base=True)
    head = ScoreHead(score_weights().shape[1])
    head.weight.data.copy_(score_weights())
    scorer = Scorer(LanguageModel(llama()), head).eval().requires_grad_(False)
    return RewardModelReward(scorer, letters())


def _prompt_batch(groups: list[PromptGroup]) -> PromptBatch:
    texts = tuple("" for _ in groups)
    ids = tuple(list(group.prompt) for group in groups)
    return PromptBatch(ids, texts, texts, row_ids=tuple(group.row_id for group in groups))


def _same(batch: PromptBatch) -> PromptBatch:
    return batch


# --- TRL --------------------------------------------------------------------------------------------------------------


def trl(spec: Spec, served: Served) -> None:
    """Its trainer's own ``train``, with our batches; a step for every minibatch, and samples of a fixed length.

    The policy is LoRA where ours is. Reference, value and reward are what TRL takes: the base without the adapter or
    a copy, and two classifiers of the policy's size, as in its own example.
    """
    sys.path.insert(0, spec.trl_ppo)
    from datasets import Dataset as Rows
    from peft import LoraConfig
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from lightning_rlhf.models import LoRA
    from lightning_rlhf.models.loading import lora_config

    served.imported()
    policy, value, reward = llama(), _classifier(), _classifier()
    if spec.name == CHECKPOINTED:
        for model in (policy, value):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    lora: LoraConfig | None = lora_config(LoRA()) if spec.task == "ppo_adapter" else None
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(prefix="benchmark-"),
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        gradient_checkpointing=False,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        # Of these, unlike of `gradient_accumulation_steps`, every minibatch is an optimizer step.
        per_device_train_batch_size=spec.num_prompts,
        num_mini_batches=spec.num_prompts // MINIBATCH_SIZE,
        num_ppo_epochs=spec.num_epochs,
        local_rollout_forward_batch_size=ROLLOUT_FORWARD,
        response_length=NEW_TOKENS,
        temperature=1.0,
        total_episodes=1_000_000 * spec.num_prompts,
        num_sample_generations=0,
    )
    rows = Rows.from_list([{"input_ids": [5]}] * spec.num_prompts)
    trainer = PPOTrainer(
        args, letters(), policy, None, reward, rows, value, eval_dataset=rows, peft_config=lora
    )
    trainer.dataloader = _LeftPadded(served)
    trainer.train()


class _LeftPadded:
    """What TRL takes its batches from; it asks for one when the last iteration has ended."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.waiting = 0

    def __iter__(self) -> "_LeftPadded":
        return self

    def __next__(self) -> dict[str, Any]:
        if self.waiting:
            self.served.done((float("nan"), self.waiting * NEW_TOKENS))
        ids, _ = self.served.batch(left_padded)
        self.waiting = len(ids)
        return {"input_ids": ids}


def _classifier() -> Any:
    from transformers import LlamaForSequenceClassification

    base: Any = llama()
    base.config.num_labels = 1
    model: Any = LlamaForSequenceClassification(base.config)
    model.model = base.model
    model.score.weight.data.copy_(score_weights())
    return model


# --- sampling alone ---------------------------------------------------------------------------------------------------


def ours_samples(served: Served) -> None:
    """Our ``generate``, seeded per prompt."""
    from lightning_rlhf.generation import Sampling, generate
    from lightning_rlhf.models import LanguageModel

    model = LanguageModel(llama())
    sampling = Sampling(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    while True:
        batch = served.batch(_prompt_batch)
        drawn = list(generate(model, letters(), batch.prompt_ids, sampling, seeds=batch.row_ids))
        served.done((0.0, sum(len(one.tokens) for (one,) in drawn)))


def bare_samples(served: Served) -> None:
    """Transformers' ``generate`` on the same padded prompts."""
    model = llama().eval()
    while True:
        ids, mask = served.batch(left_padded)
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
            )
        served.done((0.0, output[:, ids.shape[1] :].numel()))


def left_padded(groups: list[PromptGroup]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and their mask, ``(P, L)``."""
    width = max(len(group.prompt) for group in groups)
    ids = torch.tensor([[0] * (width - len(group.prompt)) + list(group.prompt) for group in groups])
    assert int(ids.max()) < VOCABULARY
    return ids, (ids != 0).long()
