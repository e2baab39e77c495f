"""Independent measurements divided over processes and machines, for searches and studies alike."""
