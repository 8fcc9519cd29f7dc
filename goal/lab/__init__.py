"""The gradient laboratory: what a field of gradients is, when it is the gradient of a loss, and where it leads."""
