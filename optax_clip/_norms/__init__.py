"""How large updates are, exactly, in every dtype, on every mesh and backend."""
