"""What an algorithm asks of Lightning's strategies; tests/strategies has them at work."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from lightning_rlhf.algorithms.strategies import (
    clip_by_strategy,
    keeps_gradients,
    require_storage,
    require_whole_steps,
    require_zero_stage,
    scale_gradients,
    unscale_losses,
)
from lightning_rlhf.models import Quantization


class Zero(SimpleNamespace):
    """The part of DeepSpeed's optimizer that is used: its loss scale."""

    def override_loss_scale(self, scale):
        self.external = scale


def deepspeed(**config):
    """The strategy without DeepSpeed, which is no dependency."""
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    strategy.config = config
    strategy._optimizers = [Zero(loss_scaler=SimpleNamespace(loss_scale=8.0))]
    strategy._model = SimpleNamespace(gradient_accumulation_steps=lambda: 2)
    return strategy


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_that_leave_weights_whole_are_taken(stage):
    require_zero_stage(deepspeed(zero_optimization={"stage": stage}))
    require_zero_stage(DDPStrategy())


@pytest.mark.parametrize(
    "config", [{"zero_optimization": {"stage": 3}}, {"zero_optimization": {}}, {}], ids=str
)
def test_other_stages_are_refused(config):
    with pytest.raises(ValueError, match=r"ZeRO stage is [03].*Set stage: 2"):
        require_zero_stage(deepspeed(**config))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", "bfloat16"), ("bf16-true", "bfloat16"), ("32-true", "float32")]
)
def test_four_bits_are_stored_as_deepspeed_has_its_weights(precision, dtype):
    run = SimpleNamespace(strategy=deepspeed(), precision=precision)
    for other in {"bfloat16", "float16", "float32"} - {dtype}:
        quantization = Quantization(compute_dtype=other)
        with pytest.raises(ValueError, match=f"set policy.quantization.compute_dtype: {dtype}"):
            require_storage(run, quantization)
        require_storage(SimpleNamespace(strategy=DDPStrategy(), precision=precision), quantization)
    require_storage(run, Quantization(compute_dtype=dtype))
    require_storage(run, Quantization(bits=8, compute_dtype="float16"))
    require_storage(run, None)


@pytest.mark.parametrize("batches", [4, float("inf")])
def test_a_step_within_an_epoch_is_taken(batches):
    run = {"accumulate_grad_batches": 2, "num_training_batches": batches}
    require_whole_steps(SimpleNamespace(strategy=deepspeed(), **run))


def test_a_step_over_the_end_of_an_epoch_is_refused_under_deepspeed():
    run = {"accumulate_grad_batches": 2, "num_training_batches": 5}
    require_whole_steps(SimpleNamespace(strategy=DDPStrategy(), **run))
    with pytest.raises(ValueError, match=r"5 batches, no multiple of accumulate_grad_batches 2.*limit_train"):
        require_whole_steps(SimpleNamespace(strategy=deepspeed(), **run))


def test_gradients_are_scaled_in_place_or_by_what_deepspeed_divides_them_by():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, 4.0])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scale_gradients(SingleDeviceStrategy("cpu"), optimizer, 0.5)
    assert weight.grad.tolist() == [0.5, 2.0]
    strategy = deepspeed()
    scale_gradients(strategy, optimizer, 0.5)
    assert weight.grad.tolist() == [0.5, 2.0]
    assert strategy.optimizers[0].external == 8.0 / (0.5 * 2)
    unscale_losses(strategy)
    assert strategy.optimizers[0].external == 8.0


@pytest.mark.parametrize(("norm", "expected"), [(0.5, 0.5), (None, 0.0)])
def test_deepspeed_clips_by_its_own_settings(norm, expected):
    strategy = deepspeed()
    clip_by_strategy(strategy, norm)
    assert strategy.config == {"gradient_clipping": expected}
    assert keeps_gradients(strategy)
    clip_by_strategy(DDPStrategy(), norm)
    assert not keeps_gradients(DDPStrategy())
    clip_by_strategy(deepspeed(gradient_clipping=0.0), norm)
    with pytest.raises(ValueError, match="gradient_clipping: 0.1.*update.max_grad_norm is"):
        clip_by_strategy(deepspeed(gradient_clipping=0.1), norm)


def test_nothing_is_scaled_where_a_rank_has_no_gradient():
    """Under FSDP1 its shards may hold nothing that is trained."""
    weight = torch.nn.Parameter(torch.ones(2))
    scale_gradients(DDPStrategy(), torch.optim.SGD([weight], lr=0.1), 0.5)
    assert weight.grad is None
