"""Every objective equals TRL 1.16: loss, gradient that the optimizer sees, and metrics, on the same tokens."""

import copy

import pytest
from datasets import Dataset

from lightning_rlhf.algorithms import DPO
from lightning_rlhf.data.packing import PromptGroup
from lightning_rlhf.models import LanguageModel
from lightning_rlhf.objectives import (
    AOT,
    BCO,
    CPO,
    EXO,
    IPO,
    NCA,
    ORPO,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    Hinge,
    LengthNormalizedSigmoid,
    Robust,
    SFTTerm,
    Sigmoid,
    SimPO,
    Weighted,
)
from tests.algorithms.conftest import random_groups
from tests.algorithms.test_trl_oracle import (
    BARE,
    BETA,
    DPO_NAMES,
    TOLERANCE,
    assert_same,
    away_from,
    flat_gradient,
    ours,
    pairs,
    reference_at,
    their_dpo,
    theirs,
)
from tests.models.families import tiny
from tests.tokenizers import letters

pytest.importorskip("trl")

SUM = Weighted([Sigmoid(beta=BETA), SFTTerm()], [0.7, 0.3])
# Each row: an objective, TRL's settings, options of the module.
TABLE = {
    "sigmoid": (Sigmoid(beta=BETA), {}, {}),
    "ipo": (IPO(beta=BETA), {"loss_type": ["ipo"]}, {}),
    "hinge": (Hinge(beta=BETA), {"loss_type": ["hinge"]}, {}),
    "robust": (Robust(BETA, 0.2), {"loss_type": ["robust"], "label_smoothing": 0.2}, {}),
    "exo": (EXO(BETA, 0.01), {"loss_type": ["exo_pair"], "label_smoothing": 0.01}, {}),
    "nca": (NCA(BETA), {"loss_type": ["nca_pair"]}, {}),
    "bco, first step": (BCO(BETA), {"loss_type": ["bco_pair"]}, {}),
    "sppo": (SPPO(BETA), {"loss_type": ["sppo_hard"]}, {}),
    "aot": (AOT(BETA), {"loss_type": ["aot"]}, {}),
    "aot, smoothed": (AOT(BETA, 0.1), {"loss_type": ["aot"], "label_smoothing": 0.1}, {}),
    "aot_unpaired": (AOTUnpaired(BETA), {"loss_type": ["aot_unpaired"]}, {}),
    "apo_zero": (APOZero(BETA), {"loss_type": ["apo_zero"]}, {}),
    "apo_down": (APODown(BETA), {"loss_type": ["apo_down"]}, {}),
    "discopop": (DiscoPOP(BETA, 0.1), {"loss_type": ["discopop"], "discopop_tau": 0.1}, {}),
    "sigmoid_norm": (LengthNormalizedSigmoid(BETA), {"loss_type": ["sigmoid_norm"]}, {}),
    "a sum": (SUM, {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]}, {}),
    "forward KL": (Sigmoid(BETA, divergence="forward_kl"), {"f_divergence_type": "forward_kl"}, {}),
    "JS": (Hinge(BETA, divergence="js"), {"loss_type": ["hinge"], "f_divergence_type": "js_divergence"}, {}),
    "alpha": (
        IPO(BETA, divergence="alpha", divergence_alpha=0.3),
        {"loss_type": ["ipo"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {},
    ),
    "ld_alpha": (Sigmoid(BETA), {"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
    "ld_alpha of ipo": (IPO(BETA), {"loss_type": ["ipo"], "ld_alpha": 0.0}, {"ld_alpha": 0.0}),
    "wpo": (Sigmoid(BETA), {"use_weighting": True}, {"wpo": True}),
    "wpo of nca": (NCA(BETA), {"loss_type": ["nca_pair"], "use_weighting": True}, {"wpo": True}),
}


@pytest.mark.parametrize("row", TABLE)
def test_objectives_with_a_reference(row, trainer, tmp_path):
    objective, settings, options = TABLE[row]
    groups = random_groups(6, 2)
    reference = tiny("LlamaConfig")
    policy = away_from(reference)
    oracle = their_dpo(copy.deepcopy(policy), copy.deepcopy(reference), tmp_path, **settings)
    expected = theirs(oracle, pairs(groups))
    path = reference_at(reference, tmp_path / "reference")
    found = ours(DPO(policy, letters(), objective=objective, reference=path, **options), groups, trainer)
    assert_same(found, expected, DPO_NAMES)
    if row != "sigmoid":
        plain = theirs(their_dpo(copy.deepcopy(policy), copy.deepcopy(reference), tmp_path), pairs(groups))
        assert abs(plain[0] - expected[0]) > 1e-4 * abs(plain[0])  # the row is not DPO under another name


def test_the_rows_together_name_every_objective():
    from lightning_rlhf import objectives

    classes = [getattr(objectives, name) for name in objectives.__all__]
    named = {type(objective) for objective, *_ in TABLE.values()} | {type(o) for o, *_ in FREE.values()}
    named |= {SFTTerm, objectives.Margin, objectives.WithReference, objectives.Objective}
    assert {c for c in classes if issubclass(c, objectives.Objective)} == named


def their_free(kind, model, path, **settings):
    """TRL's trainers without a reference, which tokenise in their own way: a batch is handed to them instead."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config, trainer = {"orpo": (ORPOConfig, ORPOTrainer), "cpo": (CPOConfig, CPOTrainer)}[kind]
    bare = {name: value for name, value in BARE.items() if name != "activation_checkpointing"}
    args = config(output_dir=str(path), gradient_checkpointing=False, **{**bare, **settings})
    tokenizer = letters()
    tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    return trainer(model, args=args, train_dataset=rows, processing_class=tokenizer)


def rows_of(groups):
    rows = []
    for group in groups:
        row = {"prompt_input_ids": group.prompt, "prompt_attention_mask": [1] * len(group.prompt)}
        for name, completion in zip(("chosen", "rejected"), group.completions, strict=True):
            row[f"{name}_input_ids"] = group.prompt + completion
            row[f"{name}_attention_mask"] = [1] * len(row[f"{name}_input_ids"])
            row[f"{name}_labels"] = [-100] * len(group.prompt) + completion
        rows.append(row)
    return rows


def theirs_free(oracle, groups):
    oracle.model.train()
    oracle.model.zero_grad()
    batch = oracle.data_collator(rows_of(groups))
    loss, metrics = oracle.get_batch_loss_metrics(oracle.model, batch)
    loss.backward()
    return loss.item(), flat_gradient(oracle.model), metrics


FREE_NAMES = tuple(name for name in DPO_NAMES if name not in ("mean_token_accuracy", "entropy"))
ORPO_NAMES = (*FREE_NAMES, "nll_loss", "log_odds_ratio", "log_odds_chosen")
SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7, "beta": 2.0}
FREE = {
    "orpo": (ORPO(beta=BETA), "orpo", {"beta": BETA}, ORPO_NAMES),
    "simpo": (SimPO(beta=2.0, gamma=0.7), "cpo", SIMPO, FREE_NAMES),
    "simpo, smoothed": (SimPO(2.0, 0.7, 0.1), "cpo", {**SIMPO, "label_smoothing": 0.1}, FREE_NAMES),
    "cpo": (CPO(BETA, cpo_alpha=0.6), "cpo", {"beta": BETA, "cpo_alpha": 0.6}, (*FREE_NAMES, "nll_loss")),
    "cpo-simpo": (
        Weighted([SimPO(beta=2.0, gamma=0.7), SFTTerm()], [1.0, 0.5]),
        "cpo",
        {**SIMPO, "cpo_alpha": 0.5},
        (*FREE_NAMES, "nll_loss"),
    ),
}


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
@pytest.mark.parametrize("row", FREE)
def test_objectives_without_a_reference(row, layout, trainer, tmp_path):
    """Prompts of one token for ORPO: TRL's likelihood term would train on the rest of a longer prompt."""
    objective, kind, settings, names = FREE[row]
    groups = random_groups(6, 2)
    if kind == "orpo":
        groups = [PromptGroup(g.prompt[:1], g.completions, row_id=g.row_id) for g in groups]
    policy = tiny("LlamaConfig")
    expected = theirs_free(their_free(kind, copy.deepcopy(policy), tmp_path, **settings), groups)
    found = ours(DPO(LanguageModel(policy, layout=layout), letters(), objective=objective), groups, trainer)
    assert_same(found, expected, names)


def test_orpo_does_not_train_on_prompts(trainer, tmp_path):
    """On longer prompts ours is TRL's loss with the likelihood of the chosen completions alone in it."""
    groups = random_groups(6, 2)
    policy = tiny("LlamaConfig")
    loss, _, metrics = theirs_free(their_free("orpo", copy.deepcopy(policy), tmp_path, beta=BETA), groups)
    found = ours(DPO(policy, letters(), objective=ORPO(beta=BETA)), groups, trainer)
    nll = found[2]["train/nll_loss"].item()
    assert abs(nll - metrics["nll_loss"]) > 1e-2
    assert found[0] == pytest.approx(loss - metrics["nll_loss"] + nll, rel=TOLERANCE)
    for name in (*FREE_NAMES, "log_odds_ratio", "log_odds_chosen"):
        assert found[2][f"train/{name}"].item() == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name


def test_sft_term_alone(trainer, tmp_path):
    groups = random_groups(6, 2)
    policy = tiny("LlamaConfig")
    oracle = their_dpo(copy.deepcopy(policy), copy.deepcopy(policy), tmp_path, loss_type=["sft"])
    found = ours(DPO(policy, letters(), objective=SFTTerm()), groups, trainer)
    assert_same(found, theirs(oracle, pairs(groups)), ("logps/chosen", "logps/rejected", "entropy"))
