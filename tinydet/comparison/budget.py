"""The budget of a run: epochs, training time, or multiply-adds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_PREFIXES = {"G": 1e9, "T": 1e12, "P": 1e15}
_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([smh])|([GTP])macs|(epochs?))")


@dataclass(frozen=True)
class Budget:
    """A budget of one run.

    Attributes:
        text: as the user wrote it.
        unit: what the amount counts.
        amount: epochs, seconds of training steps, or multiply-adds of the forward passes.
    """

    text: str
    unit: Literal["epochs", "seconds", "multiply-adds"]
    amount: float

    def epochs(self, cost: float) -> int:
        """Return the number of whole epochs that fit into the budget.

        Args:
            cost: of one epoch, in the budget's unit.

        Raises:
            ValueError: the budget is smaller than one epoch.
        """
        epochs = int(self.amount / cost * (1 + 1e-9))
        if epochs < 1:
            raise ValueError(
                f"--budget {self.text}: one epoch takes {_amount(cost, self.unit)}; give more"
            )
        return epochs


def parse_budget(text: str) -> Budget:
    """Read "20m", "90s", "1.5h", "12epochs", "500Tmacs" or "5Pmacs".

    Raises:
        ValueError: the text is none of these.
    """
    read = _PATTERN.fullmatch(text.strip())
    amount = float(read[1]) if read else 0.0
    if not read or not amount or (read[4] and not amount.is_integer()):
        raise ValueError(
            f"--budget {text}: give training time as 20m, 90s or 2h, whole epochs as "
            "12epochs, or multiply-adds as 500Gmacs, 500Tmacs or 5Pmacs"
        )
    if read[2]:
        return Budget(text.strip(), "seconds", amount * _SECONDS[read[2]])
    if read[3]:
        return Budget(text.strip(), "multiply-adds", amount * _PREFIXES[read[3]])
    return Budget(text.strip(), "epochs", amount)


def _amount(cost: float, unit: str) -> str:
    if unit == "seconds":
        return f"about {cost / 60:.1f}m" if cost >= 60 else f"about {cost:.2g}s"
    if unit == "epochs":
        return "1epoch"
    prefix = next((p for p in "PT" if cost >= _PREFIXES[p]), "G")
    return f"{cost / _PREFIXES[prefix]:.2g}{prefix}macs"
