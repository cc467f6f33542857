"""Two trainings as `python -m tests.benchmarks.memory` has them, with a smaller model and in one process."""

import sys

import pytest

from tests.benchmarks.memory import LLAMA, LORA, Case, compare, make

SMALL = {**LLAMA, "vocab_size": 8_000, "hidden_size": 512, "intermediate_size": 1_376, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 4}


CASES = [
    Case("full, with a reference", "DPO", 1, 64, 128, {}),
    Case("adapter, and activations", "SFT", 2, 64, 192, LORA),
]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
def test_predictions_are_within_a_tenth_of_the_peak_of_a_process(tmp_path):
    make(tmp_path, SMALL)
    for case, (predicted, measured) in zip(CASES, compare(CASES, tmp_path), strict=True):
        assert measured > 150, f"{case.name}: too small to tell it from noise"
        assert predicted == pytest.approx(measured, rel=0.1), case.name
