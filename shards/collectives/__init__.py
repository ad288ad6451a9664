"""Communication between the ranks of a group: the mesh, all-to-all, and the watchdog of waits."""
