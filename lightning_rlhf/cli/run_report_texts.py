"""What logged names mean: a title, a unit and a sentence for the reader of a report. docs/metrics.md says more."""

from typing import NamedTuple


class Meaning(NamedTuple):
    """Of a logged name.

    Attributes:
        title: In words.
        unit: Of its values.
        sentence: What it says.
    """

    title: str
    unit: str
    sentence: str


UNIT = "reward units"
SDS = "standard deviations at the start"
MEANINGS = {
    "loss": Meaning("Loss", "nats", "What training minimises; a mean over the whole optimizer step."),
    "perplexity": Meaning("Perplexity", "tokens", "Among how many tokens the model chooses, in effect."),
    "mean_token_accuracy": Meaning("Token accuracy", "share", "How often the right token was the likeliest."),
    "entropy": Meaning(
        "Entropy", "nats a token", "How undecided the model is; near 0 it has become certain."
    ),
    "num_tokens": Meaning("Tokens seen", "tokens", "Since training began."),
    "kl": Meaning("KL from the reference", "nats", "How far the policy has moved; what gains are paid with."),
    "accuracy": Meaning("Pairs ordered right", "share", "How often the better answer gets the higher score."),
    "margin": Meaning("Margin", UNIT, "Score of the better answer less that of the worse one."),
    "mean_reward": Meaning("Mean score", UNIT, "Of all answers; near 0 where scores are centred."),
    "min_reward": Meaning("Least score", UNIT, "In a batch, mean over batches."),
    "max_reward": Meaning("Largest score", UNIT, "In a batch, mean over batches."),
    "disagreement": Meaning("Disagreement", UNIT, "Spread of an ensemble's members on the same answer."),
    "calibration_error": Meaning("Calibration error", "share", "How far confidence is from being right."),
    "length_correlation": Meaning(
        "Reward–length correlation", "correlation", "How much longer answers score higher."
    ),
    "longer_wins": Meaning("The longer answer is better", "share", "What an accuracy has to beat."),
    "nll_loss": Meaning("Likelihood term", "nats", "Of the chosen answers, part of the loss."),
    "log_odds_chosen": Meaning("Log odds ratio", "nats", "Of chosen over rejected answers."),
    "log_odds_ratio": Meaning("Log σ of the odds ratio", "nats", "The preference term of the loss."),
    "rewards/chosen": Meaning("Reward of chosen answers", UNIT, "The implicit reward, 0 at the start."),
    "rewards/rejected": Meaning("Reward of rejected answers", UNIT, "The implicit reward; falls."),
    "rewards/margins": Meaning("Reward margin", UNIT, "Chosen less rejected; rises."),
    "rewards/accuracies": Meaning(
        "Pairs ordered right", "share", "By the implicit reward; 0.5 at the start."
    ),
    "rewards/length_correlation": Meaning(
        "Reward–length correlation", "correlation", "The implicit reward's taste for length."
    ),
    "logps/chosen": Meaning(
        "Log-probability, chosen", "nats", "Of whole answers; compare within one data set only."
    ),
    "logps/rejected": Meaning("Log-probability, rejected", "nats", "Falls more than that of chosen answers."),
    "logps/chosen_change": Meaning(
        "Change, chosen answers", "nats", "A fall: the chosen answers become less likely than they were."
    ),
    "logps/chosen_change_per_token": Meaning(
        "Change a token, chosen", "nats a token", "Below −0.5 probability moves to what nobody chose."
    ),
    "objective/scores": Meaning("Reward", UNIT, "Of sampled answers, before the KL penalty: the proxy."),
    "objective/scores_greedy": Meaning("Reward, greedy", UNIT, "Of the likeliest answers."),
    "objective/kl": Meaning(
        "KL from the reference", "nats an answer", "How far the policy has moved, exactly."
    ),
    "objective/kl_k1": Meaning("KL, estimate k1", "nats an answer", "From the sampled tokens alone."),
    "objective/kl_k3": Meaning(
        "KL, estimate k3", "nats an answer", "From the sampled tokens, never negative."
    ),
    "objective/kl_coef": Meaning("KL coefficient", "reward units a nat", "The price of a nat."),
    "objective/non_score_reward": Meaning("KL penalty", UNIT, "What the KL costs an answer."),
    "objective/rlhf_reward": Meaning("Reward less penalty", UNIT, "What is maximised."),
    "objective/entropy": Meaning(
        "Entropy", "nats a token", "A collapse towards 0: the policy has become certain."
    ),
    "policy/approxkl_avg": Meaning(
        "Step size in KL", "nats a token", "Above 0.02 or so updates are too large."
    ),
    "policy/clipfrac_avg": Meaning("Clipped tokens", "share", "Above 0.2 to 0.3 steps are too large."),
    "policy/ratio": Meaning("Probability ratio", "ratio", "New over old policy; stays near 1."),
    "loss/policy_avg": Meaning("Policy loss", UNIT, "Near 0, and no measure of progress."),
    "loss/value_avg": Meaning("Critic's loss", "squared reward units", "Falls where the critic learns."),
    "value/clipfrac_avg": Meaning("Clipped values", "share", "Large: the critic moves too fast."),
    "completions/mean_length": Meaning(
        "Length", "tokens", "Of an answer; a steady rise: the reward pays for length."
    ),
    "completions/clipped_ratio": Meaning("Cut off", "share", "Answers that did not end in time."),
    "time/generation_share": Meaning("Time spent sampling", "share", "Of a rollout's time."),
    "pairs/tied": Meaning("Ties", "share", "Prompts whose answers all score the same: nothing to learn."),
    "goodhart/proxy": Meaning("Proxy", SDS, "The reward that is trained on, on held-out prompts."),
    "goodhart/gold": Meaning("Gold", SDS, "What the proxy stands for; when it falls, stop."),
    "goodhart/kl": Meaning("KL of held-out samples", "nats an answer", "The distance from the start."),
    "goodhart/gap": Meaning("Gap", SDS, "Proxy less gold; grows under any selection: no alarm by itself."),
    "goodhart/excess_gap": Meaning(
        "Excess gap",
        SDS,
        "Above 0 by more than its interval, gold no longer follows the proxy as at the start.",
    ),
    "goodhart/correlation": Meaning(
        "Correlation at the start", "correlation", "Of proxy and gold, over samples."
    ),
    "goodhart/rank_correlation": Meaning(
        "Rank correlation", "correlation", "Of both curves; falls when they part."
    ),
    "goodhart/alpha": Meaning("Fitted α", "SDs a √nat", "How steeply gold rises at first."),
    "goodhart/beta": Meaning("Fitted β", "SDs a √nat", "Positive: gold will turn."),
    "goodhart/peak_kl": Meaning("Fitted peak", "nats", "KL at which fitted gold is highest."),
    "goodhart/kl_left": Meaning("KL left to the peak", "nats", "Negative: the peak is behind."),
    "goodhart/alarm": Meaning(
        "Alarm", "0 or 1", "1 where gold fell while the proxy rose by more than chance."
    ),
    "goodhart/time_share": Meaning(
        "Share of time", "0 to 1", "What the monitor itself takes of the training."
    ),
}
GROUPS = {
    "": "General",
    "objective": "Objective",
    "rewards": "Rewards",
    "logps": "Log-probabilities",
    "loss": "Losses",
    "policy": "Policy updates",
    "value": "Critic",
    "completions": "Answers",
    "pairs": "Pairs",
    "time": "Time",
    "goodhart": "Over-optimisation, step by step",
    "hacking": "Detectors, step by step",
}


class Detector(NamedTuple):
    """A row of the detectors' table.

    Attributes:
        name: In ``hacking.json``.
        title: In words.
        unit: ``share`` is shown in percent.
        change: What the interval is of: its name, and the value that means no change. None without an interval.
        control: What it is compared with.
        sentence: What it looks for.
    """

    name: str
    title: str
    unit: str
    change: tuple[str, float] | None
    control: str
    sentence: str


def _changed(name: str, title: str, unit: str, control: str, sentence: str) -> Detector:
    return Detector(name, title, unit, (f"{name}_change", 0.0), control, sentence)


START = "the starting policy"
DETECTORS = (
    Detector(
        "length",
        "Mean length",
        "tokens",
        ("length_ratio", 1.0),
        START,
        "Reward bought with length; the change is a ratio.",
    ),
    Detector(
        "length_correlation",
        "Reward–length correlation",
        "correlation",
        None,
        START,
        "How much longer answers score higher.",
    ),
    Detector(
        "length_per_distance",
        "Length per distance",
        "tokens a √nat",
        ("length_per_distance", 0.0),
        "0",
        "Tokens gained for each √nat of KL.",
    ),
    _changed("bullets", "Bullets", "share", START, "Answers with lists."),
    _changed("headers", "Headers", "share", START, "Answers with headings."),
    _changed("tables", "Tables", "share", START, "Answers with tables."),
    _changed("bold", "Bold", "share", START, "Answers with bold text."),
    _changed("refusals", "Refusals", "share", START, "Of prompts that no one need refuse."),
    _changed(
        "flips",
        "Sycophancy",
        "share",
        "the same question, without an opinion",
        "Right answers that turn wrong under a stated opinion.",
    ),
    _changed(
        "nonsense",
        "Confident nonsense",
        "share",
        "a plain wrong answer",
        "How often the reward prefers a fluent wrong answer to a plain right one.",
    ),
    _changed("hedged", "Hedges", "share", START, "Wrong answers that hedge."),
    _changed("certain", "Words of certainty", "share", START, "Wrong answers that sound sure."),
    _changed("distinct_2", "Different word pairs", "share", START, "Diversity of the samples of a prompt."),
    _changed(
        "self_bleu",
        "Likeness of samples",
        "share",
        START,
        "Self-BLEU of the samples of a prompt: 1 is the same answer each time.",
    ),
    _changed("repetition", "Repetition", "share", START, "Word triples that an answer had before."),
    _changed(
        "disagreement",
        "Ensemble disagreement",
        UNIT,
        START,
        "Spread of the members' scores: the policy leaves what they know.",
    ),
)
