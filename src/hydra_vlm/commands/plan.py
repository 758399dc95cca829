"""`hydra-vlm plan`: what a configuration will take, before anything runs. No weights are loaded."""

from typing import Any

from hydra_vlm.config import Config
from hydra_vlm.planning.advice import remedy_text
from hydra_vlm.planning.run import make_plan
from hydra_vlm.planning.table import plan_text


def plan_config(config: Config, gigabytes: float | None) -> tuple[str, dict[str, Any]]:
    """The plan as text and as JSON, with the changes that make it fit.

    Raises:
        ConfigError: as `make_plan` does.
    """
    plan, remedies = make_plan(config, gigabytes)
    text = f"{plan_text(plan)}\n\n{remedy_text(plan, remedies)}"
    return text, plan.to_json() | {"remedies": [remedy.to_json() for remedy in remedies]}
