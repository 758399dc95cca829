"""`python -m hydra_vlm`, which launchers start: `accelerate launch -m hydra_vlm …`, `torchrun … -m hydra_vlm …`."""

from hydra_vlm.cli import main

if __name__ == "__main__":
    main()
