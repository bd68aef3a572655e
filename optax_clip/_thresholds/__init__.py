"""What limits share: given ones, memory, windows."""
