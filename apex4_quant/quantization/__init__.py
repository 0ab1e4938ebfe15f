"""A float model to a W4A4 checkpoint: what is asked for, what will be done, and the run that does it.

Words: an *input group* is the linears of a decoder layer that read one tensor (q, k and v; gate and up); they share one
transform, one clip ratio and one group size. A *group* alone is what has one scale: 128 or more channels of K. A *block* is
128 channels of K, the unit of group transforms.

    file             holds                                              data goes
    settings.py      QuantizeSettings: asked; ResolvedSettings: decided asked -> resolve(source) -> resolved -> recorded
    plan_file.py     the plan file: group size, transform by linear     file -> PlanEntry by linear -> resolved settings
    plan.py          Plan: every linear with its format, what is kept   source, resolved settings -> plan
    estimates.py     memory, seconds, disk; --dry-run                   source, plan -> numbers
    calibration.py   the calibration text as token windows              resolved settings -> int64 [S, L]
    run.py           the order of a run; report, index, config.json     settings -> layers, one by one -> QuantizeResult
    layer.py         one decoder layer, in named steps                  source's tensors, streams -> tensors, records
    collector.py     what linears read: rows, Hessians                  layer, streams -> CollectedInput, one by one
    predictions.py   gradients of the predictions by what leaves layers token windows -> files of the run's folder
    gradients.py     those gradients through the linears of a layer     gradients, streams -> InputGradients by linear
    run_state.py     the folder of an unfinished run; what OUT holds    states, records <-> files

The way of a weight is layer.py: read -> rewrite -> transform -> round -> pack -> measure -> write. What those steps compute
stands in transforms/ and rounding/. Imports go up this list only:

    run -> layer -> collector, gradients, predictions -> run_state -> settings -> plan_file
    run -> estimates -> calibration -> plan -> settings
"""
