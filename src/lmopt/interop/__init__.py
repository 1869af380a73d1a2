"""Places in the ecosystem: what lets tools of others run lmopt, each imported only when it is asked for."""
