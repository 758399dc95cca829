"""What an export says of itself: how it was checked, what was seen, what its reader has to know."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_vlm.export.comparison import Comparison


@dataclass(frozen=True)
class Outcome:
    """What a format's writer found; `seen` is None where there are no weights to compare."""

    checked: str
    seen: Comparison | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exported:
    """A finished export: its folder with the size of each file in bytes, and its outcome."""

    format: str
    folder: Path
    files: tuple[tuple[str, int], ...]
    outcome: Outcome

    def summary(self) -> str:
        """A few lines: what was written, how large it is, what was checked and the largest difference seen."""
        total = sum(size for _, size in self.files)
        width = max(len(name) for name, _ in self.files)
        checked = self.outcome.checked + (f"; {self.outcome.seen}" if self.outcome.seen else "")
        return "\n".join(
            [
                f"{self.format}: {self.folder} ({format_size(total)})",
                *(f"  {name.ljust(width)}  {format_size(size):>9}" for name, size in self.files),
                f"checked: {checked}",
                *(f"note: {note}" for note in self.outcome.notes),
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready object; sizes in bytes, `difference` and `allowed` None where no weights were compared."""
        seen = self.outcome.seen
        return {
            "format": self.format,
            "folder": str(self.folder),
            "files": dict(self.files),
            "checked": self.outcome.checked,
            "probe": seen and seen.text,
            "difference": seen and seen.difference,
            "allowed": seen and seen.allowed,
            "notes": list(self.outcome.notes),
        }


def format_size(size: float) -> str:
    """Bytes with a decimal prefix: 512 B, 14.2 kB, 3.35 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
