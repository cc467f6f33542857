"""Command line: ``python -m tests.benchmarks [--only PART] [--quick] [--json PATH]``."""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

PARTS = ["dpo", "sft", "reward", "kto", "ranked", "overhead"]
WITHOUT_TRL = ["ranked", "overhead"]
REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> int:
    """Measure, print a Markdown table, and write the numbers."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few steps and one of TRL's settings: whether it runs, not how fast",
    )
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], help="one of DPO's two")
    parser.add_argument("--steps", type=int, help="measured steps a competitor (12; overhead twice as many)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write every number")
    parser.add_argument("--verbose", action="store_true", help="show what the competitors print")
    options = parser.parse_args()

    assets = Path(os.environ.get("LIGHTNING_RLHF_ASSETS") or REPOSITORY.parent / "shared" / "assets")
    if not assets.is_dir():
        print(
            "skipped: the batches are real data (LIGHTNING_RLHF_ASSETS or ../shared/assets), and it is absent"
        )
        return 0
    if importlib.util.find_spec("trl") is None and options.only not in WITHOUT_TRL:
        print(
            "skipped: TRL is not installed (the extra `test` has it); --only ranked and --only overhead run without it"
        )
        return 0
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS=str(options.threads))

    from tests.benchmarks.measure import Settings, run
    from tests.benchmarks.report import markdown

    steps = options.steps or (2 if options.quick else 12)
    settings = Settings(assets, steps, options.threads, options.verbose, options.quick)
    results = run(settings, options.only, options.precision)
    print(markdown(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwritten: {options.json}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
