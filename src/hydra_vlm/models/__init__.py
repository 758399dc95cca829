"""The vision-language models hydra-vlm works on."""
