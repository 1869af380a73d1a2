"""PyTorch: eager execution, and export from it."""
