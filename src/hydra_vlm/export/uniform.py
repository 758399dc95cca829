"""`uniform`: one rank and scale 1 everywhere, for servers that read one r and one alpha for the whole adapter.

vLLM multiplies every module with lora_alpha / r of the configuration and llama.cpp with lora_alpha / (rank of the
tensor); both ignore rank_pattern and alpha_pattern. With the scale folded into B, ranks padded with zeros to one R and
lora_alpha = R, both readings are exactly 1. A module of rank 0 stays out: both find modules by the tensors' names.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from hydra_vlm.errors import AdapterError, ConfigError
from hydra_vlm.export.comparison import adapted_logits, quantization_notes
from hydra_vlm.export.outcome import Outcome
from hydra_vlm.export.plain_peft import check_peft_folder, projector_notes
from hydra_vlm.export.source import Source
from hydra_vlm.files import write_json
from hydra_vlm.lora import CONFIG, PROJECTOR, WEIGHTS, WRAPPED
from hydra_vlm.models.weights import write_tensors
from hydra_vlm.schedule import RankSchedule

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as max_lora_rank (vllm/config/lora.py, MaxLoRARanks)."""


def export_uniform(source: Source, draft: Path, rank: int) -> Outcome:
    """Write the adapter with rank `rank` and scale 1 in every adapted module, float32, then load it with PEFT alone.

    Raises AdapterError when PEFT does not give what the adapter gives.
    """
    loaded, before, probe = adapted_logits(source)
    scales = source.scales(loaded.parts)
    del loaded
    tensors = uniform_tensors(load_file(source.folder / WEIGHTS), scales, rank)
    write_tensors(draft / WEIGHTS, tensors)
    write_json(draft / CONFIG, source.adapter_config() | uniform_config(scales, rank))
    if (source.folder / PROJECTOR).is_file():
        write_tensors(draft / PROJECTOR, load_file(source.folder / PROJECTOR))
    seen = check_peft_folder(source, draft, dict.fromkeys(scales, (rank, 1.0)), before, probe)
    return Outcome(
        f"loaded with PeftModel.from_pretrained; rank {rank}, scale 1 in {len(scales)} modules",
        seen,
        (_vllm_note(rank, bool(source.beyond_decoder())), *projector_notes(draft), *quantization_notes(source)),
    )


def uniform_rank(schedule: RankSchedule, wish: int | None) -> int:
    """The rank to pad to: the wish, else the smallest that vLLM permits and that is no less than the largest rank.

    Raises ConfigError for a wish below the largest rank, or a largest rank beyond vLLM's.
    """
    top = max(schedule.ranks)
    if wish is not None:
        if wish < top:
            raise ConfigError(
                f"--rank {wish} is below the largest rank of schedule {schedule.name!r}: give {top} or more."
            )
        return wish
    permitted = next((rank for rank in VLLM_RANKS if rank >= top), None)
    if permitted is None:
        raise ConfigError(
            f"the largest rank of schedule {schedule.name!r} is {top}, vLLM permits {VLLM_RANKS[-1]} at most: "
            f"give --rank {top} for another server, or export merged weights."
        )
    return permitted


def uniform_tensors(
    tensors: Mapping[str, Tensor], scales: Mapping[str, tuple[int, float]], rank: int
) -> dict[str, Tensor]:
    """A padded to [rank, in] and scale · B padded to [out, rank] for every module of `scales`, in float32.

    `tensors` and the result carry PEFT's names. Raises AdapterError for tensors of other modules or other ranks.
    """
    made: dict[str, Tensor] = {}
    for name, (there, scale) in scales.items():
        first, second = f"{WRAPPED}{name}.lora_A.weight", f"{WRAPPED}{name}.lora_B.weight"
        made[first] = pad(tensors[first].float(), (0, 0, 0, rank - there)).contiguous()
        made[second] = pad(tensors[second].float() * scale, (0, rank - there)).contiguous()
    left = sorted(set(tensors) - set(made))
    if left:
        raise AdapterError(f"the adapter holds {left[0]}, which is no LoRA matrix of its schedule.")
    return made


def uniform_config(scales: Mapping[str, tuple[int, float]], rank: int) -> dict[str, object]:
    """The keys of adapter_config.json that say one rank.

    Targets are whole names in a list: a list is the form that servers read, and whole names reach no tower.
    """
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "target_modules": list(scales),
    }


def _vllm_note(rank: int, beyond_decoder: bool) -> str:
    fitting = next((r for r in VLLM_RANKS if r >= rank), None)
    if fitting is None:
        return f"vLLM permits rank {VLLM_RANKS[-1]} at most and will refuse this adapter of rank {rank}"
    start = f"--enable-lora --max-lora-rank {fitting}" + " --enable-tower-connector-lora" * beyond_decoder
    return f"vLLM: {start}" + (f" (it does not permit a max_lora_rank of {rank})" if fitting != rank else "")
