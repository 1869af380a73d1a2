"""An lmopt backend in pure NumPy. Kept empty: lmopt imports the spec, which must stay light."""
