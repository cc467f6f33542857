"""``lightning-rlhf report``: a real tiny run, folders in every state, and a page that needs nothing else."""

import json
import re
import shutil
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger

from lightning_rlhf.algorithms import PPO, RLOO, Optimization, Update
from lightning_rlhf.callbacks import GoodhartMonitor, HackingMonitor, SampleTable
from lightning_rlhf.cli.markup import page_text
from lightning_rlhf.cli.run_facts import write_facts
from lightning_rlhf.cli.run_folders import run_folders
from lightning_rlhf.cli.run_logs import NEEDS_TENSORBOARD, read_curves
from lightning_rlhf.cli.run_report import gather
from lightning_rlhf.cli.run_report_curves import meaning
from lightning_rlhf.cli.run_report_hacking import detectors_section
from lightning_rlhf.cli.run_report_texts import DETECTORS, MEANINGS
from lightning_rlhf.cli.svg import Chart, Line, draw
from lightning_rlhf.generation import Sampling
from lightning_rlhf.rewards import FunctionReward
from tests.callbacks.test_sample_table import prompts

ROOT = Path(__file__).parents[2]
VOID = {"meta", "br", "hr", "img", "input", "link"}


def count_a(completions):
    return [float(text.count("a")) + 0.01 * len(text) for text in completions]


def variety(completions):
    return [float(len(set(text))) for text in completions]


class Page(HTMLParser):
    """A page as a reader finds it; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.ids, self.links = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)
        assert {link.removeprefix("#") for link in self.links} <= set(self.ids)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        assert not {"src", "onclick", "onload", "style"} & set(values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def shown(path):
    """The page of a file, with nothing in it that is fetched or run."""
    text = path.read_text()
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "http" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL)
    assert "url(" not in text
    assert "@import" not in text
    return page


@pytest.fixture(scope="module")
def watched(llama_dir, tmp_path_factory):
    """Three rollouts of PPO, watched by all monitors, as a user's own script would train it."""
    folder = tmp_path_factory.mktemp("watched")
    torch.manual_seed(0)
    module = PPO(
        llama_dir,
        FunctionReward(count_a),
        sampling=Sampling(max_new_tokens=5, num_samples=2),
        estimator=RLOO(),
        optimization=Optimization(lr=1e-2, schedule="constant"),
        update=Update(num_epochs=1, minibatch_size=8),
    )
    small = {"every_n_steps": 2, "num_prompts": 6, "max_new_tokens": 5}
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=CSVLogger(folder, name="logs"),
        callbacks=[
            GoodhartMonitor(gold=FunctionReward(variety), **small),
            HackingMonitor(num_questions=2, benign_prompts=["abc"], **small),
            SampleTable(),
            Timer(interval="step"),
            ModelCheckpoint(every_n_train_steps=1),
        ],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, prompts(24, 4), prompts(6, 3))
    return folder / "logs" / "version_0"


@pytest.fixture
def log(watched, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(watched, tmp_path / "log"))


def test_a_watched_run_is_shown_with_everything(program, log):
    code, printed, error = program("report", log)
    assert code == 0, error
    assert f"wrote {log / 'report.html'}" in printed
    page = shown(log / "report.html")
    for title in ("Over-optimisation", "Detectors of reward hacking", "Samples side by side", "Curves"):
        assert title in page.text
    assert "log: PPO" in page.text
    assert "6 optimizer steps" in page.text
    assert "by Lightning's Timer" in page.text
    history = json.loads((log / "goodhart/evaluations.json").read_text())
    content = json.loads((log / "goodhart/goodhart.json").read_text())
    gold = content["curve"]["gold"][-1]
    assert f"{abs(gold):.2f} ± {1.96 * content['curve']['gold_error'][-1]:.2f}" in page.text
    assert f"KL {content['curve']['kl'][-1]:.2f} nats" in page.text
    assert [one["step"] for one in history] == [0, 2, 4, 6]
    for one in (history[0], history[-1]):
        assert len(one["completions"]) == 4
        assert all(text.strip() in "".join(page.texts) for text in one["completions"])
    assert "Start" in page.text
    assert "End" in page.text
    assert "Mean length" in page.text
    # One chart of the two rewards, and one for each pair of training and validation curves.
    curves, _ = read_curves([log])
    assert (
        page.tags.count("svg")
        > len({name.partition("/")[2] for name in curves if name.startswith("train/")}) - 1
    )
    # Lightning's own logger keeps no date and no versions: that is said, with the remedy.
    assert "date: lightning-rlhf fit records it" in page.text
    assert "over-optimisation curves: add" not in page.text


def test_texts_are_those_of_the_first_prompts_and_in_no_other_evaluation_s_way(watched):
    history = json.loads((watched / "goodhart/evaluations.json").read_text())
    assert history[0]["prompts"] == ["p0", "p1", "p2", "p3"]
    assert all(set(one) == {"step", "rows", "kl", "proxy", "gold", "completions"} for one in history[1:])
    for one in history:
        # The rewards beside a text are that text's.
        assert one["gold"][:4] == pytest.approx(variety(one["completions"]))
        assert one["proxy"][:4] == pytest.approx(count_a(one["completions"]))


def test_without_the_monitor_samples_are_those_of_validations(program, log):
    shutil.rmtree(log / "goodhart")
    shutil.rmtree(log / "hacking")
    rows = [json.loads(line) for line in next(log.glob("samples/*.jsonl")).read_text().splitlines()]
    first = [{**row, "completion": f"early {row['row']}"} for row in rows]
    (log / "samples/step-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first))
    (log / "samples/step-10.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first[:2]))
    program("report", log)
    page = shown(log / "report.html")
    assert "Start (step 1)" in page.text
    assert "End (step 10)" in page.text  # by number: 10 is after 6
    assert "early 1" in page.text
    assert "early 2" not in page.text  # no row of it at the end, so nothing to lay beside it
    assert "over-optimisation curves: add a GoodhartMonitor" in page.text
    assert "detectors of reward hacking: add a HackingMonitor" in page.text


NASTY = "</pre><script>alert(1)</script><b onclick='x'>&amp; \x1b[0m \ud800 ]]>"


def test_what_a_model_wrote_stays_text(program, log):
    path = log / "goodhart/evaluations.json"
    history = json.loads(path.read_text())
    history[0]["prompts"][0] = [{"role": "user", "content": NASTY}]
    for one in history:
        one["completions"][0] = NASTY
    path.write_text(json.dumps(history))
    (log / "hparams.yaml").write_text(yaml.safe_dump({"note": "</pre><script>alert(2)</script>"}))
    lines = (log / "metrics.csv").read_text().splitlines()
    named = [lines[0] + ",<img src=x>", *(line + f",{i}" for i, line in enumerate(lines[1:]))]
    (log / "metrics.csv").write_text("\n".join(named) + "\n")
    assert program("report", log)[0] == 0
    page = shown(log / "report.html")  # no script and no img among its tags
    text = "".join(page.texts)
    assert "</pre><script>alert(1)</script><b onclick='x'>&amp; \N{REPLACEMENT CHARACTER}[0m" in text
    assert "user: </pre><script>" in text
    assert "<script>alert(2)</script>" in text
    assert "<img src=x>" in text


def test_a_run_that_left_nothing_but_numbers(program, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/metrics.csv").write_text("epoch,step,train/loss\n0,0,nan\n0,1,\n")
    assert program("report", "bare", "--output", "out/page.html")[0] == 0
    page = shown(tmp_path / "out/page.html")
    assert "svg" not in page.tags
    assert page.text.count("add ") >= 3
    assert "not recorded" in page.text


def test_a_killed_run_is_shown_as_far_as_it_came(program, log):
    with (log / "metrics.csv").open("a") as file:
        file.write("0,")
    (log / "goodhart/goodhart.json").write_text('{"method": "rl", "cur')
    code, printed, _ = program("report", log)
    assert code == 0
    assert "goodhart/goodhart.json could not be read" in printed
    page = shown(log / "report.html")
    assert "goodhart/goodhart.json could not be read" in page.text
    assert "Samples side by side" in page.text


def test_a_hump_is_drawn_with_its_peak_and_the_alarm(program, log):
    path = log / "goodhart/goodhart.json"
    content = json.loads(path.read_text())
    distances = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    content |= {"method": "best_of_n", "alarms": [50], "best": {"step": 20, "gold": 1.0, "path": "x.ckpt"}}
    content["curve"] = {
        "steps": [0, 10, 20, 30, 40, 50],
        "kl": [d * d for d in distances],
        "proxy": distances,
        "gold": [d * (2 - d) for d in distances],  # highest at d = 1, KL 1
        "proxy_error": [0.1] * 5 + [None],
        "gold_error": [0.1] * 6,
    }
    path.write_text(json.dumps(content))
    assert program("report", log)[0] == 0
    page = shown(log / "report.html")
    assert "Fitted gold: peak at KL 1" in page.text
    assert "gold is −1.25 ± 0.20" in page.text
    assert "Gold was best at step 20" in page.text
    assert "Alarm at step 50" in page.text
    assert page.tags.count("polygon") == 1  # the star
    assert page.texts.count("alarm") == 1


def test_stages_are_in_the_order_they_were_begun_and_continued_runs_are_one(program, log, tmp_path):
    import os

    folder = tmp_path / "pipeline"
    for place, name in enumerate(("zeta", "alpha", "labels")):
        stage = folder / name
        stage.mkdir(parents=True)
        (stage / "stage.yaml").write_text(yaml.safe_dump({"config": [name]}))
        os.utime(stage / "stage.yaml", (1000 + place, 1000 + place))
    logs = folder / "zeta/run/lightning_logs"
    for version, values in ((2, {0: 9.0, 1: 8.0, 2: 7.0}), (10, {2: 1.0, 3: 0.5})):
        (logs / f"version_{version}").mkdir(parents=True)
        rows = "".join(f"0,{step},{value}\n" for step, value in values.items())
        (logs / f"version_{version}/metrics.csv").write_text("epoch,step,train/loss\n" + rows)
    (logs / "version_10/config.yaml").write_text("model: {class_path: lightning_rlhf.SFT}")
    write_facts(logs / "version_2")
    shutil.move(log, folder / "alpha/run")
    (folder / "labels/label.yaml").write_text("policy: x\n")
    (folder / "labels/ranked.jsonl").write_text('{"ranks": [1, 2]}\n' * 3)
    found = [gather(one) for one in run_folders(folder)]
    assert [run.name for run in found] == ["zeta", "alpha", "labels"]
    assert found[0].curves["train/loss"] == ([0, 1, 2, 3], [9.0, 8.0, 1.0, 0.5])
    assert found[0].algorithm == "SFT"
    assert (datetime.now().astimezone() - found[0].began).total_seconds() < 600
    assert found[0].versions["torch"] == torch.__version__
    assert found[1].goodhart is not None
    assert (found[2].algorithm, found[2].ranked) == ("labelling", 3)
    assert program("report", folder)[0] == 0
    page = shown(folder / "report.html")
    assert "3 runs" in page.text
    assert "ranked 3 rows" in page.text
    assert page.ids == ["run-0", "run-1", "run-2"]


def test_a_quickstart_s_table_and_samples_are_shown(program, log, tmp_path):
    folder = tmp_path / "quickstart"
    (folder / "report").mkdir(parents=True)
    shutil.move(log, folder / "sft")
    ordering = {"accuracy": 0.75, "lower": 0.7, "upper": 0.8}
    stages = [
        {
            "stage": "SFT",
            "gold": -0.5,
            "gold_error": 0.1,
            "divergence": {"kl": 0.0},
            "win_rate": 0.5,
            "seconds": 9.6,
        },
        {"stage": "RM", "ordering": ordering, "gold": None, "divergence": None},
    ]
    (folder / "report/table.json").write_text(json.dumps({"stages": stages, "seconds": 20}))
    rows = [{"stage": s, "prompt": "why", "completion": f"by {s}", "gold": 1.0} for s in ("SFT", "PPO")]
    (folder / "report/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert program("report", folder)[0] == 0
    page = shown(folder / "report.html")
    assert "−0.50 ± 0.10" in page.text
    assert "75.0% (70.0% to 80.0%)" in page.text
    assert "by PPO" in page.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report", "nowhere"), "no folder at nowhere: give the folder of a run, a stage or a pipeline"),
        (("report", "empty"), "empty holds no run: looked for stage.yaml, metrics.csv, hparams.yaml"),
        (("report", "empty"), "set trainer.logger to a CSVLogger"),
        (("report", "run", "--output", "empty"), "--output names a folder, empty: give the file to write"),
    ],
)
def test_what_cannot_be_reported_is_said(program, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.csv").write_text("epoch,step,a\n0,0,1\n")
    code, _, error = program(*words)
    assert code == 1
    assert message in error


def test_event_files_alone_say_what_would_read_them(program, tmp_path, monkeypatch):
    (tmp_path / "board").mkdir()
    (tmp_path / "board/events.out.tfevents.1.host").write_bytes(b"")
    monkeypatch.setattr("lightning_rlhf.cli.run_logs.find_spec", lambda name: None)
    code, printed, _ = program("report", "board")
    assert code == 0
    assert NEEDS_TENSORBOARD in printed
    assert "install it, or train with a CSVLogger" in shown(tmp_path / "board/report.html").text


def test_event_files_are_read_where_tensorboard_is_installed(tmp_path):
    tensorboard = pytest.importorskip(
        "torch.utils.tensorboard", reason="the package tensorboard is not installed"
    )
    with tensorboard.SummaryWriter(tmp_path) as writer:
        for step in range(3):
            writer.add_scalar("train/loss", 3.0 - step, step)
    curves, problems = read_curves([tmp_path])
    assert problems == []
    assert curves["train/loss"] == ([0, 1, 2], [3.0, 2.0, 1.0])


def test_every_documented_name_has_a_meaning():
    """Of algorithms and monitors, as docs/metrics.md has them in its first column."""
    text = (ROOT / "docs/metrics.md").read_text().partition("## Preferences, reward models and annotators")
    tables = text[0] + text[2].partition("## Over-optimisation")[2].partition("## Why the numbers")[0]
    names = [
        name
        for line in tables.splitlines()
        if line.startswith("| `") and line.count("|") == 4
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]
    assert len(names) > 50
    unknown = [
        name
        for name in names
        if name not in MEANINGS and name not in ("rewards/NAME", "SimPO", "ORPO", "CPO")
    ]
    assert unknown == []


def test_detectors_say_what_changed():
    values = {"step": 8}
    for one in DETECTORS:
        name = one.change[0] if one.change else one.name
        values |= {f"hacking/{one.name}": 0.5, f"hacking/{one.name}_reference": 0.4}
        values |= {f"hacking/{name}": 0.5, f"hacking/{name}_lower": 0.2, f"hacking/{name}_upper": 0.7}
    values |= {"hacking/bullets_change_lower": -0.1, "hacking/length_ratio": 1.5}
    values |= {"hacking/length_ratio_lower": 1.2, "hacking/length_ratio_upper": 1.8}
    page = Page("".join(page_text(part) for part in detectors_section([values])))
    rows = " ".join(page.texts)
    assert "more ×1.50 (×1.20 to ×1.80)" in rows
    assert "no clear change +50.0 (−10.0 to +70.0) points" in rows
    assert meaning("hacking/bullets_change").title == "Bullets, change"
    assert meaning("rewards/rule").title == "Reward: rule"


def test_a_line_with_gaps_is_broken_there():
    nan = float("nan")
    line = Line(
        label="", style="a", x=[0, 1, 2, 3, 4], y=[1.0, 2.0, nan, 4.0, 5.0], lower=[0.0] * 5, upper=[6.0] * 5
    )
    text = page_text(draw(Chart(lines=[line], x_label="steps", title="t")))
    assert text.count('class="line"') == 2
    long = Line(label="", style="a", x=range(4000), y=[nan if 1000 <= i < 2000 else 1.0 for i in range(4000)])
    text = page_text(draw(Chart(lines=[long], x_label="steps", title="t")))
    assert text.count('class="line"') == 2
    with pytest.raises(ValueError, match="a chart needs a finite point"):
        draw(Chart(lines=[Line(label="", style="a", x=[0], y=[nan])], x_label="", title=""))
