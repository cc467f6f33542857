import pytest

from tests.models.families import tiny


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory):
    """A tiny random Llama on disk, with a tokenizer of single letters."""
    from tests.tokenizers import letters

    path = tmp_path_factory.mktemp("models") / "llama"
    tiny("LlamaConfig").save_pretrained(path)
    letters().save_pretrained(path)
    return str(path)
