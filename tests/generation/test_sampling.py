import pytest
import torch

from lightning_rlhf.generation import Sampling, generate
from lightning_rlhf.models import LanguageModel
from tests.models.families import tiny
from tests.tokenizers import letters

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12]]


@pytest.fixture
def model():
    return LanguageModel(tiny("LlamaConfig"))


def tokens(model, prompts, **settings):
    sampling = Sampling(**{"max_new_tokens": 12, **settings})
    return [[c.tokens for c in group] for group in generate(model, letters(), prompts, sampling)]


def test_left_padding_changes_nothing(model):
    together = tokens(model, PROMPTS, temperature=0)
    alone = [tokens(model, [prompt], temperature=0)[0] for prompt in PROMPTS]
    assert together == alone


def test_greedy_follows_the_argmax(model):
    ((found,),) = tokens(model, PROMPTS[:1], temperature=0)
    ids = list(PROMPTS[0])
    for token in found:
        assert model.model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
        ids.append(token)


def test_samples_follow_the_temperature(model):
    torch.manual_seed(0)
    (group,) = tokens(model, PROMPTS[:1], num_samples=4000, max_new_tokens=1, temperature=0.5)
    counts = torch.bincount(torch.tensor([sample[0] for sample in group]), minlength=97) / 4000
    expected = (model.model(torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.5).softmax(-1)
    assert (counts - expected).abs().max() < 0.03


def test_ends_at_the_end_token_and_says_what_was_cut(model):
    torch.manual_seed(0)
    groups = list(generate(model, letters(), PROMPTS, Sampling(max_new_tokens=60, num_samples=8)))
    completions = [c for group in groups for c in group]
    assert [len(group) for group in groups] == [8, 8, 8]
    assert {c.truncated for c in completions} == {True, False}
    for completion in completions:
        assert completion.truncated == (2 not in completion.tokens)
        assert 2 not in completion.tokens[:-1]
        assert "</s>" not in completion.text


def test_mode_is_restored_and_batches_cover_all(model):
    model.train()
    assert len(tokens(model, PROMPTS, batch_size=2)) == 3
    assert model.training


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"temperature": 0.0, "num_samples": 2}, "greedy samples are all the same"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_refuses_slips(settings, match):
    with pytest.raises(ValueError, match=match):
        Sampling(**settings)
