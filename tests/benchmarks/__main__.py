"""Command line: ``python -m tests.benchmarks [--only PART] [--quick] [--json PATH]``."""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

PARTS = ["dpo", "sft", "reward", "kto", "ranked", "overhead", "ppo"]
WITHOUT_TRL = ["ranked", "overhead", "ppo"]
TRL_PPO = (
    "PPO is compared with TRL 1.12, the last release that has it: `pip download trl==1.12.0 --no-deps`, unzip the "
    "wheel, and give the folder as --trl-ppo or TRL_PPO"
)
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
    parser.add_argument(
        "--setting", metavar="NAME", help="TRL's setting, as an earlier run's table names it: no search"
    )
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], help="one of DPO's two")
    parser.add_argument(
        "--steps", type=int, help="measured steps a competitor (12; overhead twice as many, PPO 3)"
    )
    parser.add_argument("--roles", choices=["model", "adapter", "generation"], help="one of PPO's three")
    parser.add_argument("--prompts", type=int, default=32, help="of an iteration of PPO; a multiple of 8")
    parser.add_argument(
        "--trl-ppo", type=Path, metavar="FOLDER", default=os.environ.get("TRL_PPO"), help=TRL_PPO
    )
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
    if options.trl_ppo is None and options.only == "ppo" and options.roles != "generation":
        print(f"skipped: {TRL_PPO}; --roles generation runs without it")
        return 0
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS=str(options.threads))

    from tests.benchmarks.measure import Settings, run
    from tests.benchmarks.report import markdown

    steps = options.steps or (2 if options.quick else 12)
    settings = Settings(
        assets,
        steps,
        options.threads,
        options.verbose,
        options.quick,
        options.steps or (1 if options.quick else 3),
        options.prompts,
        options.trl_ppo,
        options.setting,
    )
    results = run(settings, options.only, options.precision, options.roles)
    print(markdown(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwritten: {options.json}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
