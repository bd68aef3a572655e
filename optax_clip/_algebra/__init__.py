"""How measure, threshold and action join, and what is noted of it."""
