"""How large, exactly, in every dtype, on every mesh and backend."""
