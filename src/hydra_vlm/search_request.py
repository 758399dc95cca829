"""What is asked of a search: checked before a model is loaded. No torch."""

import difflib

from hydra_vlm.config import Config
from hydra_vlm.errors import ConfigError
from hydra_vlm.performance_model.protocol import PERFORMANCE_MODELS
from hydra_vlm.search.objective import Objective
from hydra_vlm.search.samplers import SAMPLERS
from hydra_vlm.search.study import check_storage, masked


def check_search(config: Config, url: str | None = None) -> None:
    """Raise ConfigError for anything in the section `search` that no run could put right, before a model is loaded."""
    wish = config.search
    for what, value, known in (("sampler", wish.sampler, SAMPLERS), ("model", wish.model, tuple(PERFORMANCE_MODELS))):
        if value not in known:
            near = difflib.get_close_matches(value, known, 1, 0.0)[0]
            raise ConfigError(f"search.{what} {value!r} does not exist: did you mean {near!r}? ({', '.join(known)})")
    objective = Objective.parse(wish.objective)
    if wish.pruner != "none" and objective.n_values > 1:
        raise ConfigError(f"search.pruner {wish.pruner} needs one value, and objective {wish.objective} has several")
    if url:
        check_storage(url)


def for_workers(config: Config, n_workers: int) -> Config:
    """The configuration whose proposals leave room for so many workers at once."""
    parallel = max(config.search.parallel, n_workers)
    return config.model_copy(update={"search": config.search.model_copy(update={"parallel": parallel})})


def without_password(config: Config, url: str | None) -> Config:
    """The configuration with this storage, as it may be written to a file."""
    kept = config.search.model_copy(update={"storage": masked(url) if url else None})
    return config.model_copy(update={"search": kept})
