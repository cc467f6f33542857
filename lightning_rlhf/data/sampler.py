"""Which rows make a batch: by number or by token budget, for every rank, in an order that can be resumed."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

MEGA_BATCH = 50
ATTEMPTS = 16


class GroupBatchSampler(DistributedSampler):
    """Batches of row indices, a pure function of ``(seed, epoch)``.

    It is the *sampler* of a loader with ``batch_size=None``: it yields lists of indices, and the loader asks the data
    set for each list at once. Being a ``DistributedSampler``, it is left in place by Lightning, which would shard it
    a second time, and hears ``set_epoch``.

    Every rank gets the same number of batches, and every epoch has as many as the first: Lightning counts them once.
    To even them out, the largest batches are split; no row is repeated unless there are more ranks than rows.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows in a batch; ignored where ``max_tokens`` is given.
        max_tokens: Tokens in a batch, at most, unless a single row has more.
        shuffle: Whether every epoch has an order of its own.
        length_grouped: Put rows of similar length together: rows are sorted inside shuffled runs of 50 batches.
        drop_last: Leave out a last, smaller batch, and batches that not every rank can have one of.
        seed: Of the order.
        num_replicas: Number of ranks.
        rank: This rank.

    Attributes:
        used: How many batches of an epoch are taken, where a limit leaves the rest; restoring needs to know.

    Raises:
        ValueError: If there is no batch for every rank.

    Example:
        >>> sampler = GroupBatchSampler([3, 4, 5, 6, 7], max_tokens=9, shuffle=False)
        >>> list(sampler), len(sampler)
        ([[0, 1], [2], [3], [4]], 4)
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int = 8,
        max_tokens: int | None = None,
        shuffle: bool = True,
        length_grouped: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"batch_size ({batch_size}) and max_tokens ({max_tokens}) must be at least 1")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        sized: Any = self.lengths  # all that the base class asks of a data set is its length
        super().__init__(sized, num_replicas, rank, shuffle, seed, drop_last)
        self.groups_per_batch, self.max_tokens, self.length_grouped = batch_size, max_tokens, length_grouped
        first = self._cut(self._order(0, 0))
        whole = len(first) - len(first) % num_replicas
        self._total = whole if drop_last else -(-len(first) // num_replicas) * num_replicas
        if not self._total:
            raise ValueError(
                f"{len(self.lengths)} rows make {len(first)} batches, too few for {num_replicas} ranks with drop_last; "
                "make batches smaller or set drop_last to false"
            )

        self.used = len(self)

    def __len__(self) -> int:
        """Batches of this rank in every epoch."""
        return self._total // self.num_replicas

    def __iter__(self) -> "BatchIterator":
        """The batches of this epoch."""
        return BatchIterator(self)

    def batches(self, epoch: int) -> list[list[int]]:
        """All ranks' batches of an epoch; rank r has every ``num_replicas``-th from the r-th on."""
        salts = range(ATTEMPTS) if self.shuffle else [0]
        cuts = (self._cut(self._order(epoch, salt)) for salt in salts)
        # With a token budget one order may need more batches than the first epoch's; then another is tried.
        cut = next((c for c in cuts if len(c) <= self._total or self.drop_last), None)
        cut = self._cut(self._order(0, 0)) if cut is None else cut
        generator = self._generator(epoch, ATTEMPTS)
        batches = self._evened([cut[i] for i in generator.permutation(len(cut))] if self.shuffle else cut)
        return [batch.tolist() for batch in batches]

    def _generator(self, *salts: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *salts])

    def _order(self, epoch: int, salt: int) -> np.ndarray[Any, Any]:
        count = len(self.lengths)
        order = self._generator(epoch, salt).permutation(count) if self.shuffle else np.arange(count)
        if self.length_grouped:
            size = self.groups_per_batch
            if self.max_tokens is not None:
                size = max(1, int(self.max_tokens / max(1.0, self.lengths.mean())))
            runs = [order[i : i + size * MEGA_BATCH] for i in range(0, count, size * MEGA_BATCH)]
            order = np.concatenate([run[np.argsort(-self.lengths[run], kind="stable")] for run in runs])
        return order

    def _cut(self, order: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        if self.max_tokens is None:
            size = self.groups_per_batch
            stop = len(order) - (len(order) % size if self.drop_last else 0)
            return [order[i : min(i + size, stop)] for i in range(0, stop, size)]
        cuts, used = [0], 0
        for index, length in enumerate(self.lengths[order].tolist()):
            if index > cuts[-1] and used + length > self.max_tokens:
                cuts.append(index)
                used = 0
            used += length
        return [order[i:j] for i, j in zip(cuts, [*cuts[1:], len(order)], strict=True)]

    def _evened(self, batches: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        batches = batches[: self._total]
        while len(batches) < self._total:
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            rows = batches[largest]
            if len(rows) == 1:  # fewer rows than ranks: some are repeated
                batches.append(rows)
                continue
            batches[largest] = rows[: (len(rows) + 1) // 2]
            batches.append(rows[(len(rows) + 1) // 2 :])
        return batches


class BatchIterator(Iterator[list[int]]):
    """Batches of one epoch and one rank, with a position that ``StatefulDataLoader`` stores and restores.

    Lightning restores a position before it says which epoch it is, and does not make a new iterator where the position
    is the end of an epoch. So an iterator that was restored begins anew when it hears of another epoch before its first
    batch, and the end of an epoch is restored as the beginning of the next.
    """

    def __init__(self, sampler: GroupBatchSampler) -> None:
        self.sampler = sampler
        self.epoch = sampler.epoch
        self.position = 0
        self._batches: list[list[int]] | None = None

    def __next__(self) -> list[int]:
        """The next batch."""
        if self._batches is None:
            if self.sampler.epoch != self.epoch:
                self.epoch, self.position = self.sampler.epoch, 0
            self._batches = self.sampler.batches(self.epoch)[self.sampler.rank :: self.sampler.num_replicas]
        if self.position >= len(self._batches):
            raise StopIteration
        self.position += 1
        return self._batches[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches yielded."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a stored position, unless the sampler is in a later epoch already."""
        self._batches = None
        self.epoch, self.position = state["epoch"], state["position"]
        if self.position >= min(self.sampler.used, len(self.sampler)):
            self.epoch, self.position = self.epoch + 1, 0
        if self.sampler.epoch > self.epoch:
            self.epoch, self.position = self.sampler.epoch, 0
        self.sampler.set_epoch(self.epoch)
