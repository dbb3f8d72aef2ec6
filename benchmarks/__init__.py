"""Real training runs, and measurements of fastcells beside its peers."""
