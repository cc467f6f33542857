"""A mean over all optimizer steps so far, the same on all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class RunningMean(nn.Module):
    """The mean of everything added in earlier optimizer steps; it changes only between steps.

    So a step sees one value, however it is cut into micro-batches and over ranks. The sums are float64 and no
    buffers: no precision plugin casts them. They are kept in checkpoints.

    Example:
        >>> mean = RunningMean()
        >>> mean.update(torch.tensor([1.0, 3.0]))
        >>> mean.value, mean.commit(), mean.value
        (tensor(0., dtype=torch.float64), None, tensor(2., dtype=torch.float64))
    """

    def __init__(self) -> None:
        super().__init__()
        self.sums = torch.zeros(2, dtype=torch.float64)  # of values, and their number
        self.pending = torch.zeros(2, dtype=torch.float64)

    @property
    def value(self) -> Tensor:
        """The mean, a scalar in float64; 0 before the first step."""
        return self.sums[0] / self.sums[1].clamp(min=1)

    def update(self, values: Tensor) -> None:
        """Add values of the step that runs; they count from the next one on."""
        self._to(values.device)
        total = values.detach().sum(dtype=torch.float64)
        self.pending = self.pending + torch.stack([total, torch.full_like(total, values.numel())])

    def commit(self) -> None:
        """End a step: let what was added on all ranks count."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.pending)
        self.sums = self.sums + self.pending
        self.pending = torch.zeros_like(self.pending)

    def _to(self, device: torch.device) -> None:
        if self.sums.device != device:
            self.sums, self.pending = self.sums.to(device), self.pending.to(device)

    def get_extra_state(self) -> list[float]:
        """Both sums as plain numbers."""
        return self.sums.tolist()

    def set_extra_state(self, state: list[float]) -> None:
        """Take up the sums of a checkpoint."""
        self.sums = torch.tensor(state, dtype=torch.float64, device=self.sums.device)
