import math

import pytest
import torch
from torch import nn

from lightning_rlhf.functional import perplexity, sft_loss, sum_by_sequence, token_logprobs


def reference(hidden, head, targets, temperature=1.0):
    logp = (head(hidden).double() / temperature).log_softmax(-1)
    return (
        logp.gather(-1, targets[:, None]).squeeze(-1),
        -(logp.exp() * logp).sum(-1),
        logp.argmax(-1) == targets,
    )


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(11, 6, requires_grad=True), nn.Linear(6, 17), torch.randint(17, (11,))


def test_by_hand():
    head = lambda hidden: hidden @ torch.tensor([[0.0, math.log(3.0)]])  # noqa: E731 - logits 0 and ln 3
    found = token_logprobs(torch.ones(2, 1), head, torch.tensor([0, 1]), with_entropy=True)
    assert found.logprobs.tolist() == pytest.approx([math.log(0.25), math.log(0.75)])
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert found.entropy.tolist() == pytest.approx([entropy] * 2)
    assert found.correct.tolist() == [False, True]


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_plain_formula(inputs, chunk_size, temperature):
    hidden, head, targets = inputs
    weights = torch.randn(11), torch.randn(11)
    found = token_logprobs(
        hidden, head, targets, temperature=temperature, with_entropy=True, chunk_size=chunk_size
    )
    expected = reference(hidden, head, targets, temperature)
    parameters = [hidden, *head.parameters()]
    mine = torch.autograd.grad((found.logprobs * weights[0] + found.entropy * weights[1]).sum(), parameters)
    theirs = torch.autograd.grad((expected[0] * weights[0] + expected[1] * weights[1]).sum(), parameters)
    torch.testing.assert_close(found.logprobs.double(), expected[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.entropy.double(), expected[1], atol=1e-6, rtol=1e-6)
    assert (found.correct == expected[2]).all()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_without_entropy_the_same_gradients(inputs):
    hidden, head, targets = inputs
    (grad,) = torch.autograd.grad(token_logprobs(hidden, head, targets).logprobs.sum(), hidden)
    (expected,) = torch.autograd.grad(reference(hidden, head, targets)[0].sum(), hidden)
    torch.testing.assert_close(grad, expected.float(), atol=1e-5, rtol=1e-5)


def test_float32_accumulation_in_bfloat16(inputs):
    hidden, head, targets = inputs
    head = head.bfloat16()
    found = token_logprobs(hidden.bfloat16(), head, targets).logprobs
    assert found.dtype == torch.float32
    expected = reference(hidden.bfloat16(), head, targets)[0]  # the same bfloat16 logits, then float64
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_heads_output_is_not_overwritten():
    logits = torch.randn(3, 5)
    before = logits.clone()
    token_logprobs(torch.zeros(3, 2), lambda hidden: logits, torch.tensor([0, 1, 2]))
    assert (logits == before).all()


def test_never_more_than_a_chunk_of_the_vocabulary(inputs):
    hidden, head, targets = inputs
    sizes = []
    head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[0]))
    token_logprobs(hidden, head, targets, chunk_size=4).logprobs.sum().backward()
    assert max(sizes) == 4
    assert sizes == [3, 4, 4, 4, 3]  # forward, and in the backward again all but the last


def test_what_is_kept_for_the_backward_is_one_chunk_of_logits(inputs):
    hidden, head, targets = inputs
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = token_logprobs(hidden, head, targets, chunk_size=4)
        of_vocabulary = [t for t in kept if t.ndim == 2 and t.shape[-1] == head.weight.shape[0]]
        weight = head.weight.data_ptr()
        assert sum(len(t) for t in of_vocabulary if t.data_ptr() != weight) == 4
    found.logprobs.sum().backward()


def test_a_second_backward_gives_the_same_gradient(inputs):
    hidden, head, targets = inputs
    hidden = hidden.detach().requires_grad_()
    total = token_logprobs(hidden, head, targets, chunk_size=4).logprobs.sum()
    (first,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(total, hidden)
    assert torch.equal(first, second)


def test_nothing_to_score_still_has_a_gradient(inputs):
    hidden, head, targets = inputs
    found = token_logprobs(hidden[:0], head, targets[:0], with_entropy=True)
    assert found.logprobs.shape == (0,)
    found.logprobs.sum().backward()
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_refuses_a_temperature_that_is_not_positive(inputs, temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        token_logprobs(*inputs, temperature=temperature)


def test_refuses_shapes_that_disagree(inputs):
    hidden, head, targets = inputs
    with pytest.raises(ValueError, match="targets"):
        token_logprobs(hidden, head, targets[:-1])


def test_sums_by_sequence_and_their_gradient():
    logprobs = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    sums = sum_by_sequence(logprobs, torch.tensor([2, 0, 1]))
    assert sums.tolist() == [3.0, 0.0, 4.0]
    (sums * torch.tensor([1.0, 5.0, 7.0])).sum().backward()
    assert logprobs.grad.tolist() == [1.0, 1.0, 7.0]


def test_supervised_loss_and_perplexity():
    logprobs = torch.full((6,), 1 / 8).log()
    assert perplexity(logprobs).item() == pytest.approx(8.0)
    assert sft_loss(logprobs).tolist() == pytest.approx([math.log(8)] * 6)
