"""From the command line to a command; nothing heavy is imported before it is known which."""

import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence

COMMANDS: dict[str, str] = {
    "fit": "lightning_rlhf.cli.training:fit",
    "validate": "lightning_rlhf.cli.training:validate",
    "test": "lightning_rlhf.cli.training:test",
    "predict": "lightning_rlhf.cli.training:predict",
    "generate": "lightning_rlhf.cli.generate:main",
    "best-of-n": "lightning_rlhf.cli.best_of_n:main",
    "label": "lightning_rlhf.cli.label:main",
    "export": "lightning_rlhf.cli.export:main",
    "doctor": "lightning_rlhf.cli.doctor:main",
    "memory": "lightning_rlhf.cli.memory:main",
    "pipeline": "lightning_rlhf.cli.pipeline:main",
    "goodhart": "lightning_rlhf.cli.goodhart:main",
    "report": "lightning_rlhf.cli.run_report:main",
    "sandbox": "lightning_rlhf.cli.sandbox:main",
    "quickstart": "lightning_rlhf.cli.quickstart:main",
}
"""Name of a command → ``module:function``; the function takes the arguments that follow the name."""

HELP = """\
usage: lightning-rlhf COMMAND [arguments]

RLHF for PyTorch Lightning.

training, configured by YAML files that can be stacked and by flags that override them:
  fit         train:  lightning-rlhf fit --config recipes/dpo.yaml --model.policy.path ./my-sft-model
  validate    evaluate on the validation set
  test        evaluate on the test set
  predict     write log-probabilities (SFT), implicit rewards (DPO, KTO) or samples (PPO), one line a row

beside it:
  doctor      show, before a long run, what will happen
  memory      predict what a training takes in memory, whether it fits, and what would make it fit
  generate    sample completions of prompts
  best-of-n   keep the best of n samples a prompt by a reward, as data for SFT
  label       rank samples of a policy by a judge, or for people to rank, as data for a reward model
  export      turn a checkpoint into an adapter or model directory for transformers, peft and vLLM
  pipeline    train several stages, such as SFT, reward model and PPO, each on what the former made
  goodhart    an experiment on the sandbox: over-optimisation, with and without what is done against it
  report      draw one HTML file of a run or a pipeline: curves, detectors, samples, configuration
  sandbox     write the embedded task: data, tokenizer and a tiny model
  quickstart  train, align and measure a tiny model on the sandbox

options:
  -h, --help  show this; `lightning-rlhf COMMAND --help` shows what a command takes
  --version   show the version
  --debug     (anywhere) show the traceback of an error; so does LIGHTNING_RLHF_DEBUG=1
"""

FAILURE, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
# How jsonargparse begins its report of what a module's constructor raised, which is the report's cause.
WRAPPED = "Does not validate against any of the Union subtypes"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and end the process.

    Args:
        argv: What follows the program's name; by default from ``sys.argv``.

    Raises:
        SystemExit: With 1 after an error that is said in one message, 2 where the command line or a configuration
            is wrong, 130 after Ctrl-C, 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get("LIGHTNING_RLHF_DEBUG", "0") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"lightning-rlhf {version('lightning-rlhf')}")
        return
    if words[0] not in COMMANDS:
        _fail(
            f"no command {words[0]!r}{_suggestion(words[0])}; the commands are {', '.join(COMMANDS)}", USAGE
        )
    run(words[0], words[1:], debug=debug)


def run(name: str, arguments: list[str], *, debug: bool = False) -> None:
    """Import a command and run it; an error becomes one message, unless ``debug`` asks for the traceback.

    Args:
        name: A key of :data:`COMMANDS`.
        arguments: What follows it.
        debug: Let exceptions through.
    """
    # It says at every start that an optional kernel is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    module, _, function = COMMANDS[name].partition(":")
    command: Callable[[list[str]], object] = getattr(importlib.import_module(module), function)
    try:
        command(arguments)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except SystemExit as stop:
        # Lightning turns Ctrl-C into an exit with 1, and SIGTERM into a kind of SystemExit that looks like success.
        if isinstance(stop.__context__, KeyboardInterrupt):
            _fail("interrupted", INTERRUPTED)
        if type(stop) is not SystemExit:
            _fail("terminated", TERMINATED)
        raise
    # These are what a wrong file, setting, model or machine raises (RuntimeError: non-finite loss, a checkpoint
    # that does not fit, out of memory). Others are this program's own mistakes and keep their traceback.
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        if debug:
            raise
        _fail(f"{_message(error)}\n(--debug shows where)", FAILURE)


def _message(error: Exception) -> str:
    if str(error).startswith(WRAPPED) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def _suggestion(word: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, COMMANDS, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _fail(message: str, code: int) -> None:
    print(f"lightning-rlhf: error: {message}", file=sys.stderr)
    raise SystemExit(code)
