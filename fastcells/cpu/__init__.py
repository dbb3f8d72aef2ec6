"""The CPU engine: vector IR, tiles, the loop over time, and the thread team."""
