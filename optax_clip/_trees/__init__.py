"""Which leaf is which: floats, labels, layers, units."""
