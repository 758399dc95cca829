"""What is exported: a model, an adapter that `save_adapter` wrote (or a schedule alone), read before long work."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hydra_vlm.errors import AdapterError, ConfigError
from hydra_vlm.graph import DECODER
from hydra_vlm.lora import CONFIG, SCHEDULE, WEIGHTS, read_schedule
from hydra_vlm.models.loading import LoadedModel, load_model, resolve_device, resolve_model
from hydra_vlm.models.quantization import NONE, can_quantize, dequantized
from hydra_vlm.models.structure import ModelParts, find_parts
from hydra_vlm.reading import read_json
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.stored_adapter import read_adapter, recorded_quantization


@dataclass(frozen=True)
class Source:
    """A model's name or folder, the adapter's folder (None: a schedule alone), its schedule and LoRA dropout.

    `quantization` is that of the base on which the adapter was trained.
    """

    model: str
    adapter: Path | None
    schedule: RankSchedule
    dropout: float
    device: torch.device
    decoder_pattern: str | None = None
    quantization: str = NONE
    other_base: bool = False

    @property
    def folder(self) -> Path:
        """The adapter's folder; raises AdapterError for a schedule alone."""
        if self.adapter is None:
            raise AdapterError(
                "a schedule holds no weights, so it can only become a snippet: give the adapter's folder."
            )
        return self.adapter

    def base(self) -> LoadedModel:
        """The model without the adapter, in float32 on the device, with the parts that the schedule knows.

        For an adapter that was trained on four-bit weights, plain linears hold those weights' values.
        """
        # The CPU first: weights are float32 there on every machine, which the comparison needs.
        loaded = self._loaded()
        plain = dequantized(loaded.model) if self.is_quantized else loaded.model
        model: PreTrainedModel = plain.float().to(self.device)
        return replace(loaded, model=model, parts=self.parts(model))

    def as_trained(self) -> LoadedModel:
        """The model on which the adapter was trained: `base`, with four-bit layers where it had them."""
        if not self.is_quantized:
            return self.base()
        loaded = self._loaded()
        return replace(loaded, parts=self.parts(loaded.model))

    @property
    def is_quantized(self) -> bool:
        """Whether the base is loaded in four bits: the adapter was trained so, and bitsandbytes is there."""
        return self.quantization != NONE and can_quantize(torch.device("cpu"))

    def _loaded(self) -> LoadedModel:
        kind = self.quantization if self.is_quantized else NONE
        return load_model(self.model, "cpu", self.decoder_pattern, quantization=kind)

    def parts(self, model: PreTrainedModel) -> ModelParts:
        """The model's parts, with all those in its graph that the schedule is about."""
        return find_parts(model, self.decoder_pattern, adapt=tuple(self.schedule.graph.part_layers))

    def scales(self, parts: ModelParts) -> dict[str, tuple[int, float]]:
        """Rank and scale of every adapted module by its full name, in the graph's order."""
        pairs = zip(parts.names(), self.schedule.ranks, strict=True)
        return {name: (rank, self.schedule.scaling.scale(rank)) for name, rank in pairs if rank}

    def beyond_decoder(self) -> list[str]:
        """The parts besides the decoder in which the schedule has ranks."""
        graph = self.schedule.graph
        ranked = (p.layer for p, rank in zip(graph.projections, self.schedule.ranks, strict=True) if rank)
        parts = dict.fromkeys(graph.place(layer)[0] for layer in ranked)
        return [part for part in parts if part != DECODER]

    def model_config(self) -> dict[str, Any]:
        """The model's config.json as it is on the disk."""
        config: dict[str, Any] = read_json(resolve_model(self.model) / "config.json")
        return config

    def adapter_config(self) -> dict[str, Any]:
        """The adapter's adapter_config.json as it is on the disk."""
        config: dict[str, Any] = read_json(self.folder / CONFIG)
        return config


def open_source(
    model: str,
    adapter: str | Path,
    device: str = "cpu",
    decoder_pattern: str | None = None,
    other_base: bool = False,
) -> Source:
    """Read what is small: the schedule and the configurations.

    Raises ConfigError for a model, adapter or schedule that is not there, AdapterError for a folder without an adapter.
    """
    resolve_model(model)
    place, path = resolve_device(device), Path(adapter)
    if path.is_file():
        return Source(model, None, read_schedule(path), 0.0, place, decoder_pattern)
    if not path.is_dir():
        raise ConfigError(f"adapter {path} does not exist: give the folder of a trained adapter, such as RUN/adapter.")
    for name in (CONFIG, WEIGHTS, SCHEDULE):
        if not (path / name).is_file():
            hint = f" Did you mean {path / 'adapter'}?" if (path / "adapter" / CONFIG).is_file() else ""
            raise AdapterError(f"{path} has no {name}: it is not an adapter saved by hydra-vlm.{hint}")
    schedule, dropout = read_schedule(path / SCHEDULE), float(read_adapter(path).config.get("lora_dropout") or 0.0)
    kind = recorded_quantization(path)
    return Source(model, path, schedule, dropout, place, decoder_pattern, kind, other_base)
