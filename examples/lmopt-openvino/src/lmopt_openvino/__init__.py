"""OpenVINO as an lmopt backend. Kept empty: lmopt imports the spec, which must stay light."""
