"""Every operator alone, by kind and storage of feedback, dtype and size: pytest-benchmark tests.

    make micro                                                  # all of them, on the GPU if there is one
    make micro ARGS="-k 'layer_grads and bfloat16 and fastfood'"

Two commits are compared by the same names, so first on the one, then on the other:

    make micro ARGS="--benchmark-json=runs/before.json"
    make micro ARGS="--benchmark-compare=runs/before.json"      # --benchmark-compare-fail=median:10% makes it a check

A result is compared with float64 first, and what is wrong fails without a time. What is timed is one call after the
other for a millisecond or more, caches warm, until the device has done them: on a GPU the longer of the host's part and
the device's. `bench.gpu` has device times from cold caches, and compares with backpropagation. On cores that others use
too, OMP_NUM_THREADS=1 before `make` spares times that are mostly threads waiting for each other.

On a GPU every case runs by the Triton backend and by the torch backend, and the first run compiles, for seconds a case.
"""
