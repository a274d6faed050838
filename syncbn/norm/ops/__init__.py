"""What autograd and the compiler run: forward and backward of the layer."""
