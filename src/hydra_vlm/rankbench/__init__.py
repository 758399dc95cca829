"""RankBench: a table of real fine-tuning trials, and what is compared on it: performance models and samplers."""
