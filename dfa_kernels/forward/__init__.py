"""The forward pass of a wrapped network: where it is cut, and what each segment keeps for its gradient."""
