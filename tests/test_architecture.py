"""The house rules that a machine can check: which room may know which, and what loads torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "hydra_vlm"
PURE = ("graph", "schedule", "signals", "profile", "allocation", "spending", "errors")

# room -> the rooms that it may import; a folder counts as one room.
MAY_IMPORT = {
    "errors": (),
    "faults": ("errors",),
    "interruption": (),
    "streams": (),
    "door": ("errors", "faults", "files", "interruption", "processes", "run_folder", "streams"),
    "processes": ("errors",),
    "liveness": (),
    "ownership": ("errors", "liveness"),
    "strict": ("errors",),
    "trial_copy": (),
    "reading": ("errors", "strict"),
    "files": ("errors", "faults", "ownership", "reading"),
    "names": ("errors",),
    "graph": ("errors",),
    "schedule": ("errors", "graph"),
    "signals": ("errors", "graph"),
    "profile": ("errors", "graph", "schedule", "signals"),
    "spending": ("errors", "graph", "schedule"),
    "allocation": ("errors", "graph", "schedule", "profile", "signals", "spending"),
    "search": (
        "allocation",
        "errors",
        "files",
        "graph",
        "interruption",
        "liveness",
        "performance_model",
        "profile",
        "reading",
        "schedule",
        "spending",
    ),
    "ranges": (),
    "synonyms": (),
    "config": ("errors", "names", "ranges", "reading", "signals", "strict", "synonyms"),
    "models": ("errors", "faults", "files", "graph", "names", "reading", "trial_copy"),
    "performance_model": ("errors", "graph", "profile", "schedule"),
    "moving": (
        "allocation",
        "config",
        "data",
        "errors",
        "faults",
        "files",
        "graph",
        "lora",
        "models",
        "processes",
        "reading",
        "resizing",
        "schedule",
        "search",
        "spending",
        "stored_adapter",
        "training",
        "verification",
    ),
    "pilot": ("config", "errors", "files", "graph", "processes", "schedule", "training"),
    "resizing": (),
    "verification": ("errors",),
    "stored_adapter": ("errors", "models", "reading"),
    "lora": ("errors", "files", "graph", "schedule", "models", "reading", "stored_adapter", "verification"),
    "export": (
        "data",
        "errors",
        "files",
        "graph",
        "lora",
        "models",
        "reading",
        "schedule",
        "stored_adapter",
        "verification",
    ),
    "data": ("errors", "files", "names", "reading", "strict", "trial_copy"),
    "benchmarks": ("errors", "data", "files", "graph", "names", "ownership", "reading", "strict"),
    "inputs": ("benchmarks", "data", "errors", "files", "ownership", "reading"),
    "records": ("benchmarks", "graph", "moving", "names", "pilot", "schedule"),
    "rankbench": (
        "allocation",
        "door",
        "errors",
        "files",
        "graph",
        "performance_model",
        "profile",
        "ranges",
        "reading",
        "records",
        "schedule",
        "search",
        "streams",
    ),
    "run_folder": ("config", "errors", "files", "names", "ownership", "processes", "reading", "signals"),
    "training": (
        "config",
        "data",
        "errors",
        "faults",
        "files",
        "graph",
        "interruption",
        "lora",
        "models",
        "processes",
        "profile",
        "reading",
        "resizing",
        "schedule",
        "signals",
        "starting",
        "streams",
        "verification",
    ),
    "starting": (
        "errors",
        "files",
        "graph",
        "lora",
        "models",
        "reading",
        "resizing",
        "schedule",
        "stored_adapter",
        "verification",
    ),
    "report": (
        "benchmarks",
        "errors",
        "files",
        "graph",
        "moving",
        "names",
        "pilot",
        "profile",
        "reading",
        "records",
        "schedule",
        "signals",
        "strict",
    ),
    "planning": ("allocation", "benchmarks", "config", "data", "errors", "graph", "models", "moving", "schedule"),
    "commands": (
        "allocation",
        "benchmarks",
        "config",
        "data",
        "errors",
        "export",
        "files",
        "graph",
        "lora",
        "models",
        "planning",
        "profile",
        "ranges",
        "reading",
        "run_folder",
        "schedule",
        "search",
        "search_request",
        "signals",
        "stored_adapter",
    ),
    "evaluation": (
        "benchmarks",
        "data",
        "errors",
        "faults",
        "files",
        "inputs",
        "lora",
        "models",
        "names",
        "ownership",
        "reading",
        "run_folder",
        "stored_adapter",
    ),
    "findings": ("config", "errors", "files", "reading", "records", "report", "search"),
    "search_request": ("config", "errors", "files", "performance_model", "reading", "search"),
    "trials": None,  # the top of the library
    "measuring": None,
    "schedules": None,
    "compare": None,
    "train": None,
    "tune": None,
    "squeeze": None,
    "opened_adapter": None,
    "dynamic": None,
    "pretrain": None,
    "cli": None,
    "__main__": None,
}


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The rooms of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("hydra_vlm.")}
    return found


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down_only(path: Path) -> None:
    here = room(path)
    assert here in MAY_IMPORT, f"{here} is a new room: say in MAY_IMPORT what it may know"
    allowed = MAY_IMPORT[here]
    if allowed is not None:
        assert imports(path) - {here} <= set(allowed)


@pytest.mark.parametrize(
    "module", ["hydra_vlm", "hydra_vlm.cli", "hydra_vlm.report.page", "hydra_vlm.commands.schedule"]
)
def test_these_load_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_pure_middle_needs_the_standard_library_only() -> None:
    names = ", ".join(f"hydra_vlm.{name}" for name in PURE)
    code = f"import sys, {names}; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'sklearn', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
