"""What an objective is given: completions as numbers, and pairs of them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Completions:
    """Completions, as far as an objective sees them.

    Attributes:
        logps: Log-probabilities of whole completions under the policy, ``(N,)``, in nats.
        lengths: Their tokens that count, ``(N,)``.
        ref_logps: Log-probabilities under the reference, ``(N,)``; None where no reference is computed.
    """

    logps: Tensor
    lengths: Tensor
    ref_logps: Tensor | None = None

    @property
    def averaged(self) -> Tensor:
        """Log-probabilities a token, ``(N,)``."""
        return self.logps / self.lengths.clamp(min=1)

    def pairs(self, reward_mean: Tensor | None = None) -> "Pairs":
        """Completions 2i and 2i + 1 as the pair i of a chosen and a rejected one.

        Example:
            >>> import torch
            >>> pairs = Completions(torch.tensor([-1.0, -2.0]), torch.tensor([3, 4])).pairs()
            >>> pairs.chosen.logps, pairs.rejected.lengths
            (tensor([-1.]), tensor([4]))
        """
        return Pairs(self._every_second(0), self._every_second(1), reward_mean)

    def _every_second(self, start: int) -> "Completions":
        ref_logps = None if self.ref_logps is None else self.ref_logps[start::2]
        return Completions(self.logps[start::2], self.lengths[start::2], ref_logps)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of a chosen and a rejected completion of one prompt.

    Attributes:
        chosen: The preferred completions.
        rejected: The other ones.
        reward_mean: The running mean of rewards before this step, a scalar, for objectives that ask for it; 0 for None.
    """

    chosen: Completions
    rejected: Completions
    reward_mean: Tensor | None = None

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Tokens of chosen and rejected completions, each ``(N,)``."""
        return self.chosen.lengths, self.rejected.lengths

    @property
    def policy_logps(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of chosen and rejected completions under the policy, each ``(N,)``."""
        return self.chosen.logps, self.rejected.logps

    @property
    def logps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Those under the policy, then those under the reference: the arguments of a loss with a reference.

        Raises:
            ValueError: If no reference was computed.
        """
        return *self.policy_logps, ref_logps_of(self.chosen), ref_logps_of(self.rejected)


def ref_logps_of(completions: Completions) -> Tensor:
    """The reference's log-probabilities, ``(N,)``.

    Raises:
        ValueError: If there are none.
    """
    if completions.ref_logps is None:
        raise ValueError("this objective needs the reference's log-probabilities, and there are none")
    return completions.ref_logps
