import pytest

from lightning_rlhf.cli.main import main


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
