"""What does it cost on a CPU? Times and memory beside backpropagation and plain products."""
