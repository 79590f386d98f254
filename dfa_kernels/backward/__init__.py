"""The backward pass: one autograd node, from the error to the gradients of every segment."""
