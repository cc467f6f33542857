"""The numbers as one Markdown table."""

from typing import Any

from tests.benchmarks.workload import BATCH_SIZE

TITLES = {
    "dpo": "DPO, hh_helpful",
    "sft": "SFT, gsm8k",
    "reward": "RewardModel, hh_helpful",
    "kto": "KTO, hh_helpful unpaired",
}
HEADER = (
    "what",
    "precision",
    "faster",
    "s a step",
    "tokens saved",
    "tokens a step",
    "peak MiB",
    "above the models",
    "of a matmul",
    "TRL's setting",
)


PPO_TITLES = {
    "ppo_model": "PPO, every role a model",
    "ppo_adapter": "PPO, roles as adapters / TRL's policy as LoRA",
    "generation": "sampling alone / bare `generate`",
}
PPO_HEADER = (
    "what",
    "faster",
    "by processor time",
    "samples a second",
    "s an iteration",
    "MiB above imports",
    "of TRL's",
    "generation's share of ours",
    "TRL's setting",
)


def markdown(results: list[dict[str, Any]]) -> str:
    """Tables with a row for each comparison, ours before the other's in every cell that has two."""
    online = [result for result in results if result["task"] in PPO_TITLES]
    others = [result for result in results if result["task"] not in PPO_TITLES]
    return "\n\n".join([*([_offline(others)] if others else []), *([_online(online)] if online else [])])


def _online(results: list[dict[str, Any]]) -> str:
    lines = [PPO_HEADER, tuple("---" for _ in PPO_HEADER), *map(_iteration, results)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = (
        f"An iteration: {results[0]['num_prompts']} prompts of `hh_helpful`, 64 new tokens each, for PPO 4 epochs in "
        "minibatches of 8, AdamW, float32. `faster` is the median over iterations of the other's time over ours; by "
        "processor time it depends less on what else runs on the machine."
    )
    return f"{table}\n\n{note}"


def _iteration(result: dict[str, Any]) -> tuple[str, ...]:
    ours, theirs = result["ours"], result.get("trl") or result["bare"]
    cells = (
        PPO_TITLES[result["task"]],
        f"{result['speed_ratio']:.2f}×",
        f"{result['cpu_ratio']:.2f}×",
        f"{ours['samples_per_second']:.2f} / {theirs['samples_per_second']:.2f}",
        f"{ours['median_seconds']:.1f} / {theirs['median_seconds']:.1f}",
    )
    if result["task"] == "generation":
        return (*cells, *(["–"] * (len(PPO_HEADER) - len(cells))))
    return (
        *cells,
        f"{ours['peak_above_imports_mib']:,.0f} / {theirs['peak_above_imports_mib']:,.0f}",
        f"{result['memory_ratio']:.2f}",
        f"{result['generation_share']:.0%}",
        result["trl_setting"],
    )


def _offline(results: list[dict[str, Any]]) -> str:
    rows = [ROWS.get(result["task"], _compared)(result) for result in results]
    lines = [HEADER, tuple("---" for _ in HEADER), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = (
        f"Batches of {BATCH_SIZE} (of 2 prompts where ranked), the same for both; where a cell has two "
        "numbers, ours comes first. `faster` is the "
        "median over steps of TRL's time over ours, `tokens saved` its tokens over ours. `of a matmul`: model FLOPs a "
        "second, recomputation not counted, over those of a large float32 matrix product."
    )
    return f"{table}\n\n{note}"


def _compared(result: dict[str, Any]) -> tuple[str, ...]:
    ours, theirs = result["ours"], result["trl"]
    return (
        TITLES[result["task"]],
        result["precision"],
        f"{result['speed_ratio']:.1f}×",
        f"{ours['median_seconds']:.2f} / {theirs['median_seconds']:.2f}",
        f"{result['token_ratio']:.2f}×",
        f"{ours['tokens_per_step']:,.0f} / {theirs['tokens_per_step']:,.0f}",
        f"{ours['peak_mib']:,.0f} / {theirs['peak_mib']:,.0f}",
        f"{ours['peak_above_baseline_mib']:,.0f} / {theirs['peak_above_baseline_mib']:,.0f}",
        f"{result['matmul_share']:.0%}",
        result["trl_setting"],
    )


def _overhead(result: dict[str, Any]) -> tuple[str, ...]:
    ours, bare = result["ours"], result["bare"]
    seconds = f"{ours['median_seconds']:.2f} / {bare['median_seconds']:.2f}"
    return (
        "DPO in a Trainer / in a bare loop",
        "32-true",
        f"{result['overhead']:+.1%} overhead",
        seconds,
        *(["–"] * (len(HEADER) - 4)),
    )


def _ranked(result: dict[str, Any]) -> tuple[str, ...]:
    ours, apart = result["ours"], result["apart"]
    return (
        f"{result['num_completions']} ranked answers in a group / their pairs apart",
        "32-true",
        f"{1 / result['cost']:.1f}×, {result['cost']:.0%} of the cost",
        f"{ours['median_seconds']:.2f} / {apart['median_seconds']:.2f}",
        f"{result['token_ratio']:.2f}×",
        f"{ours['tokens_per_step']:,.0f} / {apart['tokens_per_step']:,.0f}",
        f"{ours['peak_mib']:,.0f} / {apart['peak_mib']:,.0f}",
        f"{ours['peak_above_baseline_mib']:,.0f} / {apart['peak_above_baseline_mib']:,.0f}",
        *(["–"] * (len(HEADER) - 8)),
    )


ROWS = {"overhead": _overhead, "ranked": _ranked}
