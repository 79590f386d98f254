"""What Triton compiles.

Kernels: `one_phase` in `small_networks`, where every tile of a gradient makes its own δ (small errors and batches);
`two_phase` in `wide_networks`, δ of all layers first and then the gradients (large errors, too); `project_taps`, δ of
every tap; `hadamard_kernel` in `hadamard_tile`.
The other modules are what these are made of: tiles of U, random numbers, δ, the optimizer's update.
"""
