"""Structured pruning without retraining: minutes, a few thousand texts, no labels.

    record (stream)      one forward over the calibration texts keeps what goes into every layer
    build_database       for every sub-layer and every size: the error, the units that stay, their updated weights (ZipLM, 2023)
    CostTable            what every size costs: parameters, MACs, or milliseconds measured on this device
    find_sizes (search)  the sizes of least error within a budget, by dynamic programming
    fit_to_original      least squares from bottom to top, so that a layer makes up for what those below it lost

Fisher mask search (Kwon et al., 2022) and K-prune (2024) share the stream, the costs and the least squares.
"""
