"""What machine code tells of cards that are not here: kernels are compiled ahead of time, read, and held to limits."""
