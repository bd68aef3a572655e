"""Which leaf is which: floats, layers, units, labels."""
