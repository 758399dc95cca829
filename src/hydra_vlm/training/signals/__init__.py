"""How each kind of signal is measured, one file a kind: `hydra_vlm.signals` says what a signal is."""
