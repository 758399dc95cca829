"""Instruction data: LLaVA-format records, templates and label masks, collation, built-in data sets."""
