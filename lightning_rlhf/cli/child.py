"""``python -m lightning_rlhf.cli.child``: the program, for as long as the one that started it is there.

A pipeline that is killed cannot end its training any more; started again, it would have two in one folder.
"""

import os
import threading
import time

from lightning_rlhf.cli.main import TERMINATED, main

SECONDS = 0.5


def follow(parent: int) -> None:
    """End this process, as a kill would, once its parent is gone.

    Args:
        parent: The parent's process id; that of an orphan is another one.
    """
    while os.getppid() == parent:
        time.sleep(SECONDS)
    os._exit(TERMINATED)


if __name__ == "__main__":
    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()
    main()
