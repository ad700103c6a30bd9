"""The planner: model families, axis algebra, layouts, plans and checkpoint files. Free of torch at import.

A model is described by its blocks' tensors and their logical axes; a layout and the rule for cuts give the rest.

    axes, cuts                  logical axes, segments, and how one axis falls on the ranks of a mesh axis
    tensors, spec, model        a stored tensor; blocks of them with their hyperparameters; a whole model
    families/, builder, blocks, one file a family, and what family files are written with
    latent, recurrent, mtp,
    vision
    formats, packing,           how a weight is stored: the tensors of each quantisation format
    quantization
    source, config, headers,    from what a user names to a ModelSpec; `unknown` plans from tensor names and shapes
    unknown, names
    layout, cutting, legal      the rank grid, the cuts of a model under it, the legal sizes
    plan, shards, parts,        a layout applied to a model: ranges, self-check, bytes, collectives
    holdings, experts,
    collectives, memory
    cost, topology, capacity,   what a plan costs on a machine, what fits, every layout ranked
    search
    report, page/, document,    a plan as text, HTML and JSON; what changed between two; run exactly this one
    plan_file, diff, replay
    tp_export, tp_styles        Transformers' `tp_plan` dictionaries, written and read
    checkpoint/                 safetensors, GGUF and per-rank files: headers, ranges, writing, merging
"""
