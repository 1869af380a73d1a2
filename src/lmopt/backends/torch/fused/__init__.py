"""Decoders as graphs of ONNX Runtime's own operators, by construction.

`probe` runs a twin of the model and finds out what its parts compute; `lowering` makes the twin's
parts emit one operator each when it is traced; `packing`, `skips` and `layout` join what stands
side by side. See docs/adr/0009-fused-by-construction.md.
"""
