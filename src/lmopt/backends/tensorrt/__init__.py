"""TensorRT, in both its flavours: compile exported graphs into engines, and run them."""
