import pytest

from lightning_rlhf.cli.main import main
from tests.models.families import tiny
from tests.tokenizers import letters


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny("LlamaConfig").save_pretrained(path)
    letters().save_pretrained(path)
    return str(path)


@pytest.fixture
def program(capsys, monkeypatch, tmp_path):
    """Run the program in an empty folder: its exit code, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-rlhf"])

    def run(*words):
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
