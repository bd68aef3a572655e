"""Which singular values a matrix has, proven, and how they are clipped by matmuls."""
