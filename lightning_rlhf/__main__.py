"""``python -m lightning_rlhf`` is the program ``lightning-rlhf``."""

from lightning_rlhf.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
