"""What Triton compiles.

Kernels: `strip` in `small_networks`, where a program makes δ of its outputs once and goes along the inputs (batches
whose δ fits beside a tile); `two_phase` in `wide_networks`, δ of all layers first and then the gradients, or the same
in two launches, `deltas` and `grouped_gemm` (all others); `project_taps`, δ of every tap; `hadamard_kernel` in
`hadamard_tile`. The other modules are what these are made of: tiles of U, random numbers, δ, products, the optimizer's
update.
"""
