"""The same batches whatever the number of processes, also where an epoch's records do not fill the last one.

accelerate fills up the last batches with the first records of the epoch, so several processes would train on records
that one process does not. Here they are filled up with blanks instead: copies without a supervised token, which add
nothing to loss, gradients or token counts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from hydra_vlm.data.templates import IGNORED

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Blank:
    """An item that is there for its shape only."""

    item: Any


class WithBlanks(Dataset[Any]):
    """A data set in which the number ~i stands for a blank copy of item i."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        return self.items[number] if number >= 0 else Blank(self.items[~number])


def blanking(batch: Callable[[Sequence[Any]], Batch]) -> Callable[[Sequence[Any]], Batch]:
    """The same collation for items among which there are blanks: nothing in their rows is supervised."""

    def collate(items: Sequence[Any]) -> Batch:
        made = batch([item.item if isinstance(item, Blank) else item for item in items])
        blank = [row for row, item in enumerate(items) if isinstance(item, Blank)]
        if blank:
            made["labels"][blank] = IGNORED
        return made

    return collate


class EvenBatches:
    """Batches of record numbers, filled up with blanks to a full batch for each of `processes`.

    `batches` yields full batches of `batch_size` numbers and at most one shorter one, the last.
    """

    def __init__(self, batches: Any, processes: int) -> None:
        self.batches, self.processes = batches, processes
        self.batch_size, self.drop_last = batches.batch_size, batches.drop_last

    @property
    def sampler(self) -> Any:
        """Whose epoch is set by accelerate."""
        return self.batches.sampler

    def __len__(self) -> int:
        return -(-len(self.batches) // self.processes) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        given, last = 0, 0
        for batch in self.batches:
            last = ~batch[-1]
            yield [*batch, *[last] * (self.batch_size - len(batch))]
            given += 1
        for _ in range(-given % self.processes):
            yield [last] * self.batch_size
