"""The Triton kernels, and the equations in plain PyTorch that they are held to."""
