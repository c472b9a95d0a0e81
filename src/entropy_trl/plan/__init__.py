"""A run on paper: what a training configuration takes of given hardware, before any of it is rented.

`entropy-trl plan --config ... --gpus N --gpu_memory GB` prints the memory of a GPU by phase of a step, the time of a
rollout, and what travels between the ranks; and, if it does not fit, the setting to change. `model` and `inputs` read,
`memory` and `traffic` have the formulas, `verdict` the plan and what to change, `command` the command. docs/scaling.md
explains them.
"""
