"""A sharded checkpoint as one process writes it; tests/strategies has those of two."""

import os
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_rlhf import DPO, SFT, RewardModel
from lightning_rlhf.models import LoRA, Policy, sharded_checkpoint
from lightning_rlhf.models.export import export_checkpoint, read_checkpoint
from lightning_rlhf.models.reward_export import export_reward_model, is_reward_model
from tests.tokenizers import letters


def checkpoints(module, folder):
    """What one file holds, and the same as Lightning's strategy lays it out in a directory."""
    module.configure_model()
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(content)
    torch.save(content, folder / "one.ckpt")
    parts = {"state_dict": content.pop("state_dict"), "optimizer_0": {"state": {"a": torch.zeros(3)}}}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(parts, checkpoint_id=folder / "many.ckpt", no_dist=True)
    torch.save(content, folder / "many.ckpt" / "meta.pt")
    deepspeed(torch.load(folder / "one.ckpt", weights_only=True), folder / "deepspeed.ckpt")
    return folder / "one.ckpt", folder / "many.ckpt", folder / "deepspeed.ckpt"


def deepspeed(content, folder):
    """What DeepSpeed's stages 1 and 2 write, where frozen weights are left out."""
    (folder / "checkpoint").mkdir(parents=True)
    content = {"module": content.pop("state_dict"), "optimizer": None, "dp_world_size": 2, **content}
    torch.save(content, folder / "checkpoint" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("checkpoint")


@pytest.fixture
def sharded(llama_dir, tmp_path):
    return checkpoints(DPO(Policy(llama_dir, lora=LoRA(r=2))), tmp_path)[1]


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["model", "adapter"])
@pytest.mark.parametrize("algorithm", [SFT, RewardModel])
def test_it_becomes_the_directory_that_one_file_becomes(algorithm, lora, llama_dir, tmp_path):
    found = []
    for path in checkpoints(algorithm(Policy(llama_dir, lora=lora)), tmp_path):
        assert is_reward_model(path) is (algorithm is RewardModel)
        output = tmp_path / f"of-{path.name}"
        write = export_reward_model if algorithm is RewardModel else export_checkpoint
        write(path, output)
        (weights,) = output.glob("*model.safetensors")
        found.append((load_file(weights), {p.name for p in output.iterdir()}))
    (one, files), *others = found
    for many, same_files in others:
        assert files == same_files
        assert one.keys() == many.keys()
        assert all(torch.equal(one[name], many[name]) for name in one)


def test_one_of_deepspeed_is_read_only_where_it_was_written_to_its_end(llama_dir, tmp_path):
    path = checkpoints(SFT(llama_dir), tmp_path)[2]
    states = path / "checkpoint" / "mp_rank_00_model_states.pt"
    assert read_checkpoint(path)["state_dict"].keys() == read_checkpoint(states)["state_dict"].keys()
    (path / "latest").unlink()
    with pytest.raises(ValueError, match="not written to its end"):
        read_checkpoint(path)
    torch.save({"module": {}, "dp_world_size": 1}, states)
    (path / "latest").touch()
    with pytest.raises(ValueError, match="no checkpoint of a lightning_rlhf module"):
        read_checkpoint(path)


def test_an_embedding_that_is_the_head_as_well(tmp_path):
    shape = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(**shape, num_hidden_layers=1, tie_word_embeddings=True, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    module = SFT(str(tmp_path / "model"))
    export_checkpoint(checkpoints(module, tmp_path)[1], tmp_path / "out")
    expected = load_file(tmp_path / "model" / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in expected.items())


def test_the_optimizer_stays_where_it_is(sharded):
    content = read_checkpoint(sharded)
    assert not any(name.startswith("optimizer") for name in content)
    assert content["state_dict"].keys() == content["shapes"].keys()
    names = read_checkpoint(sharded, weights=False)["state_dict"]
    assert names.keys() == content["shapes"].keys()


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("file", [".metadata", "meta.pt"])
def test_nothing_in_it_is_executed(file, sharded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if file == ".metadata":
        (sharded / file).write_bytes(pickle.dumps(Harm()))
    else:
        torch.save({"algorithm": Harm()}, sharded / file)
    with pytest.raises(ValueError, match="not a readable sharded checkpoint"):
        export_checkpoint(sharded, tmp_path / "out")
    assert not (tmp_path / "harm").exists()


class Member:
    """What an enumeration's member is pickled as by Python 3.11.2."""

    def __init__(self, kind, name):
        self.sought = kind, name

    def __reduce__(self):
        return getattr, self.sought


def test_members_of_enumerations_are_looked_up_and_nothing_else(tmp_path):
    def loaded(kind, name):
        (tmp_path / "index").write_bytes(pickle.dumps(Member(kind, name)))
        with (tmp_path / "index").open("rb") as file:
            return sharded_checkpoint._Unpickler(file).load()

    wanted = _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    assert loaded(_MEM_FORMAT_ENCODING, wanted.name) is wanted
    with pytest.raises(pickle.UnpicklingError, match="'__init__' of .*Metadata.*which no index needs"):
        loaded(Metadata, "__init__")


def test_what_is_broken_is_named(sharded, tmp_path):
    (part,) = sharded.glob("*.distcp")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match="many.ckpt is not a readable sharded checkpoint"):
        export_checkpoint(sharded, tmp_path / "out")
    (sharded / "meta.pt").unlink()
    with pytest.raises(ValueError, match="not written to its end"):
        export_checkpoint(sharded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_parameter_that_the_index_lacks_is_named(sharded, tmp_path):
    index = pickle.loads((sharded / ".metadata").read_bytes())
    name = max(key for key in index.state_dict_metadata if "lora_A" in key)
    del index.state_dict_metadata[name]
    (sharded / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(
        ValueError, match=rf"lacks 1 of \d+ parameters, such as {name.removeprefix('state_dict.')}"
    ):
        export_checkpoint(sharded, tmp_path / "out")
