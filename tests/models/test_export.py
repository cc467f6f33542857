import os
import resource

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf import DPO, SFT
from lightning_rlhf.models import LoRA, Policy, Quantization
from lightning_rlhf.models.export import export_checkpoint, written_whole

IDS = torch.tensor([[1, 5, 6, 7, 8, 9]])


def checkpoint(module, path):
    """What a ModelCheckpoint would write after some training, as far as an export reads it."""
    module.configure_model()
    for name, parameter in module.policy.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "lora_" not in name):
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(content)
    torch.save(content, path)
    return path


@torch.no_grad()
def logits(model, dtype=torch.float32):
    return model.eval().to(dtype)(input_ids=IDS).logits.float()


@pytest.mark.parametrize("algorithm", [SFT, DPO])
def test_full_model_loads_with_equal_logits(algorithm, llama_dir, tmp_path):
    module = algorithm(llama_dir)
    path = checkpoint(module, tmp_path / "a.ckpt")
    written = export_checkpoint(path, tmp_path / "out")
    assert algorithm.__name__ in written
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(model), logits(module.policy.causal_lm))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("abc").input_ids == module.tokenizer("abc").input_ids
    )
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("algorithm", [SFT, DPO])
def test_adapter_loads_with_peft_and_merged_without(algorithm, llama_dir, tmp_path):
    module = algorithm(Policy(llama_dir, lora=LoRA(r=2, use_rslora=True)))
    path = checkpoint(module, tmp_path / "a.ckpt")
    expected = logits(module.policy.model)
    export_checkpoint(path, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == {
        name.removeprefix("policy.model.").replace(".default", "")
        for name in module.state_dict()
        if ".lora_" in name
    }
    base = AutoModelForCausalLM.from_pretrained(llama_dir)
    untrained = logits(base)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)
    assert (untrained - expected).abs().max() > 1e-3
    # transformers finds the base by the adapter's own configuration
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    export_checkpoint(path, tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_adapter_that_went_on_from_an_adapter(llama_dir, tmp_path):
    first = checkpoint(SFT(Policy(llama_dir, lora=LoRA(r=2))), tmp_path / "a.ckpt")
    export_checkpoint(first, tmp_path / "sft")
    module = DPO(str(tmp_path / "sft"))
    second = checkpoint(module, tmp_path / "b.ckpt")
    export_checkpoint(second, tmp_path / "dpo")
    assert not any("reference" in p.name for p in (tmp_path / "dpo").iterdir())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dpo")
    torch.testing.assert_close(logits(model), logits(module.policy.model))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_adapter_merges_onto_the_base_in_bfloat16(bits, llama_dir, tmp_path):
    quantization = Quantization(bits=bits, compute_dtype="float32")
    module = SFT(Policy(llama_dir, lora=LoRA(r=2), quantization=quantization))
    path = checkpoint(module, tmp_path / "a.ckpt")
    export_checkpoint(path, tmp_path / "adapter")
    export_checkpoint(path, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16)
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert (
        logits(merged) - expected
    ).norm() < 0.01 * expected.norm()  # the sum W + BA is rounded to bfloat16


def test_dtype_of_a_full_model(llama_dir, tmp_path):
    path = checkpoint(SFT(llama_dir), tmp_path / "a.ckpt")
    export_checkpoint(path, tmp_path / "out", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_refusals_say_why(llama_dir, tmp_path):
    path = checkpoint(SFT(Policy(llama_dir, lora=LoRA(r=2, init="pissa"))), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="'pissa' changed the base.*--merge"):
        export_checkpoint(path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="exists already.*--overwrite"):
        export_checkpoint(path, tmp_path / "out", merge=True)
    assert (tmp_path / "out" / "precious").read_text() == "x"
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nothing.ckpt"):
        export_checkpoint(tmp_path / "nothing.ckpt", tmp_path / "new")
    (tmp_path / "junk.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="junk.ckpt is not a readable checkpoint"):
        export_checkpoint(tmp_path / "junk.ckpt", tmp_path / "new")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of a lightning_rlhf module"):
        export_checkpoint(tmp_path / "other.ckpt", tmp_path / "new")
    with pytest.raises(ValueError, match="is a directory"):
        export_checkpoint(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_built_model_has_no_origin(llama_dir, tmp_path):
    from lightning_rlhf.models import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    path = checkpoint(SFT(model, tokenizer=load_tokenizer(llama_dir)), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="was given a built model"):
        export_checkpoint(path, tmp_path / "out")


def test_merging_pissa_gives_the_trained_model(llama_dir, tmp_path):
    module = SFT(Policy(llama_dir, lora=LoRA(r=2, init="pissa")))
    path = checkpoint(module, tmp_path / "a.ckpt")
    export_checkpoint(path, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(module.policy.model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["model", "adapter"])
def test_a_disk_that_fills_while_exporting_leaves_nothing(lora, llama_dir, tmp_path):
    """A limit on the size of a file makes the write of the weights fail half-way, as a full disk does."""
    path = checkpoint(SFT(Policy(llama_dir, lora=lora)), tmp_path / "a.ckpt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(OSError, match="(?i)file too large"):
            export_checkpoint(path, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_an_error_while_writing_leaves_what_was_there(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")

    def write():
        with written_whole(target, overwrite=True) as folder:
            (folder / "new").write_text("half")
            raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match="No space left"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (target / "old").read_text() == "old"
    with written_whole(target, overwrite=True) as folder:
        (folder / "new").write_text("whole")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
