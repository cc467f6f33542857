"""Every algorithm × {LoRA, nf4 LoRA, full} × {one process, DDP, FSDP2, FSDP1}: trains, is saved, resumed, exported.

Each launch of two processes runs many cells, since starting one costs more than a cell. ``make test`` runs a pairwise
selection, ``make test-all`` every cell.
"""

import itertools
import re

import pytest
import torch
from safetensors.torch import load_file

from lightning_rlhf.models.export import export_checkpoint
from lightning_rlhf.models.reward_export import export_reward_model
from tests.processes import run_module
from tests.strategies.worker import Cell, run

# A launch is the setup of the first test that asks for it.
pytestmark = pytest.mark.timeout(1200)
ALGORITHMS = ("SFT", "RewardModel", "DPO", "KTO", "PPO", "OnlineDPO")
WEIGHTS = ("lora", "nf4", "full")
STRATEGIES = ("ddp", "fsdp2", "fsdp1")
# Any two of algorithm, weights and strategy occur together.
PAIRWISE = {
    *("SFT-lora-ddp", "SFT-nf4-fsdp1", "SFT-full-fsdp2"),
    *("RewardModel-lora-fsdp2", "RewardModel-nf4-ddp", "RewardModel-full-fsdp1"),
    *("DPO-lora-fsdp1", "DPO-nf4-ddp", "DPO-full-fsdp2"),
    *("KTO-lora-fsdp1", "KTO-nf4-fsdp2", "KTO-full-ddp"),
    *("PPO-lora-ddp", "PPO-nf4-fsdp2", "PPO-full-fsdp1"),
    *("OnlineDPO-lora-fsdp2", "OnlineDPO-nf4-ddp", "OnlineDPO-full-fsdp1"),
}
# So few adapters that a rank's shards hold none.
NARROW = "SFT-lora-fsdp1-narrow"
# Beside them, in every `make test`.
QUICK = PAIRWISE | {"RewardModel-full-fsdp2-token", "DPO-full-fsdp1-decay", NARROW}
EVERY = {"-".join(cell) for cell in itertools.product(ALGORITHMS, WEIGHTS, STRATEGIES)}
# Beside the matrix: a checkpoint of a file a rank, from which one process exports.
SHARDED = ("PPO-full-fsdp2-sharded", "RewardModel-lora-fsdp2-sharded", "SFT-lora-fsdp2-sharded")
# Activations computed again, a reference that follows, half precision.
OPTIONS = {
    "PPO-lora-fsdp2-checkpointing",
    "OnlineDPO-lora-fsdp2-follow",
    "OnlineDPO-full-fsdp2-follow",
    "PPO-lora-fsdp1-checkpointing",
    "OnlineDPO-lora-fsdp1-follow",
    "OnlineDPO-full-fsdp1-follow",
    "RewardModel-full-fsdp1-token",
    "PPO-full-fsdp1-grad_op",
    "SFT-lora-fsdp1-grad_op",
}
HALF = {
    *("DPO-lora-fsdp2-bf16_true", "PPO-full-fsdp2-bf16_mixed", "RewardModel-nf4-fsdp2-bf16_true"),
    *("PPO-full-fsdp1-bf16_mixed", "RewardModel-nf4-fsdp1-bf16_mixed"),
}
# Options that one process trains with as well.
OF_TRAINING = ("follow", "token", "decay", "narrow")
# Ranks sample other numbers of prompts, to other lengths, after every batch.
UNEVEN = ("SFT-lora-fsdp2-uneven", "SFT-lora-fsdp1-uneven")
# As one process goes on from a checkpoint of two, and two from one of one, with the same rows a step.
OTHER_NUMBERS = (
    "DPO-full-fsdp2",
    "PPO-full-fsdp1",
    "PPO-nf4-fsdp2",
    "RewardModel-lora-fsdp2",
    "SFT-lora-ddp",
)
FROM_ONE = "from-one"
# Compiled layers; minutes of compilation, so in a launch of their own.
COMPILED = ("DPO-full-ddp-compiled", "DPO-lora-fsdp1-compiled", "PPO-lora-fsdp2-checkpointing-compiled")
SLOW = sorted((EVERY - PAIRWISE) | OPTIONS | HALF)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("strategies")


def launch(names, model_dir, folder):
    """By torchrun, as on several machines."""
    folder.mkdir(exist_ok=True)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_module(*torchrun, "-m", "tests.strategies.worker", 2, model_dir, folder, *names, seconds=1100)
    cells = [name.partition("=")[0] for name in names]
    return {
        name: [torch.load(folder / f"{name}.{rank}", weights_only=True) for rank in range(2)]
        for name in cells
    }


class Runs:
    """Runs of one process, each once."""

    def __init__(self, model_dir, folder):
        self.model_dir, self.folder, self.kept = model_dir, folder, {}

    def __call__(self, name):
        algorithm, weights, *_ = name.split("-")
        key = "-".join((algorithm, weights, "single", *(o for o in OF_TRAINING if o in name)))
        if key not in self.kept:
            self.kept[key] = run(Cell.named(key), self.model_dir, self.folder / key, 1)
        return self.folder / key, self.kept[key]


@pytest.fixture(scope="module")
def single(llama_dir, place):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Runs(llama_dir, place)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quick(llama_dir, place, single):
    from_one = [f"{name}-{FROM_ONE}={single(name)[0] / 'epoch=0.ckpt'}" for name in OTHER_NUMBERS]
    return launch(["refusals", *UNEVEN, *sorted(QUICK), *SHARDED, *from_one], llama_dir, place / "quick")


@pytest.fixture(scope="module")
def slow(llama_dir, place):
    return launch(SLOW, llama_dir, place / "slow")


@pytest.fixture(scope="module")
def compiled(llama_dir, place):
    return launch(COMPILED, llama_dir, place / "compiled")


def close(found, expected):
    """Losses to 1e-5 of their size or, near 0, of 1; norms of gradients likewise."""
    assert len(found["losses"]) == len(expected["losses"])
    for step, (a, b) in enumerate(zip(found["losses"], expected["losses"], strict=True)):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5), step
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)


def check(name, ranks, single):
    _, one = single(name)
    whole, resumed = ranks[0]["whole"], ranks[0]["resumed"]
    assert whole["steps"] == one["steps"] == (8 if name.startswith("PPO") else 4)
    if "bf16" not in name:  # one process is in float32, and samples other tokens
        close(whole, one)
        assert whole["tokens"] == one["tokens"]
    if "follow" not in name:  # where the reference is the policy, the loss is ln 2 whatever is learnt
        assert len({round(next(iter(values.values())), 6) for values in one["losses"]}) > 1  # it learns
    for rank in ranks:
        assert rank["whole"]["losses"] == whole["losses"]
        assert rank["resumed"]["tokens"] == rank["whole"]["tokens"] == whole["tokens"]
        # The second epoch again, from the checkpoint of the first one: bit for bit.
        assert rank["resumed"]["losses"] == rank["whole"]["losses"][-len(resumed["losses"]) :]
        assert rank["resumed"]["norms"] == rank["whole"]["norms"][-len(resumed["norms"]) :]
    assert len(resumed["losses"]) == 2
    assert whole["clipped"] == pytest.approx([0.01] * len(whole["clipped"]), rel=1e-3)


def exported(checkpoint, output):
    write = export_reward_model if "RewardModel" in str(checkpoint) else export_checkpoint
    write(checkpoint, output)
    (path,) = output.glob("*model.safetensors")
    return load_file(path)


def check_export(name, folder, single, tmp_path):
    """The files are those of one process: as many weights, and equal but for what Adam makes of rounding."""
    one, _ = single(name)
    checkpoint = folder / name / "epoch=1.ckpt"
    assert checkpoint.is_dir() is (name in SHARDED or "-zero" in name)
    mine = exported(checkpoint, tmp_path / "two")
    theirs = exported(one / "epoch=1.ckpt", tmp_path / "one")
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        # A gradient near 0 may have either sign, and Adam moves by the learning rate all the same.
        assert (value - theirs[key]).abs().max() < 5e-3, key
        assert (value - theirs[key]).norm() < 1e-2 * theirs[key].norm() + 1e-6, key


@pytest.mark.parametrize("name", [*sorted(QUICK), *SHARDED, *UNEVEN])
def test_two_processes_equal_one_and_resume(name, quick, single, place, tmp_path):
    check(name, quick[name], single)
    check_export(name, place / "quick", single, tmp_path)


ONE_PROCESS = {"SFT-full", "RewardModel-lora", "DPO-nf4", "KTO-lora", "PPO-full", "OnlineDPO-nf4"}


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=[] if cell in ONE_PROCESS else pytest.mark.slow)
        for cell in sorted(f"{algorithm}-{weights}" for algorithm in ALGORITHMS for weights in WEIGHTS)
    ],
)
def test_one_process_resumes(cell, single, llama_dir, tmp_path):
    folder, whole = single(cell)
    again = run(Cell.named(f"{cell}-single"), llama_dir, tmp_path, 1, ckpt=folder / "epoch=0.ckpt")
    assert len(again["losses"]) == 2
    for key in ("losses", "norms"):
        assert again[key] == whole[key][-len(again[key]) :]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("tensor", "tensor_parallel_size 2.*data_parallel_size: 2 and tensor_parallel_size: 1"),
        ("8bit", "optimization.name is 'adamw_8bit'.*use adamw"),
        ("odin", "odin does not train under ModelParallelStrategy"),
        ("tokens", "update.micro_batch_tokens is 64.*Set it to null"),
        ("uneven", "a rank has 5 completions in this rollout and another 3.*drop_last: true"),
        ("fsdp1-8bit", "optimization.name is 'adamw_8bit'.*use adamw"),
        ("fsdp1-odin", "odin does not train under OnCPU"),
        ("fsdp1-tokens", "update.micro_batch_tokens is 64.*Set it to null"),
        ("fsdp1-dtypes", "one dtype, and these have bfloat16 and float32.*dtype: float32"),
        ("fsdp1-half", "'bf16-true' casts what is trained under FSDPStrategy"),
        ("fsdp1-whole", "sharding_strategy NO_SHARD.*give FULL_SHARD"),
    ],
)
def test_what_would_hang_or_be_wrong_is_refused(case, message, quick):
    for refused in quick["refusals"]:
        assert re.search(message, refused[case], re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_cell(name, slow, single, place, tmp_path):
    check(name, slow[name], single)
    if name in EVERY:
        check_export(name, place / "slow", single, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layers_change_nothing(name, compiled, single):
    check(name, compiled[name], single)


@pytest.mark.parametrize("name", OTHER_NUMBERS)
def test_one_process_goes_on_from_two(name, quick, single, llama_dir, place, tmp_path):
    algorithm, weights, _ = name.split("-")
    cell = Cell(algorithm, weights, "single")
    again = run(cell, llama_dir, tmp_path, 1, ckpt=place / "quick" / name / "epoch=0.ckpt")
    _, whole = single(name)
    rest = {key: whole[key][-len(again[key]) :] for key in ("losses", "norms")}
    close(again, rest)
    assert len(again["losses"]) == 2
    assert again["tokens"] == whole["tokens"]


@pytest.mark.parametrize("name", OTHER_NUMBERS)
def test_two_processes_go_on_from_one(name, quick, single):
    _, whole = single(name)
    for rank in quick[f"{name}-{FROM_ONE}"]:
        again = rank["resumed"]
        close(again, {key: whole[key][-len(again[key]) :] for key in ("losses", "norms")})
        assert len(again["losses"]) == 2
        assert again["tokens"] == whole["tokens"]


@pytest.mark.parametrize("columns", [(0, 1), (0, 2), (1, 2)], ids=str)
def test_the_selection_is_pairwise(columns):
    def pairs(names):
        rows = [name.split("-") for name in names]
        return {(row[columns[0]], row[columns[1]]) for row in rows}

    assert PAIRWISE < EVERY
    assert pairs(PAIRWISE) == pairs(EVERY)
