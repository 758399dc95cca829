"""Hierarchical and dynamic rank adaptation (HyDRA) for vision-language models.

    from hydra_vlm.allocation import AllocationRequest, Budget, allocate
    from hydra_vlm.graph import preset
    from hydra_vlm.schedule import parse_stages

    graph = preset("mobilellama-1.4b")
    request = AllocationRequest(graph, Budget.of_rank(graph, 128), stages=parse_stages("1-8,9-12,13-24", 24))
    print(allocate("coarse", request).table())

`hydra_vlm.lora.attach` builds a schedule's adapter, `hydra_vlm.tune.tune` runs the whole job. Importing loads no torch.
"""

__version__ = "0.1.0"
